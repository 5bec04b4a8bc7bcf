r"""Lookbehind: several ascent steps, a descent step from each, then half of the way.

    p = fast = w
    p <- p + rho a(grad f(p))
    repeat num_steps times:
        fast <- outer optimizer(grad f(p)) from fast
        p    <- p + rho a(grad f(p))
    w <- w + alpha (fast - w)

all on one minibatch. Each gradient serves the descent at its point and the ascent to
the next, so an update costs 1 + num_steps of them.

Paper: Mordido et al., arXiv 2307.16704. Code: chandar-lab/Lookbehind-SAM.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat import ascent as rules
from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.walk import Walk


class LookbehindSAMState(NamedTuple):
    """What lives between outer updates."""

    metrics = ("count",)
    one_minibatch = True  # all gradients belong to it; `make_train_step` reads this

    count: jax.Array  # int32, [], outer updates made
    outer_state: optax.OptState  # of the fast weights' optimizer
    ascent_state: Any


class _Inner(NamedTuple):
    """One update under way; the trees are in the accumulator dtype."""

    taken: jax.Array  # int32, [], gradients consumed
    point: optax.Params
    fast: optax.Params
    first: Any  # the fast weights after their first step; None with a given alpha
    outer_state: optax.OptState
    ascent_state: Any


@factory
def lookbehind_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.5,
    num_steps: int = 5,
    adaptive: bool = False,
    ascent: optax.GradientTransformation | None = None,
    **loop: Unpack[LoopArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Lookbehind-SAM: several ascents, a descent from each, and a part of the way.

    .. math::
        \begin{align*}
        p_i &= p_{i-1} + \rho \frac{\nabla f(p_{i-1})}{\|\nabla f(p_{i-1})\|},
            \qquad p_0 = w, \quad i = 1 \dots k \\
        \mathrm{fast} &\leftarrow \mathrm{Outer}(\nabla f(p_i)) \\
        w &\leftarrow w + \alpha (\mathrm{fast} - w)
        \end{align*}

    with k = `num_steps`, on one minibatch: 1 + k gradients per update.
    `make_train_step` takes one minibatch; see `sam` for how to pass it by hand.

    Cost:
      `1 + num_steps` gradients per update; state: 0 copies of the params (transparent:
      4) beside `outer`'s.

    Args:
      outer: an Optax optimizer of the fast weights, whose state goes on from update to
        update. It makes `num_steps` updates for each of ours.
      rho: the radius of each ascent, >= 0.
      alpha: how far w goes to the fast weights, in (0, 1].
      num_steps: k, >= 1.
      adaptive: whether every leaf has an alpha of its own in the place of `alpha`,
        (1 + c) / 2 with c the cosine between its first fast step and all of them. It
        takes a buffer like the params.
      ascent: see `sam`; None is `ascent.unit()`, and
        ``ascent.adaptive_unit()`` makes it Lookbehind-ASAM.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      With one step and alpha 1 it is SAM:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> def step(tx):
      ...     return tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)[0]
      >>> sam = step(optax_flat.sam(optax.sgd(0.1)))
      >>> tx = optax_flat.lookbehind_sam(optax.sgd(0.1), num_steps=1, alpha=1.0)
      >>> bool(jnp.allclose(sam, step(tx), atol=1e-6))
      True

    References:
      Mordido, Malviya, Baratin and Chandar, `Lookbehind-SAM: k steps back, 1 step
      forward <https://arxiv.org/abs/2307.16704>`_, 2024.

    Differs from the paper:
      Nothing. The authors' code computes every gradient but the last twice, 2 k per
      update; its alpha of -1 is ``adaptive=True``.
    """
    outer = checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    checks.number("alpha", alpha, 0.0, 1.0, open_low=True)
    num_steps = checks.integer("num_steps", num_steps, 1)
    ascent = checks.transformation("ascent", rules.unit() if ascent is None else ascent)
    checks.flag("adaptive", adaptive)
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        w = trees.accumulator(params, accumulator_dtype)
        count = jnp.zeros([], jnp.int32)
        return LookbehindSAMState(count, outer.init(w), ascent.init(w))

    def start(memory, params):
        w = trees.accumulator(params, accumulator_dtype)
        taken = jnp.zeros([], jnp.int32)
        first = w if adaptive else None
        return _Inner(taken, w, w, first, memory.outer_state, memory.ascent_state)

    def step(memory, inner, grads, **extra_args):
        is_first = inner.taken == 0
        steps, outer_state = outer.update(
            grads, inner.outer_state, trees.finite(inner.fast), **extra_args
        )
        outer_state = trees.cast_like(outer_state, inner.outer_state)
        fast = optax.tree.add(inner.fast, steps)
        # The rule moves on once per update, as all else.
        there = trees.finite(inner.point)
        a, ascent_state = ascent.update(grads, memory.ascent_state, there)
        radius = at(rho, memory.count)
        return _Inner(
            inner.taken + 1,
            jax.tree.map(lambda p, a: p + radius * a, inner.point, a),
            trees.where(is_first, inner.fast, fast),
            trees.where(inner.taken == 1, fast, inner.first) if adaptive else None,
            trees.where(is_first, inner.outer_state, outer_state),
            trees.where(is_first, ascent_state, inner.ascent_state),
        )

    def finish(memory, inner, params):
        w = trees.accumulator(params, accumulator_dtype)
        steps = optax.tree.sub(inner.fast, w)
        if adaptive:
            firsts = optax.tree.sub(inner.first, w)
            cosines = jax.tree.map(trees.cosine, steps, firsts)
            updates = jax.tree.map(lambda s, c: (1 + c) / 2 * s, steps, cosines)
            updates = trees.cast_like(updates, steps)
        else:
            part = at(alpha, memory.count)
            updates = jax.tree.map(lambda s: part * s, steps)
        count = jnp.asarray(optax.safe_increment(memory.count))
        return updates, LookbehindSAMState(count, inner.outer_state, inner.ascent_state)

    return modes.build(Walk(1 + num_steps, init, start, step, finish), loop)
