"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, extras
from optax_flat.flatness import _batches, _hessian
from optax_flat.flatness._lanczos import lanczos


class Density(NamedTuple):
    """What `spectral_density` returns; P is the number of points.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import spectral_density
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> grid, density = spectral_density(
      ...     loss_fn, jnp.ones(2), jnp.array([0.0, 1.0]),
      ...     num_matvecs=2, num_samples=1, key=0)
      >>> float(jnp.trapezoid(jnp.where(grid > 0.5, density, 0.0), grid).round(3))
      0.5
    """

    grid: jax.Array  # [P], equally spaced
    density: jax.Array  # [P], integrates to 1


def spectral_density(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_matvecs: int,
    num_samples: int,
    key: Any,
    sigma: float = 0.01,
    num_points: int = 1000,
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Density:
    r"""The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    .. math::
        p(t) = \frac{1}{S} \sum_{s=1}^{S} \sum_{i=1}^{m} w_{si} \,
            \mathcal{N}(t;\, \theta_{si}, (\sigma R)^2)
        \approx \frac{1}{n} \sum_{j=1}^{n} \mathcal{N}(t;\, \lambda_j, (\sigma R)^2),

    with :math:`S` = `num_samples`, :math:`m` = `num_matvecs`, :math:`\sigma` = `sigma`,
    :math:`\lambda_j` the n eigenvalues and :math:`R` the spectral range, from the
    smallest to the largest :math:`\theta` (but at least a tenth of the largest
    :math:`|\theta|`, and 1 if all are 0). The nodes :math:`\theta_{si}` and weights
    :math:`w_{si}` are those of the Gauss quadrature that Lanczos' method makes of a
    random :math:`v_s \in \{-1, 1\}^n`.

    On the grid p integrates to 1; its mean is :math:`v_s^\top H v_s / n` averaged over
    the draws, that is, with the same key and number of samples, exactly `trace` / n.

    It takes :math:`S m` Hessian-vector products and holds :math:`m` vectors like the
    params.

    Cost:
      `num_samples * num_matvecs` Hessian-vector products over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, a scalar.
      params: where the Hessian is taken, any tree of floating-point arrays; n is their
        number.
      batches: one batch, or a list or another re-iterable of many.
      num_matvecs: :math:`m`, products per draw, >= 1; no more than n are made.
      num_samples: :math:`S`, draws, >= 1.
      key: PRNG key, typed or raw, or an int seed.
      sigma: :math:`\sigma`, the width of each line as a fraction of the range, in
        (0, 1].
      num_points: points of the grid, at least 1 / sigma + 13, so that they are no
        further apart than a line is wide.
      progress: whether many batches show a progress bar (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Density`, two arrays [num_points] of at least float32; the grid reaches six
      widths beyond the outermost nodes.

    Raises:
      TypeError: a count that is no int, `sigma` no float, a one-shot iterator, and as
        in `hvp`.
      ValueError: a setting outside the range given above, and as in `hvp`.
      ImportError: the extra `flatness` is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import spectral_density
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> exact = jnp.array([-1.0, 0.0, 0.0, 3.0])
      >>> grid, density = spectral_density(
      ...     loss_fn, jnp.ones(4), exact, num_matvecs=3, num_samples=1, key=0)
      >>> float(jnp.trapezoid(density, grid).round(3))
      1.0
      >>> float(jnp.trapezoid(grid * density, grid).round(3))  # trace / n
      0.5

    References:
      Ghorbani, Krishnan and Xiao, `An investigation into neural net optimization via
      Hessian eigenvalue density <https://arxiv.org/abs/1901.10159>`_, 2019; `code
      <https://github.com/google/spectral-density>`_.

    Differs from the paper:
      The vectors are signs instead of normal draws, which makes the variance smaller.
      In the published code `sigma_squared` times the range is the *variance*, and a run
      whose Krylov space is exhausted turns NaN; here it stops there, which is exact.
    """
    num_matvecs = checks.integer("num_matvecs", num_matvecs, 1)
    num_samples = checks.integer("num_samples", num_samples, 1)
    sigma = checks.constant("sigma", sigma, 0.0, 1.0, open_low=True)
    num_points = checks.integer("num_points", num_points, math.ceil(1 / sigma) + 13)
    checks.float_params(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    settings = (min(num_matvecs, size), num_samples)
    nodes, weights = _hessian.run(
        _quadratures, loss_fn, params, batches,
        key=key, settings=settings, progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    return _smooth(nodes, weights, sigma, num_points)


def _quadratures(hessian, key, num_matvecs, num_samples):
    """Nodes and weights of every draw, each [num_samples, num_matvecs]."""
    stochtrace = extras.load("matfree.stochtrace", "flatness", "spectral_density")
    draw = stochtrace.sampler_signs(jnp.zeros(hessian.size, hessian.dtype), num=1)

    def one_draw(key):
        ritz = lanczos(hessian.matvec, draw(key)[0], num_matvecs)
        _, high = ritz.ends()
        nodes = jnp.where(ritz.live, ritz.values, high)
        return nodes, jnp.where(ritz.live, ritz.coefficients[0] ** 2, 0.0)

    return jax.lax.map(one_draw, jax.random.split(key, num_samples))


@functools.partial(jax.jit, static_argnames="num_points")
def _smooth(nodes, weights, sigma, num_points) -> Density:
    low, high, largest = nodes.min(), nodes.max(), jnp.abs(nodes).max()
    extent = jnp.maximum(high - low, 0.1 * largest)
    width = sigma * jnp.where(extent == 0.0, 1.0, extent)
    grid = jnp.linspace(low - 6.0 * width, high + 6.0 * width, num_points)

    lines = jax.scipy.stats.norm.pdf(grid, nodes.ravel()[:, None], width)
    return Density(grid, weights.ravel() @ lines / len(nodes))
