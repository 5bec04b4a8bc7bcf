"""One batch or many, told apart in one way wherever data are taken.

A list, an iterator or another iterable that is no pytree (a data loader) holds many
batches, of which one at a time is in memory. Any other pytree, a tuple included, is
one batch.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(eq=False)
class Batches:
    """What `as_batches` made of an argument `batches`."""

    many: bool
    first: Any  # the batch, or the first of many
    all: Iterable[Any]
    checked: bool = False  # with the loss, by `check_deterministic`
    num_examples: int | None = None  # of many, in the passes so far


def as_batches(batches: Any, *, one_pass: bool = False) -> Batches:
    """Tells one batch from many; only with `one_pass` may it be an iterator.

    What it has made before stays as it is, so that one check serves several measures.
    """
    if isinstance(batches, Batches):
        return batches
    if not _holds_many(batches):
        return Batches(False, batches, (batches,))
    if isinstance(batches, list):
        _check_alike(batches)
    if isinstance(batches, Iterator) and not one_pass:
        raise TypeError(
            "`batches` are gone through several times here, got the one-shot iterator "
            f"{batches!r}. Give a list, or an object whose __iter__ starts anew each "
            "time, such as a data loader."
        )
    iterator = iter(batches)
    try:
        first = next(iterator)
    except StopIteration:
        raise ValueError(
            f"`batches` must hold at least one batch, got {batches!r}. Give one batch "
            "(a pytree of arrays) or a list of batches, and of a generator that was "
            "used up a new one."
        ) from None
    again = itertools.chain([first], iterator) if iterator is batches else batches
    return Batches(True, first, again)


def _check_alike(batches: list[Any]) -> None:
    """Batches of a list differ by their number of examples only."""

    def kind(batch):
        leaves, structure = jax.tree.flatten(batch)
        return structure, [(jnp.shape(x)[1:], jnp.result_type(x)) for x in leaves]

    if any(kind(batch) != kind(batches[0]) for batch in batches[1:]):
        raise ValueError(
            "A list of `batches` holds many batches, which must be alike but for their "
            f"number of examples, got {jax.tree.map(jnp.shape, batches)}. If these are "
            "the parts of one batch, give a tuple: (x, y)."
        )


def _holds_many(batches: Any) -> bool:
    if isinstance(batches, list | Iterator):
        return True
    is_leaf = jax.tree_util.all_leaves([batches])
    return is_leaf and hasattr(batches, "__iter__") and not hasattr(batches, "shape")
