"""Reports of minima, one or several side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optax_flat._core import figures
from optax_flat.flatness import Report
from optax_flat.flatness._pictures import draw_reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
      ImportError: matplotlib, the extra `plot`, is missing.

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
    figures.check_kinds("reports", named, Report, "optax_flat.flatness.Report")
    figure = draw_reports(named)
    if named is reports:
        figures.legend_above(figure, _handles(named))
    return figure


def _handles(names):
    """The marks of the first panel on the lines of the others."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], label=name, marker=figures.marker(i), **figures.style(i))
        for i, name in enumerate(names)
    ]
