r"""Sharpness: how far the loss rises within a small ball, at worst or on average.

    worst     max over ||e|| <= rho of f(w + e) - f(w)
    average   mean over random e of that length

In adaptive form the ball is measured in units of the weights, ||e / |w|||, so that it
does not depend on how a network with ReLUs is scaled. What the numbers say about
generalization is disputed: Andriushchenko et al., arXiv 2302.07011, found that they
follow training parameters such as the learning rate rather than the test error.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat._core.batches import Batches
from optax_flat.flatness import _points
from optax_flat.flatness._batches import LossFn, mean_over
from optax_flat.flatness.curvature import Estimate

# Relative to rho, where an ascent with a key starts: far below what it measures, far
# above rounding.
_START = 1e-3


def sharpness(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    rho: float,
    kind: str = "worst",
    norm: str = "l2",
    adaptive: bool = False,
    m: int | None = None,
    num_steps: int = 1,
    num_samples: int = 32,
    batch_size: int | None = 8,
    fast_convolutions: bool = True,
    key: jax.typing.ArrayLike | None = None,
) -> Estimate:
    r"""Rise of the loss in a ball around the params, at worst or on average.

    .. math::
        \text{worst} = \max_{\|e / t\|_p \le \rho} f(w + e) - f(w), \qquad
        \text{average} = \mathrm{E}_e\, f(w + e) - f(w)

    with p = 2 or infinity (`norm`), t = 1 or, if `adaptive`, t = abs(w) elementwise.

    *Worst.* In the coordinates u = e / t, projected gradient ascent: each step adds to
    u its ascent direction, :math:`t g / \|t g\|` or sign(t g), and projects on the
    ball. Step i = 0, 1, ... of S = `num_steps` has the length :math:`\rho (1 - i/S)`,
    so the first ends at SAM's point, :math:`e = \rho g / \|g\|`, with which ``S = 1``
    stops. The largest value on the way counts; it is a lower bound of the maximum. One
    gradient evaluation per step, and a forward pass at the end.

    *m-sharpness.* With `m` each shard of m consecutive examples of a batch has an e of
    its own, and the rises of their own losses are averaged.

    *Average.* e / t is uniform on the sphere of radius :math:`\rho` ("l2") or in the
    cube :math:`[-\rho, \rho]^n` ("linf"). Each sample is the mean over e and -e,
    in which the gradient cancels: near a minimum the expectations are
    :math:`\rho^2 \operatorname{tr}(t H t) / 2n` and
    :math:`\rho^2 \operatorname{tr}(t H t) / 6`. Two forward passes per sample.

    Cost:
      `num_steps` gradients and 1 forward pass over `batches`; the average
      `2 * num_samples + 1` forward passes.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: w, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other iterable of batches,
        over whose examples the loss is the mean.
      rho: :math:`\rho`, the radius, > 0.
      kind: "worst" or "average".
      norm: "l2", over all parameters together, or "linf".
      adaptive: whether the radius is relative to each weight; a weight of 0 then stays.
      m: examples per shard, which must divide every batch; None for the whole loss. Of
        "worst" only: on the average over e it makes no difference.
      num_steps: S, steps of the ascent, >= 1.
      num_samples: pairs e and -e of the average, >= 2.
      batch_size: how many shards or samples are evaluated at a time; None is all of
        them.
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.
      key: a typed or raw PRNG key, or an int. Needed for the average. The ascent has
        no randomness without; with a key it starts at a random point,
        :math:`10^{-3} \rho` from w, by which it leaves a point without gradient, for
        one forward pass more.

    Returns:
      `Estimate`: the rise and its standard error, both []. For the average that is over
      the samples, and in quadrature the rounding of f(w), eps f(w), which they share.
      With `m` it is over the shards (0 if there is one). The ascent on the whole loss
      has nothing random, so 0; its rise is inf if the loss or the gradient overflowed
      on the way.

    Raises:
      ValueError: an argument outside the range given above, or a loss with noise.
      TypeError: an argument of the wrong type; or, unless `m` is given or it is the
        average, a one-shot iterator.

    Example:
      At a minimum the worst rise is :math:`\rho^2 \lambda_{\max} / 2`, which the ascent
      finds:

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import sharpness
      >>> curvatures = jnp.array([1.0, 3.0, 10.0])
      >>> def loss_fn(w, batch):
      ...     return jnp.sum(curvatures * (w - batch.mean(0)) ** 2) / 2
      >>> batch = jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
      >>> worst = sharpness(
      ...     loss_fn, jnp.ones(3), batch, rho=0.1, num_steps=20, key=0)
      >>> bool(abs(worst.value - 0.1 ** 2 * 10 / 2) < 1e-4)
      True

    References:
      Foret et al., `Sharpness-aware minimization for efficiently improving
      generalization <https://arxiv.org/abs/2010.01412>`_, ICLR 2021 (m-sharpness).
      Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, ICML 2021 (adaptive).
      Andriushchenko et al., `A modern look at the relationship between sharpness and
      generalization <https://arxiv.org/abs/2302.07011>`_, ICML 2023;
      `code <https://github.com/tml-epfl/sharpness-vs-generalization>`_.

    Differs from the paper:
      The code of 2302.07011 ascends with momentum (Auto-PGD) from a random point of the
      ball and counts w itself; on an adaptive "l2" ball it steps along :math:`t g`
      where here it is :math:`t^2 g`, the steepest direction in this norm, as in ASAM.
      Its average for "l2" adds normal noise of deviation s to every weight, which is
      :math:`\rho = s \sqrt{n}` here. ASAM leaves biases out of t.
    """
    rho = checks.constant("rho", rho, 0.0, open_low=True)
    checks.choice("kind", kind, ("worst", "average"))
    checks.choice("norm", norm, ("l2", "linf"))
    num_steps = checks.integer("num_steps", num_steps, 1)
    batch_size = _points.check_batch_size(batch_size)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    one_pass = kind == "average" or m is not None
    batches, w = _points.prepare(loss_fn, params, batches, one_pass=one_pass)
    law = {"l2": "sphere", "linf": "box"}[norm]
    if kind == "average":
        if m is not None:
            raise ValueError(
                f"`m` must be None with kind='average', got {m}: the average over "
                "random directions is the same for every size of the shards."
            )
        return _points.average_rise(
            w, batches, rho, key, loss_fn=loss_fn, num_samples=num_samples,
            law=law, adaptive=adaptive, batch_size=batch_size,
            fast_convolutions=fast_convolutions,
        )  # fmt: skip
    start = None
    if key is not None:
        start = optax.tree.scale(_START * rho, _points.draw(checks.key(key), w, law))
    settings: dict[str, Any] = {
        "loss_fn": loss_fn, "norm": norm, "adaptive": adaptive, "num_steps": num_steps,
        "fast_convolutions": fast_convolutions,
    }  # fmt: skip
    if m is None:
        rise = _points.in_one_program(_worst, w, batches, rho, start, **settings)
        return Estimate(rise, jnp.zeros_like(rise))
    settings |= {"m": checks.integer("m", m, 1), "batch_size": batch_size}
    rises = [
        _points.in_one_program(
            _worst_of_shards, w, Batches(False, batch, (batch,)), rho, start, **settings
        )
        for batch in batches.all
    ]
    return _points.estimate(jnp.concatenate(rises))


def _worst(
    w, batches, rho, start, *, loss_fn, norm, adaptive, num_steps, fast_convolutions
):
    """The ascent on the mean loss over `batches`, from u = `start` (None is 0)."""
    unit = _points.scale(w, adaptive)
    value = functools.partial(_points.value, loss_fn=loss_fn)
    value_and_grad = functools.partial(_points.value_and_grad, loss_fn=loss_fn)

    def body(carry, length):
        u, grads, best = carry
        u = _step(u, unit, grads, length, rho=rho, norm=norm)
        new, grads = mean_over(batches, value_and_grad, _point(w, unit, u))
        return u, grads, jnp.maximum(best, _rise(new, loss))

    if start is None:
        u = optax.tree.zeros_like(w)
        loss, grads = mean_over(batches, value_and_grad, w)
    else:
        u, loss = start, mean_over(batches, value, w)
        grads = mean_over(batches, value_and_grad, _point(w, unit, u))[1]
    lengths = rho * (1.0 - jnp.arange(num_steps) / num_steps)
    carry = (u, grads, jnp.full_like(loss, -jnp.inf))
    u, grads, best = _points.repeat(
        body, carry, lengths[:-1], batches, fast_convolutions=fast_convolutions
    )
    u = _step(u, unit, grads, lengths[-1], rho=rho, norm=norm)
    last = mean_over(batches, value, _point(w, unit, u))
    return jnp.maximum(best, _rise(last, loss))


@jax.jit
def _point(w, unit, u):
    return trees.cast_like(optax.tree.add(w, optax.tree.mul(unit, u)), w)


def _rise(value, loss):
    """Where the loss is no number on the way, and was one at w, it overflowed."""
    return jnp.where(jnp.isnan(value), jnp.inf, value) - loss


@functools.partial(jax.jit, static_argnames="norm")
def _step(u, unit, grads, length, *, rho, norm):
    """One step of ascent in u and the projection on the ball."""
    direction = optax.tree.mul(unit, grads)
    if norm == "linf":
        new = jax.tree.map(
            lambda u, d: jnp.clip(u + length * jnp.sign(d), -rho, rho), u, direction
        )
        return trees.cast_like(new, u)
    # By the largest entry first: squares of very small or large ones would be lost.
    direction = _divided(direction, optax.tree.norm(direction, ord=jnp.inf))
    direction = _divided(direction, trees.norm(direction))
    new = optax.tree.add_scale(u, length, direction)
    new = optax.tree.scale(rho / jnp.maximum(trees.norm(new), rho), new)
    return trees.cast_like(new, u)


def _divided(direction, size):
    size = jnp.where(size > 0, size, 1.0)  # no gradient, no step
    return jax.tree.map(lambda d: d / size, direction)


def _worst_of_shards(w, batches, rho, start, *, m, batch_size, **settings):
    """The ascent on each shard of one batch by itself, [shards]."""
    check_shards(m, batches.first)

    def worst(shard):
        return _worst(w, Batches(False, shard, (shard,)), rho, start, **settings)

    # On an Explicit mesh a shard may lie across devices.
    shards = jax.tree.map(
        lambda x: jnp.reshape(x, (-1, m, *x.shape[1:])),
        trees.replicated(jax.tree.map(jnp.asarray, batches.first)),
    )
    return _points.mapped(
        worst, shards, batch_size=batch_size,
        fast_convolutions=settings["fast_convolutions"],
    )  # fmt: skip


def check_shards(m: int, batch: Any) -> None:
    """`m` divides the number of examples of a batch."""
    for leaf in jax.tree.leaves(batch):
        length = jnp.shape(leaf)[0] if jnp.ndim(leaf) else 0
        if length == 0 or length % m:
            raise ValueError(
                f"`m` must divide the number of examples of every batch, got m={m} and "
                f"an array of shape {jnp.shape(leaf)}. Give a divisor, or cut the "
                "batches."
            )
