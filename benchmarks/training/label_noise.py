"""Who learns in spite of wrong labels? Accuracy against the part that is wrong.

0 to 80 % of the labels of 5,000 training images are wrong: uniform over the other
classes, others for every seed. So are those of the 5,000 validation images, since
whoever has wrong labels has no right ones to choose by; only the test images (10,000 of
Fashion-MNIST, 2,000 of CIFAR-10) have right ones. Pixels are averaged in squares of
2x2. The networks have ReLU:

* Fashion-MNIST: 196-128-128-10;
* CIFAR-10: 3x3 convolutions with stride 2 to 16 and 32 channels, then 288-64-10.

Every run spends the same number of gradients of minibatches of 32, in the same order
for all methods. Those of two gradients per update take both of one minibatch, so they
make half as many updates and see the first half of the minibatches. Rates fall to 0 by
a cosine, but for swa, see `averaged_sgd`; there is no weight decay.

Every method has four candidates for its settings (see `METHODS`): four rates, or two
rates and two values of a second setting. For each data set and part of wrong labels all
four are tried with a seed that is not used again. (Where the first grids were mostly
chosen at their lower edge, those of sgd, swa, ema and entropy_sgd, they were moved down
once, before any reported seed.) Validation accuracy is taken at fifteen moments of a
run. Two questions have each their own choice out of the same runs:

* at the end: the candidate with the best validation accuracy at the end, and the test
  accuracy at the end;
* at the best moment: the candidate with the best validation accuracy at its best
  moment, and the test accuracy at the best moment by validation (early stopping).

If the choices are the same, one run answers both. Rows have the curves as well, and how
many training labels, wrong ones included, the network has in the end.

Tables: mean and standard error over the seeds. A star: the difference from sgd, seed by
seed, has a 95 % interval (Student's t) without 0. Of twenty differences one would have
a star by chance.

    python -m benchmarks.training.label_noise --data fashion_mnist.npz,cifar10_small.npz
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import scipy.stats

import optax_flat
from benchmarks import models
from benchmarks.harness import (
    COLOURS,
    SELECTION_SEED,
    Row,
    Rows,
    add_paths,
    averaged_sgd,
    parser,
    shuffled,
    write_table,
)
from benchmarks.images import CLASSES, Images, prepared_sets, wrong_labels
from optax_flat.training import make_train_step

WALK = 20  # gradients per update of Entropy-SGD
PERCENT = (0, 20, 40, 60, 80)  # of the labels are wrong
WHEN = {"end": "at the end", "best": "at the best moment by validation"}


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    images: int = 5000
    validation: int = 5000
    batch: int = 32
    moments: int = 15  # at which accuracies are taken
    evaluations: int = 400  # gradients between two of them; whole walks of 20 and 2


SMOKE = Sizes(40, 20, 4, 2, 20)


class Candidate(NamedTuple):
    """Settings of a method."""

    rate: float
    second: float | None = None  # what it is says `Method.second`

    @property
    def name(self) -> str:
        """Part of a row's name."""
        return "/".join(f"{x:g}" for x in self if x is not None)


class Method(NamedTuple):
    """An optimizer and its candidates.

    `make` gets the schedule of the rate, the second setting, the number of updates and
    a key.
    """

    make: Callable[[Any, Any, int, jax.Array], optax.GradientTransformation]
    candidates: tuple[Candidate, ...]
    second: str = ""
    num_steps: int = 1  # gradients per update
    one_minibatch: bool = False  # for all of them


def pairs(rates: Sequence[float], seconds: Sequence[float]) -> tuple[Candidate, ...]:
    """All combinations."""
    return tuple(itertools.starmap(Candidate, itertools.product(rates, seconds)))


def sharpness_aware(method: Callable[..., Any], *radii: float) -> Method:
    """A method of two gradients around SGD with momentum."""

    def make(rate, rho, updates, key):
        del updates, key
        return method(optax.sgd(rate, 0.9), rho=lambda _: rho)

    return Method(make, pairs((0.003, 0.03), radii), "rho", 2, one_minibatch=True)


def entropy_sgd(rate, gamma, updates, key):
    """The rate is that of the walk; the outer one falls from 1."""
    return optax_flat.entropy_sgd(
        optax.cosine_decay_schedule(1.0, updates), num_steps=WALK,
        step_size=lambda _: rate(0), gamma=lambda _: gamma,
        inner_transform=optax.trace(0.9, nesterov=True), noise_kind="rademacher",
        key=key,
    )  # fmt: skip


