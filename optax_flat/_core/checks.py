"""Argument checks: what was given, what is allowed, what to do.

Values that are traced (under `jit` or `optax.inject_hyperparams`) and schedules
cannot be checked before they run and pass.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import trees


def integer(name: str, value: Any, minimum: int) -> int:
    """A static integer of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"`{name}` must be a Python int >= {minimum}, got {value!r} of type "
            f"{type(value).__name__}. It must be known before the program is built, so "
            "it cannot be a float, a schedule or a traced array. (With "
            "optax.inject_hyperparams, which traces, give its `static_args`; the "
            "factory's `.static_args` has the names.)"
        )
    if value < minimum:
        raise ValueError(
            f"`{name}` must be an int >= {minimum}, got {value}. "
            f"Give at least {minimum}."
        )
    return int(value)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A float or a schedule; a concrete float must lie in [low, high]."""
    if callable(value):
        return value
    interval = _interval(low, high, open_low, open_high)
    if not _is_number(value):
        raise TypeError(
            f"`{name}` must be a float in {interval} or a schedule (a function of the "
            f"number of outer updates), got {value!r} of type {type(value).__name__}."
        )
    dtype = jnp.dtype(getattr(value, "dtype", float))
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"`{name}` must have at least 32 bits, got {dtype}, in which 0.999 may be "
            "1. Give a Python float; optax.inject_hyperparams gives the dtype of the "
            "params unless it is told hyperparam_dtype=jnp.float32."
        )
    try:
        concrete = float(value)
    except jax.errors.ConcretizationTypeError:
        return value  # traced: known only when it runs
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`{name}` must be a scalar in {interval} or a schedule, got {value!r}."
        ) from error
    if not _lies_in(concrete, low, high, open_low, open_high):
        raise ValueError(
            f"`{name}` must lie in {interval}, got {concrete:g}. Give a value inside, "
            "or a schedule that stays inside."
        )
    return value


def start_value(
    name: str, value: Any, low: float = -math.inf, *, open_low: bool = False
) -> Any:
    """What an accumulator starts at: a float of at least `low`, no schedule."""
    if callable(value):
        raise TypeError(
            f"`{name}` is read once, at `init`, so it cannot be a schedule, got "
            f"{value!r}. Give a float {'>' if open_low else '>='} {low:g}."
        )
    return number(name, value, low, open_low=open_low)


def constant(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """A concrete float in [low, high]."""
    interval = _interval(low, high, open_low, open_high)
    try:
        concrete = float(value) if _is_number(value) else None
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        concrete = None
    if concrete is None:
        raise TypeError(
            f"`{name}` must be a float that is known before the program is built, in "
            f"{interval}, got {value!r} of type {type(value).__name__}. Give a number, "
            "not a schedule or a traced array."
        )
    if not _lies_in(concrete, low, high, open_low, open_high):
        raise ValueError(
            f"`{name}` must lie in {interval}, got {concrete:g}. Give a value inside."
        )
    return concrete


def _is_number(value: Any) -> bool:
    kinds = int | float | np.number | np.ndarray | jax.Array
    return isinstance(value, kinds) and not isinstance(value, bool)


def _interval(low: float, high: float, open_low: bool, open_high: bool) -> str:
    right = ")" if open_high or high == math.inf else "]"
    return f"{'(' if open_low else '['}{low:g}, {high:g}{right}"


def _lies_in(
    value: float, low: float, high: float, open_low: bool, open_high: bool
) -> bool:
    excluded = (open_low and value == low) or (open_high and value == high)
    return low <= value <= high and math.isfinite(value) and not excluded


def choice(name: str, value: Any, allowed: Sequence[str]) -> Any:
    """One of a few strings."""
    if value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}."
        )
    return value


def unrolling(value: Any) -> int | bool:
    """How `jax.lax.scan` is unrolled: a bool, or a static integer of at least 1."""
    return value if isinstance(value, bool) else integer("unroll", value, 1)


def chunk(name: str, value: Any, size: int) -> int:
    """How many members of an ensemble are evaluated at a time; None is all."""
    if value is None:
        return size
    value = integer(name, value, 1)
    if size % value:
        raise ValueError(
            f"`{name}` must divide the ensemble's size {size}, got {value}. Give a "
            "divisor, or None to evaluate all members at once."
        )
    return value


def key(value: Any) -> jax.Array:
    """A typed PRNG key from a typed key, a raw key or an int seed."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return jax.random.key(int(value))
    if isinstance(value, jax.Array | np.ndarray):
        if trees.is_key(value) and value.ndim == 0:
            return jnp.asarray(value)
        if value.dtype == jnp.uint32 and value.ndim == 1:
            return jax.random.wrap_key_data(jnp.asarray(value))
        if jnp.issubdtype(value.dtype, jnp.integer) and value.ndim == 0:
            return jax.random.key(jnp.asarray(value))
    raise ValueError(
        "`key` must be one typed key (jax.random.key(0)), one raw key "
        f"(jax.random.PRNGKey(0)) or an int seed, got {value!r}. Several keys are for "
        "several runs: jax.vmap over all that takes the key, of an optimizer the "
        "factory and `init` together."
    )


