r"""SAMPa: SAM whose two gradients do not wait for each other.

    y  = outer optimizer(g_y) from w,   w~ = w + rho a(g_y)
    g  = grad f(y),                     g~ = grad f(w~)
    w  <- outer optimizer((1 - lam) g~ + lam g) from w,    g_y <- g

where g_y is the gradient at the last y. Both points are known when the update begins,
so their gradients can be computed at once, on two groups of devices or in one program.
The params stand on y; `eval_params` gives w.

Paper: Xie, Pethick and Cevher, arXiv 2410.10683. Code: LIONS-EPFL/SAMPa.
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


class SAMPaState(NamedTuple):
    """What lives between outer updates."""

    metrics = ("count",)
    one_minibatch = True  # both gradients belong to it; `make_train_step` reads this

    count: jax.Array  # int32, [], outer updates made
    outer_state: optax.OptState
    ascent_state: Any
    ahead: optax.Updates  # g_y, the gradient at the last y; zero at the start
    offset: optax.Updates  # w - y


class _Inner(NamedTuple):
    """One update under way; the trees are in the accumulator dtype."""

    taken: jax.Array  # int32, [], gradients consumed
    point: optax.Params
    ahead: optax.Updates  # the gradient at y
    perturbed: optax.Updates  # the gradient at w~


@factory
def sampa(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    lam: optax.ScalarOrSchedule = 0.2,
    ascent: optax.GradientTransformation | None = None,
    **loop: Unpack[LoopArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""SAMPa: sharpness-aware minimization with two gradients at once.

    .. math::
        \begin{align*}
        y_{t+1} &= \mathrm{Outer}_w(\nabla f(y_t)), \qquad
        \tilde w = w + \rho \frac{\nabla f(y_t)}{\|\nabla f(y_t)\|} \\
        w &\leftarrow \mathrm{Outer}_w\left((1 - \lambda) \nabla f(\tilde w)
            + \lambda \nabla f(y_{t+1})\right)
        \end{align*}

    Two gradients per update, neither of which needs the other: in scanned mode the one
    given to `update` is that at y, and the program computes the one at
    :math:`\tilde w` from the state alone, so that the compiler may run them side by
    side. Before there is a :math:`\nabla f(y)` both are taken at w.

    The params stand on y, and so do loss and batch statistics; read w by `eval_params`.
    Put nothing behind this method that alters its updates.

    Cost:
      2 gradients per update; state: 2 copies of the params (transparent: 6) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer. It is asked twice per update, and keeps the state of
        the update of w.
      rho: the radius, >= 0.
      lam: :math:`\lambda`, the weight of the gradient at y, in [0, 1].
      ascent: see `sam`; None is `ascent.unit()`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      The second update perturbs along the gradient that the first one saw:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.array([3.0, 1.0]) * x**2) / 2)
      >>> tx = optax_flat.sampa(optax.sgd(0.1), rho=0.5, lam=0.0)
      >>> x = w = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(2):
      ...     updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
      ...     x = optax.apply_updates(x, updates)
      >>> first = grad_fn(w, 0)
      >>> w = w - 0.1 * first
      >>> w = w - 0.1 * grad_fn(w + 0.5 * first / jnp.linalg.norm(first), 0)
      >>> bool(jnp.allclose(optax_flat.eval_params(state, x), w))
      True

    References:
      Xie, Pethick and Cevher, `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, 2024.

    Differs from the paper:
      Nothing. The authors' code takes the gradient at :math:`\tilde w` on the minibatch
      *before*, that at y on the present one: pass `batches` of your own for that.
    """
    outer = checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    checks.number("lam", lam, 0.0, 1.0)
    ascent = checks.transformation("ascent", rules.unit() if ascent is None else ascent)
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        w = trees.accumulator(params, accumulator_dtype)
        zeros = optax.tree.zeros_like(w)
        count = jnp.zeros([], jnp.int32)
        return SAMPaState(count, outer.init(w), ascent.init(w), zeros, zeros)

    def start(memory, params):
        del memory
        y = trees.accumulator(params, accumulator_dtype)
        zeros = optax.tree.zeros_like(y)
        return _Inner(jnp.zeros([], jnp.int32), y, zeros, zeros)

    def perturbation(memory, w):
        return ascent.update(memory.ahead, memory.ascent_state, trees.finite(w))

    def step(memory, inner, grads):
        is_first = inner.taken == 0
        w = optax.tree.add(inner.point, memory.offset)
        a, _ = perturbation(memory, w)
        radius = at(rho, memory.count)
        there = jax.tree.map(lambda w, a: w + radius * a, w, a)
        return _Inner(
            inner.taken + 1,
            trees.where(is_first, trees.cast_like(there, w), inner.point),
            trees.where(is_first, grads, inner.ahead),
            grads,
        )

    def finish(memory, inner, params, **extra_args):
        w = trees.accumulator(params, accumulator_dtype)
        w = optax.tree.add(w, memory.offset)
        _, ascent_state = perturbation(memory, w)
        weight = at(lam, memory.count)
        d = jax.tree.map(
            lambda p, g: (1 - weight) * p + weight * g, inner.perturbed, inner.ahead
        )
        steps, outer_state = outer.update(
            trees.cast_like(d, w), memory.outer_state, w, **extra_args
        )
        w = optax.tree.add(w, steps)
        steps, _ = outer.update(inner.ahead, outer_state, w, **extra_args)
        updates, y = trees.steps_to(optax.tree.add(w, steps), params)
        offset = optax.tree.sub(w, y)
        count = jnp.asarray(optax.safe_increment(memory.count))
        return updates, SAMPaState(
            count, outer_state, ascent_state, inner.ahead, offset
        )

    return modes.build(Walk(2, init, start, step, finish), loop)
