"""SGD, Adam, Entropy-SGD and Entropy-Adam on real digits, at equal gradients.

Trains a small Flax network with each method and several seeds, every run with the same
number of minibatch gradients, and compares accuracy, losses, and how flat the minima
are: the largest eigenvalue and the trace of the Hessian of the training loss.

    make demo                                # scikit-learn's 8x8 digits, a minute or so
    make demo DATA=mnist.npz                 # train_images, train_labels, test_images,
                                             # test_labels of MNIST's shapes
    python examples/compare_digits.py --help

Written to --out: compare_digits.png, table.md, rows.json, and the losses of every run,
which are kept when a run is cut off.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from matplotlib.ticker import LogLocator
from scipy.stats import t
from tqdm.auto import tqdm

import optax_flat
from optax_flat.flatness import top_eigenvalues, trace
from optax_flat.training import History, make_train_step

WALK = 20  # gradients per update of the entropy methods
BATCH = 32


class Method(NamedTuple):
    """A name for people, a maker, and the gradients that one update takes."""

    label: str
    make: Any  # (scale of the learning rate, key) -> optax.GradientTransformation
    length: int
    colour: str  # Okabe and Ito's, told apart with any kind of colour vision


# Textbook settings, not tuned to the data. The walks take Nesterov steps of 0.1, as the
# authors' code does; a learning rate of 1 moves the params onto the walk's mean.
INNER = {
    "num_steps": WALK,
    "noise_kind": "rademacher",
    "inner_transform": optax.trace(0.9, nesterov=True),
}
METHODS = {
    "sgd": Method(
        "SGD", lambda s, key: optax.sgd(0.1 * s, 0.9, nesterov=True), 1, "#0072B2"
    ),
    "adam": Method("Adam", lambda s, key: optax.adam(1e-3 * s), 1, "#E69F00"),
    "entropy_sgd": Method(
        "Entropy-SGD",
        lambda s, key: optax_flat.entropy_sgd(1.0 * s, key=key, **INNER),
        WALK,
        "#009E73",
    ),
    "entropy_adam": Method(
        "Entropy-Adam",
        lambda s, key: optax_flat.entropy_adam(1e-2 * s, key=key, **INNER),
        WALK,
        "#CC79A7",
    ),
}


class Data(NamedTuple):
    """Flat images [N, pixels] as floats around 0, labels [N]."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load(path: Path | None) -> Data:
    """The .npz file, or scikit-learn's digits: 1,797 images of 8x8 pixels."""
    if path is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        x, y = digits.data[order], digits.target[order]
        parts = (x[:1347], y[:1347], x[1347:], y[1347:])
    else:
        names = ("train_images", "train_labels", "test_images", "test_labels")
        with np.load(path) as file:
            missing = [name for name in names if name not in file]
            if missing:
                raise SystemExit(
                    f"{path} must have the arrays {', '.join(names)}; it has "
                    f"{', '.join(file)}. Rename or add: {', '.join(missing)}."
                )
            parts = tuple(file[name] for name in names)
    train_x, train_y, test_x, test_y = parts
    mean, scale = train_x.mean(), train_x.std()

    def flat(images):
        return ((images.reshape(len(images), -1) - mean) / scale).astype(np.float32)

    return Data(flat(train_x), train_y.astype(int), flat(test_x), test_y.astype(int))


class Network(nn.Module):
    """Two hidden layers; smooth activations, so that the Hessian says all."""

    width: int

    @nn.compact
    def __call__(self, x):
        """Logits [B, 10] of images [B, pixels]."""
        for _ in range(2):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(10)(x)


class Run(NamedTuple):
    """What one run gives."""

    accuracy: list[float]  # percent of the test images, at the end of each pass
    train_loss: float  # on all training images, at the end
    effective_loss: float  # mean over the last effective epoch, while training
    top_eigenvalue: float
    trace: float
    trace_error: float
    seconds: float  # of training, without compilation


class Task:
    """Network, loss and measures; compiled once for all methods and seeds."""

    def __init__(self, data: Data, width: int):
        self.network = Network(width)
        self.data = jax.device_put(data)
        self.walks = len(data.train_y) // (WALK * BATCH)
        self.score = jax.jit(self._score)
        self.curvature = jax.jit(self._curvature)

    def loss(self, params, batch):
        """Mean cross-entropy of a minibatch (images, labels)."""
        logits = self.network.apply({"params": params}, batch[0])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean()

    def _score(self, params, x, y):
        """Loss and accuracy in percent."""
        logits = self.network.apply({"params": params}, x)
        return self.loss(params, (x, y)), 100.0 * jnp.mean(logits.argmax(-1) == y)

    def _curvature(self, params, key):
        """Of the training loss, or of that of the first 10,000 images."""
        batch = (self.data.train_x[:10_000], self.data.train_y[:10_000])
        return curvature(self.loss, params, batch, key)

    def training_pass(self, method: Method, tx: optax.GradientTransformation):
        """One pass over the data for any optimizer, from `make_train_step`."""
        step = make_train_step(self.loss, tx)
        # An update takes one minibatch, or with a leading axis those of a walk.
        lead = () if method.length == 1 else (method.length,)
        x, y = self.data.train_x, self.data.train_y

        @jax.jit
        def one_pass(params, opt_state, key):
            # Whole walks of other images in every pass, the same for all methods.
            order = jax.random.permutation(key, len(y))[: self.walks * WALK * BATCH]

            def update(state, index):
                *state, loss = step(*state, (x[index], y[index]))
                return tuple(state), loss

            order = order.reshape(-1, *lead, BATCH)
            state, losses = jax.lax.scan(update, (params, opt_state), order)
            return *state, losses.mean()

        return one_pass


