"""Where an optimizer stands after each gradient, in one scan for every mode."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import checks, modes
from optax_flat.training.step import make_train_step

# A method, or what makes one from a key.
Source = optax.GradientTransformation | Callable[[jax.Array], Any]


def split_keys(seeds: Any, key: Any) -> jax.Array:
    """The keys of the runs, [seeds]."""
    return jax.random.split(checks.key(key), checks.integer("seeds", seeds, 1))


def make_runs(
    name: str,
    source: Source,
    function: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    keys: jax.Array,
) -> Callable[[jax.Array], jax.Array]:
    """What maps weights [T] to the params after 0, 1, ..., T gradients of the runs.

    Gradient t is that of weights[t] * function. Row k of a run is what k gradients
    bought: a walk of L gradients moves every L rows, and stays where it is when fewer
    than L are left at the end. A method without gradients makes an update in each row.

    The program is compiled once per T and lives as long as the returned function: what
    the user's functions read from outside of them may change between two pictures.

    Args:
      name: what errors call the source.
      source: a method, of which there is one run, or a function of a key that makes
        one, of which there is one run per key.
      function: ``params -> scalar``.
      start: the params, any shape.
      keys: typed keys [S], S >= 1.

    Returns:
      ``weights -> positions``, [R, T + 1, *start.shape] of R = 1 or S runs. It raises
      ValueError where T is smaller than one walk.

    Raises:
      TypeError: not a gradient transformation, nor a function that makes one.
    """

    def made(key) -> Any:
        return source(key) if callable(source) else source

    with naming(name):
        tx = checks.transformation(name, made(keys[0]))
        length, one_minibatch = _walk(tx, start)

    def positions(key, weights):
        tx = made(key)
        # In two parts, so that methods without gradients run as well.
        step = make_train_step(
            lambda outputs, weight: outputs[0],
            tx,
            output_fn=lambda params, weight: [weight * function(params)],
        )

        def body(carry, batches):
            params, opt_state, _ = step(*carry, batches)
            return (params, opt_state), modes.eval_params(opt_state, params)

        per_update = length or 1
        updates = len(weights) // per_update
        batches = weights[: updates * per_update]
        if length is not None:
            batches = batches.reshape(updates, length)
        if one_minibatch:
            batches = batches[:, 0]
        later: Any
        _, later = jax.lax.scan(body, (start, tx.init(start)), batches)
        every = jnp.concatenate([start[None], later])
        return every[np.arange(len(weights) + 1) // per_update]

    @jax.jit
    def program(weights):
        if not callable(source):
            return positions(keys[0], weights)[None]
        return jax.vmap(positions, in_axes=(0, None))(keys, weights)

    def run(weights):
        if length is not None and len(weights) < length:
            raise ValueError(
                f"one update of `{name}` spends {length} gradients, but there are only "
                f"{len(weights)}. Give at least {length}, or make the method with "
                "fewer gradients per update."
            )
        with naming(name):
            return program(weights)

    return run


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors from the user's functions say whose they are."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This is about `{name}`.")
        raise


def _walk(tx, start):
    """Gradients per update in scanned mode, and whether all are of one minibatch.

    Only the state knows, after one update. Without batches a walk takes as many
    gradients as it wants. None and False for all else.
    """
    opt_state = tx.init(start)
    if not modes.states(opt_state, modes.ScannedState):
        return None, False
    step = make_train_step(lambda params, _: jnp.sum(params), tx)
    _, opt_state, _ = step(start, opt_state, None)
    walk = modes.states(opt_state, modes.ScannedState)[0]
    return int(walk.gradient_evaluations), modes.one_minibatch(walk.memory)
