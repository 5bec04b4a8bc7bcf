"""All pictures of docs/gallery.md, and the numbers its text quotes.

One part draws anew what the Habr article "Neural network optimization methods"
shows: how each rule answers six signals, and where it walks on six surfaces. Another
shows what the article could not: methods for flat minima on a valley beside a hole, and
a learning-rate schedule that reads the loss, against the one in numpy-ml.

    make gallery                                  # into docs/gallery, about two minutes
    python examples/gallery.py --only flat,king
    python examples/gallery.py --help
"""

import argparse
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

import optax_flat
from optax_flat import plotting
from optax_flat.problems import ARTICLE, SURFACES, signals, wide_and_narrow
from optax_flat.schedules import exponential_cooling

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"

# The article's learning rate for signals, and its three parameters.
RATE = 0.25
PARAMETERS = (0.25, 0.9, 0.975)


class AheadInTime:
    """Nesterov's rule on a signal: a step of the params is a step in time.

    A signal is the same everywhere, so looking ahead in the params changes nothing. The
    article looks ahead in time instead: at the place theta - c m v the gradient is the
    signal c m v later, and 0 outside of it. All nodes belong to one moment here, as
    on one minibatch.
    """

    def __init__(self, momentum, **rule):
        self.tx = optax_flat.multipoint_nesterov(
            RATE, momentum, mode="transparent", **rule
        )
        self.length = {"geometric": 3, "four": 4}.get(rule.get("nodes"), 1)

    def on(self, signal) -> optax.GradientTransformation:
        """The rule as an optimizer that knows the signal."""
        moments = jnp.arange(len(signal), dtype=signal.dtype)

        def init(params):
            return jnp.zeros([], jnp.int32), self.tx.init(params)

        def update(grads, state, params=None):
            now, state = state
            anchor = optax_flat.eval_params(state, params)

            def visit(_, carry):
                point, state = carry
                moment = now + anchor - point
                gradient = jnp.interp(moment, moments, signal, left=0, right=0)
                updates, state = self.tx.update(gradient, state, point)
                return optax.apply_updates(point, updates), state

            carry = params, state
            point, state = jax.lax.fori_loop(0, self.length, visit, carry)
            return point - params, (now + 1, state)

        return optax.GradientTransformation(init, update)


def adadelta(decay, start):
    """The article's, whose learning rate is 1."""
    return optax_flat.adadelta(decay=decay, eps=1e-3, initial_update=start)


def adam(rate, b1):
    """The article's, with eps inside the root."""
    return optax.adam(rate, b1=b1, eps=0.0, eps_root=1e-7)


def article_adagrad(rate, eps):
    """The article's, with eps inside the root."""
    return optax_flat.adagrad(rate, eps=eps, eps_in_sqrt=True)


def by(symbol, make, values=PARAMETERS):
    """A method for each value of a parameter, by name."""
    return {f"{symbol} = {value}": make(value) for value in values}


# What each picture of signals compares, and how it is called.
RESPONSES: dict[str, dict[str, Any]] = {
    "momentum": by(
        "momentum",
        lambda m: optax.chain(optax.scale(RATE), optax.trace(m), optax.scale(-1)),
    ),
    "nesterov": by("momentum", lambda m: AheadInTime(m, nodes="four")),
    "nesterov_nodes": {
        "heavy ball": optax.sgd(RATE, 0.975),
        "1 node": AheadInTime(0.975),
        "3 nodes, geometric": AheadInTime(0.975, nodes="geometric"),
        "4 nodes, equal": AheadInTime(0.975, nodes="four"),
    },
    "adagrad": by("eps", lambda eps: article_adagrad(2.5, eps), (1e-7, 0.1, 10.0)),
    "rmsprop": by("decay", lambda d: optax.rmsprop(RATE, decay=d, eps=1e-5)),
    "adadelta": by("decay", lambda d: adadelta(d, 0.0)),
    "adadelta_big": by("decay", lambda d: adadelta(d, 50.0)),
    "adam": by("b1", lambda b1: adam(RATE, b1)),
    "adamax": by("b1", lambda b1: optax.adamax(RATE, b1=b1)),
}

