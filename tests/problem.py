"""The problems and loops that the tests share."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flat
from optax_flat._core.modes import states

FEATURES = 3


def ragged_params(dtype=jnp.float32) -> dict[str, Any]:
    """A nested tree with a matrix, a vector and a scalar, away from the origin."""
    w = np.linspace(-0.9, 1.4, FEATURES * 4).reshape(FEATURES, 4)
    return {
        "layer": {"w": jnp.asarray(w, dtype), "b": jnp.full(4, 0.3, dtype)},
        "scale": jnp.asarray(1.7, dtype),
    }


def loss(params, batch):
    """A smooth, non-convex, asymmetric loss; batch is [examples, FEATURES]."""
    layer = params["layer"]
    hidden = jnp.tanh(batch @ layer["w"] + layer["b"])
    return jnp.mean((params["scale"] * hidden.sum(-1) - batch[:, 0] - 0.4) ** 2)


def batches(updates: int, length: int, dtype=jnp.float32, seed: int = 0) -> jax.Array:
    """Minibatches [updates, length, 5, FEATURES]."""
    shape = (updates, length, 5, FEATURES)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class Run(NamedTuple):
    """Where a run ended, and the params to evaluate after each outer update."""

    params: Any
    state: Any
    path: list[Any]


def in_parts(loss, batch):
    """Half the square of a loss, as methods without gradients want it."""
    return {
        "output_fn": lambda params: loss(params, batch),
        "loss_fn": lambda output: output**2 / 2,
    }


def update(tx, mode, params, state, stack, loss=loss, **extra_args):
    """One outer update in either mode on the minibatches `stack` [L, ...]."""
    grad = jax.grad(loss)
    if mode == "scanned":
        first, rest = (
            jax.tree.map(lambda x, i=i: x[i], stack) for i in (0, slice(1, None))
        )
        updates, state = tx.update(
            grad(params, first),
            state,
            params,
            grad_fn=grad,
            batches=rest,
            **extra_args,
        )
        return optax.apply_updates(params, updates), state

    walks = states(state, optax_flat.TransparentState)
    before = [walk.gradient_evaluations for walk in walks]

    def one_gradient(carry, batch):
        if len(walks) != 1 or len(jax.tree.leaves(stack)[0]) == 1:
            return consume(carry, batch), None
        # A walk that ends early leaves the rest of its minibatches.
        (walk,) = states(carry[1], optax_flat.TransparentState)
        ended = (walk.step == 0) & (walk.gradient_evaluations > before[0])
        return jax.lax.cond(ended, lambda c, _: c, consume, carry, batch), None

    def consume(carry, batch):
        params, state = carry
        if mode == "forward":
            parts = in_parts(loss, batch)
            updates, state = tx.update(None, state, params, **parts, **extra_args)
            return optax.apply_updates(params, updates), state
        value, grads = jax.value_and_grad(loss)(params, batch)
        given = {"value": value} | extra_args
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    return jax.lax.scan(one_gradient, (params, state), stack)[0]


@functools.lru_cache(maxsize=256)
def jitted_update(tx, mode, loss):
    """`update` compiled once per optimizer, however many tests ask for it."""

    def step(params, state, stack):
        params, state = update(tx, mode, params, state, stack, loss=loss)
        return params, state, optax_flat.eval_params(state, params)

    return jax.jit(step)


def train(tx, mode, params, data, state=None, loss=loss) -> Run:
    """All outer updates of `data` [U, L, ...], one jitted call each."""
    if type(tx) is optax.GradientTransformation:
        tx = optax.with_extra_args_support(tx)
    state = tx.init(params) if state is None else state
    step = jitted_update(tx, mode, loss)
    path = []
    for stack in data:
        params, state, evaluated = step(params, state, stack)
        path.append(evaluated)
    return Run(params, state, path)


def tolerance(dtype) -> dict[str, float]:
    """Agreement to rounding after a few dozen operations in a dtype."""
    few = 8 if dtype == jnp.bfloat16 else 50  # accumulators have at least float32
    eps = few * float(jnp.finfo(dtype).eps)
    return {"rtol": eps, "atol": eps}


def assert_close(a, b, dtype=jnp.float32, factor: float = 1.0):
    """Leafwise agreement to the rounding of a dtype, times a stated factor."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float64),
            np.asarray(y, np.float64),
            **{k: factor * v for k, v in tolerance(dtype).items()},
        ),
        a,
        b,
    )


def assert_equal(a, b):
    """Bit-equal trees, typed keys included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def raw(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    jax.tree.map(lambda x, y: np.testing.assert_array_equal(raw(x), raw(y)), a, b)


def largest_difference(a, b) -> float:
    """Largest absolute difference over all leaves."""
    differences = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), a, b)
    return float(max(jax.tree.leaves(differences)))
