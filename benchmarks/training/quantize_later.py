"""Which minima bear damage? Networks trained once, then rounded, pruned, or shaken.

The networks are trained on 10,000 images of Fashion-MNIST and tuned by their accuracy
on 5,000 others, without a thought of what comes later; pixels are averaged in squares
of 2x2. The test images are all 10,000. The networks:

* mlp: 196-64-64-10;
* cnn: 3x3 convolutions with stride 2 to 16 and 32 channels, then 64-10.

Then, without any retraining, the arrays with two axes (kernels, not biases) are
damaged:

* rounded to the nearest of 2^bits - 1 equally spaced numbers around 0, the outer ones
  being the largest absolute weight of the array ("tensor") or of each of its outputs
  ("channel"): 2 bits leave three numbers;
* pruned: the given part of all weights, the smallest ones of all arrays, becomes 0;
* shaken: each weight gets normal noise, relative to the root mean square of its array;
  accuracies are means over four draws.

`summary.jsonl` and `table.md` have, for each kind of damage, the mean accuracy over its
severities, and the mean drop from the network's own clean accuracy; `severities.md` has
the accuracy at each severity, with a star where the 95 % interval of the paired
difference from the baseline is without 0; a star in the second table is that of the
drop.

Does flatness tell who drops? Every network is trained a second time with a third of its
rate, so that a method has minima of two kinds, and measured at the end of each run on
its first 1,000 training images (see `flat`; all so that larger means sharper). Then
Kendall's tau with the mean drops (benchmarks.correlation): across methods, where a
bootstrap draws methods with both rates and all their seeds, and within, where only runs
of the same method are compared and it draws runs. Also the partial tau given the
training loss. ReLU has no second derivative at its kink; the Hessian is that around it.

    python -m benchmarks.training.quantize_later --data fashion_mnist.npz
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from benchmarks import correlation
from benchmarks.harness import COLOURS, Row, Rows, write_json
from benchmarks.images import prepared_file
from benchmarks.situations import (
    BASELINES,
    Cell,
    Choice,
    Data,
    Trained,
    compare,
    floats,
    interval,
    measure,
    options_and_sizes,
    random_split,
    run_missing,
    verdict,
)
from benchmarks.training.small_data import networks
from optax_flat import flatness

METHODS = ("sgd", "adamw", "sam", "asam", "entropy_sgd", "ema", "swa", "ivon")
BITS = (8, 6, 4, 3, 2)
PRUNED = (50, 70, 80, 90, 95)  # percent
NOISE = (0.1, 0.2, 0.4, 0.8)  # relative
DRAWS = 4
SLOWER = 2  # steps of the rate's grid: a third
SHARPNESS = (
    "lambda_max", "trace", "worst", "worst_adaptive", "average", "average_adaptive"
)  # fmt: skip
PREDICTORS = (*SHARPNESS, "param_norm", "train_loss")


class Sizes(NamedTuple):
    """What presets change."""

    images: int = 10_000
    held_out: int = 5000
    gradients: int = 3000
    batch: int = 32
    width: int = 1  # factor of the networks'
    measured: int = 1000  # images for flatness
    samples: int = 16
    matvecs: int = 15


SIZES = {
    "smoke": Sizes(40, 20, 40, 4, 1, 20, 2, 2),
    "small": Sizes(),
    "paper": Sizes(55_000, 5000, 40_000, 32, 4, 1000, 64, 30),
}


# --- damage ---------------------------------------------------------------------------


def kernels(params: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
    """Changes the arrays with two axes or more."""
    return jax.tree.map(lambda x: change(x) if x.ndim > 1 else x, params)


def rounded(params: Any, bits: int, *, per_channel: bool) -> Any:
    """To the nearest of 2^bits - 1 numbers around 0; outputs are the last axis."""
    largest = 2 ** (bits - 1) - 1

    def change(x):
        axes = tuple(range(x.ndim - 1)) if per_channel else None
        scale = jnp.abs(x).max(axis=axes, keepdims=True) / largest
        scale = jnp.where(scale > 0, scale, 1.0)
        return jnp.round(x / scale) * scale

    return kernels(params, change)


def pruned(params: Any, percent: float) -> Any:
    """The smallest weights of all kernels become 0."""
    sizes = [jnp.abs(x).ravel() for x in jax.tree.leaves(params) if x.ndim > 1]
    threshold = jnp.percentile(jnp.concatenate(sizes), percent)
    return kernels(params, lambda x: jnp.where(jnp.abs(x) > threshold, x, 0.0))


def shaken(params: Any, noise: float, key: jax.Array) -> Any:
    """Normal noise, relative to the root mean square of each kernel."""
    z = optax.tree.random_like(key, params)

    def change(x, z):
        return x + noise * jnp.sqrt(jnp.square(x).mean()) * z if x.ndim > 1 else x

    return jax.tree.map(change, params, z)


def harms() -> dict[str, dict[str, Callable[[Any, jax.Array], Any]]]:
    """Kind of damage to severity to the damaged params, of params and a key."""

    def rounding(bits, per_channel):
        return lambda params, _: rounded(params, bits, per_channel=per_channel)

    return {
        "tensor": {f"{b}_bits": rounding(b, per_channel=False) for b in BITS},
        "channel": {f"{b}_bits": rounding(b, per_channel=True) for b in BITS},
        "pruned": {
            f"{part}_%": lambda params, _, part=part: pruned(params, part)
            for part in PRUNED
        },
        "shaken": {
            f"{size:g}": lambda params, key, size=size: shaken(params, size, key)
            for size in NOISE
        },
    }


HARMS = harms()


@functools.cache
def accuracies(cell: str, task: Any) -> Callable[..., Row]:
    """All accuracies of a cell's task, in one program: of params, data, and a key."""
    del cell

    def score(damage, params, data, key, draws):
        keys = jax.random.split(key, draws)
        scores = jax.lax.map(
            lambda k: task.measure(damage(params, k), data)["accuracy"], keys
        )
        return scores.mean()

    def all_of(params, data, key):
        return {
            kind: {
                severity: score(
                    damage, params, data, key, DRAWS if kind == "shaken" else 1
                )
                for severity, damage in severities.items()
            }
            for kind, severities in HARMS.items()
        }

    return jax.jit(all_of)


