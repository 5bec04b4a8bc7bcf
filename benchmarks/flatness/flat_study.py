"""Does flatness tell who generalises? Minima of several methods, measured, on images.

Small networks on MNIST and Fashion-MNIST, as many times with clean training labels as
with 40 % wrong ones (uniform over the other classes, others for every seed), which must
be learned by heart. A cell is a data set, a kind of labels and a network:

* mlp: 196-64-64-10;
* cnn: 3x3 convolutions with stride 2 to 16 and 32 channels, then 128-64-10;

both with tanh, so that second derivatives say all, on the first 5,000 training images,
whose pixels are averaged in squares of 2x2. Every run spends the same number of
gradients of minibatches of 64, in the same order for all methods, each with its
textbook rate (see `METHODS`; nothing is tuned) and with three tenths of it, so that the
minima differ. Rates fall to 0 by a cosine, but for coolmomentum, whose momentum falls
from 0.99 to 0 instead, and for swa, whose rate falls to its half and stays there while
the last quarter of the points is averaged. nesterov_thirds takes three gradients of a
minibatch, so it sees the first third of them; sam, asam and gsam take two, and see the
first half. These three, momentum_sam and swa have SGD with momentum inside. Of ivon's
posterior it is the mean that counts.

At the end of a run: accuracies and losses on the training images, with the labels that
were trained, and on the test images, whose labels are right; the gaps between the two,
test minus training, of the loss and of the error in percent; and on the first 1,000
training images the measures of `optax_flat.flatness`, all so that larger means sharper
(see `measure`). With wrong labels the gaps tell more about how many of them were
learned than about generalization (they are negative where few were); the test error
tells that.

Then Kendall's tau between each measure and test error and gaps, and the partial tau
given the training loss (see benchmarks.correlation). The norm of the params and the
training loss are there for comparison: what they tell needs no measure of flatness. A
number that is not finite is left out of its row.

    python -m benchmarks.flatness.flat_study --data mnist.npz,fashion_mnist.npz
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import optax_flat
from benchmarks import correlation, models
from benchmarks.harness import (
    COLOURS,
    Row,
    Rows,
    add_paths,
    averaged_sgd,
    parser,
    shuffled,
    table,
    write_json,
    write_table,
)
from benchmarks.images import CLASSES, Images, prepared_sets, wrong_labels
from optax_flat import flatness
from optax_flat.training import make_train_step

WALK = 20  # gradients per update of the entropy methods
LABELS = {"clean": 0.0, "noisy": 0.4}  # the part of the training labels that is wrong
FACTORS = (1.0, 0.3)  # of the textbook rates
TEMPERATURE = 1e-5  # of sgld
GAMMA = 10.0  # of the local entropy
SHARPNESS = (
    "lambda_max", "trace", "frobenius_norm", "worst", "worst_m", "worst_adaptive",
    "average", "local_energy", "local_entropy",
)  # fmt: skip
MEASURES = (*SHARPNESS, "param_norm", "train_loss")
TARGETS = ("test_error", "error_gap", "loss_gap")
COLUMNS = (
    "test_accuracy", "train_accuracy", "loss_gap", "lambda_max", "trace",
    "worst_adaptive", "local_energy", "local_entropy",
)  # fmt: skip
SHOWN = ("lambda_max", "trace", "worst_adaptive", "local_energy")


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    images: int = 5000
    batch: int = 64
    evaluations: int = 12_000  # gradients; whole walks of 20 and of 3
    measured: int = 1000  # images for flatness
    samples: int = 32  # of every random measure
    matvecs: int = 30
    steps: int = 40  # of the local entropy's path


SMOKE = Sizes(100, 4, 60, 50, 2, 3, 2)


class Method(NamedTuple):
    """An optimizer with its textbook rate."""

    make: Callable[[optax.Schedule, int, jax.Array], optax.GradientTransformation]
    rate: float
    num_steps: int = 1  # gradients per update
    falls: bool = True  # by a cosine


def entropy(method: Callable[..., Any]):
    """Entropy-SGD or Entropy-Adam; the walk has Nesterov steps of 0.1."""
    walk = {"num_steps": WALK, "noise_kind": "rademacher"}
    walk["inner_transform"] = optax.trace(0.9, nesterov=True)
    return lambda rate, _, key: method(rate, key=key, **walk)


def sgld(rate, updates, key):
    """Colder than the posterior, T = 1/5000."""
    del updates
    return optax_flat.sgld(rate, TEMPERATURE, noise_kind="rademacher", key=key)


def coolmomentum(rate, updates, key):
    """The momentum is cooled to 0 over the whole run."""
    del key
    momentum = optax_flat.schedules.exponential_cooling(0.99, updates)
    return optax_flat.coolmomentum(rate, momentum)


def swa(rate, updates, key):
    """The schedule of SWA's authors."""
    del key
    return averaged_sgd(rate, updates)


