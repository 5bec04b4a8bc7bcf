"""Schedules of the methods' own hyperparameters.

Each is a function of a count and computes in the default float dtype. Inside a method
the count is that of *outer* updates, in both modes.
"""

import jax.numpy as jnp
import optax

from optax_flat._core import checks


def scoping(gamma: float, scoping: float) -> optax.Schedule:
    r"""Exponentially growing stiffness of the local-entropy spring.

    .. math::
        \gamma_t = \gamma (1 + \text{scoping})^t

    Args:
      gamma: the value at count 0, >= 0.
      scoping: growth per outer update, > -1. 0 keeps gamma constant.

    Returns:
      A schedule, finite at every count.

    Raises:
      ValueError: gamma negative, or scoping not above -1.

    Example:
      >>> from optax_flat import schedules
      >>> gamma = schedules.scoping(0.03, scoping=1e-3)
      >>> abs(float(gamma(1000)) / 0.03 - 1.001 ** 1000) < 1e-5
      True

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent Into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, 2017, section 4.3.
    """
    checks.number("gamma", gamma, 0.0)
    checks.number("scoping", scoping, -1.0, open_low=True)

    def schedule(count):
        # exp and log1p: (1 + scoping) ** count loses digits as count grows. The growth
        # stays finite, so that gamma = 0 and a step size of 0 never meet infinity.
        exponent = jnp.asarray(count, float) * jnp.log1p(scoping)
        largest = jnp.finfo(exponent.dtype).max
        growth = jnp.exp(jnp.minimum(exponent, jnp.log(largest) - 1.0))
        return jnp.minimum(gamma * growth, largest)

    return schedule
