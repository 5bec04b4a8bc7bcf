r"""Anti-PGD: gradient descent with noise that is taken out again.

    x <- x - learning_rate g + (xi_{t+1} - xi_t),    xi = noise z

Ordinary noise xi_{t+1} alone adds up to a random walk; here each draw is replaced by
the next, so that x = v + xi stays as near to v as one draw. With v = x - xi the rule is
v <- v - learning_rate grad f(v + xi): in the mean, descent on

    f + noise^2 / 2 tr H

to leading order, of which H is the Hessian: along a valley whose floor is level, v goes
to where the trace is small.

Paper: Orvieto et al., arXiv 2202.02831 (ICML 2022).
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, keys
from optax_flat._core.arguments import NoiseArguments, factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at, is_zero
from optax_flat._core.noise import KINDS, draw


class AntiPGDState(NamedTuple):
    """State of `anti_pgd`."""

    metrics = ("count", "noise")

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    noise: jax.Array  # float, [], the deviation of the draw in the params; 0 at first


@factory
def anti_pgd(
    learning_rate: optax.ScalarOrSchedule,
    noise: optax.ScalarOrSchedule,
    **draws: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent with anticorrelated noise, which prefers a small trace.

    .. math::
        x \leftarrow x - \eta_t g + (\xi_{t+1} - \xi_t), \qquad \xi_{t+1} = \sigma_t z

    with :math:`\sigma` = `noise` and :math:`\xi_0 = 0`. :math:`v = x - \xi` descends
    :math:`f + \sigma^2 / 2\, \mathrm{tr}\, H` in the mean. One gradient evaluation per
    update, and no buffer: the old draw is made once more from the key.

    The params, and so `eval_params`, are x, a draw away from v. Let `noise` be a
    schedule that ends at 0: an update without noise takes the last draw out, and the
    params are v. The noise stays in the params, so whatever scales or clips updates
    belongs in front, and the params should be in float32, where rounding leaves little
    of a draw behind.

    Cost:
      1 gradient per update; state: 0 copies of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      noise: :math:`\sigma`, >= 0, the deviation of the draws. 0 is plain SGD.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      f = (a b)^2 / 2 is least wherever a or b is 0. Along the valley b = 0 the trace of
      the Hessian is a^2: the noise makes a smaller, and gradient descent does nothing:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad = jax.grad(lambda x: jnp.sum(jnp.prod(x, axis=0) ** 2) / 2)
      >>> noise = optax.piecewise_constant_schedule(0.2, {499: 0.0})
      >>> tx = optax_flat.anti_pgd(0.1, noise, key=0)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(grad(x), state)
      ...     return (optax.apply_updates(x, updates), state), None
      >>> x = jnp.array([[1.0], [0.0]]) * jnp.ones(1000)  # 1000 runs, a and b
      >>> (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=500)
      >>> bool(abs(x[0].mean() - (1 - 0.1 * 0.2**2) ** 500) < 0.05)
      True

    References:
      Orvieto et al., `Anticorrelated Noise Injection for Improved Generalization
      <https://arxiv.org/abs/2202.02831>`_, 2022.

    Differs from the paper:
      It begins without a draw, :math:`\xi_0 = 0`, so v begins at the params.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("noise", noise, 0.0)
    noise_kind = checks.choice("noise_kind", draws["noise_kind"], KINDS)
    key = checks.key(draws["key"])
    noiseless = is_zero(noise)

    def init(x):
        del x
        count, none = jnp.zeros([], jnp.int32), jnp.zeros([], float)
        return AntiPGDState(count, keys.data(key), none)

    def step(state, grads, x, **extra_args):
        del x, extra_args
        t, count = state.count, counted(state.count)
        rate, sigma = at(learning_rate, t), jnp.full_like(state.noise, at(noise, t))
        steps = jax.tree.map(lambda g: -rate * g, grads)
        if not noiseless:
            old, new = (
                draw(keys.fold_in(state.key, n, key), steps, noise_kind, scale)
                for n, scale in ((t, state.noise), (count, sigma))
            )
            steps = jax.tree.map(lambda s, a, b: s + (b - a), steps, old, new)
        return steps, AntiPGDState(count, state.key, sigma)

    return by_gradient(init, step)
