"""Reports of minima, one or several side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optax_flat.flatness import Report
from optax_flat.plotting import _figure
from optax_flat.plotting.hessian_spectrum import draw_densities
from optax_flat.plotting.loss_landscape import draw_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels by measure: a title and how to draw it.
_PANELS = {
    "spectral_density": ("Spectrum of the Hessian", draw_densities),
    "eigenvector_line": ("Along the first eigenvector", draw_lines),
    "random_line": ("Along a random direction", draw_lines),
}


def report(reports: Report | Mapping[str, Report]) -> "Figure":
    """Draws one or several reports: the measures, the spectrum and the slices.

    The first panel has every measure that is a positive number, with bars of two
    standard errors where they are known; what is not positive, such as most smallest
    eigenvalues, is left to the table. Measures that were not asked for are left out.

    Args:
      reports: what `optax_flat.flatness.report` returned, or several by name.

    Returns:
      A figure 8 inches wide, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: something that is no `Report`.
      ValueError: an empty mapping, or reports without any measure.
      ImportError: matplotlib is missing: ``pip install 'optax_flat[plot]'``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import flatness
      >>> from optax_flat.plotting import report
      >>> def loss_fn(w, curvature):
      ...     return jnp.sum(curvature * w ** 2) / 2
      >>> found = flatness.report(
      ...     loss_fn, jnp.ones(2), jnp.array([1.0, 9.0]), key=0,
      ...     measures=("trace", "random_line"))
      >>> [axes.get_title() for axes in report(found).axes]
      ['Measures', 'Along a random direction']
    """
    named = {"": reports} if isinstance(reports, Report) else reports
    _figure.check_kinds("reports", named, Report, "optax_flat.flatness.Report")
    panels = []
    for measure, (title, draw) in _PANELS.items():
        found = {name: getattr(report, measure) for name, report in named.items()}
        if all(value is not None for value in found.values()):
            panels.append((title, draw, found))
    rows = 1 + len(panels) // 2
    figure = _figure.new_figure(8.0, 3.6 * rows)
    axes = figure.add_subplot(rows, 2, 1)
    axes.set_title("Measures", fontsize=11)
    _draw_numbers(axes, named)
    for i, (title, draw, found) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, i + 2)
        axes.set_title(title, fontsize=11)
        draw(axes, found)
    if named is reports:
        _figure.legend_above(figure, _handles(named))
    return figure


def _handles(names):
    """The marks of the first panel on the lines of the others."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], label=name, marker=_figure.marker(i), **_figure.style(i))
        for i, name in enumerate(names)
    ]


def _draw_numbers(axes: "Axes", reports: Mapping[str, Report]):
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
            linestyle="none", marker=_figure.marker(i), markersize=5,
            color=_figure.style(i)["color"], markeredgecolor="white",
        )  # fmt: skip
    _figure.plain(axes)
    axes.set_xscale("log")
    axes.set_yticks(
        list(places.values()), [name.replace("_", " ") for name in places], fontsize=8
    )
    axes.set_xlabel("value")