NESTEROV = by("momentum", lambda m: optax_flat.multipoint_nesterov(0.01, m))
# The article's rates on surfaces. It has none for momentum and Adamax, which get those
# of Nesterov and Adam; its start of Adadelta, 100, makes first steps of 30 to 45, far
# out of the window, and is 0.01 here.
RULES = {
    "Adadelta, start 0.01": adadelta(0.9, 0.01),
    "momentum 0.01": optax.sgd(0.01, 0.9),
    "Nesterov 0.01": optax_flat.multipoint_nesterov(0.01, 0.9),
    "Adagrad 1": article_adagrad(1.0, 1e-7),
    "RMSProp 0.25": optax.rmsprop(0.25, decay=0.9, eps=1e-5),
    "Adam 0.25": adam(0.25, 0.9),
    "Adamax 0.25": optax.adamax(0.25),
}

# The flat-minima methods on `wide_and_narrow`: one step size, at which the hole is
# stable (it is below 2/40), and normal noise of deviation 1 on every gradient, in the
# place of minibatches. Nothing else is tuned.
STEP, NOISE = 0.02, 1.0
FLAT_STEPS = 600


def sharpness_aware(rho) -> Callable:
    """SAM; both its gradients get the same noise, as they are of one minibatch."""
    tx = optax_flat.sam(optax.sgd(STEP), rho=rho)

    def with_noise(key):
        def init(params):
            return key, tx.init(params)

        def update(grads, state, params=None, *, grad_fn, **extra_args):
            key, noise_key = jax.random.split(state[0])
            noise = NOISE * jax.random.normal(noise_key, grads.shape)
            updates, after = tx.update(
                grads + noise, state[1], params,
                grad_fn=lambda *args: grad_fn(*args) + noise, **extra_args,
            )  # fmt: skip
            return updates, (key, after)

        return optax.GradientTransformationExtraArgs(init, update)

    return with_noise


def noisy(tx: optax.GradientTransformation) -> Callable:
    """An optimizer that gets noisy gradients, for every key."""
    return lambda key: optax.chain(optax.add_noise(NOISE**2, 0.0, key), tx)


def entropy_sgd(noise) -> Callable:
    """Entropy-SGD; its normal noise and that of the gradients add up."""
    total = (noise**2 + STEP * NOISE**2) ** 0.5
    return lambda key: optax_flat.entropy_sgd(
        1.0, num_steps=10, step_size=STEP, noise=total, key=key
    )


def kalman(spread) -> Callable:
    """Ensemble Kalman inversion with fresh members at each update."""
    return lambda key: optax_flat.ensemble_kalman(
        0.1, ensemble_size=10, spread=spread, resample=1, key=key
    )


def smoothed(spread) -> Callable:
    """SGD along perturbation gradients."""
    return lambda key: optax_flat.perturbation_gradient(
        optax.sgd(STEP), ensemble_size=10, spread=spread, noise_kind="normal",
        antithetic=True, key=key,
    )  # fmt: skip


COOLING = exponential_cooling(0.9, total_steps=FLAT_STEPS)
FLAT: dict[str, dict[str, Callable]] = {
    "momentum": {
        "SGD": noisy(optax.sgd(STEP)),
        "Adam": noisy(optax.adam(0.1)),
        "SGD, momentum 0.9": noisy(optax.sgd(STEP, 0.9)),
        "CoolMomentum": noisy(optax_flat.coolmomentum(STEP, COOLING)),
    },
    "walks": {
        "Entropy-SGD": entropy_sgd(1e-4),
        "Entropy-SGD, noise 1": entropy_sgd(1.0),
        "SAM, rho 0.05": sharpness_aware(0.05),
        "SAM, rho 1": sharpness_aware(1.0),
    },
    "ensembles": {
        "Kalman, spread 0.1": kalman(0.1),
        "Kalman, spread 0.5": kalman(0.5),
        "perturbations 0.1": smoothed(0.1),
        "perturbations 0.5": smoothed(0.5),
    },
}
MOVING = (
    "SGD",
    "Adam",
    "CoolMomentum",
    "Entropy-SGD, noise 1",
    "SAM, rho 1",
    "Kalman, spread 0.5",
    "perturbations 0.5",
)


