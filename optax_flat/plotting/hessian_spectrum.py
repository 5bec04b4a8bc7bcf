"""The density of a Hessian's eigenvalues."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_flat.flatness import Density
from optax_flat.plotting import _figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 7  # below the peak: one eigenvalue out of some millions is seen


def spectrum(densities: Density | Mapping[str, Density]) -> "Figure":
    """Draws one or several densities of eigenvalues, with a logarithmic density.

    Most eigenvalues of a network are near zero; on the logarithmic axis the few large
    ones, and the negative ones left of the vertical line, are seen beside them. Each
    eigenvalue is drawn as wide as `spectral_density` has smoothed it: what a peak at
    zero spreads to the left is not negative curvature.

    Args:
      densities: what `optax_flat.flatness.spectral_density` returned, or several by
        name.

    Returns:
      A figure 7 inches wide, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: something that is no `Density`.
      ValueError: an empty mapping.
      ImportError: matplotlib is missing: ``pip install 'optax_flat[plot]'``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import spectral_density
      >>> from optax_flat.plotting import spectrum
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> density = spectral_density(
      ...     loss_fn, jnp.ones(4), jnp.array([-1.0, 0.0, 0.0, 3.0]),
      ...     num_matvecs=3, num_samples=1, key=0)
      >>> spectrum(density).axes[0].get_yscale()
      'log'
    """
    named = {"": densities} if isinstance(densities, Density) else densities
    _figure.check_kinds("densities", named, Density, "optax_flat.flatness.Density")
    figure = _figure.new_figure(7.0, 4.2)
    handles = draw_densities(figure.add_subplot(), named)
    if named is densities:
        _figure.legend_above(figure, handles)
    return figure


def draw_densities(axes: "Axes", densities: Mapping[str, Density]) -> list[Any]:
    """The densities and a line at zero; returns what a legend needs."""
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    handles, peak = [], 0.0
    for i, (name, (grid, density)) in enumerate(densities.items()):
        style = {"label": name, "linewidth": 1.4, **_figure.style(i)}
        handles += axes.plot(np.asarray(grid), np.asarray(density), **style)
        peak = max(peak, float(np.nanmax(density)))
    _figure.plain(axes)
    axes.set_yscale("log")
    if 0.0 < peak < np.inf:
        axes.set_ylim(peak * 10.0**-_DECADES, 2.0 * peak)
    axes.set_xlabel("eigenvalue of the Hessian")
    axes.set_ylabel("density")
    return handles