# --- a run ----------------------------------------------------------------------------


def flat(loss: Any, params: Any, data: Any, key: jax.Array, sizes: Sizes) -> Row:
    """The measures of flatness."""
    keys = iter(jax.random.split(key, 4))
    top = flatness.top_eigenvalues(
        loss, params, data, num_matvecs=sizes.matvecs, key=next(keys)
    )

    def average(rho, *, adaptive):
        return flatness.sharpness(
            loss, params, data, rho=rho, kind="average", adaptive=adaptive,
            num_samples=sizes.samples, batch_size=1, key=next(keys),
        )  # fmt: skip

    def worst(rho, *, adaptive):
        return flatness.sharpness(loss, params, data, rho=rho, adaptive=adaptive)

    found = {
        "lambda_max": top.values[0],
        "trace": flatness.trace(
            loss, params, data, num_samples=sizes.samples, key=next(keys)
        ).value,
        "worst": worst(0.05, adaptive=False).value,
        "worst_adaptive": worst(0.5, adaptive=True).value,
        "average": average(1.0, adaptive=False).value,
        # The root mean square of e / |w| is 0.1, like the smallest noise.
        "average_adaptive": average(
            0.1 * optax.tree.size(params) ** 0.5, adaptive=True
        ).value,
        "param_norm": optax.tree.norm(params),
        "train_loss": loss(params, data),
    }
    return floats(found)


def report(cell: Any, sizes: Sizes, trained: Trained, data: Data) -> Row:
    """Accuracies of what is damaged, their means and drops, and flatness."""
    clean = float(measure(cell.task)(trained.params, data.test)["accuracy"])
    key, flat_key = jax.random.split(jax.random.key(0))
    found = jax.device_get(
        accuracies(cell.name, cell.task)(trained.params, data.test, key)
    )
    row = {"accuracy": clean}
    for kind, of in found.items():
        row |= {f"{kind}_{severity}": float(value) for severity, value in of.items()}
        row[f"{kind}_mean"] = float(np.mean(list(of.values())))
        row[f"{kind}_drop"] = clean - row[f"{kind}_mean"]
    part = jax.tree.map(lambda x: x[: sizes.measured], data.train)
    return row | flat(cell.task.loss, trained.params, part, flat_key, sizes)


MEASURES = {
    "accuracy": 1, **{f"{kind}_mean": 1 for kind in HARMS},
    **{f"{kind}_drop": -1 for kind in HARMS},
}  # fmt: skip


def slower_runs(
    cells: Sequence[Cell],
    options: Any,
    choices: Mapping[tuple[str, str], Choice],
    settings: Mapping[str, Any],
) -> Rows:
    """Runs with a third of the chosen rates, in a folder of their own."""
    rows = Rows(options.out / "slower", settings)
    slower = {
        place: choice.candidate._replace(step=choice.candidate.step - SLOWER)
        for place, choice in choices.items()
    }
    jobs = [(cell, name) for cell in cells for name in options.methods]
    run_missing(rows, jobs, slower, options.seeds, "slower")
    return rows


# --- what comes of it -----------------------------------------------------------------


