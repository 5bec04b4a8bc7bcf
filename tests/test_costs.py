"""The line `Cost:` of the docstrings, against what is counted when they run.

A number in a line is a digit or an expression in backticks, of the arguments.
"""

import inspect
import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import METHODS, WALK_MODES
from problem import FEATURES, batches, loss, ragged_params, update

import optax_flat
from optax_flat import flatness, training

NUMBER = r"\d|`[^`]+`"
OPTIMIZER = re.compile(
    rf"(?:(?:(?P<least>\d) to )?(?P<passes>{NUMBER}) (?P<kind>gradient|forward pass)"
    r"(?:e?s)?|`inner`'s gradients) per update; "
    rf"state: (?P<copies>{NUMBER}) cop(?:y|ies) of (?:the|bfloat16) params"
    r"(?: \(transparent: (?P<transparent>\d)\))?(?: beside `(?P<around>\w+)`'s)?\."
)
TERM = re.compile(
    rf"({NUMBER}) (Hessian-vector product|gradient|forward pass)(?:e?s)?\b"
)
PASSES = Counter()


def tell(kind, value):
    jax.debug.callback(lambda _: PASSES.update([kind]), value)
    return value


@jax.custom_jvp
def differentiated(value):
    """What a gradient evaluates; its derivative is a Hessian-vector product."""
    return tell("gradient", value)


@differentiated.defjvp
def _(primals, tangents):
    return tell("Hessian-vector product", primals[0]), tangents[0]


@jax.custom_vjp
def watched(value):
    """The same number, and a note of what it is computed for."""
    return tell("forward pass", value)


watched.defvjp(lambda value: (differentiated(value), None), lambda _, slope: (slope,))


def counted(function, *args, **kwargs):
    """How many passes of each kind a call makes, and what it returns."""
    PASSES.clear()
    found = function(*args, **kwargs)
    jax.block_until_ready(found)
    jax.effects_barrier()
    return +PASSES, found


def cost(function):
    """The line of a docstring."""
    (line,) = re.findall(r"^Cost:\n((?:  .*\n)+)", inspect.getdoc(function), re.M)
    return " ".join(line.split())


def value(text, function, given):
    """A number of a line, with the defaults for what is not given."""
    bound = inspect.signature(function).bind(**given)
    bound.apply_defaults()
    return eval(text.strip("`"), dict(bound.arguments))


def copies(tx, params):
    """The size of the state over that of the params."""

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    return size(jax.eval_shape(tx.init, params)) / size(params)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_state(method):
    """With the defaults."""
    said = OPTIMIZER.fullmatch(cost(method.factory))
    assert said, cost(method.factory)
    parameters = inspect.signature(method.factory).parameters
    given = {
        name: argument
        for name, argument in method.arguments.items()
        if parameters[name].default is inspect.Parameter.empty or name == "inner"
    }
    params = jax.ShapeDtypeStruct((1_000_000,), jnp.float32)
    around = said["around"]
    assert around == next((n for n in ("outer", "inner") if n in parameters), None)
    beside = copies(given[around], params) if around else 0
    for mode in method.modes:
        text = said["transparent" if mode == "transparent" else "copies"]
        found = copies(method.factory(**given | method.loop(mode)), params) - beside
        assert found == pytest.approx(value(text, method.factory, given), abs=0.01)
    assert bool(said["transparent"]) == ("transparent" in method.modes)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_passes_per_update(method):
    said = OPTIMIZER.fullmatch(cost(method.factory))
    assert said, cost(method.factory)
    mode, given, length = method.modes[0], method.arguments, method.length
    if method.modes == WALK_MODES and method.of_length:
        given, length = given | method.of_length(6), 6
    tx = method.factory(**given | method.loop(mode))

    @jax.jit
    def step(params, state, stack):
        return update(
            tx, mode, params, state, stack, loss=lambda p, b: watched(loss(p, b))
        )

    params, state, found = ragged_params(), tx.init(ragged_params()), []
    for stack in batches(8, length):
        passes, (params, state) = counted(step, params, state, stack)
        found.append(passes)
    kind = said["kind"] or "gradient"
    assert set().union(*found) == {kind}
    numbers = [passes[kind] for passes in found]
    expected = value(said["passes"] or "1", method.factory, given)
    if said["least"]:
        assert (min(numbers), max(numbers)) == (int(said["least"]), expected)
    else:
        assert sum(numbers) == len(numbers) * expected


