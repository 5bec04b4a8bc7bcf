"""What the measures look like: panels and whole reports."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_flat._core import figures
from optax_flat.flatness.density import Density
from optax_flat.flatness.landscape import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from optax_flat.flatness._report import Report

_DECADES = 7  # below the peak: one eigenvalue out of some millions is seen


def draw_densities(axes: "Axes", densities: Mapping[str, Density]) -> list[Any]:
    """The densities and a line at zero; returns what a legend needs."""
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    handles, peak = [], 0.0
    for i, (name, (grid, density)) in enumerate(densities.items()):
        style = {"label": name, "linewidth": 1.4, **figures.style(i)}
        handles += axes.plot(np.asarray(grid), np.asarray(density), **style)
        peak = max(peak, float(np.nanmax(density)))
    figures.plain(axes)
    axes.set_yscale("log")
    if 0.0 < peak < np.inf:
        axes.set_ylim(peak * 10.0**-_DECADES, 2.0 * peak)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density")
    return handles


def draw_lines(axes: "Axes", lines: Mapping[str, Line]) -> list[Any]:
    """The curves and where the params are; returns what a legend needs."""
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    handles = []
    for i, (name, line) in enumerate(lines.items()):
        a, losses = np.asarray(line.positions), np.asarray(line.losses)
        handles += axes.plot(a, losses, label=name, linewidth=1.8, **figures.style(i))
    figures.plain(axes)
    axes.set_xlabel("position along the direction")
    axes.set_ylabel("loss")
    return handles


# Panels by measure: a title and how to draw it.
_PANELS = {
    "spectral_density": ("Spectrum of the Hessian", draw_densities),
    "eigenvector_line": ("Along the first eigenvector", draw_lines),
    "random_line": ("Along a random direction", draw_lines),
}


def draw_reports(reports: Mapping[str, "Report"]) -> "Figure":
    """A figure of the numbers and of every curve that all reports have."""
    panels = []
    for measure, (title, draw) in _PANELS.items():
        found = {name: getattr(report, measure) for name, report in reports.items()}
        if all(value is not None for value in found.values()):
            panels.append((title, draw, found))
    rows = 1 + len(panels) // 2
    figure = figures.new_figure(8.0, 3.6 * rows)
    axes = figure.add_subplot(rows, 2, 1)
    axes.set_title("Measures", fontsize=11)
    _draw_numbers(axes, reports)
    for i, (title, draw, found) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 2)
        axes.set_title(title, fontsize=11)
        draw(axes, found)
    return figure


def _draw_numbers(axes: "Axes", reports: Mapping[str, "Report"]):
    tables = {name: report.numbers() for name, report in reports.items()}
    shown = dict.fromkeys(
        measure
        for table in tables.values()
        for measure, number in table.items()
        if number.value > 0
    )
    places = {measure: i for i, measure in enumerate(reversed(shown))}
    for i, table in enumerate(tables.values()):
        found = {m: number for m, number in table.items() if number.value > 0}
        shift = 0.2 * (i - (len(tables) - 1) / 2)
        axes.errorbar(
            [number.value for number in found.values()],
            [places[measure] - shift for measure in found],
            xerr=[2.0 * number.standard_error for number in found.values()],
            linestyle="none", marker=figures.marker(i), markersize=5,
            color=figures.style(i)["color"], markeredgecolor="white",
        )  # fmt: skip
    figures.plain(axes)
    axes.set_xscale("log")
    axes.set_yticks(
        list(places.values()), [name.replace("_", " ") for name in places], fontsize=8
    )
    axes.set_xlabel("value")
