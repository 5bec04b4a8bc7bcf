"""Batch statistics of weights that no training step has visited."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def update_batch_stats(
    apply: Callable[[optax.Params, Any, Any], Any],
    params: optax.Params,
    batches: Iterable[Any],
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
    first batch with huge ones besides, which tells m.

    Args:
      apply: ``(params, batch, batch_stats) -> batch_stats``: the statistics behind a
        pass in training mode. It is jitted.
      params: where to evaluate the model, from `optax_flat.eval_params`.
      batches: minibatches, any iterable: one epoch of the training data, or part of
        it. Batches of another shape compile another program.
      batch_stats: the model's, for their structure and dtypes; a `flax.nnx.State` will
        do.

    Returns:
      Statistics like `batch_stats`.

    Raises:
      ValueError: no batches; a pass that left the statistics as they were, as in
        evaluation mode, or that returned others.
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
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    huge = jax.tree.map(lambda s: jnp.full_like(s, _huge(s.dtype)), batch_stats)
    total, probed, number = zeros, zeros, 0
    for batch in batches:
        left = apply(params, batch, zeros)
        if number == 0:
            _check_same(left, batch_stats)
            probed = jax.tree.map(jnp.subtract, apply(params, batch, huge), left)
        total = _add(total, left)
        number += 1
    if number == 0:
        raise ValueError(
            "`batches` must hold at least one minibatch, got none. Is it a generator "
            "that was used up? Make a new one."
        )
    momenta = jax.tree.map(lambda p, h: p / h, probed, huge)
    _check_moved(momenta)
    return jax.tree.map(
        lambda t, m: (t / number / (1 - m)).astype(t.dtype), total, momenta
    )


@jax.jit
def _add(total, left):
    return jax.tree.map(jnp.add, total, left)


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


def _check_same(left, batch_stats):
    got, expected = map(jax.tree.structure, (left, batch_stats))
    if got != expected:
        raise ValueError(
            "`apply` must return the statistics with the structure it was given.\n"
            f"  got:      {got}\n  expected: {expected}\n"
            'With Linen return the "batch_stats" of the second value of module.apply.'
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