def train(task: Task, method: Method, options, bar: tqdm) -> list[Run]:
    """A run of `options.passes` passes over the data for each seed."""
    runs = []
    tx = method.make(options.scale_rates, 0)
    one_pass = task.training_pass(method, tx)
    for seed in range(options.seeds):
        init_key, noise_key, measure_key, *keys = jax.random.split(
            jax.random.key(seed), 3 + options.passes
        )
        params = task.network.init(init_key, task.data.train_x[:1])["params"]
        # The noise key lives in the state, so one compiled pass serves all seeds.
        opt_state = method.make(options.scale_rates, noise_key).init(params)
        if seed == 0:
            one_pass = one_pass.lower(params, opt_state, keys[0]).compile()
        log = options.out / "history" / f"{method.label}-{seed}.json"
        accuracy, seconds = [], 0.0
        with History(method.length, path=log) as history:
            for key in keys:
                start = time.perf_counter()
                params, opt_state, loss = one_pass(params, opt_state, key)
                loss.block_until_ready()
                seconds += time.perf_counter() - start
                anchor = optax_flat.eval_params(opt_state, params)
                test_loss, correct = task.score(
                    anchor, task.data.test_x, task.data.test_y
                )
                history.record(loss, test_loss)
                accuracy.append(float(correct))
                bar.set_postfix_str(
                    f"{method.label}, pass {len(accuracy)}, loss {loss:.4f}"
                )
        train_loss, _ = task.score(anchor, task.data.train_x, task.data.train_y)
        measures = map(float, task.curvature(anchor, measure_key))
        effective = (history.eff_loss or [statistics.fmean(history.loss)])[-1]
        runs.append(Run(accuracy, float(train_loss), effective, *measures, seconds))
        bar.update()
    return runs


def curvature(loss_fn, params, batch, key):
    """Largest Hessian eigenvalue, trace, and the standard error of the trace.

    By 31 and 50 Hessian-vector products.
    """
    top_key, trace_key = jax.random.split(key)
    top = top_eigenvalues(loss_fn, params, batch, num_matvecs=30, key=top_key)
    return top.values[0], *trace(loss_fn, params, batch, num_samples=50, key=trace_key)


