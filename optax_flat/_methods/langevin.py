r"""Langevin samplers: SGLD, preconditioned SGLD, SGHMC.

Gradient descent with noise of the right size does not stop at a minimum; it visits the
params with the density exp(-f / T), in which of two minima of one depth the wider has
more weight:

    SGLD    x  <- x - learning_rate g + sqrt(2 learning_rate T) z
    pSGLD   nu <- decay nu + (1 - decay) g^2,   G = 1 / (sqrt(nu) + eps)
            x  <- x - learning_rate G g + sqrt(2 learning_rate T G) z
    SGHMC   mu <- (1 - friction) mu - learning_rate g
                  + sqrt(2 friction learning_rate T) z
            x  <- x + mu

with fresh z of mean 0 and variance 1 at each update.

Temperature. The loss f is a *mean* over N examples, so T = 1 / N samples the Bayesian
posterior (the prior is in f as weight decay), and T = 0 is an optimizer. Codes that
scale their temperature by 1 / N have T = their temperature / N.

Papers: Welling and Teh, ICML 2011 (SGLD); Li et al., arXiv 1512.07666 (pSGLD); Chen et
al., arXiv 1402.4102 (SGHMC).
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, keys, trees
from optax_flat._core.arguments import NoiseArguments, factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at, is_zero
from optax_flat._core.noise import KINDS, draw


class LangevinNoiseState(NamedTuple):
    """State of `add_langevin_noise` and `sgld`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count


class PSGLDState(NamedTuple):
    """State of `psgld`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    nu: optax.Updates  # running mean of g^2, at least float32


class SGHMCState(NamedTuple):
    """State of `sghmc`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    mu: optax.Updates  # velocity, at least float32


@factory
def add_langevin_noise(
    step_size: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    **noise: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the noise of Langevin dynamics to finished updates.

    .. math::
        u \leftarrow u + \sqrt{2 \eta_t T_t}\, z

    It belongs *behind* the learning rate, which it must be told: noise in front of it
    (`optax.add_noise`) would be heated or cooled by it, and by any momentum or
    preconditioner in between. Both arguments may be schedules of the same count, and
    the noise stays right while they move.

    The chain samples exp(-f / T) if what stands in front is :math:`-\eta g`. A clipped
    or decayed gradient samples another density, that of its own potential where it has
    one; with momentum or a preconditioner in front there is none: use `sghmc` or
    `psgld`, whose noise goes through them as it should.

    Cost:
      1 gradient per update; state: 0 copies of the params.

    Args:
      step_size: :math:`\eta`, the learning rate in front, >= 0.
      temperature: T, >= 0; 1 / N samples the posterior if the loss is a mean over N
        examples. 0 adds nothing.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      Langevin dynamics with a clipped drift; what is clipped is not the noise:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> rate = optax.cosine_decay_schedule(0.1, 100)
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     optax.scale_by_learning_rate(rate),
      ...     optax_flat.add_langevin_noise(rate, temperature=0.5, key=0))
      >>> x = jnp.zeros(100_000)
      >>> updates, state = tx.update(jnp.zeros_like(x), tx.init(x))
      >>> bool(abs(jnp.var(updates) - 2 * 0.1 * 0.5) < 2e-3)
      True

    References:
      Welling and Teh, `Bayesian Learning via Stochastic Gradient Langevin Dynamics
      <https://icml.cc/2011/papers/398_icmlpaper.pdf>`_, 2011.

    Differs from the paper:
      The paper writes the sum over N examples and T = 1; the step sizes there are
      2 / N of ours.
    """
    checks.number("step_size", step_size, 0.0)
    return _noisy(lambda updates, _: updates, step_size, temperature, **noise)


@factory
def sgld(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    **noise: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient Langevin dynamics.

    .. math::
        x \leftarrow x - \eta_t g + \sqrt{2 \eta_t T_t}\, z

    On a quadratic of curvature k its stationary variance is
    :math:`(T / k) / (1 - \eta k / 2)`: T / k, and a bias of the order of the step. The
    noise of the minibatches comes on top. One gradient evaluation per update.

    Keep the params in float32: at T = 1 / N the steps of the noise are often below the
    spacing of bfloat16, and would be rounded away.

    The prior is part of the loss: ``optax.add_decayed_weights(T / variance)`` in front
    is a normal prior of that variance. `optax_flat.training.collect_samples` gathers
    samples and averages predictions; `optax_flat.schedules.cyclical_cosine` makes the
    sampler cyclical.

    Cost:
      1 gradient per update; state: 0 copies of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      temperature: T, >= 0; 1 / N samples the posterior if the loss is a mean over N
        examples. 0 is plain SGD.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      100,000 chains in one array sample exp(-f / T) for f = 2 x^2 and T = 1; its
      variance is 1/4:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.sgld(0.01, 1.0, noise_kind="rademacher", key=0)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(4 * x, state)
      ...     return (optax.apply_updates(x, updates), state), None
      >>> x = jnp.zeros(100_000)
      >>> (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=100)
      >>> bool(abs(jnp.var(x) - 0.25) < 0.01)
      True

    References:
      Welling and Teh, `Bayesian Learning via Stochastic Gradient Langevin Dynamics
      <https://icml.cc/2011/papers/398_icmlpaper.pdf>`_, 2011. Zhang et al., `Cyclical
      Stochastic Gradient MCMC for Bayesian Deep Learning
      <https://arxiv.org/abs/1902.03932>`_, 2020.

    Differs from the paper:
      The paper writes the sum over N examples and T = 1; its step size is 2 / N of
      ours.
    """
    checks.number("learning_rate", learning_rate, 0.0)

    def drift(grads, rate):
        return jax.tree.map(lambda g: -rate * g, grads)

    return _noisy(drift, learning_rate, temperature, **noise)


