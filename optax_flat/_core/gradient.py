"""The engine of methods that take one gradient per update.

What holds for each of them stands here once: params and gradients are checked, the
state is one of the method's own, numbers add up in at least float32, and updates come
back in the gradients' dtype.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from optax_flat._core import checks, layout, trees


def by_gradient(
    init: Callable[[optax.Params], Any],
    step: Callable[..., tuple[optax.Updates, Any]],
    *,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation from what a method does with one gradient.

    Entries of the params that are not finite, as in a mask of -inf among them, stay as
    they are: the method sees zeros there, and in their gradients.

    Args:
      init: ``x -> state``, of the params in the accumulators' dtype.
      step: ``(state, grads, x, **extra_args) -> (updates, state)``, all in that dtype;
        x is None where `update` was given no params.
      accumulator_dtype: None is at least float32.

    Returns:
      The transformation.
    """

    def wide(params):
        return trees.accumulator(trees.finite(params), accumulator_dtype)

    def fresh(params):
        checks.float_params(params)
        params = trees.concrete(params)
        return trees.copy(init(wide(params)), params)

    def update(updates, state, params=None, **extra_args):
        x, grads = None, updates
        if params is not None:
            checks.float_params(params)
            params = trees.concrete(params)
            checks.same_structure("The gradient given to `update`", updates, params)
            x, grads = wide(params), trees.where_finite(params, updates)
        layout.check(fresh, state, updates if params is None else params)
        grads = trees.accumulator(grads, accumulator_dtype)
        steps, after = step(state, grads, x, **extra_args)
        if params is not None:
            steps = trees.where_finite(params, steps)
        return trees.cast_like(steps, updates), trees.cast_like(after, state)

    return optax.GradientTransformationExtraArgs(fresh, update)


def counted(count: Any) -> Any:
    """The number of updates after one more."""
    return jnp.asarray(optax.safe_increment(count))
