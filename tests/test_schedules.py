"""Schedules of the methods' hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_flat import schedules


def test_scoping_is_its_power(x64):
    gamma = schedules.scoping(0.03, 1e-3)
    counts = np.array([0, 1, 2, 1000, 100_000])
    expected = 0.03 * 1.001 ** counts.astype(float)
    np.testing.assert_allclose(gamma(jnp.asarray(counts)), expected, rtol=1e-10)


def test_scoping_keeps_its_digits_in_float32():
    """float32 powers of 1.001 lose digits as counts grow."""
    growth = jax.jit(schedules.scoping(1.0, 1e-3))(jnp.array(50_000, jnp.int32))
    np.testing.assert_allclose(growth, np.float64(1.001) ** 50_000, rtol=2e-5)


def test_scoping_constant_at_zero():
    assert float(schedules.scoping(0.5, 0.0)(10**6)) == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((-1.0, 0.1), "`gamma` must lie in"), ((1.0, -1.0), "`scoping` must lie in")],
)
def test_scoping_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedules.scoping(*arguments)
