"""Hyperparameters that are floats or schedules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def at(value: optax.ScalarOrSchedule, count: jax.typing.ArrayLike) -> Any:
    """The value of a float or a schedule at an outer update."""
    return value(count) if callable(value) else value


def is_zero(value: Any) -> bool:
    """Whether it is known to be 0 when the program is built, which can leave it out."""
    return isinstance(value, int | float) and value == 0


class ScheduledState(NamedTuple):
    """State of `scheduled`: the number of updates and the optimizer's own state."""

    count: jax.Array  # int32, []
    inner_state: optax.OptState


def scheduled(
    factory: Callable[..., optax.GradientTransformation], **hyperparams: Any
) -> optax.GradientTransformation:
    """`factory(**hyperparams)`, where any hyperparameter may be a schedule.

    Unlike `optax.inject_hyperparams` it keeps constants out of the state, so that they
    are neither rounded to the params' dtype nor frozen at `init` when they are traced.
    """
    if not any(callable(value) for value in hyperparams.values()):
        return factory(**hyperparams)

    def build(count):
        return factory(
            **{name: at(value, count) for name, value in hyperparams.items()}
        )

    def init(params):
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, build(count).init(params))

    def update(updates, state, params=None):
        updates, inner = build(state.count).update(updates, state.inner_state, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, ScheduledState(count, inner)

    return optax.GradientTransformation(init, update)
