"""What the benchmark scripts share: options, rows on disk, tables, pictures.

A benchmark measures methods with several seeds. Every finished pair (method, seed) is
a row in DIR/rows.json, which is written again, whole, after each of them: a script that
was cut off goes on where it stopped when it is started again with the same options. The
settings that all rows of a folder have in common are in DIR/settings.json.
"""

import argparse
import json
import math
import os
import statistics
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm.auto import tqdm

import optax_flat

Row = dict[str, Any]

# Minibatch gradients; forward passes beside those of the gradients; time without
# compilation and evaluation.
COSTS = ("gradient_evaluations", "forward_passes", "seconds")

SELECTION_SEED = 1000  # none of those that are reported

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def parser(
    script: str | None, methods: Iterable[str], *, seeds: int, out: str, data: bool
) -> argparse.ArgumentParser:
    """The options --smoke, --seeds, --methods, --out and, if wanted, --data.

    `script` is a docstring, of which `--help` shows the first line.
    """
    known = list(methods)

    def names(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = ", ".join(name for name in chosen if name not in known)
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown {unknown}; choose from {', '.join(known)}"
            )
        return chosen

    result = argparse.ArgumentParser(description=(script or "").partition("\n")[0])
    add = result.add_argument
    add("--smoke", action="store_true", help="tiny sizes, seconds: does it run at all?")
    add("--seeds", type=int, default=seeds, metavar="N", help=f"({seeds})")
    add("--methods", type=names, default=known, metavar="A,B", help=", ".join(known))
    add("--out", type=Path, default=Path(out), metavar="DIR", help=f"({out})")
    if data:
        add("--data", type=Path, metavar="FILE", help=".npz file with the images")
    return result


def add_paths(options_of: argparse.ArgumentParser) -> None:
    """The option --data with one path or several."""
    options_of.add_argument(
        "--data",
        type=lambda text: [Path(part) for part in text.split(",")],
        default=[],
        metavar="PATH,PATH",
        help="data files",
    )


class Rows:
    """The rows of a benchmark, kept in a folder. Threads may record side by side.

    Args:
      folder: where rows.json and settings.json are; made if missing.
      settings: what all rows have in common. JAX's version and the device are added.

    Raises:
      SystemExit: the folder has rows that were measured with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._path = folder / "rows.json"
        self._lock = threading.Lock()
        self._rows: list[Row] = read_json(self._path, [])
        device = f"{jax.devices()[0].device_kind}, host with {os.cpu_count()} cores"
        settings = {**settings, "jax": jax.__version__, "device": device}
        # Through JSON, so that tuples compare equal with the lists read back.
        wanted = json.loads(json.dumps(settings))
        found = read_json(folder / "settings.json", {})
        if self._rows and found != wanted:
            changes = "; ".join(
                f"{name} was {found.get(name)}, is now {wanted.get(name)}"
                for name in {**found, **wanted}
                if found.get(name) != wanted.get(name)
            )
            raise SystemExit(
                f"{self._path} has rows that were measured with other settings: "
                f"{changes}. Choose another --out, use the old settings, or delete "
                f"{folder} to start again."
            )
        write_json(folder / "settings.json", wanted)

    def __contains__(self, pair: tuple[str, int]) -> bool:
        return any((row["method"], row["seed"]) == pair for row in self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def pending(
        self, methods: Sequence[str], seeds: Collection[int]
    ) -> Iterator[tuple[str, int]]:
        """The pairs (method, seed) without a row, under one progress bar.

        Seeds change slowest, so that a run that is cut off has comparable rows.
        """
        with tqdm(total=len(methods) * len(seeds), unit="row") as bar:
            for seed in seeds:
                for method in methods:
                    if (method, seed) not in self:
                        bar.set_description(f"{method}, seed {seed}")
                        yield method, seed
                    bar.update()

    def record(self, method: str, seed: int, row: Row) -> None:
        """Adds a row and writes the file.

        The row has the `COSTS` and any measures; NaN is refused.
        """
        costs = {name: row[name] for name in COSTS}
        with self._lock:
            self._rows.append({"method": method, "seed": seed, **costs, **row})
            write_json(self._path, self._rows)


def table(rows: Iterable[Row], measures: Sequence[str]) -> str:
    """A Markdown table, one line per method: mean ± sample standard deviation.

    Measures that no row has are left out.
    """
    rows = list(rows)
    known = {name for row in rows for name in row}
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    columns = [*(m for m in measures if m in known), "gradient_evaluations", "seconds"]
    lines = [["method", *(c.replace("_", " ") for c in columns), "seeds"]]
    lines.append(["---"] + ["---:"] * (len(columns) + 1))
    for method, of_method in by_method.items():
        cells = [_summary([r[c] for r in of_method if c in r]) for c in columns]
        lines.append([method, *cells, str(len(of_method))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_table(text: str, folder: Path) -> None:
    """Writes DIR/table.md, and shows it."""
    (folder / "table.md").write_text(text)
    print(text)


def random_digits(
    images: int, width: int, seed: int
) -> tuple[dict[str, jax.Array], tuple[jax.Array, jax.Array]]:
    """Params of an MLP 784-width-10, and noise with random labels instead of digits.

    Args:
      images: how many, N.
      width: of the hidden layer.
      seed: of both.

    Returns:
      Params w1, b1, w2, b2, and images [N, 784] with labels [N].
    """
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w1": jax.random.normal(keys[0], (784, width)) / 28,
        "b1": jnp.zeros(width),
        "w2": jax.random.normal(keys[1], (width, 10)) / width**0.5,
        "b2": jnp.zeros(10),
    }
    noise = jax.random.normal(keys[2], (images, 784))
    return params, (noise, jax.random.randint(keys[3], (images,), 0, 10))


def shuffled(examples: int, count: int, seed: int) -> np.ndarray:
    """The first `count` numbers of epochs, each of all examples in another order."""
    draw = np.random.default_rng(seed).permutation
    epochs = -(-count // examples)
    return np.concatenate([draw(examples) for _ in range(epochs)])[:count]


def _summary(values: Sequence[float]) -> str:
    """Mean ± deviation with two digits of the deviation."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation == 0.0:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def falling(rate: float, updates: int, factor: float, *fractions: float):
    """A rate that is multiplied by the factor after fractions of all updates."""
    return optax.piecewise_constant_schedule(
        rate, {int(fraction * updates): factor for fraction in fractions}
    )


