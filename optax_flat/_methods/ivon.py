r"""IVON: variational learning of a normal posterior by natural gradients.

Instead of one point, learn the mean m and the curvature h of a normal distribution of
the weights, N(m, 1 / (N (h + delta))). Every gradient g is taken at a draw w from it,
and tells with the draw's displacement what the curvature is there, without any second
derivative (by Stein's identity):

    f  = g (w - m) N (h + delta)                           both means over the samples
    h  <- b2 h + (1 - b2) f + (1 - b2)^2 (h - f)^2 / (2 (h + delta))
    mu <- b1 mu + (1 - b1) g
    m  <- m - learning_rate (mu / (1 - b1^t) + delta m) / (h + delta)

N is `ess`, delta is `weight_decay`. The last term of h keeps h + delta > 0, though h
itself may fall below 0.

Paper: Shen et al., arXiv 2402.17641 (ICML 2024). Codes: ivon-opt (PyTorch, the
authors') and ivon-optax; how we differ from them is at the end of `ivon`'s docstring.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, keys, modes, trees
from optax_flat._core.arguments import KeyArgument, LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.noise import KINDS, draw_around, draw_from, first_seed, next_seed
from optax_flat._core.walk import Walk


class IVONArguments(LoopArguments, KeyArgument):
    """What `ivon` shares with other walks."""


class IVONState(NamedTuple):
    """What lives between outer updates; the trees have at least float32."""

    metrics = ("count",)
    one_minibatch = True  # all draws may share it; `make_train_step` reads this

    count: jax.Array  # int32, [], outer updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    mu: optax.Updates  # running mean of g, not debiased
    hess: optax.Params  # h; the posterior's precision is ess (h + weight_decay)
    offset: optax.Updates  # m minus the draw that the params stand on
    # Of that draw:
    ess: jax.Array  # float, []
    weight_decay: jax.Array  # float, []
    drawn: jax.Array  # bool, [], whether it is one: `init` leaves the params at m

    def deviations(self) -> optax.Params:
        """The posterior's standard deviations."""
        return _deviations(self.hess, self.ess, self.weight_decay)


class _Others(NamedTuple):
    """What the samples behind the first one need."""

    anchor: optax.Params  # m
    seed: jax.Array  # uint32, [2], of the next draw


class _Inner(NamedTuple):
    """The samples of one update; the trees are in the accumulator dtype."""

    point: optax.Params
    total: optax.Updates  # sum of g so far
    product: optax.Updates  # sum of g (w - m) so far
    others: _Others | None  # None if there is one sample


class _Settings(NamedTuple):
    """The arguments of `ivon`."""

    learning_rate: optax.ScalarOrSchedule
    ess: optax.ScalarOrSchedule
    hess_init: float
    b1: optax.ScalarOrSchedule
    b2: optax.ScalarOrSchedule
    weight_decay: optax.ScalarOrSchedule
    num_samples: int
    rescale_lr: bool
    clip_radius: optax.ScalarOrSchedule | None
    debias: bool
    noise_kind: str
    hess_approx: str


HESSIANS = ("price", "gradsq")


