r"""CoolMomentum: momentum that cools, as simulated annealing by Langevin dynamics.

    dx <- rho_t dx + learning_rate (1 + rho_t) / 2 (g + weight_decay x)
    x  <- x - dx

This is a discrete underdamped Langevin equation in which the noise of the minibatches
plays the heat bath. Its friction grows while rho_t falls to zero, so the run ends in
plain SGD with half the learning rate. The schedules of rho_t are in
`optax_flat.schedules`: exponential_cooling, temperature_cooling, linear_cooling.

Paper: Borysenko and Byshkin, Sci. Rep. 11:10705 (2021), arXiv 2005.14605. Code:
borbysh/coolmomentum. How we differ is at the end of `coolmomentum`'s docstring.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat._core.arguments import factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at, is_zero


class CoolMomentumState(NamedTuple):
    """State of `coolmomentum`."""

    metrics = ("count", "temperature")

    count: jax.Array  # int32, [], updates made
    mu: optax.Updates  # dx, the last step downhill, at least float32

    @property
    def temperature(self) -> jax.Array:
        """Mean of dx^2 over all parameters, [], 0 before the first update."""
        size = sum(leaf.size for leaf in jax.tree.leaves(self.mu))
        return trees.vdot(self.mu, self.mu) / max(size, 1)


@factory
def coolmomentum(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.99,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Simulated annealing by SGD whose momentum cools down to zero.

    .. math::
        \begin{align*}
        \Delta x &\leftarrow \rho_t \Delta x
            + \eta_t \tfrac{1 + \rho_t}{2} (g + \lambda x) \\
        x &\leftarrow x - \Delta x
        \end{align*}

    with :math:`\eta_t` = `learning_rate`, :math:`\rho_t` = `momentum` and
    :math:`\lambda` = `weight_decay`, each a float or a schedule of the update count
    t = 0, 1, 2, ...

    The effective learning rate of a momentum method is the sum over all later steps of
    what one gradient moves, with :math:`\rho` constant
    :math:`\eta (1 + \rho) / (2 (1 - \rho))`. It falls
    from 99.5 :math:`\eta` at :math:`\rho` = 0.99 to :math:`\eta / 2` at the end of the
    cooling, without a schedule of the learning rate itself. The rate and
    :math:`(1 + \rho_t) / 2` are inside the buffer, so a step that was large stays
    large while it decays.

    One gradient evaluation per update. The temperature that the authors plot, the mean
    squared step per parameter, costs nothing until it is read:
    ``optax.tree.get(opt_state, "CoolMomentumState").temperature``, also under `jit`.
    (Under `optax.partition` there may be several such states, for which there is
    `optax.tree.get_all_with_path`; that of a population is read under `jax.vmap`.)

    Cost:
      1 gradient per update; state: 1 copy of the params.

    Args:
      learning_rate: :math:`\eta`, the square of the time step, >= 0.
      momentum: :math:`\rho`, in [0, 1], usually a cooling such as
        ``schedules.exponential_cooling(0.99, total_steps)``.
      weight_decay: :math:`\lambda`, >= 0, added to the gradient (L2 regularization). To
        decay some leaves only, put ``optax.add_decayed_weights(decay, mask)`` in front,
        which is the same.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or, in `update`, a
        `weight_decay` but no params.
      TypeError: an argument of the wrong type.

    Example:
      The momentum falls to zero and the temperature with it, although the gradients
      are as noisy at the end as at the start:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> momentum = optax_flat.schedules.exponential_cooling(0.99, total_steps=400)
      >>> tx = optax_flat.coolmomentum(0.01, momentum)
      >>> def step(carry, key):
      ...     x, state = carry
      ...     grads = x + jax.random.normal(key, x.shape)
      ...     updates, state = tx.update(grads, state)
      ...     return (optax.apply_updates(x, updates), state), state.temperature
      >>> x = jnp.zeros(1000)
      >>> keys = jax.random.split(jax.random.key(0), 500)
      >>> _, temperatures = jax.lax.scan(step, (x, tx.init(x)), keys)
      >>> bool(temperatures[:100].mean() > 30 * temperatures[-100:].mean())
      True

    References:
      Borysenko and Byshkin, `CoolMomentum: a method for stochastic optimization by
      Langevin dynamics with simulated annealing
      <https://arxiv.org/abs/2005.14605>`_, Scientific Reports 11, 10705,
      2021; `code <https://github.com/borbysh/coolmomentum>`_.

    Differs from the paper:
      Nothing while it cools; the momentum stays 0 afterwards. The published files
      disagree with each other, and map to this function as follows, with S steps of
      cooling:

      * TensorFlow's ``Coolmomentum(learning_rate, beta_1, beta_2)``, called rho_0 and
        alpha elsewhere: ``exponential_cooling(beta_1, rate=beta_2)``. Its default
        0.99997 means S = 153,503 for rho_0 = 0.99.
      * PyTorch's ``Coolmomentum(lr, momentum, beta, weight_decay)`` in
        optimizers/coolmom_pytorch.py: ``exponential_cooling(momentum, rate=beta)``.
      * ``Coolmom(lr, rho_0, cool_steps)`` in optimizers/coolmomentum.py, whose README
        calls it exponential: ``temperature_cooling(rho_0, cool_steps)``.
      * ``Coollin(lr, rho_0, cool_steps)`` in optimizers/cool_lin.py:
        ``linear_cooling(rho_0, cool_steps)``.
      * The class `SGD` in the coolmom_pytorch.py at the repository's root makes no
        update at the first call and starts at exponent 1. Here the first update moves.
      * main_cool.py (EfficientNet) keeps raw gradients in TensorFlow's momentum buffer
        and multiplies by the current rate, which is another algorithm while rho moves;
        that is Optax's momentum with a schedule of the rate *behind* its buffer.
      * The command for Penn Treebank has beta = 0.9999998018, that is S = 2.3e7: in a
        run of usual length rho hardly moves.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("momentum", momentum, 0.0, 1.0)
    checks.number("weight_decay", weight_decay, 0.0)
    decays = not is_zero(weight_decay)

    def init(x):
        return CoolMomentumState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(x))

    def step(state, grads, x, **extra_args):
        del extra_args
        if decays:
            checks.float_params(x)
            decay = at(weight_decay, state.count)
            grads = jax.tree.map(lambda g, x: g + decay * x, grads, x)
        rho = at(momentum, state.count)
        rate = at(learning_rate, state.count) * (1.0 + rho) / 2.0
        mu = jax.tree.map(lambda dx, g: rho * dx + rate * g, state.mu, grads)
        mu = trees.cast_like(mu, state.mu)
        return optax.tree.scale(-1.0, mu), CoolMomentumState(counted(state.count), mu)

    return by_gradient(init, step)
