"""Samples and predictive averages: from a sampler's run, or from a posterior."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, convolutions, modes, programs, trees
from optax_flat._core.posteriors import sample_params


class Samples(NamedTuple):
    """What `collect_samples` returns; S is the number of samples."""

    params: optax.Params  # where the run ended, to go on from
    opt_state: optax.OptState
    aux: Any
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
    predict_fn: Callable[..., Any] | None = None,
    keep: bool = True,
    aux: Any = None,
    fast_convolutions: bool = True,
) -> Samples:
    """Runs a sampler in one `lax.scan` and takes a sample every few steps.

    The first `burn_in` steps only move the chain. After them, every `thin` steps, the
    params (`optax_flat.eval_params` of them) are one sample. The average of
    `predict_fn` over the samples is what Bayesian prediction asks for; it is summed up
    as the run goes, so that no more than one sample need be held (``keep=False``).

    A long run may be cut into several calls: each returns where it ended. The scan is
    compiled once for the same `step` and `predict_fn`, so make these outside the loop.
    What was compiled, and the arrays these functions close over, is let go with them.

    Args:
      step: ``(params, opt_state, batch) -> (params, opt_state, loss)``, as
        `make_train_step` makes it; with `aux`, which it then takes and returns as the
        fourth.
      params: where the chain starts.
      opt_state: the sampler's state there.
      batches: minibatches, every leaf with the leading axis steps = burn_in + S * thin.
        If that much data does not fit, give indices and let the loss look them up.
      burn_in: steps before the first sample's own, >= 0.
      thin: steps per sample, >= 1.
      predict_fn: ``params -> tree of arrays or numbers``, for instance the class
        probabilities of test inputs; ``(params, aux)`` if there is `aux`.
      keep: whether the samples themselves are returned.
      aux: what moves along in the step: batch statistics, dropout keys. None if there
        is nothing.
      fast_convolutions: whether convolutions in the loop are given the layout that is
        fast on a CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Samples`.

    Raises:
      ValueError: `burn_in` or `thin` too small, or batches that do not make whole
        samples.
      TypeError: `burn_in` or `thin` not an int, or a function that is not hashable.

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
    _check_length(batches, burn_in, thin)
    chain = (params, opt_state) if aux is None else (params, opt_state, aux)
    return _run(
        chain, batches,
        step=step, burn_in=burn_in, thin=thin, predict_fn=predict_fn, keep=keep,
        fast_convolutions=checks.flag("fast_convolutions", fast_convolutions),
    )  # fmt: skip


def predict(
    predict_fn: Callable[..., Any],
    opt_state: optax.OptState,
    params: optax.Params,
    key: jax.typing.ArrayLike,
    *,
    num_samples: int = 32,
    aux: Any = None,
    fast_convolutions: bool = True,
) -> Any:
    """Averages predictions over draws from the posterior of `ivon` or `bsam`.

    The draws are those of `optax_flat.sample_params`, made and used one at a time in
    one `lax.scan`, which is compiled once for the same `predict_fn` and let go with it:
    for many batches of inputs make one function and pass them as `aux`.

    Cost:
      `num_samples` forward passes.

    Args:
      predict_fn: ``params -> tree of arrays or numbers``, for instance the class
        probabilities (not the logits) of test inputs; ``(params, aux)`` if there is
        `aux`.
      opt_state: the state of an optimizer that contains `ivon` or `bsam`.
      params: the current params.
      key: a typed or raw PRNG key, or an int.
      num_samples: draws, >= 1.
      aux: what else the model takes, such as batch statistics or the inputs. None if
        there is nothing.
      fast_convolutions: whether convolutions in the loop are given the layout that is
        fast on a CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      The mean of ``predict_fn(draw)``, in at least float32.

    Raises:
      ValueError: the state holds no posterior, `num_samples` below 1, or a `key` that
        is none.
      TypeError: `num_samples` not an int, or a `predict_fn` that is not hashable.

    Example:
      >>> import jax.numpy as jnp, optax_flat
      >>> from optax_flat.training import predict
      >>> tx = optax_flat.ivon(0.1, ess=100.0, hess_init=0.25, key=0)
      >>> params = jnp.full(1000, 3.0)
      >>> square = predict(
      ...     lambda w: jnp.mean(w**2), tx.init(params), params, 0, num_samples=50)
      >>> bool(abs(square - (3.0**2 + 1 / 25)) < 0.01)
      True
    """
    num_samples = checks.integer("num_samples", num_samples, 1)
    extra = () if aux is None else (aux,)
    return _mean_prediction(
        opt_state, params, checks.key(key), extra,
        predict_fn=predict_fn, num_samples=num_samples,
        fast_convolutions=checks.flag("fast_convolutions", fast_convolutions),
    )  # fmt: skip


@programs.jit("predict_fn", static_argnames=("num_samples", "fast_convolutions"))
def _mean_prediction(
    opt_state, params, key, extra, *, predict_fn, num_samples, fast_convolutions
):
    def one(key):
        sample = sample_params(opt_state, params, key)
        return _averaged(predict_fn(sample, *extra))

    def add(total, key):
        return jax.tree.map(jnp.add, total, one(key)), None

    keys = jax.random.split(key, num_samples)
    total = trees.concrete(jax.eval_shape(one, keys[0]))
    add = convolutions.fast_if(fast_convolutions, add)
    total, _ = jax.lax.scan(add, total, keys)
    return jax.tree.map(lambda x: x / num_samples, total)


@programs.jit(
    "step", "predict_fn",
    static_argnames=("burn_in", "thin", "keep", "fast_convolutions"),
)  # fmt: skip
def _run(chain, batches, *, step, burn_in, thin, predict_fn, keep, fast_convolutions):
    step = convolutions.fast_if(fast_convolutions, step)

    first = jax.tree.map(lambda x: x[:burn_in], batches)
    rest = jax.tree.map(lambda x: x[burn_in:].reshape(-1, thin, *x.shape[1:]), batches)

    def one_step(chain, batch):
        params, opt_state, *extra = chain
        params, opt_state, loss, *extra = step(params, opt_state, batch, *extra)
        return (params, opt_state, *extra), loss

    def predict(sample, extra):
        fast = convolutions.fast_if(fast_convolutions, predict_fn)
        return _averaged(fast(sample, *extra))

    def one_sample(carry, batches):
        chain, mean, taken = carry
        chain, losses = jax.lax.scan(one_step, chain, batches)
        params, opt_state, *extra = chain
        sample = modes.eval_params(opt_state, params)
        if predict_fn is not None:
            new = predict(sample, extra)
            mean = jax.tree.map(lambda m, x: m + (x - m) / (taken + 1), mean, new)
        return (chain, mean, taken + 1), (losses, sample if keep else None)

    mean = None
    if predict_fn is not None:
        params, _, *extra = chain
        mean = trees.concrete(jax.eval_shape(predict, params, extra))
    chain, early = jax.lax.scan(one_step, chain, first)
    (chain, mean, _), (late, samples) = jax.lax.scan(one_sample, (chain, mean, 0), rest)
    params, opt_state, *extra = chain
    losses = jnp.concatenate([early, late.ravel()])
    aux = extra[0] if extra else None
    return Samples(params, opt_state, aux, losses, samples, mean)


def _averaged(prediction):
    """What predictions are summed up in: at least float32, of Python numbers too."""
    return trees.accumulator(jax.tree.map(jnp.asarray, prediction))


def _check_length(batches, burn_in, thin):
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
