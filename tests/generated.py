"""Odd params and odd arguments for any method, made by hypothesis.

`outcome` says what a method did with them. There are two right answers: an update of
the right structure without NaN or infinity, or a ValueError or TypeError of ours.
"""

import inspect
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    schedule = floats.map(lambda value: optax.constant_schedule(value))
    changed = {
        name: draw(st.one_of(floats, schedule))
        for name in method.floats
        if draw(st.booleans())
    }
    if draw(st.integers(0, 3)) == 0:
        changed[draw(st.sampled_from(names))] = draw(st.sampled_from(ODD))
    return changed


def example(method):
    """Params and arguments for one update."""
    return st.tuples(params, arguments(method))


def bounded_loss(params, batch):
    """Any tree's loss; its gradients are at most 1, so that nothing can overflow."""
    del batch
    distances = [
        jnp.sum(jnp.sqrt(1.0 + (jnp.real(jnp.asarray(x)).astype(float) - 0.3) ** 2))
        for x in jax.tree.leaves(params)
    ]
    return sum(distances, jnp.zeros([]))


def outcome(method, mode, params, arguments) -> str:
    """"finite" or "refused"; anything else is a fault, and described."""
    arguments = method.arguments | method.loop(mode) | arguments
    try:
        tx = method.factory(**arguments)
        state = tx.init(params)
    except (TypeError, ValueError) as error:
        return "refused" if _is_ours(error) else _described(error)
    except Exception as error:
        return _described(error)
    try:
        # Number of gradients of the walk, whatever `num_steps` and `nodes` are now.
        length = 1 if mode in {"plain", "forward"} else _length(method, arguments)
        with jax.disable_jit():
            after, new_state = update(
                tx, mode, params, state, jnp.zeros([length]), loss=bounded_loss
            )
    except (TypeError, ValueError) as error:
        return "refused" if _is_ours(error) else _described(error)
    except Exception as error:
        return _described(error)
    if _types(after) != _types(params):
        return f"params changed their types from {_types(params)} to {_types(after)}"
    if _types(new_state) != _types(state):
        return f"the state changed from {_types(state)} to {_types(new_state)}"
    if not all(map(_is_finite, jax.tree.leaves((after, new_state)))):
        return "NaN or infinity"
    return "finite"


def _length(method, arguments):
    steps = arguments.get("num_steps", method.length)
    nodes = arguments.get("nodes")
    return len(nodes) if isinstance(nodes, tuple) else int(steps)


def _is_ours(error):
    """Whether the line that raised is a line of the library."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(optax_flat.__file__).parent)


def _described(error):
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} in {place}: {error}"[:500]


def _types(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def _is_finite(leaf):
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return True
    return bool(np.isfinite(np.asarray(leaf, np.float64)).all())