def swa(rate, _, updates, key):
    """The rate is held, falls to its half, and is held."""
    del key
    return averaged_sgd(lambda _: rate(0), updates)


def ema(rate, *_):
    """SGD with momentum, averaged."""
    return optax_flat.ema_weights(optax.sgd(rate, 0.9), decay=0.999)


def ivon(rate, ess, updates, key):
    """Its b2 reaches back over the whole run."""
    del updates
    return optax_flat.ivon(
        rate, ess=lambda _: ess, b2=0.9999, noise_kind="rademacher",
        mode="transparent", key=key,
    )  # fmt: skip


RATES = tuple(map(Candidate, (0.001, 0.003, 0.01, 0.03)))
METHODS = {
    "sgd": Method(lambda rate, *_: optax.sgd(rate, 0.9), RATES),
    "adam": Method(
        lambda rate, *_: optax.adam(rate),
        tuple(map(Candidate, (1e-4, 3e-4, 1e-3, 3e-3))),
    ),
    "sam": sharpness_aware(optax_flat.sam, 0.05, 0.1),
    "asam": sharpness_aware(optax_flat.asam, 0.5, 1.0),
    "friendly_sam": sharpness_aware(optax_flat.friendly_sam, 0.05, 0.1),
    "gsam": sharpness_aware(optax_flat.gsam, 0.05, 0.1),
    "entropy_sgd": Method(
        entropy_sgd, pairs((0.003, 0.01), (0.03, 1.0)), "gamma", WALK
    ),
    "swa": Method(swa, RATES),
    "ema": Method(ema, RATES),
    "ivon": Method(ivon, pairs((0.03, 0.3), (500.0, 5000.0)), "ess"),
}

LAYERS = {  # shapes of the kernels, for images of 14x14 and of 16x16x3
    "mlp": ((196, 128), (128, 128), (128, CLASSES)),
    "cnn": ((27, 16), (144, 32), (288, 64), (64, CLASSES)),
}


def initial(key: jax.Array, network: str) -> Any:
    """Normal kernels of variance 2 over the number of inputs; no biases."""
    keys = jax.random.split(key, len(LAYERS[network]))
    layers = zip(keys, LAYERS[network], strict=True)
    return [models.dense(key, *shape, gain=2.0) for key, shape in layers]


def logits_of(network: str, params: Any, images: jax.Array) -> jax.Array:
    """[B, 10] of images [B, 14, 14, 1] or [B, 16, 16, 3]."""
    convolutions = 2 if network == "cnn" else 0
    return models.feed_forward(params, images, convolutions, jax.nn.relu)


def accuracy(network: str, params: Any, images: jax.Array, labels: jax.Array):
    """In percent; in pieces that fit into a cache."""

    def guess(image):
        return logits_of(network, params, image[None])[0].argmax()

    right = jax.lax.map(guess, images, batch_size=100) == labels
    return 100.0 * right.mean()


@functools.partial(jax.jit, static_argnames=("network", "name"))
def train(params, sets, order, setting, key, *, network: str, name: str) -> Any:
    """Accuracies in percent on each of three sets at every moment, [3, moments].

    `sets` are those for training, validation and test. `order` has the moments as its
    first axis, then the updates. The settings are an argument, so one program serves
    all runs.
    """
    method = METHODS[name]
    rate, second = setting
    updates = order.shape[0] * order.shape[1]
    decay = optax.cosine_decay_schedule(1.0, updates)
    tx = method.make(lambda count: rate * decay(count), second, updates, key)

    def loss(params, batch):
        logits = logits_of(network, params, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    step = make_train_step(loss, tx)

    def update(state, index):
        batch = jax.tree.map(lambda x: x[index], sets[0])
        return step(*state, batch)[:2], None

    def until_moment(state, order):
        state, _ = jax.lax.scan(update, state, order)
        params = optax_flat.eval_params(state[1], state[0])
        return state, jnp.stack([accuracy(network, params, *x) for x in sets])

    _, accuracies = jax.lax.scan(until_moment, (params, tx.init(params)), order)
    return accuracies.T


@functools.cache
def program(network: str, name: str, shapes: Any) -> Any:
    """`train`, compiled for one network and method."""
    given = jax.tree.unflatten(*shapes)
    return train.lower(*given, network=network, name=name).compile()


class Run(NamedTuple):
    """What is trained, and on what."""

    data: str
    percent: int
    optimizer: str

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.data}-{self.percent}/{self.optimizer}"


