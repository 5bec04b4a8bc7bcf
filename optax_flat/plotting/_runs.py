"""Where an optimizer stands after each gradient, in one scan for every mode."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import checks, modes
from optax_flat.training.step import make_train_step

# A method, or what makes one from a key.
Source = optax.GradientTransformation | Callable[[jax.Array], Any]


def positions(
    source: Source,
    function: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """The params to evaluate after 0, 1, ..., T gradients of weights[t] * function.

    Row k is what k gradients bought: a walk of L gradients moves every L rows, and
    stays where it is when fewer than L are left at the end. A method without gradients
    makes an update in each row.

    Args:
      source: a method, of which there is one run, or a function of a key that makes
        one, of which there is one run per key.
      function: ``params -> scalar``.
      start: the params, any shape.
      weights: factor of the function at each gradient, [T].
      keys: typed keys [S], S >= 1.

    Returns:
      Positions [R, T + 1, *start.shape] of R = 1 or S runs.

    Raises:
      ValueError: T is smaller than one walk.
    """
    length = _walk_length(_made(source, keys[0]), start)
    if length is not None and len(weights) < length:
        raise ValueError(
            f"one update of this method spends {length} gradients, but there are only "
            f"{len(weights)}. Give at least {length}, or make the method with fewer "
            "gradients per update."
        )
    run = functools.partial(
        _positions, source=source, function=function, walk_length=length
    )
    if not callable(source):
        return run(keys[0], start, weights)[None]
    return jax.vmap(run, in_axes=(0, None, None))(keys, start, weights)


def check_source(name: str, source: Any) -> None:
    """A method, or a function that makes one from a key."""
    made = source(jax.random.key(0)) if callable(source) else source
    checks.transformation(name, made)


@functools.partial(jax.jit, static_argnames=("source", "function", "walk_length"))
def _positions(key, start, weights, *, source, function, walk_length):
    tx = _made(source, key)
    # In two parts, so that methods without gradients run as well.
    step = make_train_step(
        lambda outputs, weight: outputs[0],
        tx,
        output_fn=lambda params, weight: [weight * function(params)],
    )

    def body(carry, batches):
        params, opt_state, _ = step(*carry, batches)
        return (params, opt_state), modes.eval_params(opt_state, params)

    length = walk_length or 1
    updates = len(weights) // length
    batches = weights[: updates * length]
    if walk_length is not None:
        batches = batches.reshape(updates, length)
    later: Any
    _, later = jax.lax.scan(body, (start, tx.init(start)), batches)
    every = jnp.concatenate([start[None], later])
    return every[np.arange(len(weights) + 1) // length]


def _made(source, key) -> Any:
    return source(key) if callable(source) else source


def _walk_length(tx, start):
    """Gradients per update in scanned mode, None for all others.

    Only the state knows, after one update. Without batches a walk takes as many
    gradients as it wants.
    """
    opt_state = tx.init(start)
    if not modes.states(opt_state, modes.ScannedState):
        return None
    step = make_train_step(lambda params, _: jnp.sum(params), tx)
    _, opt_state, _ = step(start, opt_state, None)
    walk = modes.states(opt_state, modes.ScannedState)[0]
    return int(walk.gradient_evaluations)
