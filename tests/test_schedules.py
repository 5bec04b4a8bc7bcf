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


COOLINGS = {
    "exponential": schedules.exponential_cooling,
    "temperature": schedules.temperature_cooling,
    "linear": schedules.linear_cooling,
}


def decaying(name, rho):
    """The quantity that a cooling decays, geometrically or (linear) linearly."""
    return {
        "exponential": 1 / (1 - rho),
        "temperature": (1 + rho) / (1 - rho),
        "linear": rho / (1 - rho),
    }[name]


@pytest.mark.parametrize("name", COOLINGS)
@pytest.mark.parametrize("initial", [0.99, 0.5])
def test_cooling_decays_what_it_says(name, initial, x64):
    S = 50
    t = np.arange(S + 11)
    rho = np.asarray(COOLINGS[name](initial, S)(jnp.asarray(t)))
    assert abs(rho[0] - initial) < 1e-15
    assert rho[S - 1] > 0
    assert (rho[S:] == 0).all()
    quantity = decaying(name, rho[: S + 1])
    start = decaying(name, initial)
    left = 1 - t[: S + 1] / S
    expected = left * start if name == "linear" else start**left
    np.testing.assert_allclose(quantity, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", COOLINGS)
def test_cooling_keeps_its_digits_in_float32(name):
    """The published alpha, rounded to float32, moves the end of the cooling."""
    S = 1_000_000
    rho = jax.jit(COOLINGS[name](0.99, S))
    eps = np.finfo(np.float32).eps
    # Up to 3 eps are XLA's: its tanh is a quotient of polynomials.
    np.testing.assert_allclose(rho(jnp.array(0)), np.float32(0.99), rtol=4 * eps)
    assert float(rho(jnp.array(S - 1000))) > 0
    assert float(rho(jnp.array(S))) == 0
    exact = {
        "exponential": 1 - 0.01**0.25,
        "temperature": np.tanh(0.25 * np.arctanh(0.99)),
        "linear": 0.99 * 0.25 / (1 - 0.99 * 0.75),
    }[name]
    np.testing.assert_allclose(rho(jnp.array(3 * S // 4)), exact, rtol=1e-6)


@pytest.mark.parametrize("name", COOLINGS)
def test_cooling_from_zero_stays_there(name):
    rho = COOLINGS[name](0.0, 5)(jnp.arange(8))
    assert (np.asarray(rho) == 0).all()


def test_rate_and_total_steps_agree(x64):
    t = jnp.arange(100)
    by_steps = schedules.exponential_cooling(0.95, 40)(t)
    by_rate = schedules.exponential_cooling(0.95, rate=0.05 ** (1 / 40))(t)
    np.testing.assert_allclose(by_rate, by_steps, rtol=0, atol=1e-12)


def test_published_rate_ends_at_its_step():
    rho = schedules.exponential_cooling(0.99, rate=0.99997)
    assert float(rho(153_503)) > 0  # log(0.01) / log(0.99997) = 153,503.4
    assert float(rho(153_504)) == 0


@pytest.mark.parametrize(
    ("rate", "expected"), [(1.0, [0.9, 0.9, 0.9]), (1e-3, [0.9, 0.0, 0.0])]
)
def test_rates_at_the_ends(rate, expected):
    """1 does not cool; a rate below 1 - initial ends before the second update."""
    rho = schedules.exponential_cooling(0.9, rate=rate)
    assert [float(rho(t)) for t in (0, 1, 10**6)] == pytest.approx(expected)
    assert float(schedules.exponential_cooling(0.0, rate=rate)(0)) == 0


BAD_COOLINGS = [
    ({"total_steps": 0}, ValueError, "`total_steps` must be an int >= 1, got 0"),
    ({"total_steps": 5.0}, TypeError, "`total_steps` must be a Python int .* got 5.0"),
    ({"initial": 1.0}, ValueError, r"`initial` must lie in \[0, 1\), got 1"),
    ({"initial": -0.1}, ValueError, r"`initial` must lie in \[0, 1\), got -0.1"),
    ({"initial": lambda t: 0.9}, TypeError, "`initial` must be a float that is known"),
]


@pytest.mark.parametrize("name", COOLINGS)
@pytest.mark.parametrize(("arguments", "error", "words"), BAD_COOLINGS)
def test_cooling_errors(name, arguments, error, words):
    with pytest.raises(error, match=words):
        COOLINGS[name](**{"initial": 0.9, "total_steps": 5} | arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "takes `total_steps` or `rate`, got total_steps=None and rate=None"),
        ({"total_steps": 5, "rate": 0.9}, "Give exactly one"),
        ({"rate": 0.0}, r"`rate` must lie in \(0, 1\], got 0"),
        ({"rate": 1.1}, r"`rate` must lie in \(0, 1\], got 1.1"),
    ],
)
def test_exponential_cooling_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedules.exponential_cooling(0.9, **arguments)


def test_traced_shape_of_a_schedule_is_an_error():
    with pytest.raises(TypeError, match="`initial` must be a float that is known"):
        jax.jit(lambda rho: schedules.linear_cooling(rho, 5)(0))(0.9)


def test_cyclical_cosine(x64):
    """The paper's formula, whose k is our t + 1; 10 steps make cycles of 4."""
    rate = schedules.cyclical_cosine(0.5, 10, num_cycles=3)
    k = np.arange(1, 14)
    expected = 0.5 / 2 * (np.cos(np.pi * ((k - 1) % 4) / 4) + 1)
    np.testing.assert_allclose(rate(jnp.asarray(k - 1)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1.0, 10), "`initial` must lie in"),
        ((1.0, 0), "`total_steps` must be an int >= 1"),
        ((1.0, 10, 0), "`num_cycles` must be an int >= 1"),
    ],
)
def test_cyclical_cosine_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        schedules.cyclical_cosine(*arguments)


def test_noam(x64):
    """Against the formula, from the first update on."""
    n = np.arange(1, 50)
    expected = 0.7 * 64**-0.5 * np.minimum(n**-0.5, n * 20**-1.5)
    rate = schedules.noam(64, 20, scale=0.7)
    np.testing.assert_allclose(rate(jnp.asarray(n - 1)), expected, rtol=1e-12)
    assert int(jnp.argmax(rate(jnp.arange(49)))) == 19


def test_nesterov_momentum(x64):
    """Against t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2, beta_k = (t_k - 1) / t_{k+1}."""
    t = [1.0]
    for _ in range(101):
        t.append((1 + np.sqrt(1 + 4 * t[-1] ** 2)) / 2)
    t = np.array(t)
    momentum = schedules.nesterov_momentum(100)
    expected = ((t[:-1] - 1) / t[1:])[:100]
    np.testing.assert_allclose(momentum(jnp.arange(100)), expected, atol=1e-13)
    assert float(momentum(10**6)) == float(momentum(99))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.noam(0, 10), "`model_dim` must be an int >= 1"),
        (lambda: schedules.noam(8, 0), "`warmup_steps` must be an int >= 1"),
        (lambda: schedules.noam(8, 10, -1.0), "`scale` must lie in"),
        (lambda: schedules.nesterov_momentum(0), "`total_steps` must be an int >= 1"),
    ],
)
def test_other_schedule_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