def severities(rows: Sequence[Row], cell: str, baseline: str) -> str:
    """Markdown: a table of accuracies and one of drops for each kind of damage."""
    by_method: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["cell"] == cell:
            by_method.setdefault(row["optimizer"], {})[row["seed"]] = row
    text = ""
    for kind, of in HARMS.items():
        names = [f"{kind}_{severity}" for severity in of]
        for drop in (False, True):
            head = ["method", *(s.replace("_", " ") for s in of)]
            lines = [head, ["---"] + ["---:"] * len(of)]
            for method, seeds in by_method.items():

                def value(row, name, drop=drop):
                    return row["accuracy"] - row[name] if drop else row[name]

                line = [method]
                for name in names:
                    values = [value(row, name) for row in seeds.values()]
                    gains = [
                        (value(by_method[baseline][seed], name) - value(row, name))
                        * (1 if drop else -1)
                        for seed, row in seeds.items()
                    ]
                    _, low, high = interval(gains)
                    star = "" if verdict(low, high) == "same" else "*"
                    star = "" if method == baseline else star
                    line.append(f"{np.mean(values):.1f}{star}")
                lines.append(line)
            what = "drop from the clean accuracy" if drop else "accuracy"
            text += f"### {cell}, {kind}: {what} in %, star: not as {baseline}\n\n"
            text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def predicted(rows: Iterable[Row], slower: Iterable[Row], out: Path) -> None:
    """Kendall's tau between flatness and drops, across and within methods."""
    across: dict[str, list[Row]] = {}
    within: dict[str, list[Row]] = {}
    for rate, of in (("chosen", rows), ("third", slower)):
        for row in of:
            name = f"{row['cell']}/{row['optimizer']}"
            across.setdefault(row["cell"], []).append(
                {**row, "configuration": row["optimizer"]}
            )
            within.setdefault(name, []).append(
                {**row, "configuration": f"{name}/{rate}/{row['seed']}"}
            )
    targets = [f"{kind}_drop" for kind in HARMS]
    text, found = "", {}
    for name, cells in (("across", across), ("within", within)):
        pools = {
            f"{network}, {name}": [c for c in cells if c.split("/")[0] == network]
            for network in across
        }
        for control in (None, "train_loss"):
            measures = SHARPNESS if control else PREDICTORS
            taus = correlation.correlations(
                cells, pools, measures, targets, control=control
            )
            title = "Partial tau, given the training loss," if control else "Tau"
            text += correlation.markdown(taus, pools, f"{title} {name} methods")
            found[f"{name}{'_partial' if control else ''}"] = taus
            if name == "across" and control is None:
                correlation.picture(taus, pools, out / "correlations.png")
    write_json(out / "correlations.json", found)
    (out / "correlations.md").write_text(text)


def picture(rows: Sequence[Row], path: Path) -> None:
    """Accuracy against severity, means over the seeds: a line per method."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    methods = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, grid = plt.subplots(
        len(cells), len(HARMS), squeeze=False, layout="constrained", sharey=True,
        figsize=(11, 1 + 2.6 * len(cells)),
    )  # fmt: skip
    for cell, panels in zip(cells, grid, strict=True):
        for (kind, of), axes in zip(HARMS.items(), panels, strict=True):
            for i, method in enumerate(methods):
                runs = [
                    r for r in rows if (r["cell"], r["optimizer"]) == (cell, method)
                ]
                means = [
                    np.mean([r[name] for r in runs])
                    for name in ("accuracy", *(f"{kind}_{s}" for s in of))
                ]
                style = "-" if i < len(COLOURS) else "--"
                colour = COLOURS[i % len(COLOURS)]
                axes.plot(means, style, color=colour, label=method.replace("_", " "))
            names = ("clean", *(s.replace("_", " ") for s in of))
            axes.set_xticks(range(len(names)), names, fontsize="x-small")
            axes.set_title(f"{cell}, {kind}", fontsize="medium")
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("test accuracy, %")
    handles = grid[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, then writes tables, correlations and pictures."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="quantize_later"
    )
    data, images = prepared_file(options)
    known = networks(sizes.width)
    split = functools.partial(random_split, images, sizes.images, sizes.held_out)
    cells = []
    for network in ["mlp"] if data == "random" else ["mlp", "cnn"]:
        cell = Cell(
            network, known[network][0], split, sizes.images, sizes.gradients,
            sizes.batch, measures=MEASURES,
        )  # fmt: skip
        cells.append(cell._replace(report=functools.partial(report, cell, sizes)))
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    choices = compare("quantize_later", cells, options, settings)
    rows = list(Rows(options.out, settings))
    slower = slower_runs(cells, options, choices, settings)
    predicted(rows, slower, options.out)
    picture(rows, options.out / "severities.png")
    text = ""
    for cell in cells:
        baselines = [name for name in BASELINES if name in options.methods]
        if baselines:
            best = max(baselines, key=lambda name: choices[cell.name, name].score)
            text += severities(rows, cell.name, best)
    (options.out / "severities.md").write_text(text)


if __name__ == "__main__":
    main()