class Size(NamedTuple):
    """How much is drawn."""

    methods: int  # in each picture
    responses: tuple[str, ...]
    signals: int
    length: int
    surfaces: tuple[str, ...]
    steps: int
    flat_steps: int
    seeds: int
    frames: int


FULL = Size(7, tuple(RESPONSES), 6, 300, ARTICLE, 125, FLAT_STEPS, 12, 60)
SMOKE = Size(1, ("momentum", "nesterov"), 1, 20, ARTICLE[:1], 20, 20, 2, 3)


def first(methods: dict[str, Any], size: Size) -> dict[str, Any]:
    """As many methods as there are in a picture."""
    return dict(list(methods.items())[: size.methods])


def response(name: str, size: Size) -> Figure:
    """One rule on all signals."""
    chosen = list(signals(size.length, key=0).items())[: size.signals]
    shown = {name.replace("_", " "): signal for name, signal in chosen}
    methods = first(RESPONSES[name], size)
    for label, rule in methods.items():
        if isinstance(rule, AheadInTime):
            methods[label] = {name: rule.on(signal) for name, signal in shown.items()}
    return plotting.gradient_response(methods, shown)


@functools.cache
def flat_paths(name: str, size: Size) -> jax.Array:
    """The runs of a flat-minima method, which up to three pictures show."""
    (source,) = [group[name] for group in FLAT.values() if name in group]
    return plotting.paths(
        source, wide_and_narrow, num_steps=size.flat_steps, seeds=size.seeds
    )


def flat_ends(size: Size) -> tuple[Figure, list[dict]]:
    """Where the runs of every flat-minima method end, as bars and as rows."""
    rows = []
    groups = [first(group, size) for group in FLAT.values()]
    for name in [name for group in groups for name in group]:
        ends = flat_paths(name, size)[:, -1]
        hole, valley = (
            np.linalg.norm(ends - centre, axis=1) < radius
            for centre, radius in zip(wide_and_narrow.minima, (0.5, 1.0), strict=True)
        )
        counts = {"hole": int(hole.sum()), "wide valley": int(valley.sum())}
        rows.append({"method": name, **counts, "runs": size.seeds})
    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    names = [row["method"] for row in rows]
    shades = {"wide valley": "#009E73", "elsewhere": "0.85", "hole": "#D55E00"}
    for where, colour in shades.items():
        counts = np.array(
            [row.get(where, row["runs"] - row["hole"] - row["wide valley"])
             for row in rows]
        )  # fmt: skip
        bars = axes.barh(names, counts, left=left, color=colour, label=where)
        axes.bar_label(bars, [count or "" for count in counts], label_type="center")
        left += counts
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"runs, after {size.flat_steps} gradients or forward-only updates")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure, rows


