r"""bSAM: sharpness-aware minimization as variational learning of a posterior.

The worst case within a ball, which SAM descends, is a relaxation of the expected loss
under a normal distribution of the weights; with a variance that is learned, SAM becomes
an Adam-like method with a posterior N(w, 1 / (N s)). On each shard of a minibatch

    g   = grad f at w + z / sqrt(N s)             its own draw z
    e   = rho g / s                               around w, not around the noisy point
    g_r = grad f at w + e

and with means over the shards

    mu <- b1 mu + (1 - b1) (g_r + weight_decay w)
    w  <- w - learning_rate mu / s                the old s
    s  <- b2 s + (1 - b2) (sqrt(s) |g| + damping + weight_decay)

Paper: Moellenhoff and Khan, arXiv 2210.01620 (ICLR 2023). Codes:
team-approx-bayes/bayesian-sam (the authors'), kozistr/pytorch_optimizer.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, keys, modes, trees
from optax_flat._core.arguments import KeyArgument, LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.noise import KINDS, draw_around, first_seed, next_seed
from optax_flat._core.walk import Walk


class BSAMArguments(LoopArguments, KeyArgument):
    """What `bsam` shares with other walks."""


class BSAMState(NamedTuple):
    """What lives between outer updates; the trees have at least float32."""

    metrics = ("count",)
    one_minibatch = True  # all draws may share it; `make_train_step` reads this

    count: jax.Array  # int32, [], outer updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    mu: optax.Updates  # running mean of g_r + weight_decay w, not debiased
    scale: optax.Params  # s; the posterior's precision is num_data s
    offset: optax.Updates  # w minus the noisy point that the params stand on
    num_data: jax.Array  # float, [], of that point

    def deviations(self) -> optax.Params:
        """The posterior's standard deviations."""
        return _deviations(self.scale, self.num_data)


class _Inner(NamedTuple):
    """The shards of one update; the trees are in the accumulator dtype."""

    anchor: optax.Params  # w
    taken: jax.Array  # int32, [], gradients consumed
    seed: jax.Array  # uint32, [2], of the next draw
    point: optax.Params
    size: optax.Updates  # sum of |g| so far
    total: optax.Updates  # sum of g_r so far


