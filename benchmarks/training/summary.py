"""Where does which method help? Situations and methods in one matrix.

Read from the rows of the situations' scripts. In every cell of a situation (a network,
a number of labels, ...) a method is compared with the better one of SGD and Adam(W):
the better one in the final runs of that cell, so that to be better than it is to be
better than both. The differences are averaged over the cells seed by seed; a field is
their mean over the seeds with its 95 % interval (see `wider_interval`). "better" and
"worse" are intervals without 0, "same" are those with it. Of twenty fields without any
effect one would not be "same" by chance. A method that was run with a strong weight
decay inside, too, has in each cell the decay that validation chose. The tables of the
scripts have the cells one by one, and all methods.

    python -m benchmarks.training.summary
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from matplotlib.patches import Rectangle

from benchmarks.harness import Row, read_json, write_json, write_table
from benchmarks.situations import interval, verdict

SHADES = {"better": "#8FD3BF", "worse": "#F2B48C", "same": "#E8E8E8"}
BASELINES = ("SGD", "Adam(W)")
DECAYED = "_decayed"
METHODS = {  # with the names in the rows, the first of which that is there counts
    "SGD": ("sgd",),
    "Adam(W)": ("adamw", "adam"),
    "SAM": ("sam",),
    "ASAM": ("asam",),
    "Entropy-SGD or -Adam": ("entropy_sgd", "entropy_sgd_short", "entropy_adam"),
    "EMA": ("ema",),
    "SWA": ("swa",),
    "IVON": ("ivon",),
}


class Situation(NamedTuple):
    """A row of the matrix."""

    title: str
    script: str  # and the folder of its results
    data: str  # what the script is given
    measure: str
    unit: str
    sign: int = 1  # -1, if less is more
    # The beginnings or ends of the names of those that count.
    cells: str | tuple[str, ...] = ""


FASHION = "fashion_mnist.npz"
SITUATIONS = (
    Situation(
        "40 % wrong labels, MLP and CNN, no weight decay", "label_noise",
        f"{FASHION},cifar10_small.npz", "end_accuracy", "%", cells="-40",
    ),
    Situation(
        "40 % wrong labels, MLP, ResNet, ViT", "noisy_labels", FASHION, "accuracy",
        "%", cells="-40",
    ),
    Situation("100 to 3,000 labels", "small_data", FASHION, "accuracy", "%"),
    Situation(
        "ViT from scratch", "transformer", "DIR,cifar10_small.npz", "accuracy", "%",
        cells="vit",
    ),
    Situation(
        "Transformer on text", "transformer", "DIR,cifar10_small.npz", "bits",
        "bits per character", -1, "chars",
    ),
    Situation(
        "batches of 2,048 and 4,096", "large_batches", FASHION, "accuracy", "%",
        cells=("batch-2048", "batch-4096"),
    ),
    Situation("LSTM on text", "recurrent", "DIR", "perplexity", "perplexity", -1),
    Situation("weights in 4 bits", "quantize_later", FASHION, "tensor_4_bits", "%"),
    Situation("weights in 3 bits", "quantize_later", FASHION, "tensor_3_bits", "%"),
    Situation("80 % of the weights cut", "quantize_later", FASHION, "pruned_80_%", "%"),
    Situation(
        "probabilities", "uncertainty", f"{FASHION},mnist.npz", "nll",
        "nats / 100", -1,
    ),
)  # fmt: skip


def read(folder: Path, situation: Situation) -> dict[str, dict[str, dict[int, float]]]:
    """Cell, method and seed to what was measured."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in read_json(folder / situation.script / "rows.json", []):
        cell = row.get("cell") or row["method"].rpartition("/")[0]
        counts = cell.startswith(situation.cells) or cell.endswith(situation.cells)
        if counts and situation.measure in row:
            runs = found.setdefault(cell, {}).setdefault(row["optimizer"], {})
            runs[row["seed"]] = row[situation.measure]
    choices = read_json(folder / situation.script / "selection.json", {})
    for cell, of in found.items():
        for decayed in [name for name in of if name.endswith(DECAYED)]:
            name, runs = decayed.removesuffix(DECAYED), of.pop(decayed)
            score = choices[f"{cell}/{decayed}"]["score"]
            if score > choices[f"{cell}/{name}"]["score"]:
                of[name] = runs
    return found