def curves_of(
    run: Run, candidate: Candidate, images: Images, sizes: Sizes, *, seed: int
) -> Row:
    """Accuracies at all moments, on `prepared` images."""
    network = "mlp" if images.train_images.shape[-1] == 1 else "cnn"
    method = METHODS[run.optimizer]
    labels = wrong_labels(images.train_labels, run.percent / 100, seed)
    known = (images.train_images, labels)
    training, validation = (
        tuple(x[part] for x in known)
        for part in (slice(sizes.images), slice(sizes.images, None))
    )
    test = (images.test_images, images.test_labels)

    budget = sizes.moments * sizes.evaluations
    order = shuffled(sizes.images, budget * sizes.batch, seed)
    updates = sizes.evaluations // method.num_steps
    each = 1 if method.one_minibatch else method.num_steps  # minibatches
    order = order[: sizes.moments * updates * each * sizes.batch]
    lead = () if each == 1 else (each,)
    order = order.reshape(sizes.moments, updates, *lead, sizes.batch)

    init_key, noise_key = jax.random.split(jax.random.key(seed))
    second = 0.0 if candidate.second is None else candidate.second
    setting = (jnp.float32(candidate.rate), jnp.float32(second))
    sets = (training, validation, test)
    given = (initial(init_key, network), sets, order, setting, noise_key)
    given = jax.device_put(given)
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda *x: x, *given))
    compiled = program(network, run.optimizer, (structure, tuple(leaves)))
    start = time.perf_counter()
    trained, validated, tested = jax.device_get(compiled(*given))
    return {
        "gradient_evaluations": budget,
        "forward_passes": 0,
        "seconds": time.perf_counter() - start,
        "train_accuracy": float(trained[-1]),
        "validation_accuracies": validated.tolist(),
        "test_accuracies": tested.tolist(),
    }


def chosen(tried: Iterable[Row], run: Run) -> dict[str, Candidate]:
    """The candidate for each question, by validation."""
    validated = {row["method"]: row["validation_accuracies"] for row in tried}
    of = {
        candidate: validated[f"{run.name}/{candidate.name}"]
        for candidate in METHODS[run.optimizer].candidates
    }
    return {
        "end": max(of, key=lambda candidate: of[candidate][-1]),
        "best": max(of, key=lambda candidate: max(of[candidate])),
    }


def answers(
    run: Run, best: dict[str, Candidate], images: Images, sizes: Sizes, *, seed: int
) -> Row:
    """The row of a run: one training, or two where the choices differ."""
    found = {
        candidate: curves_of(run, candidate, images, sizes, seed=seed)
        for candidate in dict.fromkeys(best.values())
    }
    row = {**run._asdict()}
    for when, candidate in best.items():
        curves = found[candidate]
        validated = curves["validation_accuracies"]
        moment = len(validated) - 1 if when == "end" else int(np.argmax(validated))
        row |= {
            f"{when}_accuracy": curves["test_accuracies"][moment],
            f"{when}_moment": moment,
            f"{when}_curve": curves["test_accuracies"],
            f"{when}_rate": candidate.rate,
        }
        if candidate.second is not None:
            row[f"{when}_second"] = candidate.second
    costs = found[best["end"]]  # of one training, which both questions have
    names = ("gradient_evaluations", "forward_passes", "seconds", "train_accuracy")
    return {**{name: costs[name] for name in names}, **row}


def accuracies(rows: Iterable[Row], when: str) -> dict[tuple[str, int, str], Any]:
    """By data set, percent and method: seed to test accuracy."""
    found = {}
    for row in rows:
        place = (row["data"], row["percent"], row["optimizer"])
        found.setdefault(place, {})[row["seed"]] = row[f"{when}_accuracy"]
    return found


