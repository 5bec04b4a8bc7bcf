r"""Momentum-SAM: sharpness-aware minimization with one gradient per update.

    wt = w - rho v / ||v||,    v: the outer optimizer's momentum
    w  <- outer optimizer(grad f(wt))

The direction is that of the coming step, which is known before the gradient is; where
momentum carries the params across a valley and up its wall, it leads uphill. The params
stand on wt, where the gradient is wanted; `eval_params` gives w.

Paper: Becker, Altrock and Risse, arXiv 2401.12033. Code: MarlonBecker/MSAM.
"""

import math
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.walk import Walk

PROBES = 1000  # updates after which a momentum of zero is taken for one of steps


class MomentumSAMState(NamedTuple):
    """What lives between updates."""

    metrics = ("count",)
    one_minibatch = True  # there is but one gradient; `make_train_step` reads this

    count: jax.Array  # int32, [], updates made
    outer_state: optax.OptState
    sign: jax.Array  # [], -1 where `outer` keeps minus the momentum, else 1
    factor: jax.Array  # [], sign rho / ||v||: w is params + factor v + remainder
    remainder: optax.Updates  # what rounding takes; [] where the dtypes are the same

    @property
    def offset(self) -> optax.Updates:
        """The way from where the params stand to w."""
        # Not a field: one more buffer, written and read, would cost more time than v.
        return jax.tree.map(
            lambda v, rest: rest + (self.factor * v).astype(rest.dtype),
            _momentum(self.outer_state),
            self.remainder,
        )


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

    Cost:
      1 gradient per update; state: 0 copies of the params (transparent: 3) beside
      `outer`'s.

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
    outer = checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        w = trees.accumulator(params, accumulator_dtype)
        outer_state = outer.init(w)
        _check_momentum(outer_state, w)
        remainder = jax.tree.map(_remainder, optax.tree.zeros_like(w), params)
        count, zero = jnp.zeros([], jnp.int32), jnp.zeros([])
        sign = _sign(outer, w)
        return MomentumSAMState(count, outer_state, sign, zero, remainder)

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
        w = optax.apply_updates(w, steps)
        count = jnp.asarray(optax.safe_increment(memory.count))
        momentum = _momentum(outer_state)
        size = trees.norm(momentum)
        inverse = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1.0), 0.0)
        factor = memory.sign * at(rho, count) * inverse
        there = jax.tree.map(lambda w, v: w - (factor * v).astype(w.dtype), w, momentum)
        updates, reached = trees.steps_to(there, params)
        rest = optax.tree.sub(there, reached)
        remainder = jax.tree.map(_remainder, rest, params)
        return updates, MomentumSAMState(
            count, outer_state, memory.sign, factor, remainder
        )

    return modes.build(Walk(1, init, start, step, finish), loop)


def _sign(outer, params):
    """-1 where `outer` keeps minus the momentum: what gradients uphill make of it.

    Most optimizers add them up, some keep the steps. Either may stay zero for a while,
    in a warm-up or inside `optax.MultiSteps`. It is tried on a model of the params that
    has two entries along each axis.
    """

    def slope(leaf):  # not a constant one, which `optax.centralize` makes zero
        shape = [min(length, 2) for length in leaf.shape]
        return jnp.linspace(0.5, 1.5, math.prod(shape), dtype=leaf.dtype).reshape(shape)

    gradient = jax.tree.map(slope, params)
    zeros = optax.tree.zeros_like(gradient)

    def is_unknown(tried):
        _, product, count = tried
        return (product == 0) & (count < PROBES)

    def again(tried):
        state, _, count = tried
        _, state = outer.update(gradient, state, zeros)
        return state, trees.vdot(_momentum(state), gradient), count + 1

    tried = outer.init(zeros), jnp.zeros_like(trees.vdot(zeros, zeros)), 0
    if trees.is_traced(tried):
        tried = jax.lax.while_loop(is_unknown, again, tried)
    else:  # a loop of JAX would be compiled anew at every call
        while is_unknown(tried):
            tried = again(tried)
    return jnp.where(tried[1] > 0, jnp.ones([]), -jnp.ones([]))


def _remainder(rest, param):
    """What lies between a point and its place in the params' dtype."""
    return rest if rest.dtype != param.dtype else jnp.zeros([], rest.dtype)


def _momentum(outer_state: optax.OptState) -> Any:
    """The tree of the outer optimizer's state that is its momentum, or None."""

    def buffer(node):
        if not hasattr(node, "_fields"):  # an array has a method `trace`
            return None
        fields = (getattr(node, name, None) for name in ("trace", "mu"))
        return next((field for field in fields if field is not None), None)

    nodes = jax.tree.leaves(outer_state, is_leaf=lambda x: buffer(x) is not None)
    return next((buffer(x) for x in nodes if buffer(x) is not None), None)


def _check_momentum(outer_state, params):
    def kind(tree):
        return jax.tree.structure(tree), [jnp.shape(x) for x in jax.tree.leaves(tree)]

    if kind(_momentum(outer_state)) != kind(params):
        raise ValueError(
            "`outer` must keep a momentum, a tree `trace` or `mu` like the params in "
            f"its state, got an optimizer with the state {type(outer_state).__name__}. "
            "Give for instance optax.sgd(learning_rate, momentum=0.9) or optax.adamw."
        )
