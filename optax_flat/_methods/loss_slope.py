r"""Davis King's learning-rate schedule: lower the rate when the loss stops falling.

A line is fitted to the last `patience` losses. With independent, normal noise its slope
has a known distribution, hence a probability p of being negative:

    p(h) = Phi(-s / se),    se^2 = 12 / (n^3 - n) RSS / (n - 2)

for the least-squares slope s of n losses h. The rate falls when p < 0.51 both for the
whole window and for the window without its largest tenth, which a spike would tilt.

Source: "Automatic Learning Rate Scheduling That Really Works", and dlib, whose
semantics these are.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks
from optax_flat._core.arguments import factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at

THRESHOLD = 0.51


class LossSlopeState(NamedTuple):
    """State of `scale_by_loss_slope`."""

    metrics = ("count", "scale")

    count: jax.Array  # int32, [], updates made
    scale: jax.Array  # [], what updates are multiplied by
    losses: jax.Array  # [patience], a ring
    stored: jax.Array  # int32, [], losses in the ring
    next_index: jax.Array  # int32, [], where the next loss goes, over the oldest
    unchecked: jax.Array  # int32, [], losses since the last check


@factory
def scale_by_loss_slope(
    patience: int = 2000,
    factor: optax.ScalarOrSchedule = 0.1,
    *,
    min_scale: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Lowers the learning rate when the loss has stopped falling.

    .. math::
        p(h) = \Phi\left(-\frac{s}{\sigma_s}\right), \qquad
        \sigma_s^2 = \frac{12}{n^3 - n} \frac{\mathrm{RSS}}{n - 2}

    is the probability that n losses h with least-squares slope s are noise around a
    falling line (1/2 if all are equal). Once the last `patience` losses are there, and
    at every :math:`\lfloor \mathrm{patience} / 200 \rfloor + 1`-th loss, the scale is
    multiplied by `factor` if p < 0.51 for all of them *and* for those that are not
    above their 90th percentile. Then the oldest 400 + `patience` // 10 are forgotten,
    so up to a patience of 444 it starts from nothing.

    Put it behind an optimizer whose params stand where they are evaluated (not behind
    `multipoint_nesterov`, nor a walk in transparent mode) and give `update` the loss::

        tx = optax.chain(optax.adam(1e-3), optax_flat.scale_by_loss_slope())
        updates, state = tx.update(grads, state, params, value=loss)

    `make_train_step` does so itself. The loss of a minibatch will do. The new scale
    holds from the update that was given the deciding loss;
    ``optax.tree.get(state, "scale")`` reads it. Losses that are not finite are left
    out. With several devices all must be given the same loss; `optax.MultiSteps` hands
    on the loss of the last micro-batch only.

    Cost:
      1 gradient per update; state: 0 copies of the params.

    Args:
      patience: losses in the window, >= 3. Pure noise lowers the rate soon after the
        window has filled, so it should span the slowest progress worth waiting for.
      factor: what the scale is multiplied by, in (0, 1].
      min_scale: the scale never falls below, in [0, 1].

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or, in `update`, no
        `value`.
      TypeError: an argument of the wrong type.

    Example:
      A loss that falls leaves the rate alone, one that has arrived lowers it:

      >>> import jax, jax.numpy as jnp, optax_flat
      >>> tx = optax_flat.scale_by_loss_slope(patience=50, factor=0.5)
      >>> def scale_after(losses):
      ...     def step(state, loss):
      ...         return tx.update(jnp.zeros(1), state, value=loss)[1], None
      ...     return jax.lax.scan(step, tx.init(jnp.zeros(1)), losses)[0].scale
      >>> noise = jax.random.normal(jax.random.key(0), (200,))
      >>> float(scale_after(noise - jnp.arange(200.0)))
      1.0
      >>> float(scale_after(noise)) < 1.0
      True

    References:
      King, "Automatic Learning Rate Scheduling That Really Works", dlib's blog, 2018;
      dlib, dnn/trainer.h and statistics/running_gradient.h.

    Differs from the paper:
      dlib looks for the longest tail of the losses without a fall and compares its
      length with the patience; since the history holds no more than `patience` losses,
      that is the test above. dlib stops below a rate of 1e-5: `min_scale` holds
      instead. Its defaults, 2000 and 0.1, are ours. Leaving out losses that are not
      finite is ours.

      The `KingScheduler` of numpy-ml has three faults that this does not have: after
      its largest tenth is removed the history is too short to pass the test, for every
      patience >= 100, so the rate never falls, even while the loss rises; where it does
      pass, the history is kept and the rate falls at every further step; and it counts
      once per parameter, not once per update.
    """
    patience = checks.integer("patience", patience, 3)
    checks.number("factor", factor, 0.0, 1.0, open_low=True)
    checks.number("min_scale", min_scale, 0.0, 1.0)
    every = patience // 200 + 1
    forgotten = min(400 + patience // 10, patience)

    def init(x):
        del x
        zero = jnp.zeros([], jnp.int32)
        losses = jnp.zeros(patience, float)
        scale = jnp.ones([], float)
        return LossSlopeState(zero, scale, losses, zero, zero, zero)

    def step(state, grads, x, *, value=None, **extra_args):
        del x, extra_args
        if value is None:
            raise ValueError(
                "`value` must be passed to `update`: the schedule reads the loss. Call "
                "tx.update(grads, opt_state, params, value=loss), or use "
                "optax_flat.training.make_train_step."
            )
        if jnp.shape(value) != ():
            raise ValueError(
                "`value` must be the loss, a scalar, got an array of shape "
                f"{jnp.shape(value)}. Average it first."
            )
        loss = jnp.asarray(value, state.losses.dtype)
        given = jnp.isfinite(loss).astype(jnp.int32)
        place = state.next_index
        losses = jnp.where(given, state.losses.at[place].set(loss), state.losses)
        next_index = (place + given) % patience
        stored = jnp.minimum(state.stored + given, patience)
        unchecked = state.unchecked + given
        due = (unchecked >= every) & (given == 1)
        stopped = jax.lax.cond(
            due & (stored == patience), _has_stopped, _goes_on, losses, next_index
        )
        lowered = jnp.maximum(
            state.scale * at(factor, state.count), at(min_scale, state.count)
        )
        scale = jnp.where(stopped, lowered, state.scale).astype(state.scale.dtype)
        scaled = jax.tree.map(lambda u: u * scale.astype(u.dtype), grads)
        return scaled, LossSlopeState(
            counted(state.count),
            scale,
            losses,
            jnp.where(stopped, stored - forgotten, stored),
            next_index,
            jnp.where(due, 0, unchecked),
        )

    return by_gradient(init, step)


def _goes_on(losses, oldest):
    del losses, oldest
    return jnp.array(False)


def _has_stopped(losses, oldest):
    """Whether the losses do not fall, with and without spikes; `oldest` is first."""
    n = losses.size
    losses = jnp.roll(losses, -oldest)
    quantile = jnp.sort(losses)[math.floor(0.9 * (n - 1) + 0.5)]
    everything = jnp.ones(n, bool)
    return (_falls(losses, everything) < THRESHOLD) & (
        _falls(losses, losses <= quantile) < THRESHOLD
    )


def _falls(losses, kept):
    """Probability that the losses `kept` have a negative slope over their index."""
    weights = kept.astype(losses.dtype)
    n = jnp.sum(weights)
    index = jnp.cumsum(weights) - 1.0
    t = (index - (n - 1.0) / 2.0) * weights
    h = (losses - jnp.sum(weights * losses) / n) * weights
    slope = jnp.sum(t * h) * 12.0 / (n**3 - n)
    residual = jnp.sum((h - slope * t) ** 2)
    error = jnp.sqrt(12.0 / (n**3 - n) * residual / (n - 2.0))
    # A perfect line has no error; its slope alone decides.
    certain = jnp.where(slope < 0, 1.0, jnp.where(slope > 0, 0.0, 0.5))
    z = -slope / jnp.where(error > 0, error, 1.0)
    return jnp.where(error > 0, jax.scipy.special.ndtr(z), certain)
