"""What the methods that only run the model forward have in common."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import convolutions, trees
from optax_flat._core.modes import states


def check_spread(spread: Any) -> None:
    """A tree of positive standard deviations."""
    for leaf in jax.tree.leaves(spread):
        number = isinstance(leaf, int | float | np.number | np.ndarray | jax.Array)
        if not number or isinstance(leaf, bool):
            raise TypeError(
                "`spread` must be a float > 0 or a tree of them like the params, got "
                f"{leaf!r} of type {type(leaf).__name__}."
            )
        if not (np.isfinite(leaf).all() and (np.asarray(leaf) > 0).all()):
            raise ValueError(
                f"`spread` must be a finite standard deviation > 0, got {leaf!r}."
            )


def deviations_like(spread: Any, params: optax.Params) -> Any:
    """`spread`, a tree prefix of the params, as a tree of numbers like them."""
    if is_empty(params):
        return params
    try:
        deviations = jax.tree.broadcast(spread, params)
    except ValueError as error:
        raise ValueError(
            "`spread` must be one float or a tree of floats whose structure begins "
            f"like that of the params.\n  got:      {jax.tree.structure(spread)}\n"
            f"  expected: {jax.tree.structure(params)}"
        ) from error
    for deviation, leaf in zip(
        *map(jax.tree.leaves, (deviations, params)), strict=True
    ):
        shape = jnp.shape(deviation)
        # An array of deviations may have fewer axes than its leaf, or axes of length 1.
        ends = zip(reversed(shape), reversed(leaf.shape), strict=False)
        if len(shape) > leaf.ndim or any(ours not in (1, its) for ours, its in ends):
            raise ValueError(
                "`spread` must be one float for each leaf, or an array that broadcasts "
                f"to it, got shape {shape} for a leaf of shape {leaf.shape}."
            )
    return deviations


def is_empty(params: Any) -> bool:
    """Whether there is nothing, as in what stands for all params in Optax's tools."""
    return not jax.tree.leaves(params)


def check_functions(params: Any, **functions: Any) -> None:
    """The functions of these names were passed to `update`, and can use the params."""
    for name, value in functions.items():
        if not callable(value):
            raise ValueError(
                f"`{name}` must be passed to `update` of a method without gradients, "
                f"got {value!r}. Call tx.update(None, opt_state, params, "
                "output_fn=lambda params: model outputs, loss_fn=lambda outputs: "
                "loss), or use optax_flat.training.make_train_step with `output_fn`."
            )
    hidden = states(params, optax.MaskedNode)
    if hidden and not hasattr(functions["output_fn"], "merges_frozen"):
        raise ValueError(
            "the params hold optax.MaskedNode placeholders that `output_fn` cannot "
            "use. Use optax_flat.masked instead of optax.masked or optax.partition."
        )


def in_dtype_of(
    output_fn: Callable[[optax.Params], Any],
    params: optax.Params,
    fast_convolutions: bool,
) -> Callable[[optax.Params], Any]:
    """`output_fn` of params that are given in the accumulators' dtype."""

    def evaluated(point):
        point = trees.cast_like(point, params)
        return output_fn(trees.where_finite(params, point, params))

    return convolutions.fast_if(fast_convolutions, evaluated)


def wide(outputs: Any) -> Any:
    """Outputs of the model as arrays of at least float32, which can be subtracted."""
    if is_empty(outputs):
        raise ValueError(
            f"`output_fn` must return at least one array, got {outputs!r}. Return what "
            "the loss of the outputs takes."
        )
    return trees.accumulator(jax.tree.map(jnp.asarray, outputs))


def slopes(loss_fn: Callable[[Any], jax.Array], outputs: Any) -> Any:
    """The gradient of the loss in the outputs, in their dtype."""

    def scalar(outputs):
        loss = loss_fn(outputs)
        shape = jnp.shape(loss) if jax.tree_util.all_leaves([loss]) else "a tree"
        if shape != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise TypeError(
                "`loss_fn` must return the loss of the outputs, one floating-point "
                f"number, got {loss!r}. Return its mean over the examples, and nothing "
                "beside it."
            )
        return loss

    return jax.grad(scalar)(outputs)


def check_target(target: Any, outputs: Any) -> None:
    """The observations are like the outputs, which have a leading axis of members."""
    got, expected = jax.tree.structure(target), jax.tree.structure(outputs)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(target)]
    expected_shapes = [leaf.shape[1:] for leaf in jax.tree.leaves(outputs)]
    if got != expected or shapes != expected_shapes:
        raise ValueError(
            "`target` must have the structure and the shapes of what `output_fn` "
            f"returns.\n  got:      {got} of shapes {shapes}\n"
            f"  expected: {expected} of shapes {expected_shapes}\n"
            "Each observation belongs to the output in its place: transpose or reshape "
            "`target`, or what `output_fn` returns."
        )


def flat(outputs: Any, leading: int = 0) -> jax.Array:
    """All outputs in one array of at least float32, after the leading axes.

    Where types carry shardings (on an Explicit mesh) it is the same on all devices.
    """
    leaves = jax.tree.leaves(trees.replicated(wide(outputs)))
    shape = leaves[0].shape[:leading]
    size = [math.prod(leaf.shape[leading:]) for leaf in leaves]
    parts = [leaf.reshape(*shape, n) for leaf, n in zip(leaves, size, strict=True)]
    return jnp.concatenate(parts, axis=-1)
