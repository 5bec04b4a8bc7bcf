"""Kendall's tau between measures and targets over runs, with bootstrap intervals.

Only runs of the same cell (data, labels, network) are compared with each other; the tau
of a pool of cells is the mean of theirs. Runs that differ by their seed only are alike,
so the bootstrap draws configurations, with all their seeds, and the same ones in every
cell. A partial tau is what is left once a control explains its part:

    (tau_xy - tau_xc tau_yc) / ((1 - tau_xc^2) (1 - tau_yc^2))^(1/2)
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.harness import COLOURS, Row

RESAMPLES = 2000


def finite(row: Row, *keys: str) -> bool:
    """Whether a run has all of these numbers; a run that diverged has not."""
    return all(key in row for key in keys)


def taus(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of samples in which run i occurs counts[s, i] times, [S].

    0 where a sample has no order, all its runs being equal.
    """
    a, b = (np.sign(np.subtract.outer(z, z)) for z in (x, y))

    def pairs(signs):
        return ((counts @ signs) * counts).sum(axis=-1)

    size = np.sqrt(pairs(a * a) * pairs(b * b))
    return pairs(a * b) / np.where(size > 0, size, 1.0)


def partial(xy: np.ndarray, xc: np.ndarray, yc: np.ndarray) -> np.ndarray:
    """Partial tau of x and y given c; 0 where c explains one of them wholly."""
    rest = np.sqrt(np.maximum((1 - xc**2) * (1 - yc**2), 0.0))
    return (xy - xc * yc) / np.where(rest > 1e-9, rest, np.inf)


def correlations(
    cells: Mapping[str, Sequence[Row]],
    pools: Mapping[str, Sequence[str]],
    measures: Sequence[str],
    targets: Sequence[str],
    *,
    control: str | None = None,
) -> list[Row]:
    """Tau in every pool and cell, with percentile intervals of 95 %.

    Rows name their `configuration`. With a `control` the taus are partial ones, given
    it.
    """
    known = {row["configuration"] for rows in cells.values() for row in rows}
    places = {name: i for i, name in enumerate(sorted(known))}
    drawn = np.random.default_rng(0).multinomial(
        len(places), [1 / len(places)] * len(places), RESAMPLES
    )
    drawn = np.concatenate([np.ones((1, len(places))), drawn])  # first all runs
    result = []
    for target, measure in itertools.product(targets, measures):
        keys = (measure, target, *([control] if control else []))
        found = {}
        for cell, rows in cells.items():
            runs = [row for row in rows if finite(row, *keys)]
            counts = drawn[:, [places[row["configuration"]] for row in runs]]
            x, y, *c = (np.array([row[key] for row in runs]) for key in keys)
            tau = taus(x, y, counts)
            if control:
                tau = partial(tau, taus(x, c[0], counts), taus(y, c[0], counts))
            found[cell] = tau
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


def markdown(found: Sequence[Row], pools: Iterable[str], title: str) -> str:
    """For each target a table: a line per measure, a column per pool."""
    measures, targets = (
        list(dict.fromkeys(row[key] for row in found)) for key in ("measure", "target")
    )
    entries = {
        (row["target"], row["measure"], row["cell"]): (
            f"{row['tau']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        )
        for row in found
    }
    text = ""
    for target in targets:
        lines = [["measure", *pools]]
        lines.append(["---"] + ["---:"] * (len(lines[0]) - 1))
        lines += [
            [m.replace("_", " "), *(entries[target, m, pool] for pool in pools)]
            for m in measures
        ]
        text += f"### {title} with the {target.replace('_', ' ')}\n\n"
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    return text


def picture(
    found: Sequence[Row], pools: Mapping[str, Sequence[str]], path: Path
) -> None:
    """A dot for each pool, with its interval; a tick for each of its cells."""
    measures, targets = (
        list(dict.fromkeys(row[key] for row in found)) for key in ("measure", "target")
    )
    colours = dict(zip(pools, COLOURS, strict=False))
    shifts = dict(zip(pools, np.linspace(-0.2, 0.2, len(pools)), strict=True))
    figure, panels = plt.subplots(
        1,
        len(targets),
        figsize=(10.5, 5),
        layout="constrained",
        sharey=True,
        sharex=True,
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
