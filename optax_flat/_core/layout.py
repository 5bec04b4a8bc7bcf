"""Whether a state is one that an optimizer's own `init` would make."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def check(init: Callable[[Any], Any], state: optax.OptState, params: Any) -> None:
    """`state` has the structure and the shapes of `init(params)`.

    Nothing is computed: JAX finds out what `init` would return, once for all params of
    the same structure, shapes and dtypes.

    Args:
      init: makes a state from params, or from gradients in their place.
      state: what was given to `update`.
      params: what was given to `update` too.
    """
    expected = jax.eval_shape(init, params)
    if _kind(state) == _kind(expected):
        return
    if _is_stacked(state, expected):
        raise TypeError(
            "`update` takes the state of one optimizer, got several stacked along a "
            "leading axis, as jax.vmap(tx.init) makes them. Map `update` as well: "
            "jax.vmap(tx.update)(grads, state, params)."
        )
    path, got, wanted = _difference(state, expected)
    place = f"state{jax.tree_util.keystr(path)}"
    raise TypeError(
        "`update` takes a state that `init` of the same optimizer made for the same "
        f"params, but `{place}` differs.\n  got:      {got}\n  expected: {wanted}\n"
        "Was the state made by another optimizer or version, with other arguments "
        "(mode, momentum), or for other params? Then begin with a new one, "
        "tx.init(params). Was it restored from a file? Then restore it with a new one "
        "as target, which gives it its classes."
    )


def _kind(tree):
    """What must agree in two states: structure and shapes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [jnp.shape(leaf) for leaf in leaves]


def _is_stacked(got, expected):
    """Whether every leaf has one more axis in front, of one length for all."""
    structure, shapes = _kind(got)
    one_structure, one = _kind(expected)
    lengths = {shape[:1] for shape in shapes}
    rest = [shape[1:] for shape in shapes]
    return (
        (structure, rest) == (one_structure, one)
        and len(lengths) == 1
        and () not in lengths
    )


def _difference(got, expected, path=()):
    """Path to the outermost nodes that differ, and what the two are."""
    ours, theirs = _children(got), _children(expected)
    if type(got) is not type(expected) or ours.keys() != theirs.keys():
        return path, _described(got), _described(expected)
    for key, child in theirs.items():
        if _kind(ours[key]) != _kind(child):
            return _difference(ours[key], child, (*path, key))
    return path, _described(got), _described(expected)


def _children(tree):
    """The nodes one level below, by the last entry of their path; none of a leaf."""
    below, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    return {path[0]: child for path, child in below if path}


def _described(node):
    if node is None:
        return "None"
    if jax.tree_util.all_leaves([node]):
        return f"an array of shape {jnp.shape(node)}"
    names = ", ".join(jax.tree_util.keystr((key,)) for key in _children(node))
    return f"{type(node).__name__} of {names or 'nothing'}"