def averaged_sgd(
    rate: optax.Schedule, updates: int
) -> optax.GradientTransformationExtraArgs:
    """SWA of SGD with momentum, over the last quarter of the updates.

    The rate falls linearly to its half, from half to nine tenths of the way there, and
    stays, as in the code of SWA's authors.
    """
    start = 3 * updates // 4
    factor = optax.linear_schedule(1.0, 0.5, int(0.4 * start), start // 2)
    inner = optax.sgd(lambda count: factor(count) * rate(count), 0.9)
    return optax_flat.swa(inner, start=start)


def bars(rows: Iterable[Row], measure: str, label: str, path: Path) -> None:
    """A bar per method: the mean of a ratio over the seeds, with its deviation."""
    by_method: dict[str, list[float]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row[measure])
    names = list(by_method)[::-1]
    size = (7, 1 + 0.26 * max(len(names), 10))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.barh(
        names,
        [np.mean(by_method[name]) for name in names],
        xerr=[np.std(by_method[name]) for name in names],
        color=COLOURS[0],
    )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def curves(rows: Iterable[Row], path: Path) -> None:
    """Errors in percent against gradient evaluations, mean ± deviation over the seeds.

    A row has `errors_percent` at equal distances, the last one at the end of the run.
    """
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for (name, runs), colour in zip(by_method.items(), COLOURS, strict=False):
        errors = np.array([row["errors_percent"] for row in runs])  # [seeds, times]
        spent = runs[0]["gradient_evaluations"] * np.linspace(0, 1, errors.shape[1] + 1)
        mean = errors.mean(axis=0)
        deviation = errors.std(axis=0, ddof=1) if len(runs) > 1 else 0.0 * mean
        axes.plot(spent[1:], mean, color=colour, label=name.replace("_", "-"))
        axes.fill_between(
            spent[1:], mean - deviation, mean + deviation, color=colour, alpha=0.2
        )
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("test error, %")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def read_json(path: Path, default: Any) -> Any:
    """The content of a file, or the default if there is none."""
    return json.loads(path.read_text()) if path.is_file() else default


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; an interruption leaves the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False))
    temporary.replace(path)
