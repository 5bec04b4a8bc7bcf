r"""Momentum-SAM: sharpness-aware minimization with one gradient per update.

    wt = w - rho v / ||v||,    v: the outer optimizer's momentum
    w  <- outer optimizer(grad f(wt))

The direction is that of the coming step, which is known before the gradient is; where
momentum carries the params across a valley and up its wall, it leads uphill. The params
stand on wt, where the gradient is wanted; `eval_params` gives w.

Paper: Becker, Altrock and Risse, arXiv 2401.12033. Code: MarlonBecker/MSAM.
"""

from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat import ascent
from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.walk import Walk


class MomentumSAMState(NamedTuple):
    """What lives between updates."""

    metrics = ("count",)
    one_minibatch = True  # there is but one gradient; `make_train_step` reads this

    count: jax.Array  # int32, [], updates made
    outer_state: optax.OptState
    offset: optax.Updates  # w minus the point where the params stand


class _Inner(NamedTuple):
    """The only gradient of an update; the trees are in the accumulator dtype."""

    point: optax.Params
    gradient: optax.Updates


@factory
def momentum_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.3,
    **loop: Unpack[LoopArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: perturbs along the momentum, which costs no gradient.

    .. math::
        w \leftarrow \mathrm{Outer}\left(\nabla f\left(w - \rho_t
        \frac{v}{\|v\|}\right)\right)

    with :math:`\rho` = `rho` and v the momentum of `outer`: the buffer `trace` of
    `optax.sgd` with momentum, or the first moment `mu` of `optax.adam` and its like.
    One gradient per update, so both modes are called alike.

    The params stand on the perturbed point, and the loss and the batch statistics of
    the training are those of that point. Read w by `eval_params`, and put nothing
    behind this method that alters its updates. Give a moving `rho` as a schedule: the
    point reads it one update ahead, which `optax.inject_hyperparams` cannot.

    Args:
      outer: an Optax optimizer that keeps a momentum, whose state holds a tree `trace`
        or `mu` like the params.
      rho: the radius, >= 0; 0 is `outer`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; in `init`, an `outer`
        without momentum.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x: jnp.sum(jnp.cosh(x)))
      >>> tx = optax_flat.momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> x = jnp.array([3.0, -4.0])
      >>> updates, state = tx.update(grad_fn(x), tx.init(x), x)
      >>> x = optax.apply_updates(x, updates)
      >>> w = optax_flat.eval_params(state, x)
      >>> bool(jnp.allclose(jnp.linalg.norm(x - w), 0.5))
      True

    References:
      Becker, Altrock and Risse, `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.

    Differs from the paper:
      Nothing for SGD: before there is a momentum the params stand on w. The authors'
      class has `rho` 0.3, their runs 3, and none during the warm-up of a ViT. Their SGD
      takes weight decay at the perturbed point: ours does with
      ``inner_transform=optax.add_decayed_weights(...)``, and at w in `outer`.
    """
    checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        w = trees.accumulator(params, accumulator_dtype)
        outer_state = outer.init(w)
        _momentum(outer_state, w)  # raises where there is none
        zeros = optax.tree.zeros_like(w)
        return MomentumSAMState(jnp.zeros([], jnp.int32), outer_state, zeros)

    def start(memory, params):
        del memory
        point = trees.accumulator(params, accumulator_dtype)
        return _Inner(point, optax.tree.zeros_like(point))

    def step(memory, inner, grads):
        del memory
        return inner._replace(gradient=grads)

    def finish(memory, inner, params):
        w = optax.tree.add(inner.point, memory.offset)
        steps, outer_state = outer.update(inner.gradient, memory.outer_state, w)
        w = optax.tree.add(w, steps)
        count = jnp.asarray(optax.safe_increment(memory.count))
        momentum = _momentum(outer_state, w)
        along, _ = ascent.unit().update(momentum, optax.EmptyState())
        # Along the step; some optimizers keep minus the momentum.
        sign = jnp.where(trees.vdot(momentum, steps) > 0, -1.0, 1.0)
        radius = sign * at(rho, count)
        there = jax.tree.map(lambda w, a: w - radius * a, w, along)
        updates, there = trees.steps_to(there, params)
        offset = optax.tree.sub(w, there)
        return updates, MomentumSAMState(count, outer_state, offset)

    return modes.build(Walk(1, init, start, step, finish), loop)


def _momentum(outer_state: optax.OptState, params: optax.Params) -> Any:
    """The tree of the outer optimizer's state that is its momentum."""

    def kind(tree):
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    def buffers(node):
        if not hasattr(node, "_fields"):  # an array has a method `trace`
            return []
        fields = (getattr(node, name, None) for name in ("trace", "mu"))
        return [field for field in fields if kind(field) == kind(params)]

    nodes = jax.tree.leaves(outer_state, is_leaf=lambda x: bool(buffers(x)))
    found = [buffer for node in nodes for buffer in buffers(node)]
    if not found:
        raise ValueError(
            "`outer` must keep a momentum, a tree `trace` or `mu` like the params in "
            f"its state, got an optimizer with the state {type(outer_state).__name__}. "
            "Give for instance optax.sgd(learning_rate, momentum=0.9) or optax.adamw."
        )
    return found[0]
