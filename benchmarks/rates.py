"""One free rate per method: `--select` chooses it by validation, later runs use it."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.harness import (
    SELECTION_SEED,
    Row,
    Rows,
    curves,
    parser,
    read_json,
    table,
    write_json,
    write_table,
)
from benchmarks.images import Images, hold_out

SELECTION = "selection.json"


class Method(Protocol):
    """What a method says of its rate."""

    @property
    def rates(self) -> tuple[float, ...]:
        """The grid of `--select`."""
        ...

    @property
    def rate(self) -> float:
        """What is used without a selection."""
        ...


class Study(NamedTuple):
    """What a script compares."""

    name: str  # of the picture
    methods: Mapping[str, Method]
    # Of a method's name, a rate, images, a seed, and a file for a log.
    train: Callable[[str, float, Images, int, Path], Row]
    settings: Mapping[str, Any]  # "validation" tells how many images are held out
    measures: tuple[str, ...]


def options_of(
    script: str | None, methods: Mapping[str, Method], name: str
) -> argparse.ArgumentParser:
    """The options of a script with images, and `--select`."""
    result = parser(script, methods, seeds=3, out=f"out/{name}", data=True)
    result.add_argument(
        "--select", action="store_true", help="choose the rates by validation, and stop"
    )
    return result


def select_or_run(study: Study, images: Images, options: argparse.Namespace) -> None:
    """Chooses the rates, or runs what is missing and writes table and picture."""
    if options.select:
        select(study, hold_out(images, study.settings["validation"]), options)
        return
    rates = {name: method.rate for name, method in study.methods.items()}
    rates |= read_json(options.out / SELECTION, {})
    rows = Rows(options.out, {**study.settings, "rates": rates})
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        log = options.out / "history" / f"{name}-{seed}.json"
        rows.record(name, seed, study.train(name, rates[name], images, seed, log))
    write_table(table(rows, study.measures), options.out)
    curves(rows, options.out / f"{study.name}.png")


def select(study: Study, images: Images, options: argparse.Namespace) -> None:
    """Writes the rate with the smallest error of every method.

    The seed is one that is not used again.
    """
    folder = options.out / "selection"
    rows = Rows(folder, study.settings)
    runs = {
        f"{name}/{rate}": (name, rate)
        for name in options.methods
        for rate in study.methods[name].rates
    }
    for run, seed in rows.pending(list(runs), [SELECTION_SEED]):
        name, rate = runs[run]
        log = folder / "history" / f"{name}-{rate}.json"
        try:
            row = study.train(name, rate, images, seed, log)
        except FloatingPointError:  # the loss became NaN
            spent = {"gradient_evaluations": 0, "forward_passes": 0, "seconds": 0.0}
            row = {**spent, "error_percent": 100.0}
        rows.record(run, seed, row)
    best: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: row["error_percent"]):
        name, rate = runs[row["method"]]
        best.setdefault(name, rate)
    write_json(options.out / SELECTION, best)
    print(table(rows, study.measures))
