"""Batch statistics of weights that no training step has visited."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core.batches import as_batches


def update_batch_stats(
    apply: Callable[[optax.Params, Any, Any], Any],
    params: optax.Params,
    batches: Any,
    batch_stats: Any,
) -> Any:
    r"""Batch statistics of averaged weights: the mean over the statistics of batches.

    The running statistics of BatchNorm belong to the weights of the training, not to
    their average (`swa`), a center (`parle`) or a sample. This passes minibatches
    through the model at `params` and gives each the same weight, whatever the layers'
    momentum.

    Layers must move what they keep by ``m * old + (1 - m) * of_the_batch`` with a
    constant m each, as BatchNorm does in Flax Linen and NNX. They are passed every
    batch with statistics of zero, which leaves (1 - m) of the batch's own, and the
    first batch besides with huge ones, which tells m, and with ones, which tells
    whether that is all there is to it. All of this is in at least float32, and the
    result in the dtypes of the statistics.

    Args:
      apply: ``(params, batch, batch_stats) -> batch_stats``: the statistics behind a
        pass in training mode. It is jitted.
      params: where to evaluate the model, from `optax_flat.eval_params`.
      batches: one batch (a pytree of arrays), or a list or another iterable of many:
        one epoch of the training data, or part of it. Batches of another shape compile
        another program.
      batch_stats: the model's, for their structure and dtypes; a `flax.nnx.State` will
        do.

    Returns:
      Statistics like `batch_stats`.

    Raises:
      ValueError: no batches; a pass that left the statistics as they were, as in
        evaluation mode, that moved them otherwise, as SpectralNorm does, that rounded
        them to 16 bits, or that returned others.
      TypeError: statistics that are not floating point.

    Example:
      One layer with a momentum of 0.9 that keeps the mean of its inputs:

      >>> import jax.numpy as jnp
      >>> from optax_flat.training import update_batch_stats
      >>> def apply(params, batch, stats):
      ...     return {"mean": 0.9 * stats["mean"] + 0.1 * jnp.mean(params * batch)}
      >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
      >>> stats = update_batch_stats(apply, 10.0, batches, {"mean": jnp.zeros(())})
      >>> bool(jnp.allclose(stats["mean"], 40.0))
      True
    """
    _check_floats(batch_stats)
    apply = jax.jit(apply)
    found = as_batches(batches, one_pass=True)
    zeros, huge, ones = (
        jax.tree.map(lambda s, v=value: _full(s, v), batch_stats)
        for value in (lambda dtype: 0.0, _huge, lambda dtype: 1.0)
    )
    left = apply(params, found.first, zeros)
    _check_same(left, zeros)
    momenta = jax.tree.map(
        lambda at_huge, left, huge: (at_huge - left) / huge,
        apply(params, found.first, huge), left, huge,
    )  # fmt: skip
    _check_affine(apply(params, found.first, ones), left, momenta)
    _check_moved(momenta)
    total, number = zeros, 0
    for batch in found.all:
        total = _add(total, apply(params, batch, zeros))
        number += 1
    return jax.tree.map(
        lambda t, m, s: (t / number / (1 - m)).astype(jnp.result_type(s)),
        total, momenta, batch_stats,
    )  # fmt: skip


@jax.jit
def _add(total, left):
    return jax.tree.map(jnp.add, total, left)


def _full(like, value):
    """An array of one value, whose dtype loses nothing of a momentum near 1."""
    dtype = jnp.promote_types(jnp.result_type(like), jnp.float32)
    return jnp.full_like(like, value(dtype), dtype)


def _huge(dtype) -> float:
    """A power of two: times m it is exact, and what is added to it is lost."""
    return 2.0 ** (jnp.finfo(dtype).maxexp // 2)


def _check_floats(batch_stats):
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                "`batch_stats` must hold floating-point arrays only, got "
                f"{jnp.result_type(leaf)} at {jax.tree_util.keystr(path)}. Give the "
                'collection "batch_stats" of Linen, or nnx.state(model, '
                "nnx.BatchStat), and let `apply` close over the rest."
            )


def _check_same(left, given):
    got, expected = map(jax.tree.structure, (left, given))
    if got != expected:
        raise ValueError(
            "`apply` must return the statistics with the structure it was given.\n"
            f"  got:      {got}\n  expected: {expected}\n"
            'With Linen return the "batch_stats" of the second value of module.apply.'
        )
    leaves, _ = jax.tree_util.tree_flatten_with_path(left)
    for (path, leaf), wanted in zip(leaves, jax.tree.leaves(given), strict=True):
        if (leaf.shape, leaf.dtype) != (wanted.shape, wanted.dtype):
            raise ValueError(
                "`apply` must return the statistics with the shapes and the dtypes "
                f"that it was given, at {jax.tree_util.keystr(path)} {wanted.shape} "
                f"and {wanted.dtype}, got {leaf.shape} and {leaf.dtype}. (They are "
                "passed in at least float32, as 16 bits would round the momentum away: "
                "let `apply` not cast them.)"
            )


def _check_moved(momenta):
    for path, m in jax.tree_util.tree_leaves_with_path(momenta):
        if not jnp.all((m >= 0) & (m < 1)):
            raise ValueError(
                "`apply` must move the statistics by m * old + (1 - m) * of_the_batch "
                f"with m in [0, 1), got m = {jnp.max(m)} at "
                f"{jax.tree_util.keystr(path)}. Make the pass in training mode "
                "(train=True, model.train()), with mutable=['batch_stats'] in Linen."
            )


def _check_affine(at_ones, left, momenta):
    leaves, _ = jax.tree_util.tree_flatten_with_path(at_ones)
    others = map(jax.tree.leaves, (left, momenta))
    wrong = []
    for (path, got), zero, m in zip(leaves, *others, strict=True):
        expected = jnp.where(jnp.isfinite(m), m, 0.0) + zero
        rounding = jnp.finfo(got.dtype).eps ** 0.5 * (1.0 + jnp.abs(zero))
        if jnp.any(jnp.abs(got - expected) > rounding):
            wrong.append(jax.tree_util.keystr(path))
    if wrong:
        raise ValueError(
            "`apply` must move the statistics by m * old + (1 - m) * of_the_batch, but "
            f"does otherwise at {', '.join(wrong)}. Vectors of SpectralNorm are no "
            "such averages, and change what layers behind see: give the averages only, "
            "and let `apply` put the rest beside them."
        )
