"""Odd params and odd arguments for any method, made by hypothesis.

`outcome` says what a method did with them. There are two right answers: an update of
the right structure without NaN or infinity, or a ValueError or TypeError of ours.
"""

import functools
import inspect
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from catalogue import METHODS
from hypothesis import strategies as st
from problem import update

import optax_flat

SHAPES = ((), (3,), (2, 3), (0, 2), (1,))
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
OTHERS = (
    jnp.int32, jnp.uint8, jnp.bool_, jnp.complex64, jnp.float8_e4m3fn, jnp.float8_e5m2
)  # fmt: skip
SCALES = (0.0, 1e-8, 1.0, -2.0, 100.0)
LEGAL = (0.0, 1e-3, 0.1, 0.5, 1.0)
ODD = (
    -1.0, 2.0, float("nan"), float("inf"), -float("inf"), "0.1", None, True, 1j, (), {},
    np.float64(0.3), np.ones(2), jnp.ones([], jnp.int32), jnp.array(0.4),
)  # fmt: skip


def _array(shape, dtype, scale):
    values = scale * np.linspace(-1.0, 1.0, max(int(np.prod(shape)), 1))
    return jnp.asarray(values[: int(np.prod(shape))].reshape(shape)).astype(dtype)


def _leaf(dtypes):
    return st.builds(
        _array, st.sampled_from(SHAPES), st.sampled_from(dtypes),
        st.sampled_from(SCALES),
    )  # fmt: skip


def _tree(leaves):
    def nested(children):
        tied = children.map(lambda x: {"encoder": x, "decoder": x})
        return st.one_of(
            st.dictionaries(st.sampled_from("abc"), children, max_size=3),
            st.lists(children, max_size=2),
            st.tuples(children, children),
            tied,
        )

    return st.recursive(leaves, nested, max_leaves=4)


# What is computed with. All other trees are traced only, which takes no compilation.
VALUES = (
    _array((2, 3), jnp.float32, 1.0),
    _array((3,), jnp.bfloat16, 1.0),
    _array((), jnp.float16, 1.0),
    _array((0, 2), jnp.float32, 1.0),
)

good = _leaf(FLOATS)
odd = st.one_of(
    _leaf(OTHERS),
    st.none(),
    st.sampled_from([1.5, 2, "w", np.ones(3, np.float32), np.ones(2)]),
    st.just(1.5).map(jnp.asarray),  # weakly typed
)
params = st.one_of(_tree(good), _tree(st.one_of(good, odd)))


@st.composite
def arguments(draw, method):
    """Some of a method's arguments replaced, by legal values mostly."""
    names = list(inspect.signature(method.factory).parameters)
    floats = st.sampled_from(LEGAL)
    schedule = floats.map(optax.constant_schedule)
    changed = {
        name: draw(st.one_of(floats, schedule))
        for name in method.floats
        if draw(st.booleans())
    }
    if draw(st.integers(0, 3)) == 0:
        changed[draw(st.sampled_from(names))] = draw(st.sampled_from(ODD))
    return changed


class Example(NamedTuple):
    """What is tried at once: odd shapes and types, then odd values."""

    mode: str
    params: Any
    arguments: dict[str, Any]
    scales: tuple[float, ...]  # of the leaves of `VALUES`


def examples(method, modes):
    """Examples for one method."""
    return st.builds(
        Example,
        st.sampled_from(modes),
        params,
        arguments(method),
        st.tuples(*[st.sampled_from(SCALES)] * len(VALUES)),
    )


def bounded_loss(params, batch):
    """Any tree's loss; its gradients are at most 1, so that nothing can overflow."""
    del batch
    distances = [
        jnp.sum(jnp.sqrt(1.0 + (jnp.real(jnp.asarray(x)).astype(float) - 0.3) ** 2))
        for x in jax.tree.leaves(params)
    ]
    return sum(distances, jnp.zeros([]))


def outcome(method, example) -> str:
    """ "finite" or "refused"; anything else is a fault, and described."""
    arguments = method.arguments | method.loop(example.mode) | example.arguments
    # A schedule's values cannot be checked: only values that are allowed are scheduled.
    constants = {k: v(0) if callable(v) else v for k, v in example.arguments.items()}
    try:
        method.factory(**method.arguments | method.loop(example.mode) | constants)
        tx = method.factory(**arguments)
        changed = _changed_types(tx, method, example, arguments)
    except Exception as error:
        return "refused" if _is_ours(error) else _described(error)
    if changed:
        return changed
    values = tuple(s * leaf for s, leaf in zip(example.scales, VALUES, strict=True))
    # Numbers are traced, so that one program serves all examples.
    numbers = {k: v for k, v in constants.items() if k in method.floats}
    fixed = _defaults(method) | method.arguments | method.noisy
    numbers = {k: numbers.get(k, fixed[k]) for k in method.floats}
    if not _all_finite(method.name, example.mode)(values, numbers):
        return f"NaN or infinity with {example.mode}, {example.scales}, {numbers}"
    return "finite"


def _changed_types(tx, method, example, arguments):
    """Traces `init` and an update; what changed its type, or nothing."""
    params, mode = example.params, example.mode
    if all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(params)):
        state = jax.eval_shape(tx.init, params)
    else:
        state = tx.init(params)
    length = 1 if mode in {"plain", "forward"} else _length(method, arguments)
    after = jax.eval_shape(
        functools.partial(update, tx, mode, loss=bounded_loss),
        params, state, jnp.zeros([length]),
    )  # fmt: skip
    before, after = _types((params, state)), _types(after)
    return "" if before == after else f"types changed from {before} to {after}"


def _defaults(method):
    parameters = inspect.signature(method.factory).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


@functools.cache
def _all_finite(name, mode):
    method = next(method for method in METHODS if method.name == name)

    @jax.jit
    def all_finite(params, numbers):
        fixed = method.arguments | method.noisy | method.loop(mode)
        tx = method.factory(**fixed | numbers)
        result = update(
            tx, mode, params, tx.init(params), jnp.zeros([method.length]),
            loss=bounded_loss,
        )  # fmt: skip
        floats = [
            jnp.isfinite(leaf).all()
            for leaf in jax.tree.leaves(result)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        return jnp.all(jnp.array(floats))

    return all_finite


def _length(method, arguments):
    steps = arguments.get("num_steps", method.length)
    nodes = arguments.get("nodes")
    return len(nodes) if isinstance(nodes, tuple) else int(steps)


def _is_ours(error):
    """Whether it is of an allowed type, and raised by a line of the library."""
    if not isinstance(error, TypeError | ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(optax_flat.__file__).parent)


def _described(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} in {place}: {error}"[:500]


def _types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(x.shape, jnp.result_type(x.dtype)) for x in leaves]
