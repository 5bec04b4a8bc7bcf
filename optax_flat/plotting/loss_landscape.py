"""Losses along lines and over a plane of parameter space."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from optax_flat._core import figures
from optax_flat.flatness import Line, Plane
from optax_flat.flatness._pictures import draw_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEVELS = 16
_DECADES = 4  # of the rise over the lowest loss


def landscape(
    losses: Line | Mapping[str, Line] | Plane,
    *,
    points: Mapping[str, ArrayLike] | None = None,
    log_scale: bool = False,
) -> "Figure":
    """Draws the loss along one or several lines, or over a plane.

    A plane has filled contours, whose levels are evenly spaced in the logarithm of the
    rise over the lowest loss: darker is lower, in the colours of matplotlib's viridis,
    told apart with any kind of colour vision. Losses that are NaN or infinite stay
    white.

    Args:
      losses: what `optax_flat.flatness.line` or `plane` returned, or lines by name.
      points: of a plane, positions (x, y) to mark, by name, such as solutions; or None.
      log_scale: of lines, whether the loss is on a logarithmic axis.

    Returns:
      A figure at most 8 inches wide, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: something that is neither a line nor a plane.
      ValueError: an empty mapping, points that are no pairs, or points of a line.
      ImportError: matplotlib, the extra `plot`, is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import line
      >>> from optax_flat.plotting import landscape
      >>> def loss_fn(w, curvature):
      ...     return curvature * jnp.sum(w ** 2) / 2
      >>> lines = {
      ...     name: line(loss_fn, jnp.zeros(2), c, direction=jnp.array([1.0, 0.0]))
      ...     for name, c in {"flat": jnp.array(1.0), "sharp": jnp.array(9.0)}.items()}
      >>> landscape(lines).axes[0].get_ylabel()
      'loss'
    """
    if isinstance(losses, Plane):
        return _plane(losses, points or {})
    if points is not None:
        raise ValueError(f"`points` are of a plane, got {points!r} with lines.")
    lines = {"": losses} if isinstance(losses, Line) else losses
    figures.check_kinds("losses", lines, Line, "optax_flat.flatness.Line")
    figure = figures.new_figure(7.0, 4.2)
    handles = draw_lines(figure.add_subplot(), lines)
    if log_scale:
        figure.axes[0].set_yscale("log")
    if lines is losses:
        figures.legend_above(figure, handles)
    return figure


def _plane(plane, points):
    pairs = {name: np.asarray(point, float) for name, point in points.items()}
    if any(pair.shape != (2,) for pair in pairs.values()):
        raise ValueError(f"`points` must be pairs (x, y) by name, got {points!r}.")
    figure = figures.new_figure(7.0, 5.0)
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap

    axes = figure.add_subplot()
    x, y = np.asarray(plane.x), np.asarray(plane.y)
    losses = np.ma.masked_invalid(np.asarray(plane.losses, float))
    levels = _levels(losses)
    if len(levels) > 1:
        shades = np.linspace(0.0, 1.0, len(levels) - 1)
        colours = ListedColormap(matplotlib.colormaps["viridis"](shades))
        norm = BoundaryNorm(levels, colours.N)
        drawn = axes.contourf(x, y, losses, levels, cmap=colours, norm=norm)
        axes.contour(x, y, losses, levels, colors="white", linewidths=0.4)
        # As wide in the bar as each other, whatever the levels.
        bar = figure.colorbar(drawn, ax=axes, spacing="uniform", ticks=levels[::4])
        bar.minorticks_off()
        bar.ax.set_yticklabels([f"{level:.2g}" for level in levels[::4]])
        bar.set_label("loss")
    for i, (name, pair) in enumerate(pairs.items()):
        axes.plot(
            *pair, marker=figures.marker(i), markersize=9, linestyle="none",
            color="white", markeredgecolor="black", label=name,
        )  # fmt: skip
    axes.set_xlabel("position along the first direction")
    axes.set_ylabel("position along the second direction")
    if pairs:
        figures.legend_above(figure, axes.get_lines())
    return figure


def _levels(losses):
    """From the lowest to the highest loss, without what is equal in float64."""
    if losses.count() == 0:
        return np.array([])
    low, high = losses.min(), losses.max()
    rises = np.geomspace(10.0**-_DECADES, 1.0, _LEVELS)
    return np.unique(np.append(low, low + (high - low) * rises))