def ivon(rate, updates, key):
    """Its b2 reaches back over most of the run."""
    del updates
    return optax_flat.ivon(
        rate, ess=Sizes().images, b2=0.9999, noise_kind="rademacher",
        mode="transparent", key=key,
    )  # fmt: skip


def around_sgd(method: Callable[..., Any], **settings: Any):
    """A method around SGD with momentum."""
    return lambda rate, *_: method(optax.sgd(rate, 0.9), **settings)


METHODS = {
    "sgd": Method(lambda rate, *_: optax.sgd(rate, 0.9), 0.1),
    "adam": Method(lambda rate, *_: optax.adam(rate), 1e-3),
    "entropy_sgd": Method(entropy(optax_flat.entropy_sgd), 1.0, WALK),
    "entropy_adam": Method(entropy(optax_flat.entropy_adam), 1e-2, WALK),
    "coolmomentum": Method(coolmomentum, 0.01, falls=False),
    "sgld": Method(sgld, 0.1),
    "nesterov_thirds": Method(
        lambda rate, *_: optax_flat.multipoint_nesterov(rate, nodes="thirds"), 0.1, 3
    ),
    "sam": Method(around_sgd(optax_flat.sam, rho=0.05), 0.1, 2),
    "asam": Method(around_sgd(optax_flat.asam, rho=0.5), 0.1, 2),
    "gsam": Method(around_sgd(optax_flat.gsam, rho=0.05, alpha=0.4), 0.1, 2),
    "momentum_sam": Method(
        around_sgd(optax_flat.momentum_sam, rho=0.3, mode="transparent"), 0.1
    ),
    "swa": Method(swa, 0.1, falls=False),
    "ivon": Method(ivon, 0.2),
}
ONE_MINIBATCH = ("sam", "asam", "gsam")  # for both gradients of an update

LAYERS = {  # shapes of the kernels
    "mlp": ((196, 64), (64, 64), (64, CLASSES)),
    "cnn": ((9, 16), (144, 32), (128, 64), (64, CLASSES)),
}


