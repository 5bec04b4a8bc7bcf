"""The density of a Hessian's eigenvalues."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optax_flat._core import figures
from optax_flat.flatness import Density
from optax_flat.flatness._pictures import draw_densities

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
      ImportError: matplotlib, the extra `plot`, is missing.

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
    figures.check_kinds("densities", named, Density, "optax_flat.flatness.Density")
    figure = figures.new_figure(7.0, 4.2)
    handles = draw_densities(figure.add_subplot(), named)
    if named is densities:
        figures.legend_above(figure, handles)
    return figure
