"""One batch or many: exact means over them, and a check that the loss is a function.

A list, an iterator or another iterable that is no pytree (a data loader) holds many
batches, of which one at a time is in memory. Any other pytree, a tuple included, is
one batch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_flat._core import trees

LossFn = Callable[[Any, Any], jax.Array]


class Batches(NamedTuple):
    """What `as_batches` made of an argument `batches`."""

    many: bool
    first: Any  # the batch, or the first of many
    all: Iterable[Any]


def as_batches(batches: Any, *, one_pass: bool = False) -> Batches:
    """Tells one batch from many; only with `one_pass` may it be an iterator."""
    if not _holds_many(batches):
        return Batches(False, batches, (batches,))
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
            "(a pytree of arrays) or a list of batches."
        ) from None
    again = itertools.chain([first], iterator) if iterator is batches else batches
    return Batches(True, first, again)


def mean_over(batches: Batches, fn: Callable[..., Any], *args: Any) -> Any:
    """The mean of ``fn(*args, batch)`` over all examples, in at least float32.

    Args:
      batches: from `as_batches`.
      fn: ``(*args, batch) -> tree of floating-point arrays``, itself a mean over the
        batch. Jitted by the caller, once, where there may be many batches.
      *args: the other arguments of `fn`.

    Returns:
      A tree like that of `fn`. A batch weighs as much as the leading axis of its first
      leaf is long.
    """
    if not batches.many:
        return trees.accumulator(fn(*args, batches.first))
    mean, total = None, 0
    for batch in batches.all:
        new = trees.accumulator(fn(*args, batch))
        weight = _size(batch)
        total += weight
        mean = new if mean is None else _toward(new, mean, weight / total)
    if total == 0:
        raise ValueError(
            "`batches` gave no examples on a later pass. Give a list, or an object "
            "whose __iter__ starts anew each time."
        )
    return mean


@jax.jit
def _toward(new, mean, part):
    return jax.tree.map(lambda x, m: m + part * (x - m), new, mean)


def is_traced(*trees: Any) -> bool:
    """Whether values are known only when a program runs, as under `jit`."""
    one = jnp.zeros([]) + 1.0  # under `jit` traced, even where no argument is
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((one, trees)))


def check_deterministic(
    loss_fn: LossFn, params: optax.Params, batches: Batches
) -> None:
    """The loss is one number, and for the same input the same number.

    It is evaluated twice on the first batch, without `jit`, which would freeze what a
    host's random generator gave. Under a trace only its shape can be seen.
    """
    value = jax.eval_shape(loss_fn, params, batches.first)
    dtype = getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not is_float or value.shape != ():
        raise TypeError(
            "`loss_fn` must return the mean loss of the batch, a scalar, got "
            f"{value!r}. Drop auxiliary outputs: lambda p, b: loss_fn(p, b)[0]."
        )
    if is_traced(params, batches.first):
        return
    once, twice = (loss_fn(params, batches.first) for _ in range(2))
    close = 100 * float(jnp.finfo(dtype).eps)  # sums on a GPU
    if not np.allclose(once, twice, rtol=close, atol=0.0, equal_nan=True):
        raise ValueError(
            "`loss_fn` must give the same value for the same input, got "
            f"{float(once):.9g} and then {float(twice):.9g}. Switch dropout and other "
            "noise off and normalization to its running statistics (evaluation mode), "
            "or give the loss a fixed key."
        )


def _holds_many(batches: Any) -> bool:
    if isinstance(batches, list | Iterator):
        return True
    is_leaf = jax.tree_util.all_leaves([batches])
    return is_leaf and hasattr(batches, "__iter__") and not hasattr(batches, "shape")


def _size(batch: Any) -> int:
    shape = next((jnp.shape(leaf) for leaf in jax.tree.leaves(batch)), ())
    if not shape:
        raise ValueError(
            "every batch must be weighed by the leading axis of its first leaf, got "
            f"{jax.tree.map(jnp.shape, batch)}. Give batches whose arrays begin with "
            "the axis of the examples."
        )
    return shape[0]