@factory
def bsam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    num_data: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.01,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    damping: optax.ScalarOrSchedule = 0.1,
    s_init: float = 1.0,
    num_shards: int = 1,
    noise_kind: str = "normal",
    **loop: Unpack[BSAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Bayesian SAM: a posterior by sharpness-aware steps.

    .. math::
        \begin{align*}
        g &= \nabla f(w + z / \sqrt{N s}), \qquad
            g_r = \nabla f(w + \rho\, g / s) \qquad \text{on each shard} \\
        \mu &\leftarrow \beta_1 \mu + (1 - \beta_1)(\overline{g_r} + \delta w) \\
        w &\leftarrow w - \eta\, \mu / s \\
        s &\leftarrow \beta_2 s + (1 - \beta_2)
            (\sqrt{s}\, \overline{|g|} + \gamma + \delta)
        \end{align*}

    with N = `num_data`, :math:`\delta` = `weight_decay`, :math:`\gamma` = `damping`, s
    starting at `s_init`, bars for means over `num_shards` shards, and the old s in the
    update of w. The weights have the posterior :math:`N(w, 1 / (N s))`.

    An update takes two gradients per shard, both on the shard's minibatch: the first
    at the shard's noisy point, the second at its perturbed one. Give them in this
    order, each minibatch twice: shard 1, shard 1, shard 2, shard 2, ...
    `make_train_step` takes one minibatch, for all of them.

    The params stand on the first noisy point, in both modes; `eval_params` gives w, and
    `sample_params` draws from the posterior. Nothing may alter the updates behind this
    method: w is kept as a distance from where they lead. `init` cannot move the params,
    so the very first gradient is taken without noise.

    Cost:
      `2 * num_shards` gradients per update; state: 3 copies of the params (transparent:
      8).

    Args:
      learning_rate: :math:`\eta`, >= 0; the authors use 0.5 on CIFAR-10.
      num_data: N, the number of training examples, > 0.
      rho: :math:`\rho`, >= 0, size of the perturbation.
      b1: decay of the momentum, in [0, 1).
      b2: decay of s, in [0, 1]; 1 keeps s as it is.
      weight_decay: :math:`\delta`, >= 0: the prior's precision over N (the authors' 40
        on CIFAR-10 is 8e-4 here).
      damping: :math:`\gamma`, >= 0, added to what s follows.
      s_init: s at the start, > 0.
      num_shards: parts of a minibatch with their own noise and perturbation, >= 1; the
        authors use 8.
      noise_kind: "normal", or "rademacher": independent signs, much cheaper.
        `sample_params` is normal anyway.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      Where the slope is constant, :math:`\sqrt{s}` becomes its size, and the posterior
      the wider the flatter it is:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> slope = jnp.array([4.0, 1.0])
      >>> tx = optax_flat.bsam(
      ...     0.1, num_data=100.0, b2=0.9, weight_decay=0.0, damping=0.0, key=0)
      >>> def step(carry, _):
      ...     w, state = carry
      ...     updates, state = tx.update(
      ...         slope, state, w, grad_fn=lambda w, batch: slope)
      ...     return (optax.apply_updates(w, updates), state), None
      >>> w = jnp.zeros(2)
      >>> (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=300)
      >>> bool(jnp.allclose(state.memory.scale, slope**2, rtol=1e-3))
      True

    References:
      Moellenhoff and Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, 2023.

    Differs from the paper:
      The formulas are those of the authors' code, which also gives the order of the two
      updates. The first gradient of all is taken without noise.

    Coming from team-approx-bayes/bayesian-sam and kozistr/pytorch_optimizer:
      The authors' ``Ndata`` is num_data, ``batchsplit`` (the *number* of shards)
      num_shards, ``beta1`` and ``beta2`` b1 and b2, ``priorprec / Ndata`` weight_decay.
      kozistr's class differs from them in five places: its noise has the deviation
      1 / (N s), the perturbation is never taken back, the momentum holds g times the
      weight decay, s has a squared term, and there are no shards.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("num_data", num_data, 0.0, open_low=True)
    checks.number("rho", rho, 0.0)
    checks.number("b1", b1, 0.0, 1.0, open_high=True)
    checks.number("b2", b2, 0.0, 1.0)
    checks.number("weight_decay", weight_decay, 0.0)
    checks.number("damping", damping, 0.0)
    checks.start_value("s_init", s_init, 0.0, open_low=True)
    num_shards = checks.integer("num_shards", num_shards, 1)
    checks.choice("noise_kind", noise_kind, KINDS)
    key = checks.key(loop["key"])
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        zeros = optax.tree.zeros_like(trees.accumulator(params, accumulator_dtype))
        scale = jax.tree.map(lambda x: jnp.full_like(x, s_init), zeros)
        count = jnp.zeros([], jnp.int32)
        return BSAMState(
            count,
            keys.data(key),
            zeros,
            scale,
            zeros,
            jnp.asarray(at(num_data, count), float),
        )

    def start(memory, params):
        point = trees.accumulator(params, accumulator_dtype)
        anchor, zeros = (
            optax.tree.add(point, memory.offset),
            optax.tree.zeros_like(point),
        )
        # The seed itself has made the point that the params stand on.
        seed = first_seed(keys.fold_in(memory.key, memory.count, key), point)
        taken = jnp.zeros([], jnp.int32)
        return _Inner(anchor, taken, next_seed(seed), point, zeros, zeros)

    def step(memory, inner, grads):
        is_noisy = inner.taken % 2 == 0
        size, total = inner.size, inner.total
        size = trees.where(
            is_noisy, jax.tree.map(lambda x, g: x + jnp.abs(g), size, grads), size
        )
        total = trees.where(is_noisy, total, optax.tree.add(total, grads))
        radius = at(rho, memory.count)
        perturbed = jax.tree.map(
            lambda w, g, s: w + radius * g / s, inner.anchor, grads, memory.scale
        )
        noisy = draw_around(inner.anchor, memory.deviations(), inner.seed, noise_kind)
        point = trees.where(is_noisy, perturbed, noisy)
        seed = jnp.where(is_noisy, inner.seed, next_seed(inner.seed))
        return _Inner(inner.anchor, inner.taken + 1, seed, point, size, total)

    def finish(memory, inner, params):
        t = memory.count
        rate, beta1, beta2 = (at(x, t) for x in (learning_rate, b1, b2))
        delta, gamma = at(weight_decay, t), at(damping, t)
        mu = jax.tree.map(
            lambda m, g, w: beta1 * m + (1.0 - beta1) * (g / num_shards + delta * w),
            memory.mu, inner.total, inner.anchor,
        )  # fmt: skip
        mean = jax.tree.map(
            lambda w, m, s: w - rate * m / s, inner.anchor, mu, memory.scale
        )
        scale = jax.tree.map(
            lambda s, g: beta2 * s
            + (1.0 - beta2) * (jnp.sqrt(s) * g / num_shards + gamma + delta),
            memory.scale, inner.size,
        )  # fmt: skip
        mean, scale = (trees.cast_like(x, inner.anchor) for x in (mean, scale))
        count = jnp.asarray(optax.safe_increment(t))
        # Like the old one: in `shard_map` it varies over devices as the key does.
        number = jnp.full_like(memory.num_data, at(num_data, count))
        seed = first_seed(keys.fold_in(memory.key, count, key), mean)
        point = draw_around(mean, _deviations(scale, number), seed, noise_kind)
        updates, there = trees.steps_to(point, params)
        offset = optax.tree.sub(mean, there)
        return updates, BSAMState(count, memory.key, mu, scale, offset, number)

    return modes.build(Walk(2 * num_shards, init, start, step, finish), loop)


def _deviations(scale, num_data):
    """1 / sqrt(num_data s)."""
    return jax.tree.map(lambda s: jax.lax.rsqrt(num_data.astype(s.dtype) * s), scale)
