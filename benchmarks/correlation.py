"""Kendall's tau between measures and targets over runs, with bootstrap intervals.

Only runs of the same cell (data, labels, network) are compared with each other; the tau
of a pool of cells is the mean of theirs.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from harness import COLOURS, Row

RESAMPLES = 2000


def taus(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of samples in which run i occurs counts[s, i] times, [S].

    0 where a sample has no order, all its runs being equal.
    """
    a, b = (np.sign(np.subtract.outer(z, z)) for z in (x, y))

    def pairs(signs):
        return ((counts @ signs) * counts).sum(axis=-1)

    size = np.sqrt(pairs(a * a) * pairs(b * b))
    return pairs(a * b) / np.where(size > 0, size, 1.0)


def correlations(
    cells: Mapping[str, Sequence[Row]],
    pools: Mapping[str, Sequence[str]],
    measures: Sequence[str],
    targets: Sequence[str],
) -> list[Row]:
    """Tau in every pool and cell, with percentile intervals of 95 % over runs."""
    result = []
    for target, measure in itertools.product(targets, measures):
        random = np.random.default_rng(0)  # the same samples for all measures
        found = {}
        for cell, rows in cells.items():
            n = len(rows)
            counts = random.multinomial(n, [1 / n] * n, RESAMPLES).astype(float)
            counts = np.concatenate([np.ones((1, n)), counts])  # first all runs
            x, y = (np.array([row[key] for row in rows]) for key in (measure, target))
            found[cell] = taus(x, y, counts)
        pooled = {
            pool: np.mean([found[cell] for cell in of], axis=0)
            for pool, of in pools.items()
        }
        for place, (tau, *samples) in {**pooled, **found}.items():
            low, high = np.percentile(samples, [2.5, 97.5])
            result.append({
                "target": target, "measure": measure, "cell": place,
                "tau": float(tau), "low": float(low), "high": float(high),
            })  # fmt: skip
    return result


def markdown(found: Sequence[Row]) -> str:
    """For each target a table: a line per measure, a column per pool and cell."""
    cells, measures, targets = (
        list(dict.fromkeys(row[key] for row in found))
        for key in ("cell", "measure", "target")
    )
    entries = {
        (row["target"], row["measure"], row["cell"]): (
            f"{row['tau']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        )
        for row in found
    }
    text = ""
    for target in targets:
        lines = [["measure", *cells], ["---"] + ["---:"] * len(cells)]
        lines += [
            [m.replace("_", " "), *(entries[target, m, cell] for cell in cells)]
            for m in measures
        ]
        text += f"### Kendall's tau with the {target.replace('_', ' ')}\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def picture(
    found: Sequence[Row], pools: Mapping[str, Sequence[str]], path: Path
) -> None:
    """A dot for the tau of each pool, with its interval; a tick for each cell of it."""
    measures, targets = (
        list(dict.fromkeys(row[key] for row in found)) for key in ("measure", "target")
    )
    colours = dict(zip(pools, COLOURS, strict=False))
    shifts = dict(zip(pools, np.linspace(-0.2, 0.2, len(pools)), strict=True))
    figure, panels = plt.subplots(
        1, len(targets), figsize=(9, 5), layout="constrained", sharey=True, sharex=True
    )
    for target, axes in zip(targets, panels, strict=True):
        of_target = [row for row in found if row["target"] == target]
        for row, pool in itertools.product(of_target, pools):
            y = measures.index(row["measure"]) + shifts[pool]
            colour = colours[pool]
            if row["cell"] in pools[pool]:
                axes.plot(row["tau"], y, "|", color=colour, alpha=0.6)
            elif row["cell"] == pool:
                axes.plot([row["low"], row["high"]], [y, y], color=colour)
                axes.plot(row["tau"], y, "o", color=colour)
        axes.axvline(0.0, color="black", linewidth=0.8)
        axes.set_xlim(-1.02, 1.02)
        axes.set_xlabel(f"Kendall's tau with the {target.replace('_', ' ')}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(measures)), [m.replace("_", " ") for m in measures])
    panels[0].invert_yaxis()
    handles = [
        plt.Line2D([], [], marker="o", color=colours[pool], label=pool)
        for pool in pools
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)