@factory
def ivon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ess: optax.ScalarOrSchedule,
    hess_init: float = 1.0,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.99999,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    num_samples: int = 1,
    rescale_lr: bool = True,
    clip_radius: optax.ScalarOrSchedule | None = None,
    debias: bool = True,
    hess_approx: str = "price",
    noise_kind: str = "normal",
    **loop: Unpack[IVONArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Improved variational online Newton: a posterior about the price of Adam.

    .. math::
        \begin{align*}
        f &= g\,(w - m)\, N (h + \delta), \qquad w = m + z / \sqrt{N (h + \delta)} \\
        h &\leftarrow \beta_2 h + (1 - \beta_2) f
            + \frac{(1 - \beta_2)^2 (h - f)^2}{2 (h + \delta)} \\
        \mu &\leftarrow \beta_1 \mu + (1 - \beta_1) g \\
        m &\leftarrow m - \eta\, \frac{\mu / (1 - \beta_1^t) + \delta m}{h + \delta}
        \end{align*}

    with N = `ess`, :math:`\delta` = `weight_decay`, h starting at `hess_init`, and g
    and f averaged over `num_samples` draws w, each with one gradient. The weights have
    the posterior :math:`N(m, 1 / (N (h + \delta)))`.

    The params stand on a draw w, where the next gradient is wanted, in both modes;
    `eval_params` gives m, and `sample_params` new draws from the posterior. With one
    sample, scanned mode needs no `grad_fn` and keeps less than transparent mode.
    Nothing may alter the updates behind this method: m is kept as a distance from where
    they lead. `init` cannot move the params, so the very first gradient is taken at m
    itself; it moves m and tells nothing of h.

    The loss f is a mean over examples. What is minimized is the variational free energy
    of N f and the prior :math:`N(0, 1 / (N \delta))`. Keep the params in float32: in
    bfloat16 the deviations must be wide against the spacing of the numbers.

    Cost:
      `num_samples` gradients per update; state: 3 copies of the params (transparent:
      7).

    Args:
      learning_rate: :math:`\eta`, >= 0; with `rescale_lr` about that of SGD.
      ess: N, the effective sample size, > 0: the number of training examples; less
        makes the posterior wider, more makes it narrower.
      hess_init: h at the start, > 0. Too small a value, and the first draws are wild.
      b1: decay of the momentum, in [0, 1).
      b2: decay of h, in [0, 1]; 1 keeps h as it is.
      weight_decay: :math:`\delta`, >= 0, the prior's precision over N. As a schedule it
        should not fall, which could make :math:`h + \delta` negative.
      num_samples: draws, and so gradients, per update, >= 1.
      rescale_lr: whether the learning rate is multiplied by `hess_init` +
        `weight_decay`, which makes the first steps those of SGD.
      clip_radius: bound, > 0, of each entry of what the learning rate multiplies; None
        is no bound.
      debias: whether the momentum is divided by :math:`1 - \beta_1^t`.
      hess_approx: "price", the f above, or "gradsq": :math:`f = N g^2`, as in older
        methods of the family.
      noise_kind: "normal", or "rademacher": independent signs, much cheaper; f has
        the same mean on a quadratic. `sample_params` is normal anyway.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      On a quadratic of curvatures 4 and 1, h becomes the curvature and m the minimum:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> h, c = jnp.array([4.0, 1.0]), jnp.array([1.0, -2.0])
      >>> tx = optax_flat.ivon(
      ...     0.1, ess=1000.0, b2=0.99, weight_decay=0.0, noise_kind="rademacher",
      ...     key=0)
      >>> def step(carry, _):
      ...     w, state = carry
      ...     updates, state = tx.update(h * (w - c), state, w)
      ...     return (optax.apply_updates(w, updates), state), None
      >>> w = jnp.zeros(2)
      >>> (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=2000)
      >>> bool(jnp.allclose(state.memory.hess, h, rtol=0.1))
      True
      >>> bool(jnp.allclose(optax_flat.eval_params(state, w), c, atol=0.02))
      True

    References:
      Shen et al., `Variational Learning is Effective for Large Deep Networks
      <https://arxiv.org/abs/2402.17641>`_, 2024.

    Differs from the paper:
      The first gradient is taken at m. Algorithm 1 has no `rescale_lr` and no
      `clip_radius`, which are the authors' codes'; ``rescale_lr=False`` is the paper.

    Coming from ivon-opt and ivon-optax:
      There the params are put on a draw and back around every gradient by hand
      (``sampled_params``, ``sample_parameters``), and a training loop that forgets it
      still runs; here they stand on it. ivon-optax' state changes its structure between
      the two, so that no `jax.lax.scan` can carry it, and must be the first of its
      chain.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("ess", ess, 0.0, open_low=True)
    checks.start_value("hess_init", hess_init, 0.0, open_low=True)
    checks.number("b1", b1, 0.0, 1.0, open_high=True)
    checks.number("b2", b2, 0.0, 1.0)
    checks.number("weight_decay", weight_decay, 0.0)
    if clip_radius is not None:
        checks.number("clip_radius", clip_radius, 0.0, open_low=True)
    settings = _Settings(
        learning_rate=learning_rate,
        ess=ess,
        hess_init=hess_init,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        num_samples=checks.integer("num_samples", num_samples, 1),
        rescale_lr=checks.flag("rescale_lr", rescale_lr),
        clip_radius=clip_radius,
        debias=checks.flag("debias", debias),
        noise_kind=checks.choice("noise_kind", noise_kind, KINDS),
        hess_approx=checks.choice("hess_approx", hess_approx, HESSIANS),
    )
    walk = _walk(settings, checks.key(loop["key"]), loop["accumulator_dtype"])
    return modes.build(walk, loop)


def _walk(settings, key, accumulator_dtype):
    numbers = settings.ess, settings.weight_decay

    def init(params):
        zeros = optax.tree.zeros_like(trees.accumulator(params, accumulator_dtype))
        hess = jax.tree.map(lambda x: jnp.full_like(x, settings.hess_init), zeros)
        count = jnp.zeros([], jnp.int32)
        ess, decay = (jnp.asarray(at(x, count), float) for x in numbers)
        return IVONState(
            count, keys.data(key), zeros, hess, zeros, ess, decay, jnp.array(False)
        )

    def start(memory, params):
        point = trees.accumulator(params, accumulator_dtype)
        zeros, others = optax.tree.zeros_like(point), None
        if settings.num_samples > 1:
            # The seed itself has made the point that the params stand on.
            seed = first_seed(keys.fold_in(memory.key, memory.count, key), point)
            anchor = optax.tree.add(point, memory.offset)
            others = _Others(anchor, next_seed(seed))
        return _Inner(point, zeros, zeros, others)

    def step(memory, inner, grads):
        total, others = optax.tree.add(inner.total, grads), inner.others
        if settings.hess_approx == "gradsq":
            product = jax.tree.map(lambda p, g: p + g * g, inner.product, grads)
        elif others is None:
            product = jax.tree.map(lambda g, o: -g * o, grads, memory.offset)
        else:
            product = jax.tree.map(
                lambda p, g, w, m: p + g * (w - m),
                inner.product, grads, inner.point, others.anchor,
            )  # fmt: skip
        if others is None:
            return _Inner(inner.point, total, product, None)
        anchor, seed = others
        point = draw_around(anchor, memory.deviations(), seed, settings.noise_kind)
        return _Inner(point, total, product, _Others(anchor, next_seed(seed)))

    def finish(memory, inner, params):
        t, n = memory.count, settings.num_samples
        anchor = trees.accumulator(params, accumulator_dtype)
        anchor = optax.tree.add(anchor, memory.offset)
        beta = at(settings.b1, t)
        mu = jax.tree.map(
            lambda m, g: beta * m + (1.0 - beta) * (g / n), memory.mu, inner.total
        )
        hess = _new_hess(settings, memory, inner.product)
        mean = _new_mean(settings, memory, anchor, mu, hess)
        mean, hess, mu = (trees.cast_like(x, anchor) for x in (mean, hess, mu))
        count = jnp.asarray(optax.safe_increment(t))
        # Like the old ones: in `shard_map` they vary over devices as the key does.
        ess, decay = (
            jnp.full_like(old, at(x, count))
            for x, old in zip(numbers, (memory.ess, memory.weight_decay), strict=True)
        )
        seed = first_seed(keys.fold_in(memory.key, count, key), mean)
        z = draw_from(seed, mean, settings.noise_kind)
        moves = optax.tree.mul(_deviations(hess, ess, decay), z)
        updates, there = trees.steps_to(optax.tree.add(mean, moves), params)
        offset = jax.tree.map(_offset, mean, moves, there, params)
        return updates, IVONState(
            count,
            memory.key,
            mu,
            hess,
            offset,
            ess,
            decay,
            jnp.full_like(memory.drawn, True),
        )

    return Walk(settings.num_samples, init, start, step, finish)


def _new_hess(settings, memory, product):
    """The new h, from the sum of g (w - m), or of g^2."""
    squares = settings.hess_approx == "gradsq"
    # The samples that stood on a draw; the first gradient of all did not.
    on_draws = settings.num_samples - 1 + memory.drawn.astype(jnp.int32)
    observed = jnp.int32(settings.num_samples) if squares else on_draws
    weight = jnp.where(observed > 0, 1.0 - at(settings.b2, memory.count), 0.0)

    def update(h, p):
        precision = h + memory.weight_decay.astype(h.dtype)
        scale = memory.ess.astype(h.dtype) / jnp.maximum(observed, 1).astype(h.dtype)
        f = p * scale if squares else p * scale * precision
        change = weight.astype(h.dtype) * (f - h)
        return h + change + change**2 / (2.0 * precision)

    return jax.tree.map(update, memory.hess, product)


def _new_mean(settings, memory, mean, mu, hess):
    """The new m, from the new momentum and h."""
    t = memory.count
    rate = at(settings.learning_rate, t)
    if settings.rescale_lr:
        rate = rate * (settings.hess_init + memory.weight_decay)
    weight, radius = 1.0, settings.clip_radius
    if settings.debias:
        weight = 1.0 - at(settings.b1, t) ** (jnp.asarray(t, float) + 1.0)

    def update(m, mu, h):
        delta = memory.weight_decay.astype(h.dtype)
        step = (mu / weight + delta * m) / (h + delta)
        if radius is not None:
            step = jnp.clip(step, -at(radius, t), at(radius, t))
        return m - rate * step

    return jax.tree.map(update, mean, mu, hess)


def _offset(mean, move, there, param):
    """The mean minus where the params are."""
    # In one precision the mean is as exact as any params; the difference would be one
    # more pass over memory.
    return -move if mean.dtype == param.dtype else mean - there


def _deviations(hess, ess, weight_decay):
    """1 / sqrt(ess (h + weight_decay))."""
    return jax.tree.map(
        lambda h: jax.lax.rsqrt(
            ess.astype(h.dtype) * (h + weight_decay.astype(h.dtype))
        ),
        hess,
    )
