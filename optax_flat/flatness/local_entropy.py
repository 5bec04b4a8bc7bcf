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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, noise, programs, trees
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
    fast_convolutions: bool = True,
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
    gradient evaluations on all batches per move and chain, of which there is one less
    than steps, and a forward pass at the end. A chain that meets an infinite loss, or
    one that is no number, has the weight 0.

    If the standard error is large, take more steps. How many it needs grows with the
    number and the size of the curvatures above gamma, and with the way to the nearest
    minimum, :math:`\|g\|^2 / T \gamma`. From an error of about T on, the value is too
    low with high probability, and no more than a lower bound.

    Cost:
      `2 * (num_steps - 1) * (num_chains + max(2, num_chains // 4))` gradients and
      `num_chains + max(2, num_chains // 4) + 1` forward passes over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: x, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other re-iterable of
        batches, over whose examples the loss is the mean.
      gamma: :math:`\gamma`, the stiffness of the spring that sets the scope, > 0; the
        `gamma` of `optax_flat.entropy_sgd`.
      temperature: T, > 0.
      num_steps: gammas on the way, >= 1.
      num_chains: chains that are weighed, >= 2. Memory is needed for about seven copies
        of the params for each chain, the further ones included.
      batch_size: how many chains are evaluated at a time; None is all of them. It
        bounds the memory of the evaluation, not that of the chains.
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.
      key: a typed or raw PRNG key, or an int.

    Returns:
      `Estimate`: F in the units of the loss and its standard error, both []. The error
      is that of a mean of weights that are 0 with some probability, else log-normal; it
      grows without bound with their spread.

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
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    key = checks.key(key)
    batches, x = _points.prepare(loss_fn, params, batches)
    loss, log_weights = _points.in_one_program(
        _anneal, x, batches, gamma, temperature, key, loss_fn=loss_fn,
        num_steps=num_steps, num_chains=num_chains, batch_size=batch_size,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    return _estimate(loss, log_weights, temperature)


@jax.jit
def _estimate(loss, log_weights, temperature):
    log_mean = jax.nn.logsumexp(log_weights) - jnp.log(log_weights.size)
    error = jnp.sqrt(_relative_variance(log_weights) / log_weights.size)
    return Estimate(temperature * log_mean - loss, temperature * error)


def _relative_variance(log_weights):
    """Var w / (E w)^2 of weights that are 0 or log-normal."""
    alive = log_weights > -jnp.inf
    count = jnp.sum(alive)
    mean = jnp.sum(jnp.where(alive, log_weights, 0.0)) / jnp.maximum(count, 1)
    squares = jnp.where(alive, (log_weights - mean) ** 2, 0.0)
    variance = jnp.sum(squares) / jnp.maximum(count - 1, 1)
    return jnp.expm1(variance - jnp.log(count / log_weights.size))


class _Chains(NamedTuple):
    u: Any  # trees like x with a leading axis
    momentum: Any
    losses: jax.Array  # [C], where the chains are; inf where they are no numbers
    log_weights: jax.Array  # [C]
    size: jax.Array  # of the moves, []


@programs.jit("loss_fn", static_argnames=("with_grads", *_points.LOOP_ARGUMENTS))
def _losses(x, u, s, batch, *, loss_fn, with_grads, **loop):
    """f(x + s u) for each u, [C]; and its gradients in u, a tree like `u`."""

    def loss(u):
        point = trees.cast_like(optax.tree.add_scale(x, s, u), x)
        return trees.accumulator(loss_fn(point, batch))

    fn = jax.value_and_grad(loss) if with_grads else loss
    return _points.mapped(fn, u, **loop)


def _anneal(
    x, batches, gamma, temperature, key,
    *, loss_fn, num_steps, num_chains, batch_size, fast_convolutions,
):  # fmt: skip
    """f(x), [], and the logarithms of the weights, [num_chains]."""
    at = functools.partial(
        _losses, loss_fn=loss_fn, batch_size=batch_size,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    with_grads = functools.partial(at, with_grads=True)

    def body(chains, step):
        s, key = step
        losses, grads = mean_over(batches, with_grads, x, chains.u, s)
        chains = _weigh(chains, losses, temperature)
        chains, proposed, gained = _propose(chains, grads, temperature, key)
        losses, grads = mean_over(batches, with_grads, x, proposed[0], s)
        return _accept(
            chains, proposed, gained, losses, grads, temperature=temperature, key=key,
            num_chains=num_chains,
        )  # fmt: skip

    loss = mean_over(batches, functools.partial(_points.value, loss_fn=loss_fn), x)
    start_key, key = jax.random.split(key)
    chains = _start(x, loss, start_key, num_chains + max(2, num_chains // 4))
    scales = jnp.sqrt(temperature / gamma) * jnp.arange(1, num_steps + 1) / num_steps
    steps = (scales[:-1], jax.random.split(key, num_steps)[:-1])
    chains = _points.repeat(
        body, chains, steps, batches, fast_convolutions=fast_convolutions
    )
    without = functools.partial(at, with_grads=False)
    losses = mean_over(batches, without, x, chains.u, scales[-1])
    return loss, _weigh(chains, losses, temperature).log_weights[:num_chains]


@functools.partial(jax.jit, static_argnames="count")
def _start(x, loss, key, count):
    """Draws from N(0, I), all with the same loss and weight."""
    like = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), x)
    u, momentum = noise.draw(key, (like, like), "normal")
    losses = jnp.full(count, loss)
    size = jnp.full_like(loss, _LARGEST_STEP)
    return _Chains(u, momentum, losses, jnp.zeros_like(losses), size)


@jax.jit
def _weigh(chains, losses, temperature):
    """What the losses rise as gamma falls, off the logarithms of the weights."""
    losses = _or_inf(losses)
    log_weights = chains.log_weights - (losses - chains.losses) / temperature
    # A chain of weight 0 stays so, wherever it moves, also between two infinities.
    log_weights = jnp.where(chains.log_weights == -jnp.inf, -jnp.inf, log_weights)
    return chains._replace(losses=losses, log_weights=log_weights)


def _or_inf(losses):
    return jnp.where(jnp.isnan(losses), jnp.inf, losses)


@jax.jit
def _propose(chains, grads, temperature, key):
    """Refreshes the momentum; a leapfrog step but for its last kick.

    The turn is exact in N(0, I).
    """
    momentum = _refresh(chains.momentum, jax.random.fold_in(key, 0))
    kicked, gained = _kick(momentum, grads, chains.size / temperature)
    cos, sin = jnp.cos(chains.size), jnp.sin(chains.size)
    turned = jax.tree.map(lambda u, p: cos * u + sin * p, chains.u, kicked)
    kicked = jax.tree.map(lambda u, p: cos * p - sin * u, chains.u, kicked)
    proposed = trees.cast_like((turned, kicked), (chains.u, momentum))
    return chains._replace(momentum=momentum), proposed, gained


@functools.partial(jax.jit, static_argnames="num_chains")
def _accept(chains, proposed, gained, losses, grads, *, temperature, key, num_chains):
    """The last kick and the Metropolis rule, and from the pilots the next step size."""
    losses = _or_inf(losses)
    u, momentum = proposed
    momentum, gained_at_end = _kick(momentum, grads, chains.size / temperature)
    probability = _probability(
        (losses - chains.losses) / temperature + gained + gained_at_end
    )
    accept_key = jax.random.fold_in(key, 1)
    accepted = jax.random.uniform(accept_key, probability.shape) < probability
    # Pilots of infinite loss tell nothing of the step size.
    useful = jnp.isfinite(chains.losses[num_chains:])
    error = jnp.where(useful, probability[num_chains:] - _ACCEPTANCE, 0.0).mean()
    size = jnp.minimum(chains.size * jnp.exp(_GAIN * error), _LARGEST_STEP)
    # A rejected chain turns back, for the sake of detailed balance.
    back = optax.tree.scale(-1.0, chains.momentum)
    new = _Chains(
        _where(accepted, u, chains.u),
        _where(accepted, momentum, back),
        jnp.where(accepted, losses, chains.losses),
        chains.log_weights,
        size,
    )
    return trees.cast_like(new, chains)


def _refresh(momentum, key):
    """Replaces part of the momentum by a fresh draw."""
    fresh = (1.0 - _PERSISTENCE**2) ** 0.5
    z = noise.draw(key, momentum, "normal")
    return jax.tree.map(lambda p, z: _PERSISTENCE * p + fresh * z, momentum, z)


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
    """Of accepting a move; 0 from one infinite loss to another."""
    probability = jnp.exp(-jnp.maximum(energy_error, 0.0))
    return jnp.where(jnp.isnan(probability), 0.0, probability)


def _where(accepted, a, b):
    """`a` for the chains that are accepted, else `b`."""

    def select(a, b):
        mask = accepted.reshape(-1, *[1] * (a.ndim - 1))
        return jnp.where(mask, a, b)

    return jax.tree.map(select, a, b)