def differences(
    found: Any, data: str, percent: int, name: str, baseline: str = "sgd"
) -> list[float]:
    """From the baseline, for the seeds that both have."""
    of, base = (found.get((data, percent, who), {}) for who in (name, baseline))
    return [of[seed] - base[seed] for seed in of if seed in base]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: for each data set and question a line per method."""
    text = ""
    sets = dict.fromkeys(row["data"] for row in rows)
    for data, when in itertools.product(sets, WHEN):
        found = accuracies(rows, when)
        lines = [["method", *(f"{percent} %" for percent in PERCENT)]]
        lines.append(["---"] + ["---:"] * len(PERCENT))
        for name in METHODS:
            cells = [
                cell(
                    list(found.get((data, percent, name), {}).values()),
                    differences(found, data, percent, name),
                )
                for percent in PERCENT
            ]
            if any(cells):
                lines.append([name, *cells])
        title = f"### {data.replace('_', ' ')}, test accuracy {WHEN[when]}"
        text += f"{title}\n\n" + "".join(f"| {' | '.join(x)} |\n" for x in lines) + "\n"
    return text


def cell(values: Sequence[float], gains: Sequence[float]) -> str:
    """Mean and standard error; a star if the interval of the gain has no 0."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    text = f"{mean:.1f} ± {error:.1f}"
    gain, error = mean_and_error(gains)
    if len(gains) > 1 and abs(gain) > scipy.stats.t.ppf(0.975, len(gains) - 1) * error:
        text += "*"
    return text


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error if there is more than one value."""
    if len(values) < 2:
        return float(np.mean(values)) if values else 0.0, 0.0
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Accuracy minus that of sgd: a panel per data set and question."""
    sets = list(dict.fromkeys(row["data"] for row in rows))
    others = [name for name in METHODS if name != "sgd"]
    styles = zip(others, itertools.product(("-", "--"), COLOURS), strict=False)
    shifts = np.linspace(-3, 3, len(others))  # so that error bars stand side by side
    figure, grid = plt.subplots(
        len(WHEN), len(sets), figsize=(1 + 4.5 * len(sets), 8), squeeze=False,
        layout="constrained", sharey="col",
    )  # fmt: skip
    for (name, (style, colour)), shift in zip(list(styles), shifts, strict=True):
        for (when, line), (i, data) in itertools.product(
            zip(WHEN, grid, strict=True), enumerate(sets)
        ):
            found = accuracies(rows, when)
            points = [
                (p + shift, *mean_and_error(differences(found, data, p, name)))
                for p in PERCENT
                if (data, p, name) in found and (data, p, "sgd") in found
            ]
            if points:
                line[i].errorbar(
                    *zip(*points, strict=True), label=name.replace("_", " "),
                    linestyle=style, color=colour, linewidth=1.2, capsize=2,
                )  # fmt: skip
    for (when, line), (i, data) in itertools.product(
        zip(WHEN, grid, strict=True), enumerate(sets)
    ):
        found, panel = accuracies(rows, when), line[i]
        labels = [
            f"{p} %\n{np.mean(list(found[data, p, 'sgd'].values())):.1f}"
            if (data, p, "sgd") in found
            else f"{p} %"
            for p in PERCENT
        ]
        panel.set_xticks(PERCENT, labels)
        panel.axhline(0.0, color="black", linewidth=0.8)
        panel.set_title(f"{data.replace('_', ' ')}, {WHEN[when]}", fontsize="medium")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in grid[-1]:
        panel.set_xlabel("wrong training labels; below: accuracy of sgd, %")
    for panel in grid[:, 0]:
        panel.set_ylabel("test accuracy minus that of sgd, %")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, then writes tables and a picture."""
    options_of = parser(__doc__, METHODS, seeds=5, out="out/label_noise", data=False)
    add_paths(options_of)
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    sets = prepared_sets(options, sizes.images + sizes.validation)
    percents = (40,) if "random" in sets else PERCENT
    combined = itertools.product(sets, percents, options.methods)
    runs = {run.name: run for run in itertools.starmap(Run, combined)}
    settings = {**sizes._asdict(), "data": list(sets)}

    tried = Rows(options.out / "selection", settings)
    attempts = {
        f"{run.name}/{candidate.name}": (run, candidate)
        for run in runs.values()
        for candidate in METHODS[run.optimizer].candidates
    }
    for name, seed in tried.pending(list(attempts), [SELECTION_SEED]):
        run, candidate = attempts[name]
        row = curves_of(run, candidate, sets[run.data], sizes, seed=seed)
        tried.record(name, seed, row)

    rows = Rows(options.out, settings)
    for name, seed in rows.pending(list(runs), range(options.seeds)):
        run = runs[name]
        best = chosen(tried, run)
        row = answers(run, best, sets[run.data], sizes, seed=seed)
        rows.record(name, seed, row)
    write_table(tables(list(rows)), options.out)
    picture(list(rows), options.out / "label_noise.png")


if __name__ == "__main__":
    main()
