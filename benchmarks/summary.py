"""One matrix of all situations: better, same or worse than the best baseline.

Reads the summary.jsonl of every folder of results (see situations.py), and the rows of
label_noise.py, of which it makes the same lines: the baseline is sgd or adam, whichever
was better by validation at the end of a run, and the accuracy is that at the end. Its
grids were fixed, so that `at_edge` is told for them too.

    python benchmarks/summary.py --results results --out results/summary
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from harness import COLOURS, Row, read_json, write_json, write_table
from label_noise import METHODS, Run, accuracies, chosen, differences
from matplotlib.patches import Rectangle
from situations import interval, verdict

BASELINES = ("sgd", "adam")  # of label_noise.py
SHADES = {"better": COLOURS[2], "worse": COLOURS[1], "same": "#E8E8E8"}


def label_noise_lines(folder: Path) -> list[Row]:
    """The rows of label_noise.py as lines of a summary."""
    rows = read_json(folder / "rows.json", [])
    tried = read_json(folder / "selection" / "rows.json", [])
    places = dict.fromkeys((row["data"], row["percent"]) for row in rows)
    return [line for place in places for line in label_noise_cell(place, rows, tried)]


def label_noise_cell(
    place: tuple[str, int], rows: Sequence[Row], tried: Sequence[Row]
) -> list[Row]:
    """Those of one data set and part of wrong labels."""
    found = accuracies(rows, "end")
    runs = {name: Run(*place, name) for name in METHODS if (*place, name) in found}
    validated = {row["method"]: row["validation_accuracies"][-1] for row in tried}
    best = {name: chosen(tried, run)["end"] for name, run in runs.items()}
    scores = {n: validated[f"{run.name}/{best[n].name}"] for n, run in runs.items()}
    baseline = max(BASELINES, key=lambda name: scores[name])
    lines = []
    for name in runs:
        gains = differences(found, *place, name, baseline)
        mean, low, high = interval(gains)
        rates = [candidate.rate for candidate in METHODS[name].candidates]
        lines.append({
            "situation": "label_noise", "cell": f"{place[0]}-{place[1]}",
            "measure": "accuracy", "method": name, "baseline": baseline,
            "seeds": len(gains), "gain": mean, "low": low, "high": high,
            "verdict": "baseline" if name == baseline else verdict(low, high),
            "at_edge": best[name].rate in (min(rates), max(rates)),
        })  # fmt: skip
    return lines


def all_lines(results: Path) -> list[Row]:
    """Of all folders, in the order of their names."""
    lines = label_noise_lines(results / "label_noise")
    for path in sorted(results.glob("*/summary.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    return lines


def matrix(lines: Iterable[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """By situation, cell and measure: method to its line."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for line in lines:
        place = (line["situation"], line["cell"], line["measure"])
        found.setdefault(place, {})[line["method"]] = line
    return found


def table(found: Any, methods: Sequence[str]) -> str:
    """Markdown: a line per situation, cell and measure, a column per method."""
    head = ["situation", "cell", "measure", "baseline", *methods]
    text = f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |\n"
    for place, of in found.items():
        baseline = next(iter(of.values()))["baseline"]
        cells = [cell(of[name]) if name in of else "" for name in methods]
        text += f"| {' | '.join([*place, baseline, *cells])} |\n"
    return text


def cell(line: Row) -> str:
    """The verdict with the interval of the gain; a star: the rate was at an edge."""
    star = "*" if line["at_edge"] else ""
    if line["verdict"] == "baseline" or line["low"] is None:
        return line["verdict"] + star
    return f"{line['verdict']}{star} {line['low']:+.2g} to {line['high']:+.2g}"


def picture(found: Any, methods: Sequence[str], path: Path) -> None:
    """The verdicts as colours, the mean gains as numbers."""
    figure, axes = plt.subplots(
        figsize=(2.6 + 0.75 * len(methods), 1.2 + 0.28 * len(found)),
        layout="constrained",
    )
    for (y, of), (x, name) in itertools.product(
        enumerate(found.values()), enumerate(methods)
    ):
        if name not in of:
            continue
        line = of[name]
        if line["verdict"] == "baseline":
            axes.text(x, y, "base", ha="center", va="center", fontsize="x-small")
            continue
        colour = SHADES[line["verdict"]]
        axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, color=colour))
        number = f"{line['gain']:+.2g}"
        axes.text(x, y, number, ha="center", va="center", fontsize="x-small")
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylim(len(found) - 0.5, -0.5)
    names = [name.replace("_", " ") for name in methods]
    axes.set_xticks(range(len(methods)), names, rotation=40, ha="left")
    axes.xaxis.tick_top()
    places = [" ".join(place).replace("_", " ") for place in found]
    axes.set_yticks(range(len(found)), places, fontsize="small")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=c, label=v) for v, c in SHADES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Writes summary.json, table.md and summary.png."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--results", type=Path, default=Path("results"), metavar="DIR")
    options.add_argument("--out", type=Path, default=Path("results/summary"))
    given = options.parse_args()
    lines = all_lines(given.results)
    found = matrix(lines)
    methods = list(dict.fromkeys(line["method"] for line in lines))
    write_json(given.out / "summary.json", lines)
    write_table(table(found, methods), given.out)
    picture(found, methods, given.out / "summary.png")


if __name__ == "__main__":
    main()