def king() -> tuple[Figure, list[dict]]:
    """The learning rates of numpy-ml's KingScheduler and of scale_by_loss_slope."""
    figure = Figure(figsize=(8, 4.6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 3, sharex=True, sharey="row")
    rows = []
    for i, name in enumerate(("decreasing", "plateau", "spiky")):
        with np.load(GOLDEN / f"king_{name}.npz", allow_pickle=False) as file:
            config = json.loads(str(file["meta"]))["config"]
            losses, theirs = file["loss"], file["lr"]
        tx = optax_flat.scale_by_loss_slope(config["patience"], config["decay"])

        def step(state, loss, tx=tx):
            scaled, state = tx.update(jnp.ones([]), state, value=loss)
            return state, scaled

        _, scale = jax.lax.scan(step, tx.init(jnp.zeros([])), jnp.asarray(losses))
        ours = config["initial_lr"] * np.asarray(scale)
        above[i].plot(losses, color="0.45", linewidth=1)
        above[i].set_title(f"{name} loss")
        below[i].semilogy(ours, color="#0072B2", label="scale_by_loss_slope")
        below[i].semilogy(theirs, color="#D55E00", linestyle="--", label="numpy-ml")
        below[i].set_xlabel("step")
        for axes in (above[i], below[i]):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="0.9", linewidth=0.6)
        for who, rates in (("numpy-ml", theirs), ("scale_by_loss_slope", ours)):
            cuts = int(np.sum(np.diff(rates, prepend=config["initial_lr"]) < 0))
            rows.append({"loss": name, "rule": who, "cuts": cuts, "end": rates[-1]})
    above[0].set_ylabel("loss")
    below[0].set_ylabel("learning rate")
    handles, labels = below[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure, rows


def pictures(size: Size) -> dict[str, Callable]:
    """What makes each picture, by name; one that is given a path writes a GIF."""
    made: dict[str, Callable] = {
        f"signals_{name}": lambda name=name: response(name, size)
        for name in size.responses
    }
    for name in size.surfaces:
        for kind, methods in (("nesterov", NESTEROV), ("rules", RULES)):
            made[f"{name}_{kind}"] = lambda name=name, methods=methods: (
                plotting.trajectory(
                    first(methods, size), SURFACES[name], num_steps=size.steps
                )
            )
    made["rules.gif"] = lambda path: plotting.animate(
        first(RULES, size), SURFACES["hills_and_canyon"], path, num_steps=size.steps,
        frames=size.frames, dpi=80,
    )  # fmt: skip
    for group, methods in FLAT.items():
        made[f"flat_{group}"] = lambda methods=methods: plotting.trajectory(
            {name: flat_paths(name, size) for name in first(methods, size)},
            wide_and_narrow,
            num_steps=size.flat_steps,
        )
    made["flat_ends"] = lambda: flat_ends(size)
    made["flat.gif"] = lambda path: plotting.animate(
        {name: flat_paths(name, size) for name in MOVING[: size.methods]},
        wide_and_narrow, path, num_steps=size.flat_steps, frames=size.frames, trail=40,
        dpi=80,
    )  # fmt: skip
    made["king"] = king
    return made


def save(figure: Figure, path: Path) -> None:
    """A PNG with a palette, a third of the size of one without."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    image = Image.open(buffer).convert("RGB")
    # This way rare colours, those of hidden lines in the legend, survive.
    way = Image.Quantize.MAXCOVERAGE
    image = image.quantize(256, way, kmeans=3, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def main(argv: list[str] | None = None) -> list[Path]:
    """Writes the pictures and returns their paths."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", default=Path("out/gallery"),
        help="(out/gallery)")  # fmt: skip
    add("--only", metavar="NAME,...", help="pictures whose names start so")
    add("--smoke", action="store_true", help="little of everything, in seconds")
    options = parser.parse_args(argv)
    made = pictures(SMOKE if options.smoke else FULL)
    if options.only:
        starts = tuple(options.only.split(","))
        chosen = {k: make for k, make in made.items() if k.startswith(starts)}
        if not chosen:
            raise SystemExit(
                f"No picture's name starts so. There are {', '.join(made)}."
            )
        made = chosen
    options.out.mkdir(parents=True, exist_ok=True)
    written, tables = [], {}
    with tqdm(made.items(), unit="picture") as bar:
        for name, make in bar:
            bar.set_postfix_str(name)
            path = options.out / (name if "." in name else f"{name}.png")
            if path.suffix == ".gif":
                make(path)
            else:
                figure = make()
                if isinstance(figure, tuple):
                    figure, tables[name] = figure
                save(figure, path)
            written.append(path)
    for name, rows in tables.items():
        print(f"\n{name}")
        for row in rows:
            print(", ".join(f"{key}: {value}" for key, value in row.items()))
    print(f"\n{len(written)} pictures in {options.out}")
    return written


if __name__ == "__main__":
    main()
