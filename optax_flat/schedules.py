"""Schedules of the methods' own hyperparameters.

Each is a function of a count and computes in the default float dtype. Inside a method
the count is that of *outer* updates, in both modes.
"""

import math

import jax.numpy as jnp
import numpy as np
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


def exponential_cooling(
    initial: float, total_steps: int | None = None, *, rate: float | None = None
) -> optax.Schedule:
    r"""Momentum of CoolMomentum: 1 / (1 - rho) decays geometrically.

    .. math::
        \rho_t = \max\left(0, 1 - (1 - \rho_0)^{1 - t / S}\right)
                = \max\left(0, 1 - \frac{1 - \rho_0}{\alpha^t}\right),
        \qquad \alpha = (1 - \rho_0)^{1 / S}

    Args:
      initial: :math:`\rho_0`, in [0, 1).
      total_steps: S, updates until the momentum is 0, >= 1. It stays 0 from there on.
      rate: :math:`\alpha`, in (0, 1], in the place of `total_steps`; 1 does not cool.
        Prefer `total_steps`: an `alpha` that was rounded to float32 ends the cooling
        too early or too late, by 0.3 % for S = 10^6 and by more for longer ones.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: an argument outside the range given above, or not exactly one of
        `total_steps` and `rate`.
      TypeError: an argument of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> rho = schedules.exponential_cooling(0.99, total_steps=100)
      >>> [round(float(rho(t)), 4) for t in (0, 50, 100, 101)]
      [0.99, 0.9, 0.0, 0.0]

    References:
      Borysenko and Byshkin, `CoolMomentum: a method for stochastic optimization by
      Langevin dynamics with simulated annealing <https://arxiv.org/abs/2005.14605>`_,
      2021, equation 20.
    """
    initial = checks.constant("initial", initial, 0.0, 1.0, open_high=True)
    if (total_steps is None) == (rate is None):
        raise ValueError(
            "exponential_cooling takes `total_steps` or `rate`, got "
            f"total_steps={total_steps!r} and rate={rate!r}. Give exactly one."
        )
    log_start = math.log1p(-initial)
    if rate is not None:
        rate = checks.constant("rate", rate, 0.0, 1.0, open_low=True)
        # An end before the second update is as good as one there, and 1e30 as never.
        end = 1e30 if rate == 1.0 else max(log_start / math.log(rate), 1.0)
    else:
        end = checks.integer("total_steps", total_steps, 1)

    def schedule(count):
        return -jnp.expm1(log_start * _remaining(count, end))

    return schedule


def temperature_cooling(initial: float, total_steps: int) -> optax.Schedule:
    r"""Momentum of CoolMomentum: (1 + rho) / (1 - rho) decays geometrically.

    That ratio is proportional to the temperature of the Langevin dynamics while the
    noise of the minibatches does not change.

    .. math::
        \frac{1 + \rho_t}{1 - \rho_t} =
            \left(\frac{1 + \rho_0}{1 - \rho_0}\right)^{1 - t / S},
        \qquad \rho_t = \tanh((1 - t / S) \operatorname{artanh} \rho_0)

    Args:
      initial: :math:`\rho_0`, in [0, 1).
      total_steps: S, updates until the momentum is 0, >= 1. It stays 0 from there on.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> rho = schedules.temperature_cooling(0.99, total_steps=100)
      >>> [round(float(rho(t)), 4) for t in (0, 50, 100, 101)]
      [0.99, 0.8676, 0.0, 0.0]

    References:
      The class `Coolmom` of `the authors' repository
      <https://github.com/borbysh/coolmomentum>`_, the "exponential" of its README.
    """
    initial = checks.constant("initial", initial, 0.0, 1.0, open_high=True)
    total_steps = checks.integer("total_steps", total_steps, 1)

    def schedule(count):
        return jnp.tanh(math.atanh(initial) * _remaining(count, total_steps))

    return schedule


