"""Exact means over one batch or many, and checks that the loss is a function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optax_flat._core import programs, trees
from optax_flat._core.batches import Batches

LossFn = Callable[[Any, Any], jax.Array]


def mean_over(batches: Batches, fn: Callable[..., Any], *args: Any) -> Any:
    """The mean of ``fn(*args, batch)`` over all examples, in at least float32.

    Args:
      batches: from `as_batches`.
      fn: ``(*args, batch) -> tree of floating-point arrays``, itself a mean over the
        batch. Jitted by the caller, once, where there may be many batches.
      *args: the other arguments of `fn`.

    Returns:
      A tree like that of `fn`. A batch weighs as much as the leading axis of its leaves
      is long.
    """
    if not batches.many:
        return trees.accumulator(fn(*args, batches.first))
    total, sums = 0, None
    for batch in batches.all:
        size = _size(batch)
        mean = trees.accumulator(fn(*args, batch))
        if sums is None:
            sums = jax.tree.map(jnp.zeros_like, mean)
        total, sums = total + size, _add(sums, mean, float(size))
    _check_pass(batches, total)
    return jax.tree.map(lambda x: x / float(total), sums)


@jax.jit
def _add(sums, mean, weight):
    return jax.tree.map(lambda s, x: s + weight * x, sums, mean)


def _check_pass(batches: Batches, num_examples: int) -> None:
    """As many examples as in the passes before, and at least one."""
    before = batches.num_examples
    if num_examples == 0 and before is None:
        raise ValueError(
            "`batches` must hold at least one example, got no examples. Give batches "
            "whose arrays begin with an axis of examples that is not empty."
        )
    if before not in (None, num_examples):
        raise ValueError(
            "`batches` must give the same examples in every pass, got "
            f"{before} in one pass and {num_examples} in another. Give a list, or a "
            "loader whose __iter__ starts anew each time, without drop_last under "
            "shuffling and without random augmentation."
        )
    batches.num_examples = num_examples


def is_traced(*trees: Any) -> bool:
    """Whether values are known only when a program runs, as under `jit`."""
    one = jnp.zeros([]) + 1.0  # under `jit` traced, even where no argument is
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((one, trees)))


def check_deterministic(
    loss_fn: LossFn, params: optax.Params, batches: Batches
) -> None:
    """The loss is one number, for the same input the same, and not a stale one.

    It is evaluated twice on the first batch, without `jit`, which would freeze what a
    host's random generator gave, and once compiled. Under a trace only its shape can
    be seen.
    """
    if batches.checked:
        return
    programs.check_hashable("loss_fn", loss_fn)
    value = _shape(loss_fn, params, batches)
    dtype = getattr(value, "dtype", None)
    is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not is_float or value.shape != ():
        raise TypeError(
            "`loss_fn` must return the mean loss of the batch, a scalar, got "
            f"{value!r}. Drop auxiliary outputs: lambda p, b: loss_fn(p, b)[0]."
        )
    if is_traced(params, batches.first, batches.all):
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
    _check_fresh(loss_fn, params, batches.first, once)
    batches.checked = True


def _shape(loss_fn: LossFn, params: optax.Params, batches: Batches) -> Any:
    try:
        return jax.eval_shape(loss_fn, params, batches.first)
    except Exception as error:
        if _may_be_one(batches.all):
            error.add_note(
                "`batches` is a list, which means many batches, and `loss_fn` got the "
                "first of them. If it was meant as one batch, give a tuple: (x, y)."
            )
        raise


def _check_fresh(
    loss_fn: LossFn, params: optax.Params, batch: Any, eager: jax.Array
) -> None:
    """What the loss closes over is what it was when its programs were compiled."""

    def renewed(params, batch):
        return loss_fn(params, batch)

    compiled = _compiled_loss(params, batch, loss_fn=loss_fn)
    rounding = max(1e-3, float(jnp.finfo(compiled.dtype).eps))
    close = functools.partial(np.allclose, rtol=rounding, atol=0.0, equal_nan=True)
    # Compiled in another way the same loss may round otherwise, compiled anew not.
    if not close(compiled, eager) and not close(
        compiled, jax.jit(renewed)(params, batch)
    ):
        raise ValueError(
            "`loss_fn` reads something that changed since it was compiled (eager value "
            f"{float(eager):.9g}, compiled value {float(compiled):.9g}). Put what "
            "changes into `params` or the batch, or make a new function."
        )


@programs.jit("loss_fn")
def _compiled_loss(params, batch, *, loss_fn):
    return loss_fn(params, batch)


def _may_be_one(batches: Any) -> bool:
    """Whether it is a list [x, y, ...] of arrays with as many examples each."""
    if not isinstance(batches, list) or not jax.tree_util.all_leaves(batches):
        return False
    return len({jnp.shape(array)[:1] for array in batches}) == 1


def _size(batch: Any) -> int:
    shapes = jax.tree.map(jnp.shape, batch)
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "one of many batches is weighed by the number of its examples, so all its "
            f"arrays must have one leading axis, got the shapes {shapes}. Keep other "
            "things, such as weights of classes, out of the batch: let `loss_fn` close "
            "over them."
        )
    return lengths.pop()[0]
