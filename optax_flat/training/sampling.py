"""Samples and predictive averages from a sampler's run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, modes, trees


class Samples(NamedTuple):
    """What `collect_samples` returns; S is the number of samples."""

    params: optax.Params  # where the run ended, to go on from
    opt_state: optax.OptState
    losses: jax.Array  # [steps], what the training step returned
    samples: optax.Params | None  # every leaf with a leading axis S; None if not kept
    prediction: Any  # mean of predict_fn over the samples; None without predict_fn


def collect_samples(
    step: Callable[..., Any],
    params: optax.Params,
    opt_state: optax.OptState,
    batches: Any,
    *,
    burn_in: int = 0,
    thin: int = 1,
    predict_fn: Callable[[optax.Params], Any] | None = None,
    keep: bool = True,
) -> Samples:
    """Runs a sampler in one `lax.scan` and takes a sample every few steps.

    The first `burn_in` steps only move the chain. After them, every `thin` steps, the
    params (`optax_flat.eval_params` of them) are one sample. The average of
    `predict_fn` over the samples is what Bayesian prediction asks for; it is summed up
    as the run goes, so that no more than one sample need be held (``keep=False``).

    Args:
      step: ``(params, opt_state, batch) -> (params, opt_state, loss)``, as
        `make_train_step` makes it.
      params: where the chain starts.
      opt_state: the sampler's state there.
      batches: minibatches, every leaf with the leading axis steps = burn_in + S * thin.
        If that much data does not fit, give indices and let the loss look them up.
      burn_in: steps before the first sample's own, >= 0.
      thin: steps per sample, >= 1.
      predict_fn: ``params -> tree of floating-point arrays``, for instance the class
        probabilities of test inputs.
      keep: whether the samples themselves are returned.

    Returns:
      `Samples`.

    Raises:
      ValueError: `burn_in` or `thin` too small, or batches that do not make whole
        samples.
      TypeError: `burn_in` or `thin` not an int.

    Example:
      >>> import jax.numpy as jnp, optax_flat
      >>> from optax_flat.training import collect_samples, make_train_step
      >>> def loss_fn(x, batch):  # f = x^2 / 2 in 10,000 chains at once
      ...     return jnp.sum(x ** 2) / 2
      >>> tx = optax_flat.sgld(0.1, temperature=1.0, key=0)
      >>> x = jnp.zeros(10_000)
      >>> run = collect_samples(
      ...     make_train_step(loss_fn, tx), x, tx.init(x), jnp.zeros(100),
      ...     burn_in=50, thin=10, predict_fn=lambda x: jnp.mean(x ** 2))
      >>> run.samples.shape
      (5, 10000)
      >>> bool(abs(run.prediction - 1 / (1 - 0.1 / 2)) < 0.03)
      True
    """
    burn_in = checks.integer("burn_in", burn_in, 0)
    thin = checks.integer("thin", thin, 1)
    num_samples = _count(batches, burn_in, thin)
    first = jax.tree.map(lambda x: x[:burn_in], batches)
    rest = jax.tree.map(
        lambda x: x[burn_in:].reshape(num_samples, thin, *x.shape[1:]), batches
    )

    def one_step(carry, batch):
        params, opt_state, loss = step(*carry, batch)
        return (params, opt_state), loss

    def one_sample(carry, inputs):
        chain, mean = carry
        taken, batches = inputs
        chain, losses = jax.lax.scan(one_step, chain, batches)
        sample = modes.eval_params(chain[1], chain[0])
        if predict_fn is not None:
            new = trees.accumulator(predict_fn(sample))
            mean = jax.tree.map(lambda m, x: m + (x - m) / (taken + 1), mean, new)
        return (chain, mean), (losses, sample if keep else None)

    mean = None
    if predict_fn is not None:
        shapes = jax.eval_shape(lambda p: trees.accumulator(predict_fn(p)), params)
        mean = trees.concrete(shapes)
    chain, early = jax.lax.scan(one_step, (params, opt_state), first)
    (chain, mean), (late, samples) = jax.lax.scan(
        one_sample, (chain, mean), (jnp.arange(num_samples), rest)
    )
    losses = jnp.concatenate([early, late.ravel()])
    return Samples(*chain, losses, samples, mean)


def _count(batches, burn_in, thin):
    """The number of samples."""
    lengths = {
        jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
        for leaf in jax.tree.leaves(batches)
    }
    steps = next(iter(lengths), None)
    if len(lengths) != 1 or steps is None:
        raise ValueError(
            "every leaf of `batches` must have the same leading axis, one entry per "
            f"step, got leading axes {sorted(map(str, lengths))}."
        )
    samples, left_over = divmod(steps - burn_in, thin)
    if samples < 1 or left_over:
        raise ValueError(
            "`batches` must have a leading axis of burn_in + S * thin with S >= 1 "
            f"samples, got {steps} with burn_in={burn_in} and thin={thin}. Cut or add "
            "minibatches, or change `burn_in`."
        )
    return samples