@functools.partial(jax.jit, static_argnames="network")
def initial(key: jax.Array, network: str) -> Any:
    """Normal kernels of variance 1 over the number of inputs; no biases."""
    keys = jax.random.split(key, len(LAYERS[network]))
    return [
        {
            "kernel": jax.random.normal(key, shape) / shape[0] ** 0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for key, shape in zip(keys, LAYERS[network], strict=True)
    ]


def logits_of(network: str, params: Any, images: jax.Array) -> jax.Array:
    """[B, 10] of images [B, 14, 14, 1]."""
    convolutions = 2 if network == "cnn" else 0
    return models.feed_forward(params, images, convolutions, jnp.tanh)


def cross_entropy(network: str, params: Any, batch: Any) -> jax.Array:
    """Mean loss of a minibatch (images, labels)."""
    logits = logits_of(network, params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# One function for each network, so that programs are compiled once.
LOSSES = {name: functools.partial(cross_entropy, name) for name in LAYERS}


@functools.partial(jax.jit, static_argnames=("network", "method"))
def train(params, data, order, factor, key, *, network: str, method: Method) -> Any:
    """The params to evaluate after one update for each entry of `order`.

    The factor of the rate is an argument, so one program serves all runs.
    """
    updates = len(order)
    decay = optax.cosine_decay_schedule(method.rate, updates)

    def rate(count):
        return factor * (decay(count) if method.falls else method.rate)

    tx = method.make(rate, updates, key)
    step = make_train_step(LOSSES[network], tx)

    def body(state, index):
        batch = jax.tree.map(lambda x: x[index], data)
        return step(*state, batch)[:2], None

    (params, opt_state), _ = jax.lax.scan(body, (params, tx.init(params)), order)
    return optax_flat.eval_params(opt_state, params)


@functools.partial(jax.jit, static_argnames="network")
def evaluate(params, data, *, network: str):
    """Mean loss, and accuracy in percent."""
    right = logits_of(network, params, data[0]).argmax(axis=-1) == data[1]
    return LOSSES[network](params, data), 100.0 * right.mean()


@functools.partial(jax.jit, static_argnames=("network", "sizes"))
def measure(params, data, key, *, network: str, sizes: Sizes) -> dict[str, Any]:
    """Name to `Estimate`; the local entropy as how far -F lies above the loss."""
    given = (LOSSES[network], params, data)
    keys = iter(jax.random.split(key, 6))

    def draws():
        return {"num_samples": sizes.samples, "key": next(keys)}

    def points():
        return {**draws(), "batch_size": 1}

    top = flatness.top_eigenvalues(*given, num_matvecs=sizes.matvecs, key=next(keys))
    entropy = flatness.local_entropy(
        *given, gamma=GAMMA, temperature=1.0 / sizes.measured, num_steps=sizes.steps,
        num_chains=8, batch_size=1, key=next(keys),
    )  # fmt: skip
    return {
        "param_norm": flatness.Estimate(optax.tree.norm(params), 0.0),
        "lambda_max": flatness.Estimate(top.values[0], top.residuals[0]),
        "trace": flatness.trace(*given, **draws()),
        "frobenius_norm": flatness.frobenius_norm(*given, **draws()),
        "worst": flatness.sharpness(*given, rho=0.05),
        "worst_m": flatness.sharpness(*given, rho=0.05, m=50, batch_size=None),
        "worst_adaptive": flatness.sharpness(*given, rho=0.5, adaptive=True),
        "average": flatness.sharpness(*given, rho=1.0, kind="average", **points()),
        "local_energy": flatness.local_energy(*given, sigma=0.1, **points()),
        "local_entropy": entropy._replace(value=-entropy.value - given[0](*given[1:])),
    }


@functools.cache
def program(network: str, name: str, shapes: Any) -> Any:
    """`train`, compiled for one network and method."""
    given = jax.tree.unflatten(*shapes)
    return train.lower(*given, network=network, method=METHODS[name]).compile()


class Run(NamedTuple):
    """What is trained, and with what."""

    data: str
    labels: str
    network: str
    optimizer: str
    factor: float  # of the textbook rate

    @property
    def cell(self) -> str:
        """Runs of the same cell can be compared."""
        return f"{self.data}-{self.labels}-{self.network}"

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.cell}/{self.optimizer}/x{self.factor:g}"


def train_and_measure(run: Run, images: Images, sizes: Sizes, *, seed: int) -> Row:
    """One run on `prepared` images."""
    network, name = run.network, run.optimizer
    wrong = wrong_labels(images.train_labels, LABELS[run.labels], seed)
    training = jax.device_put((images.train_images, wrong))
    test = jax.device_put((images.test_images, images.test_labels))
    order = shuffled(len(wrong), sizes.evaluations * sizes.batch, seed)
    order = order.reshape(-1, sizes.batch)
    length = METHODS[name].num_steps
    if name == "nesterov_thirds":  # one minibatch at all points
        order = order[: len(order) // length, None].repeat(length, axis=1)
    elif name in ONE_MINIBATCH:
        order = order[: len(order) // length]
    elif length > 1:
        order = order.reshape(-1, length, sizes.batch)

    init_key, noise_key, measure_key = jax.random.split(jax.random.key(seed), 3)
    params = initial(init_key, network)
    given = (params, training, jnp.asarray(order), jnp.float32(run.factor), noise_key)
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda *x: x, *given))
    trained = program(network, name, (structure, tuple(leaves)))
    start = time.perf_counter()
    params = jax.block_until_ready(trained(*given))
    seconds = time.perf_counter() - start
    train_loss, train_accuracy = map(float, evaluate(params, training, network=network))
    test_loss, test_accuracy = map(float, evaluate(params, test, network=network))
    part = (images.train_images[: sizes.measured], wrong[: sizes.measured])
    start = time.perf_counter()
    found = measure(params, part, measure_key, network=network, sizes=sizes)
    found = jax.device_get(found)
    row = {
        **run._asdict(),
        "cell": run.cell,
        "rate": run.factor * METHODS[name].rate,
        "gradient_evaluations": sizes.evaluations,
        "forward_passes": 0,
        "seconds": seconds,
        "measuring_seconds": time.perf_counter() - start,
        "test_accuracy": test_accuracy,
        "train_accuracy": train_accuracy,
        "test_loss": test_loss,
        "train_loss": train_loss,
        "error_gap": train_accuracy - test_accuracy,
        "loss_gap": test_loss - train_loss,
        **{key: float(value) for key, (value, _) in found.items()},
        **{f"{key}_error": float(error) for key, (_, error) in found.items()},
    }
    numbers = {key: x for key, x in row.items() if isinstance(x, float)}
    return {key: x for key, x in row.items() if math.isfinite(numbers.get(key, 0.0))}


def tables(cells: Mapping[str, Sequence[Row]]) -> str:
    """Markdown: for each cell a line per method, means over seeds and rates."""
    text = ""
    for cell, rows in cells.items():
        named = [{**row, "method": row["optimizer"]} for row in rows]
        text += f"### {cell}\n\n{table(named, COLUMNS)}\n"
    return text


def picture(rows: Sequence[Row], path: Path) -> None:
    """The error gap against some measures, a row of panels for each kind of labels."""
    kinds, places = (
        list(dict.fromkeys(found))
        for found in zip(*((r["labels"], place(r)) for r in rows), strict=True)
    )
    markers = dict(zip(places, "os^Dv<>P", strict=False))
    # A colour for two methods, one with full and one with open markers.
    fills = dict(
        zip(METHODS, itertools.product(("full", "none"), COLOURS), strict=False)
    )
    figure, grid = plt.subplots(
        len(kinds), len(SHOWN), figsize=(11, 1.2 + 2.6 * len(kinds)), squeeze=False,
        layout="constrained", sharex="col", sharey="row",
    )  # fmt: skip
    for row, (measured, axes) in itertools.product(rows, enumerate(grid.T)):
        if not correlation.finite(row, SHOWN[measured], "error_gap"):
            continue
        axes[kinds.index(row["labels"])].plot(
            row[SHOWN[measured]], row["error_gap"], markers[place(row)],
            **looks(*fills[row["optimizer"]]), markersize=4.5, alpha=0.75,
        )  # fmt: skip
    for axes in grid.flat:
        axes.set_xscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for kind, axes in zip(kinds, grid[:, 0], strict=True):
        axes.set_ylabel(f"{kind} labels\ntest minus training error, %")
    for name, axes in zip(SHOWN, grid[-1], strict=True):
        axes.set_xlabel(name.replace("_", " "))
    legend = [(method, "o", looks(*fills[method])) for method in METHODS]
    legend += [(name, marker, {"color": "#777777"}) for name, marker in markers.items()]
    handles = [
        plt.Line2D([], [], linestyle="", marker=marker, label=name, **look)
        for name, marker, look in legend
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def looks(fill: str, colour: str) -> dict[str, Any]:
    """Of a marker."""
    width = 0.0 if fill == "full" else 1.2
    return {"fillstyle": fill, "color": colour, "markeredgewidth": width}


def place(row: Row) -> str:
    """Data set and network of a row, for people."""
    return f"{row['data'].replace('_', ' ')}, {row['network']}"


def main() -> None:
    """Runs what is missing, then writes tables, correlations and pictures."""
    options_of = parser(__doc__, METHODS, seeds=3, out="out/flat_study", data=False)
    add_paths(options_of)
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    sets = prepared_sets(options, sizes.images)
    networks, kinds, factors = LAYERS, LABELS, FACTORS
    if "random" in sets:
        networks, kinds, factors = ["mlp"], ["noisy"], [1.0]
    combined = itertools.product(sets, kinds, networks, options.methods, factors)
    runs = {run.name: run for run in itertools.starmap(Run, combined)}
    settings = {
        **sizes._asdict(), "data": list(sets), "temperature": TEMPERATURE,
        "gamma": GAMMA,
    }  # fmt: skip
    rows = Rows(options.out, settings)
    for name, seed in rows.pending(list(runs), range(options.seeds)):
        run = runs[name]
        row = train_and_measure(run, sets[run.data], sizes, seed=seed)
        rows.record(name, seed, row)

    cells: dict[str, list[Row]] = {}
    for row in rows:
        derived = {"configuration": f"{row['optimizer']}/x{row['factor']:g}"}
        if "test_accuracy" in row:
            derived["test_error"] = 100.0 - row["test_accuracy"]
        cells.setdefault(row["cell"], []).append({**row, **derived})
    pools = {"all": list(cells)} | {
        f"{kind} labels": [c for c in cells if cells[c][0]["labels"] == kind]
        for kind in kinds
    }
    found = correlation.correlations(cells, pools, MEASURES, TARGETS)
    given = correlation.correlations(
        cells, pools, SHARPNESS, TARGETS, control="train_loss"
    )
    write_json(options.out / "correlations.json", {"tau": found, "partial": given})
    (options.out / "correlations.md").write_text(
        correlation.markdown(found, pools, "Kendall's tau")
        + correlation.markdown(given, pools, "Partial tau, given the training loss,")
    )
    correlation.picture(found, pools, options.out / "correlations.png")
    picture(list(rows), options.out / "flat_study.png")
    text = tables(cells)
    write_table(text, options.out)


if __name__ == "__main__":
    main()
