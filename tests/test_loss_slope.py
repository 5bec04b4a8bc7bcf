"""Davis King's schedule against a plain transcription of dlib's rule."""

import functools
from math import erf, floor, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import load

import optax_flat


def probability(losses):
    """That the slope is negative."""
    n = len(losses)
    t = np.arange(n) - (n - 1) / 2
    slope = t @ losses / (t @ t)
    residual = np.sum((losses - losses.mean() - slope * t) ** 2)
    error = sqrt(12 / (n**3 - n) * residual / (n - 2))
    if np.ptp(losses) == 0:
        return 0.5
    return 0.5 * (1 + erf(-slope / error / sqrt(2)))


def longest_tail(losses, kept):
    """The most recent losses without a fall, as many as there can be."""
    for j in range(len(losses), 2, -1):
        tail = losses[-j:][kept[-j:]]
        if len(tail) >= 3 and probability(tail) < 0.51:
            return j
    return 0


def dlib(losses, patience, factor):
    """The scale after each loss."""
    history, scale, scales, unchecked = [], 1.0, [], 0
    for loss in losses:
        history = [*history, loss][-patience:]
        unchecked += 1
        if unchecked >= patience // 200 + 1:
            unchecked = 0
            h = np.array(history)
            bound = np.sort(h)[floor(0.9 * (len(h) - 1) + 0.5)]
            plain = longest_tail(h, np.ones(len(h), bool))
            if min(plain, longest_tail(h, h <= bound)) >= patience:
                scale *= factor
                history = history[min(400 + patience // 10, len(history)) :]
        scales.append(scale)
    return np.array(scales)


@functools.partial(jax.jit, static_argnums=(1, 2))
def scales(losses, patience, factor):
    tx = optax_flat.scale_by_loss_slope(patience, factor)

    def step(state, loss):
        updates, state = tx.update(jnp.ones([]), state, value=loss)
        return state, updates

    return jax.lax.scan(step, tx.init(jnp.zeros([])), losses)[1]


@pytest.mark.parametrize("curve", ["decreasing", "plateau", "spiky"])
def test_king_curves(curve, x64):
    meta, golden = load(f"king_{curve}")
    patience, factor = meta["config"]["patience"], meta["config"]["decay"]
    ours = scales(golden["loss"], patience, factor)
    np.testing.assert_allclose(ours, dlib(golden["loss"], patience, factor), rtol=1e-12)


@pytest.mark.parametrize("patience", [3, 20, 45])
def test_random_curves(patience, x64):
    """A hundred in all: falls, plateaus, rises and spikes."""
    lowered = []
    for seed in range(34):
        rng = np.random.default_rng(seed)
        n = 160
        slope = rng.choice([0.0, -0.3, 0.05]) * rng.uniform()
        losses = slope * np.minimum(np.arange(n), n // 2) + rng.normal(size=n)
        losses += 20 * (rng.uniform(size=n) < 0.03)
        ours = scales(losses, patience, 0.5)
        np.testing.assert_allclose(ours, dlib(losses, patience, 0.5), rtol=1e-12)
        lowered.append(int(np.log2(1 / ours[-1])))
    assert len(set(lowered)) > 1


def test_long_windows_forget_a_part(x64):
    """Beyond a patience of 444 some losses survive a drop, and checks are rarer."""
    rng = np.random.default_rng(0)
    losses = rng.normal(size=1800)
    ours = np.asarray(scales(losses, 600, 0.5))
    full = np.flatnonzero(ours < 1)[0]
    drops = np.flatnonzero(np.diff(ours) < 0) + 1
    assert (drops + 1) % 4 == pytest.approx(0)  # every 600 // 200 + 1 losses
    assert np.all(np.diff(drops) >= 460)
    # Of 600, 460 are forgotten: the next drop may come before 600 new ones.
    assert full >= 599
    assert np.any(np.diff(drops) < 600)


def test_constant_losses_have_stopped():
    """In float32 too, where their mean is not exact."""
    ours = scales(jnp.full(40, 0.1), 10, 0.5)
    places = np.array([8, 9, 18, 19, 39])
    np.testing.assert_allclose(ours[places], [1, 0.5, 0.5, 0.25, 0.0625])


def test_a_visible_fall_never_lowers():
    ours = scales(-0.1 * jnp.arange(100.0), 10, 0.5)
    np.testing.assert_array_equal(ours, 1.0)


def test_a_spike_does_not_hide_a_fall():
    """In float32 too, where the spike's digits end above the losses."""
    losses = jnp.linspace(1.0, 0.5, 30).at[0].set(1e9).at[29].set(2e9)
    np.testing.assert_array_equal(scales(losses, 30, 0.5), 1.0)


def test_losses_that_are_not_finite_are_left_out():
    losses = jnp.asarray(np.random.default_rng(0).normal(size=60))
    poisoned = jnp.insert(losses, jnp.array([5, 30]), jnp.array([jnp.nan, jnp.inf]))
    ours = scales(poisoned, 20, 0.5)
    np.testing.assert_array_equal(
        jnp.delete(ours, jnp.array([5, 31])), scales(losses, 20, 0.5)
    )


def test_the_loss_is_needed():
    tx = optax_flat.scale_by_loss_slope()
    state = tx.init(jnp.ones(1))
    with pytest.raises(ValueError, match="`value` must be passed .* value=loss"):
        tx.update(jnp.ones(1), state)
    with pytest.raises(ValueError, match=r"a scalar, got an array of shape \(3,\)"):
        tx.update(jnp.ones(1), state, value=jnp.ones(3))


def test_the_scale_has_a_floor():
    tx = optax_flat.scale_by_loss_slope(3, 0.1, min_scale=0.05)
    state = tx.init(jnp.zeros(1))
    for _ in range(30):
        _, state = tx.update(jnp.ones(1), state, value=1.0)
    assert float(state.scale) == pytest.approx(0.05)
