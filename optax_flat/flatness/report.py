"""All measures of a minimum in one call, with their errors and costs."""

from collections.abc import Sequence
from typing import Any

import optax

from optax_flat._core import checks, extras
from optax_flat._core.batches import as_batches
from optax_flat.flatness import _points
from optax_flat.flatness._batches import LossFn
from optax_flat.flatness._measures import MEASURES, Run, Settings, compute
from optax_flat.flatness._report import Report, words
from optax_flat.flatness.directions import check_filter_axis
from optax_flat.flatness.sharpness import check_shards


def report(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    key: Any,
    measures: Sequence[str] | None = None,
    k: int = 3,
    num_matvecs: int = 50,
    num_samples: int = 32,
    num_draws: int = 4,
    rho: float = 0.05,
    adaptive_rho: float = 0.5,
    m: int | None = None,
    ascent_steps: int = 20,
    sigma: float = 0.05,
    gamma: float = 1.0,
    temperature: float = 1e-3,
    entropy_steps: int = 50,
    filter_axis: int = -1,
    batch_size: int | None = 8,
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Report:
    r"""Measures a minimum: curvature, sharpness, local energy and entropy, slices.

    Each measure is the function of this module with the same name, or nearly so, and
    has a key of its own, made from `key` and its name: it comes out the same whatever
    else is measured. With the default settings all of them cost about as much as 5000
    gradients on all of `batches`, of which local entropy takes 4000. It needs the
    memory of about seven copies of the params for each of 40 chains, the eigenvalues
    of 50 and more: with a large network give the `measures` wanted, or fewer samples.
    Not for use under `jit`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or another re-iterable of
        batches, over whose examples the loss is the mean.
      key: a typed or raw PRNG key, or an int.
      measures: names of the measures wanted, or None for all (of `m_sharpness` only if
        there is `m`); they are the attributes of `Report`.
      k: eigenvalues at the top, >= 1; no more than n are sought.
      num_matvecs: Hessian-vector products per eigenvalue and per draw of the density,
        >= 1.
      num_samples: samples of the trace, the Frobenius norm, the averages, and chains of
        local entropy, >= 2.
      num_draws: draws of the density, >= 1.
      rho: radius of the ball of all worst-case sharpness but the adaptive, > 0.
      adaptive_rho: radius relative to the weights, > 0.
      m: examples per shard of `m_sharpness`, which must divide every batch; or None.
      ascent_steps: of the worst-case sharpness, >= 1.
      sigma: noise per weight, > 0: of local energy relative to the weight, and of the
        average sharpness absolute, so its radius is :math:`\sigma \sqrt{n}`. With
        `rho`, each weight would move too little to be told from rounding.
      gamma: stiffness of the spring of local entropy, > 0.
      temperature: of local entropy, > 0. The scope is sqrt(temperature / gamma) per
        parameter, by default 0.03.
      entropy_steps: of local entropy, >= 1.
      filter_axis: of the filters of the random line: -1 (Flax) or 0 (Equinox, PyTorch).
      batch_size: how many points or samples are evaluated at a time; None is all.
      progress: whether to show a progress line (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Report`.

    Raises:
      ValueError: a setting outside the range given above, a name that is no measure, an
        `m` that does not divide a batch, or a loss with noise.
      TypeError: an argument of the wrong type, or a one-shot iterator of batches.
      ImportError: the extra `flatness` is not installed.

    Example:
      The flatter of two minima, by every measure:

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import report
      >>> def loss_fn(x, batch):
      ...     return jnp.sum(batch * (x - 1) ** 2) / 2
      >>> names = ("top_eigenvalues", "sharpness_worst", "local_energy")
      >>> flat, sharp = (
      ...     report(loss_fn, jnp.ones(3), c * jnp.ones(3), key=0, measures=names)
      ...     for c in (1.0, 10.0))
      >>> bool(flat.top_eigenvalues.values[0] < sharp.top_eigenvalues.values[0])
      True
      >>> flat.sharpness_worst.value < sharp.sharpness_worst.value
      True
      >>> flat.local_energy.value < sharp.local_energy.value
      True
    """
    names = _check_measures(measures, m)
    settings = Settings(
        k=checks.integer("k", k, 1),
        num_matvecs=checks.integer("num_matvecs", num_matvecs, 1),
        num_samples=checks.integer("num_samples", num_samples, 2),
        num_draws=checks.integer("num_draws", num_draws, 1),
        rho=checks.constant("rho", rho, 0.0, open_low=True),
        adaptive_rho=checks.constant("adaptive_rho", adaptive_rho, 0.0, open_low=True),
        m=m if m is None else checks.integer("m", m, 1),
        ascent_steps=checks.integer("ascent_steps", ascent_steps, 1),
        sigma=checks.constant("sigma", sigma, 0.0, open_low=True),
        gamma=checks.constant("gamma", gamma, 0.0, open_low=True),
        temperature=checks.constant("temperature", temperature, 0.0, open_low=True),
        entropy_steps=checks.integer("entropy_steps", entropy_steps, 1),
        filter_axis=check_filter_axis(filter_axis),
        batch_size=_points.check_batch_size(batch_size),
    )
    found = as_batches(batches)
    if m is not None and "m_sharpness" in names:  # look at all batches, before the work
        for batch in found.all:
            check_shards(m, batch)
    fast = checks.flag("fast_convolutions", fast_convolutions)
    run = Run(loss_fn, params, found, checks.key(key), settings, fast_convolutions=fast)
    values, costs = {}, {}
    for name in _shown(names, progress):
        values[name], costs[name] = compute(run, name)
    return Report(
        num_parameters=run.size, settings=settings._asdict(), costs=costs, **values
    )


def _check_measures(measures, m):
    if measures is None:
        return [name for name in MEASURES if name != "m_sharpness" or m is not None]
    unknown = [name for name in measures if name not in MEASURES]
    if isinstance(measures, str) or unknown or not measures:
        raise ValueError(
            f"`measures` must be names out of {', '.join(MEASURES)}, or None for all, "
            f"got {measures!r}."
        )
    if "m_sharpness" in measures and m is None:
        raise ValueError("`m` must be given for 'm_sharpness', got None. Give an int.")
    return [name for name in MEASURES if name in measures]


def _shown(names, progress):
    if not progress:
        return names
    tqdm = extras.load("tqdm.auto", "progress", "progress=True").tqdm
    return _named(names, tqdm(total=len(names), unit="measure"))


def _named(names, bar):
    with bar:
        for name in names:
            bar.set_postfix_str(words(name))
            yield name
            bar.update()