WRAPPERS = {
    optax_flat.master_weights: {},
    optax_flat.stochastic_rounding: {"key": 0},
    optax_flat.masked: {"mask": True},
}


@pytest.mark.parametrize(("wrapper", "arguments"), WRAPPERS.items())
def test_wrappers(wrapper, arguments):
    said = OPTIMIZER.fullmatch(cost(wrapper))
    assert said and said["around"] == "inner"
    params = jax.ShapeDtypeStruct((1_000_000,), jnp.bfloat16)
    # Without a state, whose precision is that of the params inside.
    found = copies(wrapper(optax.sgd(0.1), **arguments), params)
    assert found == pytest.approx(int(said["copies"]), abs=0.01)


# With the clause of the line that says it.
MEASURES = [
    (flatness.hvp, {"vector": {"w": jnp.ones([FEATURES, 2])}}, 0),
    (flatness.trace, {"num_samples": 3, "key": 0}, 0),
    (flatness.frobenius_norm, {"num_samples": 3, "key": 0}, 0),
    (flatness.top_eigenvalues, {"k": 2, "num_matvecs": 3, "key": 0}, 0),
    (flatness.spectral_density, {"num_matvecs": 2, "num_samples": 3, "key": 0}, 0),
    (flatness.sharpness, {"rho": 0.1, "num_steps": 3}, 0),
    (flatness.sharpness,
     {"rho": 0.1, "kind": "average", "num_samples": 3, "key": 0}, 1),
    (flatness.local_energy, {"sigma": 0.1, "num_samples": 3, "key": 0}, 0),
    (flatness.local_entropy,
     {"gamma": 2.0, "num_steps": 4, "num_chains": 3, "batch_size": 2, "key": 0}, 0),
    (flatness.line, {"positions": [0.0, 0.5, 1.0], "batch_size": 2, "key": 0}, 0),
    (flatness.plane, {"x": [0.0, 1.0], "y": [0.0, 0.5, 1.0], "key": 0}, 0),
]  # fmt: skip


@pytest.mark.parametrize(("measure", "arguments", "clause"), MEASURES)
def test_flatness(measure, arguments, clause):
    def loss_fn(params, batch):
        mean = jnp.mean((jnp.tanh(batch @ params["w"]).sum(-1) - batch[:, 0]) ** 2)
        # Not in the evaluations without `jit` that check it.
        return watched(mean) if isinstance(mean, jax.core.Tracer) else mean

    params = {"w": jnp.linspace(-0.9, 1.4, 2 * FEATURES).reshape(FEATURES, 2)}
    given = {"loss_fn": loss_fn, "params": params, "batches": batches(1, 1)[0, 0]}
    found, _ = counted(measure, **given | arguments)
    found["forward pass"] -= 1  # the check that the loss is a function
    said = {
        kind: value(number, measure, given | arguments)
        for number, kind in TERM.findall(cost(measure).split("; ")[clause])
    }
    assert said == +found


def test_predict():
    tx, params = optax_flat.ivon(0.1, ess=50.0, key=0), jnp.ones(3)
    given = {
        "predict_fn": lambda w: watched(w.sum()), "opt_state": tx.init(params),
        "params": params, "key": 0, "num_samples": 5,
    }  # fmt: skip
    found, _ = counted(training.predict, **given)
    ((number, kind),) = TERM.findall(cost(training.predict))
    assert found == {kind: value(number, training.predict, given)}


def test_every_cost_is_tested():
    """No line but those above."""
    tested = {method.factory for method in METHODS} | {training.predict, *WRAPPERS}
    tested |= {measure for measure, _, _ in MEASURES}
    lines = {
        member
        for module in (optax_flat, flatness, training)
        for member in vars(module).values()
        if "\nCost:\n" in (inspect.getdoc(member) or "")
    }
    assert lines == tested