@factory
def psgld(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    *,
    decay: optax.ScalarOrSchedule = 0.99,
    eps: optax.ScalarOrSchedule = 1e-5,
    **noise: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Langevin dynamics preconditioned as in RMSProp.

    .. math::
        \begin{align*}
        \nu &\leftarrow a \nu + (1 - a) g^2, \qquad
            G = \frac{1}{\sqrt{\nu} + \varepsilon} \\
        x &\leftarrow x - \eta_t G g + \sqrt{2 \eta_t T_t G}\, z
        \end{align*}

    with a = `decay` and :math:`\varepsilon` = `eps`. Directions of small gradients take
    larger steps, with the noise that belongs to them. One gradient evaluation per
    update.

    A parameter whose gradient is always zero (a dead unit) has G = 1 / eps and diffuses
    fast; a larger `eps` bounds it.

    Cost:
      1 gradient per update; state: 1 copy of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      temperature: T, >= 0; 1 / N samples the posterior if the loss is a mean over N
        examples. 0 is RMSProp.
      decay: weight of the old mean of squares, in [0, 1).
      eps: :math:`\varepsilon`, > 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      Curvatures 10 and 0.1; for T = 1 the standard deviations are 10^(-1/2) and
      10^(1/2):

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> curvature = jnp.array([[10.0], [0.1]])
      >>> tx = optax_flat.psgld(0.02, 1.0, eps=1.0, noise_kind="rademacher", key=0)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(curvature * x, state)
      ...     return (optax.apply_updates(x, updates), state), None
      >>> x = jax.random.normal(jax.random.key(1), (2, 5000))
      >>> (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=1000)
      >>> bool(jnp.allclose(x.std(axis=1), jnp.array([0.316, 3.16]), rtol=0.1))
      True

    References:
      Li et al., `Preconditioned Stochastic Gradient Langevin Dynamics for Deep Neural
      Networks <https://arxiv.org/abs/1512.07666>`_, 2016.

    Differs from the paper:
      The drift term :math:`\Gamma = \nabla \cdot G`, which the paper drops in practice,
      is not there. The bias is small if the mean of squares forgets slowly against the
      chain, 1 / (1 - a) updates against 1 / (:math:`\eta G k`) at curvature k; so at a
      fixed `decay` it *grows* as the learning rate falls, up to samples of
      :math:`e^{-f / T} / G(x)`, for f = k x^2 / 2 and a small `eps` twice the right
      variance. The noise of minibatches makes `nu` more constant and the bias smaller.
      `nu` takes the *mean* gradient; codes that feed the gradient of the sum over N
      examples make `eps` N times less effective.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("decay", decay, 0.0, 1.0, open_high=True)
    checks.number("eps", eps, 0.0, open_low=True)
    key, kind = _check(temperature, **noise)

    def init(x):
        nu = optax.tree.zeros_like(x)
        return PSGLDState(jnp.zeros([], jnp.int32), keys.data(key), nu)

    def step(state, grads, x, **extra_args):
        del x, extra_args
        rate, a = at(learning_rate, state.count), at(decay, state.count)
        nu = jax.tree.map(lambda v, g: a * v + (1.0 - a) * g**2, state.nu, grads)
        nu = trees.cast_like(nu, state.nu)
        floor = at(eps, state.count)
        # In the coordinates x / sqrt(G) all directions have the same noise.
        roots = jax.tree.map(lambda v: jax.lax.rsqrt(jnp.sqrt(v) + floor), nu)
        steps = jax.tree.map(lambda r, g: -rate * r * g, roots, grads)
        steps = _add_noise(steps, key, state, temperature, 2.0 * rate, kind=kind)
        steps = jax.tree.map(lambda r, s: r * s, roots, steps)
        return steps, PSGLDState(counted(state.count), state.key, nu)

    return by_gradient(init, step)


@factory
def sghmc(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    *,
    friction: optax.ScalarOrSchedule = 0.1,
    **noise: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient Hamiltonian Monte Carlo: Langevin dynamics with momentum.

    .. math::
        \begin{align*}
        \mu &\leftarrow (1 - c) \mu - \eta_t g + \sqrt{2 c \eta_t T_t}\, z \\
        x &\leftarrow x + \mu
        \end{align*}

    with c = `friction`. On a quadratic of curvature k the stationary variance is
    :math:`(T / k) / (1 - \eta k / (4 - 2 c))`. One gradient evaluation per update.

    The chain moves as fast as that of `sgld` with the learning rate :math:`\eta / c`,
    and the velocity follows a change of :math:`\eta` or T within about 1 / c updates.

    Cost:
      1 gradient per update; state: 1 copy of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      temperature: T, >= 0; 1 / N samples the posterior if the loss is a mean over N
        examples. 0 is SGD with momentum 1 - c.
      friction: c, in [0, 1]. 1 is SGLD.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      100,000 chains in one array sample exp(-f / T) for f = 2 x^2 and T = 1; its
      variance is 1/4:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.sghmc(0.01, 1.0, noise_kind="rademacher", key=0)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(4 * x, state)
      ...     return (optax.apply_updates(x, updates), state), None
      >>> x = jnp.zeros(100_000)
      >>> (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=100)
      >>> bool(abs(jnp.var(x) - 0.25) < 0.01)
      True

    References:
      Chen et al., `Stochastic Gradient Hamiltonian Monte Carlo
      <https://arxiv.org/abs/1402.4102>`_, 2014, equation 15.

    Differs from the paper:
      No estimate of the minibatches' own noise is subtracted (the paper's
      :math:`\hat\beta` is 0). The paper writes the sum over N
      examples and T = 1; its learning rate is 1 / N of ours.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("friction", friction, 0.0, 1.0)
    key, kind = _check(temperature, **noise)

    def init(x):
        mu = optax.tree.zeros_like(x)
        return SGHMCState(jnp.zeros([], jnp.int32), keys.data(key), mu)

    def step(state, grads, x, **extra_args):
        del x, extra_args
        rate, c = at(learning_rate, state.count), at(friction, state.count)
        mu = jax.tree.map(lambda v, g: (1.0 - c) * v - rate * g, state.mu, grads)
        mu = _add_noise(mu, key, state, temperature, 2.0 * c * rate, kind=kind)
        mu = trees.cast_like(mu, state.mu)
        return mu, SGHMCState(counted(state.count), state.key, mu)

    return by_gradient(init, step)


def _noisy(drift, step_size, temperature, **noise):
    """A Langevin step: what `drift` makes of the gradient and the step size, and noise.

    The state is but a count and the key.
    """
    key, kind = _check(temperature, **noise)

    def init(x):
        del x
        return LangevinNoiseState(jnp.zeros([], jnp.int32), keys.data(key))

    def step(state, grads, x, **extra_args):
        del x, extra_args
        eta = at(step_size, state.count)
        noisy = _add_noise(
            drift(grads, eta), key, state, temperature, 2.0 * eta, kind=kind
        )
        return noisy, LangevinNoiseState(counted(state.count), state.key)

    return by_gradient(init, step)


def _check(temperature, *, key, noise_kind):
    """The key and the kind of noise, checked."""
    checks.number("temperature", temperature, 0.0)
    kind = checks.choice("noise_kind", noise_kind, KINDS)
    return checks.key(key), kind


def _add_noise(tree, key, state, temperature, variance, *, kind):
    """`tree` + sqrt(T variance) z."""
    if is_zero(temperature):
        return tree
    z = draw(keys.fold_in(state.key, state.count, key), tree, kind)
    scale = jnp.sqrt(at(temperature, state.count) * variance)
    return jax.tree.map(lambda x, z: x + scale * z, tree, z)
