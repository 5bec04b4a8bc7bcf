"""What `metrics` reads from the state of every method, alone and inside others."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS
from flax import nnx
from problem import ragged_params

import optax_flat

every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def wrapped(method):
    """The method inside all that the docs say it is found in, and what they add."""
    injected = optax.inject_hyperparams(
        method.factory, static_args=method.factory.static_args
    )(**method.arguments)
    trainable = jax.tree.map(lambda _: True, ragged_params()) | {"scale": False}
    labels = jax.tree.map(lambda flag: "own" if flag else "rest", trainable)
    parts = {"own": method.make(), "rest": optax.set_to_zero()}
    hyperparams = {f"hyperparams/{name}" for name in method.floats}
    return {
        "chain": (optax.chain(optax.identity(), method.make()), set()),
        "masked": (optax_flat.masked(method.make(), trainable), set()),
        "optax.masked": (optax.masked(method.make(), trainable), set()),
        "partition": (optax.partition(parts, labels), set()),
        "MultiSteps": (optax.MultiSteps(method.make(), 2), {"gradient_step"}),
        "apply_if_finite": (
            optax.apply_if_finite(method.make(), 3),
            {"total_notfinite"},
        ),
        "inject_hyperparams": (injected, hyperparams),
    }


def inside(tx):
    """The names in a state, for which nothing has to be computed."""
    shapes = jax.eval_shape(lambda: optax_flat.metrics(tx.init(ragged_params())))
    assert all(value.shape == () for value in shapes.values())
    assert all(jnp.issubdtype(value.dtype, jnp.number) for value in shapes.values())
    return set(shapes)


@every_method
def test_names_are_the_same_inside_others(method):
    own = inside(method.make())
    assert "count" in own
    for name, (tx, more) in wrapped(method).items():
        assert inside(tx) == own | more, name


def test_values_are_those_of_the_states():
    """What a method, its hyperparameters, Optax's wrappers and a guard say, by name."""
    grad = jax.grad(lambda x, batch: jnp.sum((x - batch) ** 2))
    injected = optax.inject_hyperparams(
        optax_flat.entropy_sgd, static_args=optax_flat.entropy_sgd.static_args
    )
    tx = optax.MultiSteps(
        injected(
            optax.linear_schedule(0.5, 0.0, 10), num_steps=2, gamma=0.2, scoping=0.5,
            diagnostics=True, skip_nonfinite=True, mode="transparent", key=0,
        ),
        1,
    )  # fmt: skip
    x = jnp.array([1.0, -2.0])
    state = tx.init(x)
    for batch in (0.0, 0.0, jnp.nan, 0.0, 0.0):
        updates, state = tx.update(grad(x, batch), state, x)
        x = optax.apply_updates(x, updates)
    report = optax_flat.metrics(state)
    said = {
        "gradient_step": 5,
        "hyperparams/gamma": 0.2,
        "hyperparams/learning_rate": 0.3,
        "gradient_evaluations": 5,
        "skipped": 1,
        "count": 1,
        "gamma": 0.2,
    }
    for name, value in said.items():
        np.testing.assert_allclose(report[name], value, rtol=1e-6, err_msg=name)
    assert -1 <= report["cosine"] <= 1 and report["gradient_norm"] > 0
    assert "hyperparams/key" not in report


def test_two_of_a_kind_are_numbered():
    """The outer state before the inner, the first in a chain before the second."""
    every_second = optax.MultiSteps(optax_flat.coolmomentum(0.2), 2)
    pair = optax.chain(
        optax_flat.coolmomentum(0.1), every_second.gradient_transformation()
    )
    tx = optax_flat.swa(pair, start=3)
    x = jnp.ones(2)
    state = tx.init(x)
    for _ in range(2):
        _, state = tx.update(x, state, x)
    report = optax_flat.metrics(state)
    assert list(report) == [
        "count", "weight", "count/2", "temperature", "gradient_step", "count/3",
        "temperature/2",
    ]  # fmt: skip
    assert [int(report[name]) for name in ("count", "count/2", "count/3")] == [1, 2, 1]


class Radius(NamedTuple):
    metrics = ("radius", "area", "others")

    radius: jax.Array
    others: dict[str, Any]

    @property
    def area(self):
        return np.pi * self.radius**2


def test_states_of_ones_own():
    """Fields, properties and dictionaries, of which only numbers are for logs."""
    others = {"width": 3.0, "key": jax.random.key(0), "shape": jnp.ones(2), "name": "x"}
    state = (optax.EmptyState(), {"own": Radius(jnp.float32(2.0), others)})
    report = optax_flat.metrics(state)
    assert list(report) == ["radius", "area", "others/width"]
    np.testing.assert_allclose(report["area"], 4 * np.pi, rtol=1e-6)
    assert optax_flat.metrics(optax.adam(0.1).init(jnp.ones(2))) == {}


class Foreign(NamedTuple):
    """A state of others, which has something else under our name."""

    metrics: Any
    inner_state: Any


@pytest.mark.parametrize("value", [jnp.ones(3), {"loss": 1.0}, ("loss",)])
def test_a_field_of_that_name_is_none_of_ours(value):
    inner = optax_flat.coolmomentum(0.1).init(jnp.ones(2))
    found = optax_flat.metrics(Foreign(value, inner))
    assert set(found) == {"count", "temperature"}


def test_states_of_frameworks():
    """NNX wraps every array of a state; `parle` and populations come from a vmap."""
    tx = optax_flat.coolmomentum(0.1)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    report = optax_flat.metrics(optimizer.opt_state)
    assert int(report["count"]) == 1 and float(report["temperature"]) > 0

    states = jax.vmap(tx.init)(jnp.ones([3, 2]))
    assert jax.vmap(optax_flat.metrics)(states)["count"].shape == (3,)
    with pytest.raises(ValueError, match=r"got count of shape \(3,\).*jax\.vmap"):
        optax_flat.metrics(states)


def test_a_state_without_classes_is_refused():
    state = optax_flat.coolmomentum(0.1).init(jnp.ones(2))
    for lost in (state._asdict(), None, jnp.ones(2)):
        with pytest.raises(ValueError, match="`metrics` needs .* with its classes"):
            optax_flat.metrics(lost)