def linear_cooling(initial: float, total_steps: int) -> optax.Schedule:
    r"""Momentum of CoolMomentum: rho / (1 - rho) decays linearly.

    .. math::
        \rho_t = \max\left(0, \frac{\rho_0 (1 - t / S)}{1 - \rho_0 t / S}\right)

    Args:
      initial: :math:`\rho_0`, in [0, 1).
      total_steps: S, updates until the momentum is 0, >= 1. It stays 0 from there on.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> rho = schedules.linear_cooling(0.99, total_steps=100)
      >>> [round(float(rho(t)), 4) for t in (0, 50, 100, 101)]
      [0.99, 0.9802, 0.0, 0.0]

    References:
      The class `Coollin` of `the authors' repository
      <https://github.com/borbysh/coolmomentum>`_.
    """
    initial = checks.constant("initial", initial, 0.0, 1.0, open_high=True)
    total_steps = checks.integer("total_steps", total_steps, 1)

    def schedule(count):
        u = _remaining(count, total_steps)
        return initial * u / (1.0 - initial + initial * u)

    return schedule


def cyclical_cosine(
    initial: float, total_steps: int, num_cycles: int = 4
) -> optax.Schedule:
    r"""Cosine decay with warm restarts, for cyclical Langevin samplers.

    .. math::
        \eta_t = \frac{\eta_0}{2} \left(\cos \frac{\pi (t \bmod c)}{c} + 1\right),
        \qquad c = \lceil S / M \rceil

    Every cycle starts with large steps, which leave the mode that the last one ended
    in, and ends with small ones, which sample around the next.

    Args:
      initial: :math:`\eta_0`, the value at the start of a cycle, >= 0.
      total_steps: S, updates of the whole run, >= 1. Later counts go on cycling.
      num_cycles: M, >= 1.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> rate = schedules.cyclical_cosine(0.5, total_steps=200, num_cycles=4)
      >>> [round(float(rate(t)), 4) for t in (0, 25, 49, 50)]
      [0.5, 0.25, 0.0005, 0.5]

    References:
      Zhang et al., `Cyclical Stochastic Gradient MCMC for Bayesian Deep Learning
      <https://arxiv.org/abs/1902.03932>`_, 2020, equation 1; their k is t + 1.
    """
    initial = checks.constant("initial", initial, 0.0)
    total_steps = checks.integer("total_steps", total_steps, 1)
    cycle = math.ceil(total_steps / checks.integer("num_cycles", num_cycles, 1))

    def schedule(count):
        phase = jnp.asarray(jnp.asarray(count) % cycle, float) / cycle
        return initial / 2.0 * (jnp.cos(jnp.pi * phase) + 1.0)

    return schedule


def noam(model_dim: int, warmup_steps: int, scale: float = 1.0) -> optax.Schedule:
    r"""The Transformer's learning rate: linear warm-up, then inverse square root.

    .. math::
        \eta_t = \text{scale}\; d^{-1/2} \min(n^{-1/2}, n\, w^{-3/2}),
        \qquad n = t + 1

    Args:
      model_dim: d, the width of the model, >= 1.
      warmup_steps: w, >= 1; the rate peaks at t = w - 1.
      scale: >= 0.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> rate = schedules.noam(512, warmup_steps=4000)
      >>> [f"{float(rate(t)):.4g}" for t in (0, 3999, 15999)]
      ['1.747e-07', '0.0006988', '0.0003494']

    References:
      Vaswani et al., `Attention Is All You Need <https://arxiv.org/abs/1706.03762>`_,
      2017, equation 3; its step_num is t + 1. numpy-ml's ``NoamScheduler`` takes the
      count itself, which divides by zero at the first update.
    """
    model_dim = checks.integer("model_dim", model_dim, 1)
    warmup_steps = checks.integer("warmup_steps", warmup_steps, 1)
    scale = checks.constant("scale", scale, 0.0)

    def schedule(count):
        n = jnp.asarray(count, float) + 1.0
        return scale * model_dim**-0.5 * jnp.minimum(n**-0.5, n * warmup_steps**-1.5)

    return schedule


