r"""Local energy: how far the loss rises on average if every weight is off by a little.

E_z f(w + sigma z w) - f(w),        z ~ N(0, I), products elementwise
"""

from typing import Any

import jax
import optax

from optax_flat._core import checks
from optax_flat.flatness import _points
from optax_flat.flatness._batches import LossFn
from optax_flat.flatness.curvature import Estimate


def local_energy(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    sigma: float,
    num_samples: int = 32,
    batch_size: int | None = 8,
    fast_convolutions: bool = True,
    key: jax.typing.ArrayLike,
) -> Estimate:
    r"""Mean rise of the loss under multiplicative noise on the weights.

    .. math::
        \mathrm{E}_z\, f(w + \sigma z \odot w) - f(w), \qquad z \sim N(0, I)

    Flat minima rise little. Each sample is the mean over z and -z, in which the
    gradient cancels; to second order the expectation is :math:`\sigma^2 / 2 \sum_i
    H_{ii} w_i^2`. Two forward passes per sample.

    Cost:
      `2 * num_samples + 1` forward passes over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: w, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other iterable of batches,
        over whose examples the loss is the mean. One pass over them is made.
      sigma: :math:`\sigma`, the noise relative to each weight, > 0.
      num_samples: pairs z and -z, >= 2.
      batch_size: how many samples are evaluated at a time; None is all of them.
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.
      key: a typed or raw PRNG key, or an int.

    Returns:
      `Estimate`: the rise and its standard error, both []. The error is over the
      samples, and in quadrature the rounding of f(w), eps f(w), which they share.

    Raises:
      ValueError: an argument outside the range given above, or a loss with noise.
      TypeError: an argument of the wrong type.

    Example:
      Of two minima with the same curvature the one at larger weights is sharper:

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import local_energy
      >>> def loss_fn(w, minimum):
      ...     return jnp.sum((w - minimum) ** 2)
      >>> near, far = (
      ...     local_energy(loss_fn, w, w, sigma=0.1, num_samples=400, key=0).value
      ...     for w in (jnp.ones(5), 2 * jnp.ones(5)))
      >>> bool(jnp.isclose(near, 0.1 ** 2 * 5, rtol=0.1) & jnp.isclose(far, 4 * near))
      True

    References:
      Pittorino et al., `Entropic gradient descent algorithms and wide flat minima
      <https://arxiv.org/abs/2006.07897>`_, ICLR 2021.

    Differs from the paper:
      It measures the training error, which is a step function, where this is of any
      loss; a `loss_fn` that returns the error gives theirs.
    """
    sigma = checks.constant("sigma", sigma, 0.0, open_low=True)
    batch_size = _points.check_batch_size(batch_size)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    batches, w = _points.prepare(loss_fn, params, batches, one_pass=True)
    return _points.average_rise(
        w, batches, sigma, key, loss_fn=loss_fn, num_samples=num_samples,
        law="normal", adaptive=True, batch_size=batch_size,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