def mean_and_deviation(values) -> tuple[float, float]:
    """Mean and sample deviation, 0 for one value."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation


COLUMNS = {
    "test accuracy, %": ("{:.2f}", lambda run: run.accuracy[-1]),
    "training loss": ("{:.2g}", lambda run: run.train_loss),
    "effective loss": ("{:.2g}", lambda run: run.effective_loss),
    "largest eigenvalue": ("{:.2g}", lambda run: run.top_eigenvalue),
    "Hessian trace": ("{:.2g}", lambda run: run.trace),
    "seconds": ("{:.2f}", lambda run: run.seconds),
}


def table(results: dict[str, list[Run]]) -> str:
    """A Markdown table, mean ± deviation over the seeds."""
    lines = [["method", *COLUMNS], ["---"] + ["---:"] * len(COLUMNS)]
    for name, runs in results.items():
        cells = []
        for shape, read in COLUMNS.values():
            numbers = mean_and_deviation(map(read, runs))
            shown = numbers if len(runs) > 1 else numbers[:1]
            cells.append(" ± ".join(shape.format(number) for number in shown))
        lines.append([METHODS[name].label, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(f"| {row} |" for row in rows)


def verdict(results: dict[str, list[Run]]) -> str:
    """What the table shows, in words, whoever wins."""
    if min(map(len, results.values())) < 2:
        return "One seed allows no comparison: use --seeds 2 or more."
    sentences = []
    for name, base in (("entropy_sgd", "sgd"), ("entropy_adam", "adam")):
        if name not in results or base not in results:
            continue
        ours, theirs = METHODS[name].label, METHODS[base].label
        gains = [
            a.accuracy[-1] - b.accuracy[-1]
            for a, b in zip(results[name], results[base], strict=True)
        ]
        gain, deviation = mean_and_deviation(gains)
        error = deviation / len(gains) ** 0.5
        # Student's t: few seeds need a wide interval.
        if abs(gain) <= t.ppf(0.975, len(gains) - 1) * error:
            result = "cannot be told from"
        else:
            result = "is better than" if gain > 0 else "is worse than"
        sentences.append(
            f"{ours} {result} {theirs} in test accuracy: {gain:+.2f} points, standard "
            f"error {error:.2f} over {len(gains)} paired seeds."
        )
        ratios = [
            a.top_eigenvalue / b.top_eigenvalue
            for a, b in zip(results[name], results[base], strict=True)
        ]
        ratio = statistics.geometric_mean([max(r, 1e-12) for r in ratios])
        agree = all(r < 1 for r in ratios) or all(r > 1 for r in ratios)
        sentences[-1] += (
            f" Its minima are {'flatter' if ratio < 1 else 'sharper'} by the largest "
            f"eigenvalue, {ratio:.2g} times {theirs}'s"
            + (" with every seed." if agree else ", but not with every seed.")
        )
    sentences.append(
        "Effective loss: mean while training over the last effective epoch, which is "
        f"{WALK} passes (or all) for the entropy methods and one for the others."
    )
    sentences.append(
        "A smaller eigenvalue goes with a different training loss as well: compare "
        "these columns together, and do not read flatness as accuracy."
    )
    return "\n".join(sentences)


def picture(results: dict[str, list[Run]], per_pass: int, path: Path) -> None:
    """Accuracy against gradients, and flatness against accuracy."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, runs in results.items():
        method = METHODS[name]
        curves = np.array([run.accuracy for run in runs])  # [seeds, passes]
        spent = per_pass * np.arange(1, curves.shape[1] + 1)
        mean = curves.mean(0)
        deviation = curves.std(0, ddof=1) if len(runs) > 1 else 0 * mean
        left.plot(spent, mean, ".-", color=method.colour, label=method.label)
        left.fill_between(
            spent, mean - deviation, mean + deviation, color=method.colour, alpha=0.2,
            linewidth=0,
        )  # fmt: skip
        right.scatter(
            [run.top_eigenvalue for run in runs],
            [run.accuracy[-1] for run in runs],
            color=method.colour,
            alpha=0.7,
        )
    final = [run.accuracy[-1] for runs in results.values() for run in runs]
    left.set_ylim(min(final) - 8, 100)
    left.set(xlabel="gradient evaluations", ylabel="test accuracy, %")
    left.set_title("Equal gradients: mean ± deviation", fontsize=11)
    right.set(xlabel="largest Hessian eigenvalue", xscale="log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("")
    right.set_ylabel("final test accuracy, %")
    right.set_title("Flatness (flatter is left), one dot a seed", fontsize=11)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(results), frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, list[Run]]:
    """Runs all methods and seeds; prints the table and what it shows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help=".npz file with MNIST-shaped data")
    add("--seeds", type=int, metavar="N", help="(5)")
    add("--passes", type=int, metavar="N", help="over the data (60; 5 with --data)")
    add("--width", type=int, metavar="N", help="of hidden layers (64; 256 with --data)")
    add("--scale-rates", type=float, default=1.0, metavar="X",
        help="multiplies all learning rates (1)")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="(out/compare_ and the data's name)")
    add("--smoke", action="store_true", help="by default 2 seeds and 6 passes")
    options = parser.parse_args(argv)
    passes = 60 if options.data is None else 5
    options.seeds = options.seeds or (2 if options.smoke else 5)
    options.passes = options.passes or (6 if options.smoke else passes)
    options.width = options.width or (64 if options.data is None else 256)
    name = "digits" if options.data is None else options.data.stem
    options.out = options.out or Path("out") / f"compare_{name}"

    data = load(options.data)
    per_pass = len(data.train_y) // (WALK * BATCH) * WALK
    print(
        f"{name}: {len(data.train_y)} training and {len(data.test_y)} test images, "
        f"{options.passes * per_pass} gradients for each of {options.seeds} seeds."
    )
    task, results = Task(data, options.width), {}
    total = options.seeds * len(METHODS)
    try:
        # Counted in runs: what is compiled once for many passes would make the first
        # estimates hours. Without a terminal (disable=None) there is no bar.
        with tqdm(total=total, unit="run", smoothing=0, disable=None) as bar:
            for name, method in METHODS.items():
                results[name] = train(task, method, options, bar)
    except FloatingPointError as error:
        raise SystemExit(f"Stopped: {error}") from error
    text = table(results)
    print(f"\n{text}\n\n{verdict(results)}")
    (options.out / "table.md").write_text(text + "\n")
    rows = [
        {
            "method": name,
            "seed": seed,
            "gradient_evaluations": options.passes * per_pass,
        }
        | {"forward_passes": 0, **run._asdict()}
        for name, runs in results.items()
        for seed, run in enumerate(runs)
    ]
    (options.out / "rows.json").write_text(json.dumps(rows, indent=1))
    picture(results, per_pass, options.out / "compare_digits.png")
    print(f"\nPicture: {options.out / 'compare_digits.png'}")
    return results


if __name__ == "__main__":
    main()