def nesterov_momentum(total_steps: int) -> optax.Schedule:
    r"""The momentum of Nesterov's accelerated method for convex functions.

    .. math::
        \theta_{k+1} = \tfrac12 \left(-\theta_k^2
            + \sqrt{\theta_k^4 + 4 \theta_k^2}\right), \qquad
        \beta_k = \theta_{k+1} (1 / \theta_k - 1), \qquad \theta_0 = 1

    It starts at 0 and rises to 1 like k / (k + 3), which is the usual substitute.
    :math:`\beta_k` extrapolates *after* update k, as in `ensemble_kalman`; where the
    momentum acts before the gradient, as in `multipoint_nesterov`, take
    ``lambda t: schedule(t - 1)``.

    Args:
      total_steps: values computed in advance, >= 1. The last of them holds afterwards.

    Returns:
      A schedule of the update count.

    Raises:
      ValueError: `total_steps` below 1.
      TypeError: `total_steps` of the wrong type.

    Example:
      >>> from optax_flat import schedules
      >>> momentum = schedules.nesterov_momentum(1000)
      >>> [round(float(momentum(k)), 3) for k in (0, 1, 10, 1000)]
      [0.0, 0.282, 0.782, 0.997]

    References:
      Nesterov, A method of solving a convex programming problem with convergence rate
      O(1/k^2), 1983. Recommended for ensemble Kalman inversion by
      EnsembleKalmanProcesses.jl.
    """
    total_steps = checks.integer("total_steps", total_steps, 1)
    thetas = [1.0]
    for _ in range(total_steps):
        square = thetas[-1] ** 2
        thetas.append((math.sqrt(square * square + 4.0 * square) - square) / 2.0)
    theta = np.array(thetas)
    momenta = theta[1:] * (1.0 / theta[:-1] - 1.0)

    def schedule(count):
        index = jnp.clip(jnp.asarray(count, jnp.int32), 0, total_steps - 1)
        return jnp.asarray(momenta, float)[index]

    return schedule


def proportional_radius(
    learning_rate: optax.Schedule,
    *,
    rate_range: tuple[float, float],
    rho_range: tuple[float, float],
) -> optax.Schedule:
    r"""A radius of SAM that follows the learning rate, as in GSAM.

    .. math::
        \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})
        \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}}

    Args:
      learning_rate: :math:`\eta_t`, the schedule of the outer optimizer.
      rate_range: its least and its greatest value.
      rho_range: the radius at these, >= 0.

    Returns:
      A schedule. Where the learning rate leaves its range the radius stays at the end
      of its own.

    Raises:
      ValueError: a range whose ends are in the wrong order, or negative.
      TypeError: an argument of the wrong type.

    Example:
      >>> import optax
      >>> from optax_flat import schedules
      >>> rate = optax.linear_schedule(0.0, 0.1, 100)
      >>> rho = schedules.proportional_radius(
      ...     rate, rate_range=(0.0, 0.1), rho_range=(0.1, 0.6))
      >>> [round(float(rho(t)), 3) for t in (0, 50, 100)]
      [0.1, 0.35, 0.6]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022.
    """
    if not callable(learning_rate):
        raise TypeError(
            "`learning_rate` must be a schedule (a function of the number of outer "
            f"updates), got {learning_rate!r}. A constant one has a constant radius."
        )
    rates, radii = (
        tuple(checks.constant(f"{name}[{i}]", x, 0.0) for i, x in enumerate(ends))
        for name, ends in (("rate_range", rate_range), ("rho_range", rho_range))
    )
    if len(rates) != 2 or len(radii) != 2 or rates[0] >= rates[1]:
        raise ValueError(
            "`rate_range` must be two numbers, the smaller one first, and `rho_range` "
            f"two numbers, got {rate_range} and {rho_range}."
        )

    def schedule(count):
        return jnp.interp(learning_rate(count), jnp.array(rates), jnp.array(radii))

    return schedule


def _remaining(count, end):
    """The fraction of the cooling that is left: 1 at count 0, 0 from the end on."""
    # The difference first: XLA may make a product with 1 / end of the division.
    return jnp.maximum(0.0, end - jnp.asarray(count, float)) / end
