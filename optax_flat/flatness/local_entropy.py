r"""Local entropy: how much room with a low loss there is around the params.

    F(x, gamma) = T log E exp(-f(x') / T),        x' ~ N(x, T / gamma)

    dF/ds = -< u . grad f(x + s u) >,   s = sqrt(T / gamma),
                                        u ~ exp(-f(x + s u) / T - ||u||^2 / 2)

The second line is the identity dF/dgamma = -1/2 <||x - x'||^2> of Entropy-SGD's paper,
written for u = (x' - x) / s: in these coordinates the spring is N(0, I) at every
gamma, what is known exactly drops out, and the path starts at s = 0 (gamma = infinity)
with F = -f(x) and exact samples.

Integrated with Langevin chains at a few gammas the identity is biased by the nodes, by
chains that have not arrived and by their step size. Annealed importance sampling moves
chains along the same path and weighs them instead of averaging a force. The mean weight
has the right expectation for every number of steps and every step size, with the
Metropolis rule in the moves, and the spread of the weights says how far to trust it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, noise, trees
from optax_flat.flatness import _points
from optax_flat.flatness._batches import LossFn, mean_over
from optax_flat.flatness.curvature import Estimate

# Share of the momentum that survives a move, and the acceptance to aim at: of a few
# pairs tried on quadratics the one whose weights spread least.
_PERSISTENCE = 0.7
_ACCEPTANCE = 0.9
_GAIN = 0.3  # of the step size's logarithm, per move
_LARGEST_STEP = 1.0  # radian


def local_entropy(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    gamma: float,
    temperature: float = 1.0,
    num_steps: int = 100,
    num_chains: int = 32,
    batch_size: int | None = 8,
    key: jax.typing.ArrayLike,
) -> Estimate:
    r"""Local entropy of the loss at the params: minus the loss, smoothed over a scope.

    .. math::
        F(x, \gamma) = T \log \mathrm{E}\, e^{-f(x') / T}, \qquad
        x' \sim N(x, T / \gamma)

    with T = `temperature`. It tends to -f(x) for :math:`\gamma \to \infty`; the larger,
    the more room with a low loss there is within about :math:`\sqrt{T / \gamma}` per
    parameter. On a quadratic with gradient g and Hessian H at x

    .. math::
        F = -f(x) + \tfrac{1}{2} g^T (H + \gamma)^{-1} g
            - \tfrac{T}{2} \log \det (1 + H / \gamma).

    At T = 1 it is the paper's :math:`\log \int \exp(-f(x') - \gamma \|x - x'\|^2 / 2)
    \, dx'` less :math:`\tfrac{n}{2} \log (2 \pi / \gamma)`, the same without f. A loss
    that is the *mean* over N examples has T = 1/N if its sum is to be a negative
    log-likelihood.

    Annealed importance sampling: chains move while gamma falls from infinity to its
    value, each move one leapfrog step with a Metropolis rule that keeps the
    distribution at its gamma, and collect what the loss rises in their weights. The
    step size is set by further chains, a quarter as many, that do not count. Two
    gradient evaluations on all batches per step and chain.

    If the standard error is large, take more steps. How many it needs grows with the
    number and the size of the curvatures above gamma, and with the way to the nearest
    minimum, :math:`\|g\|^2 / T \gamma`. From an error of about T on, the value is too
    low with high probability, and no more than a lower bound.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: x, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other re-iterable of
        batches, over whose examples the loss is the mean.
      gamma: :math:`\gamma`, the stiffness of the spring that sets the scope, > 0; the
        `gamma` of `optax_flat.entropy_sgd`.
      temperature: T, > 0.
      num_steps: gammas on the way, >= 1.
      num_chains: chains that are weighed, >= 2. Each holds two copies of the params and
        a gradient.
      batch_size: how many chains are evaluated at a time; None is all of them.
      key: a typed or raw PRNG key, or an int.

    Returns:
      `Estimate`: F in the units of the loss and its standard error, both []. The error
      is that of a mean of log-normal weights, which grows without bound with their
      spread.

    Raises:
      ValueError: an argument outside the range given above, or a loss with noise.
      TypeError: an argument of the wrong type, or a one-shot iterator of batches.

    Example:
      Two minima of the same depth, told apart:

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import local_entropy
      >>> def loss_fn(x, curvature):
      ...     return jnp.sum(curvature * x ** 2) / 2
      >>> flat, sharp = (
      ...     local_entropy(loss_fn, jnp.zeros(5), c, gamma=1.0, key=0)
      ...     for c in (jnp.array(0.1), jnp.array(10.0)))
      >>> bool(flat.value > sharp.value + 5 * sharp.standard_error)
      True

    References:
      Chaudhari et al., `Entropy-SGD <https://arxiv.org/abs/1611.01838>`_, ICLR 2017.
      Neal, `Annealed importance sampling <https://arxiv.org/abs/physics/9803008>`_,
      Statistics and Computing 11, 125, 2001.

    Differs from the paper:
      It defines F, up to a constant in x, at T = 1, and does not evaluate it.
    """
    gamma = checks.constant("gamma", gamma, 0.0, open_low=True)
    temperature = checks.constant("temperature", temperature, 0.0, open_low=True)
    num_steps = checks.integer("num_steps", num_steps, 1)
    num_chains = checks.integer("num_chains", num_chains, 2)
    batch_size = _points.check_batch_size(batch_size)
    key = checks.key(key)
    batches, x = _points.prepare(loss_fn, params, batches)
    loss, log_weights = _points.in_one_program(
        _anneal, x, batches, gamma, temperature, key, loss_fn=loss_fn,
        num_steps=num_steps, num_chains=num_chains, batch_size=batch_size,
    )  # fmt: skip
    log_mean = jax.nn.logsumexp(log_weights) - jnp.log(num_chains)
    relative = jnp.expm1(jnp.var(log_weights, ddof=1)) / num_chains
    return Estimate(temperature * log_mean - loss, temperature * jnp.sqrt(relative))


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size"))
def _losses_and_grads(x, u, s, batch, *, loss_fn, batch_size):
    """f(x + s u) and its gradient in u for each u; [C], and a tree like `u`."""

    def loss(u):
        point = trees.cast_like(optax.tree.add_scale(x, s, u), x)
        return trees.accumulator(loss_fn(point, batch))

    return _points.mapped(jax.value_and_grad(loss), u, batch_size)


def _anneal(
    x, batches, gamma, temperature, key, *, loss_fn, num_steps, num_chains, batch_size
):
    """f(x), [], and the logarithms of the weights, [num_chains]."""
    fn = functools.partial(_losses_and_grads, loss_fn=loss_fn, batch_size=batch_size)

    def evaluate(u, s):
        losses, grads = mean_over(batches, fn, x, u, s)
        return losses / temperature, optax.tree.scale(1.0 / temperature, grads)

    pilots = max(2, num_chains // 4)
    like = jax.tree.map(
        lambda x: jnp.zeros((num_chains + pilots, *x.shape), x.dtype), x
    )

    def body(carry, step):
        u, momentum, energy, log_weights, size = carry
        s, key = step
        refresh_key, accept_key = jax.random.split(key)
        start, grads = evaluate(u, s)
        log_weights -= start - energy
        momentum = _refresh(momentum, refresh_key)
        turned, kicked, gained = _kick_and_turn(u, momentum, grads, size)
        end, grads = evaluate(turned, s)
        kicked, gained_at_end = _kick(kicked, grads, size)
        probability = _probability(end - start + gained + gained_at_end)
        accepted = jax.random.uniform(accept_key, probability.shape) < probability
        u = _where(accepted, turned, u)
        # A rejected chain turns back, for the sake of detailed balance.
        momentum = _where(accepted, kicked, optax.tree.scale(-1.0, momentum))
        energy = jnp.where(accepted, end, start)
        error = probability[num_chains:].mean() - _ACCEPTANCE
        size = jnp.minimum(size * jnp.exp(_GAIN * error), _LARGEST_STEP)
        return u, momentum, energy, log_weights, size

    at_x = functools.partial(_points.value_and_grad, loss_fn=loss_fn)
    loss, _ = mean_over(batches, at_x, x)
    energy = jnp.full(num_chains + pilots, loss / temperature)
    start_key, key = jax.random.split(key)
    u, momentum = noise.draw(start_key, (like, like), "normal")
    scales = jnp.sqrt(temperature / gamma) * jnp.arange(1, num_steps + 1) / num_steps
    steps = (scales, jax.random.split(key, num_steps))
    size = jnp.full_like(loss, _LARGEST_STEP)
    carry = (u, momentum, energy, jnp.zeros_like(energy), size)
    log_weights = _points.repeat(body, carry, steps, batches)[3]
    return loss, log_weights[:num_chains]


@jax.jit
def _refresh(momentum, key):
    """Replaces part of the momentum by a fresh draw."""
    fresh = (1.0 - _PERSISTENCE**2) ** 0.5
    z = noise.draw(key, momentum, "normal")
    return jax.tree.map(lambda p, z: _PERSISTENCE * p + fresh * z, momentum, z)


@jax.jit
def _kick_and_turn(u, momentum, grads, size):
    """The leapfrog step but for its last kick; the turn is exact in N(0, I)."""
    kicked, gained = _kick(momentum, grads, size)
    cos, sin = jnp.cos(size), jnp.sin(size)
    turned = jax.tree.map(lambda u, p: cos * u + sin * p, u, kicked)
    kicked = jax.tree.map(lambda u, p: cos * p - sin * u, u, kicked)
    return trees.cast_like(turned, u), trees.cast_like(kicked, u), gained


@jax.jit
def _kick(momentum, grads, size):
    """Half a step down the gradient, and what it adds to ||momentum||^2 / 2, [C].

    The difference of two such norms, of all parameters, would lose it in rounding.
    """
    kicked = jax.tree.map(lambda p, g: p - size / 2 * g, momentum, grads)
    added = jax.tree.map(
        lambda p, k, g: -size / 4 * jnp.sum((p + k) * g, axis=range(1, g.ndim)),
        momentum, kicked, grads,
    )  # fmt: skip
    return trees.cast_like(kicked, momentum), sum(jax.tree.leaves(added))


def _probability(energy_error):
    """Of accepting a move; 0 where the loss is no number."""
    probability = jnp.exp(-jnp.maximum(energy_error, 0.0))
    return jnp.where(jnp.isnan(probability), 0.0, probability)


@jax.jit
def _where(accepted, a, b):
    """`a` for the chains that are accepted, else `b`."""

    def select(a, b):
        mask = accepted.reshape(-1, *[1] * (a.ndim - 1))
        return jnp.where(mask, a.astype(b.dtype), b)

    return jax.tree.map(select, a, b)