def fields(folder: Path, situation: Situation) -> list[Row]:
    """What the matrix says of one situation, for the methods that were run."""
    gains: dict[str, list[dict[int, float]]] = {name: [] for name in METHODS}
    best: dict[str, list[bool]] = {name: [] for name in METHODS}
    for of in read(folder, situation).values():
        runs = {
            name: next((of[other] for other in names if other in of), {})
            for name, names in METHODS.items()
        }
        known = [name for name in BASELINES if runs[name]]
        if not known:
            continue
        means = {
            name: situation.sign * float(np.mean(list(runs[name].values())))
            for name in known
        }
        baseline = max(known, key=lambda name: means[name])
        for name, values in runs.items():
            if values:
                gains[name].append({
                    seed: situation.sign * (value - runs[baseline][seed])
                    for seed, value in values.items()
                    if seed in runs[baseline]
                })  # fmt: skip
                best[name].append(name == baseline)
    cells = max(map(len, gains.values()))
    return [
        field(situation, name, of, all(best[name]))
        for name, of in gains.items()
        if cells and len(of) == cells
    ]


def wider_interval(gains: np.ndarray) -> tuple[float, float, float]:
    """The mean of gains [cells, seeds], with the wider one of two 95 % intervals.

    One is of the means over the cells, seed by seed: right where a seed moves all cells
    together, but of few seeds it may be narrow by chance. The other adds up the
    variances within the cells (Welch and Satterthwaite): right where it does not.
    """
    mean, low, high = interval(gains.mean(axis=0).tolist())
    cells, seeds = gains.shape
    if seeds < 2:
        return mean, low, high
    variances = gains.var(axis=1, ddof=1) / seeds / cells**2
    total = float(variances.sum())
    half = high - mean
    if total > 0.0:
        freedom = (seeds - 1) * total**2 / float((variances**2).sum())
        half = max(half, float(scipy.stats.t.ppf(0.975, freedom)) * total**0.5)
    return mean, mean - half, mean + half


def field(
    situation: Situation, name: str, gains: Sequence[dict[int, float]], is_best: bool
) -> Row:
    """What is known of a method in a situation."""
    seeds = set.intersection(*(set(of) for of in gains))
    values = np.array([[of[seed] for seed in sorted(seeds)] for of in gains])
    mean, low, high = wider_interval(values)
    finite = math.isfinite(low)
    command = f"python -m benchmarks.training.{situation.script}"
    return {
        "situation": situation.title, "method": name, "unit": situation.unit,
        "command": f"{command} --data {situation.data}",
        "script": situation.script, "measure": situation.measure,
        "gain": mean, "low": low if finite else None, "high": high if finite else None,
        "verdict": "baseline" if is_best else verdict(low, high),
        "seeds": len(seeds), "cells": len(gains),
    }  # fmt: skip


def number(value: float) -> str:
    """With its sign, and digits that tell small ones apart."""
    return f"{value:+.{2 if abs(value) < 0.995 else 1}f}"


def words(found: Row) -> str:
    """A field as text."""
    if found["verdict"] == "baseline" or found["low"] is None:
        return found["verdict"]
    ends = f"{number(found['low'])} to {number(found['high'])}"
    return f"{number(found['gain'])} ({ends})"


def table(found: Iterable[Row]) -> str:
    """Markdown: a line per situation, a column per method; verdicts in words."""
    marks = {"better": "**better** ", "worse": "worse ", "same": "", "baseline": ""}
    lines = [["situation", *METHODS], ["---"] * (1 + len(METHODS))]
    by_title: dict[str, dict[str, Row]] = {}
    for x in found:
        by_title.setdefault(f"{x['situation']}, {x['unit']}", {})[x["method"]] = x
    for title, of in by_title.items():
        said = {name: marks[x["verdict"]] + words(x) for name, x in of.items()}
        lines.append([title, *(said.get(name, "") for name in METHODS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def picture(found: Sequence[Row], path: Path) -> None:
    """The matrix in colours: green is better, orange worse, grey neither."""
    titles = list(dict.fromkeys((x["situation"], x["unit"]) for x in found))
    names = [n for n in METHODS if any(x["method"] == n for x in found)]
    if not found:
        return
    size = (2.4 + 1.05 * len(names), 1.2 + 0.5 * len(titles))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for x in found:
        place = names.index(x["method"]), titles.index((x["situation"], x["unit"]))
        corner = place[0] - 0.47, place[1] - 0.44
        colour = SHADES.get(x["verdict"], "white")
        axes.add_patch(Rectangle(corner, 0.94, 0.88, color=colour))
        axes.text(
            *place, words(x).replace(" (", "\n("), ha="center", va="center",
            fontsize=7,
        )  # fmt: skip
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xticks(range(len(names)), [n.replace(" or ", "\nor ") for n in names])
    axes.set_yticks(range(len(titles)), [f"{t},\n{unit}" for t, unit in titles])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=c, label=v) for v, c in SHADES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Writes rows.json, table.md and summary.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=Path("results"), metavar="DIR")
    add("--out", type=Path, default=Path("results/summary"), metavar="DIR")
    options = parser.parse_args()
    found = [x for s in SITUATIONS for x in fields(options.results, s)]
    write_json(options.out / "rows.json", found)
    write_table(table(found), options.out)
    picture(found, options.out / "summary.png")


if __name__ == "__main__":
    main()