def float_dtype(name: str, value: Any) -> Any:
    """A floating-point dtype, or None."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if value is not None and (
        is_array or not jnp.issubdtype(jnp.dtype(value), jnp.floating)
    ):
        raise TypeError(
            f"`{name}` must be a floating-point dtype such as jnp.float32, or None for "
            f"at least float32, got {value!r}."
        )
    return value


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(
            f"`{name}` must be True or False, got {value!r} of type "
            f"{type(value).__name__}."
        )
    return bool(value)


def transformation(name: str, value: Any) -> optax.GradientTransformationExtraArgs:
    """An Optax gradient transformation, as one that takes extra arguments."""
    if isinstance(value, optax.MultiSteps):
        # Its own `gradient_transformation` would cut extra arguments off.
        return optax.GradientTransformationExtraArgs(value.init, value.update)
    if not isinstance(value, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax.GradientTransformation such as "
            f"optax.clip_by_global_norm(1.0), got {value!r} of type "
            f"{type(value).__name__}."
        )
    return optax.with_extra_args_support(value)


def float_params(params: Any) -> None:
    """Params are given and every leaf is a real floating-point array."""
    if params is None:
        raise ValueError(
            "`params` must be passed (to `update` of an optimizer as the third "
            "argument: tx.update(grads, opt_state, params)), got None."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"`params` must hold floating-point arrays only, got {leaf!r} of "
                f"dtype {dtype} at {jax.tree_util.keystr(path) or 'the root'}. Filter "
                "other leaves out and let the loss close over them, or in an optimizer "
                "use optax_flat.masked."
            )
        if jnp.finfo(dtype).bits < 16:
            raise TypeError(
                "`params` must have at least 16 bits, as a smaller step than their "
                f"spacing would be lost, got {dtype} at "
                f"{jax.tree_util.keystr(path) or 'the root'}. Keep them in bfloat16 or "
                "float32, and let the loss cast them to 8 bits."
            )


def same_structure(
    what: str,
    tree: Any,
    params: Any,
    *,
    hint: str | None = None,
    num_groups: int = 1,
) -> None:
    """`tree`, by default a gradient, has the structure and the shapes of `params`.

    With several groups of samples there is one gradient for each, stacked.
    """
    got, expected = jax.tree.structure(tree), jax.tree.structure(params)
    if got != expected:
        if hint is None:
            hint = _gradient_hint(tree, params)
        raise ValueError(
            f"{what} must have the structure of `params`.\n  got:      {got}\n"
            f"  expected: {expected}\n {hint}"
        )
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    expected_shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if num_groups > 1:
        expected_shapes = [(num_groups, *shape) for shape in expected_shapes]
        if shapes != expected_shapes:
            raise ValueError(
                f"{what} must stack one gradient for each of num_groups={num_groups} "
                f"groups of samples, got shapes {shapes}, expected {expected_shapes}. "
                "Give jax.vmap(grad_fn, (None, 0))(params, groups), the minibatch "
                f"split along a new leading axis of {num_groups}; make_train_step("
                f"..., num_groups={num_groups}) does so itself."
            )
    if shapes != expected_shapes:
        raise ValueError(
            f"{what} must have the shapes of `params`, got {shapes}, expected "
            f"{expected_shapes}."
        )
    for leaf in jax.tree.leaves(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{what} must hold floating-point arrays, got {jnp.result_type(leaf)}. "
                "Differentiate a real loss with respect to floating-point params."
            )


def _gradient_hint(tree: Any, params: Any) -> str:
    if isinstance(tree, tuple) and not isinstance(params, tuple):
        return (
            "It returned a tuple: if it returns (grads, aux), pass `aux=` to `update` "
            "or build the optimizer with has_aux=True."
        )
    return "Return the gradient with respect to the params and nothing else."


def leading_axis(batches: Any, length: int) -> None:
    """Every leaf of `batches` has the leading axis `length`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batches):
        shape = jnp.shape(leaf)
        if not shape or shape[0] != length:
            raise ValueError(
                f"`batches` must stack {length} minibatches, one for each gradient of "
                "the walk but the first (which is the gradient given to `update`): "
                f"leading axis {length}, got shape {shape} at "
                f"batches{jax.tree_util.keystr(path)}. From a stack of all "
                f"{length + 1} give `update` only `x[1:]` of every array `x`; "
                f"make_train_step does so itself and takes all {length + 1}."
            )
