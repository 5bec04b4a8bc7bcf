"""What the samplers sample, and another library's chain."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, assert_equal, batches, ragged_params, train

import optax_flat
from optax_flat._core.noise import KINDS
from optax_flat._methods import langevin

H = np.array([[2.5, 1.5], [1.5, 2.0]])  # eigenvalues 0.73 and 3.77
CENTER = np.array([1.0, -2.0])
T = 0.5
CHAINS = 40_000


def run_chains(tx, gradient, start, steps, **fields):
    """[chains, d] after some steps; `fields` replace parts of the first state."""

    @jax.jit
    def run(x, state):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(gradient(x), state)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(body, (x, state), length=steps)[0][0]

    x = jnp.asarray(start, jnp.float32)
    return np.asarray(run(x, tx.init(x)._replace(**fields)), float)


def exact_start(covariance):
    z = np.random.default_rng(0).normal(size=(CHAINS, 2))
    return CENTER + z @ np.linalg.cholesky(covariance).T


def standard_errors(covariance):
    """Of the entries of a sample covariance of CHAINS normal draws."""
    variances = np.diag(covariance)
    return np.sqrt((np.outer(variances, variances) + covariance**2) / CHAINS)


SAMPLERS = {
    "sgld": (optax_flat.sgld, {}, 2.0),
    "sghmc": (optax_flat.sghmc, {"friction": 0.3}, 2.0 * (2.0 - 0.3)),
    "sghmc_as_sgld": (optax_flat.sghmc, {"friction": 1.0}, 2.0),
    # eps far above the gradients makes the preconditioner a constant.
    "psgld_as_sgld": (optax_flat.psgld, {"eps": 1e4}, 2.0),
}


@pytest.mark.parametrize(
    ("name", "rate", "kind"),
    [
        *itertools.product(["sgld", "sghmc"], [0.05, 0.1], KINDS),
        ("sghmc_as_sgld", 0.1, "rademacher"),
        ("psgld_as_sgld", 0.1, "rademacher"),
    ],
)
def test_stationary_moments(name, rate, kind):
    """On a skewed normal target: T (H (1 - rate H / divisor))^-1 around the center.

    This differs from the target by O(rate), which the sample must show.
    """
    factory, arguments, divisor = SAMPLERS[name]
    scale = arguments.get("eps", 1.0)
    tx = factory(rate * scale, T, noise_kind=kind, key=1, **arguments)
    target = T * np.linalg.inv(H)
    expected = T * np.linalg.inv(H @ (np.eye(2) - rate * H / divisor))
    # The slowest mode forgets where it started by exp(-2 * 0.73 * 14).
    x = run_chains(tx, lambda x: (x - CENTER) @ H, exact_start(target), int(14 / rate))
    errors = standard_errors(expected)
    mean_errors = np.sqrt(np.diag(expected) / CHAINS)
    assert (np.abs(x.mean(axis=0) - CENTER) < 5 * mean_errors).all()
    found = np.cov(x.T)
    assert (np.abs(found - expected) < 5 * errors).all()
    bias = np.linalg.eigvalsh(np.linalg.solve(target, expected))[-1] - 1
    direction = np.linalg.eigh(H)[1][:, -1]  # of the largest curvature
    seen = direction @ found @ direction / (direction @ target @ direction) - 1
    assert abs(seen - bias) < 5 * (1 + bias) * np.sqrt(2 / CHAINS)
    assert bias > 5 * np.sqrt(2 / CHAINS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_psgld_with_a_slow_preconditioner(rate, kind):
    """The target, up to the bias of the step with G of the mean square of gradients."""
    curvature, eps = np.array([4.0, 1.0]), 0.5
    expected = T / curvature
    for _ in range(50):  # the fixed point of variance and preconditioner
        G = 1 / (np.sqrt(curvature**2 * expected) + eps)
        expected = T / curvature / (1 - rate * G * curvature / 2)
    tx = optax_flat.psgld(rate, T, decay=0.999, eps=eps, noise_kind=kind, key=0)
    nu = jnp.broadcast_to(jnp.float32(curvature**2 * expected), (CHAINS, 2))
    x = run_chains(
        tx,
        lambda x: curvature * (x - CENTER),
        exact_start(np.diag(expected)),
        int(20 / rate),
        nu=nu,
    )
    errors = standard_errors(np.diag(expected))
    assert (np.abs(x.mean(axis=0) - CENTER) < 5 * np.sqrt(expected / CHAINS)).all()
    assert (np.abs(np.cov(x.T) - np.diag(expected)) < 5 * errors).all()


@pytest.mark.parametrize("kind", KINDS)
def test_psgld_bias_of_the_dropped_drift(kind):
    """A preconditioner that follows x at once samples exp(-f / T) / G(x)."""
    curvature, eps = np.array([4.0, 1.0]), 0.5
    s = np.sqrt(T / curvature)
    root = np.sqrt(np.pi / 2)
    # Moments of exp(-x^2 / 2 s^2) (curvature |x| + eps).
    expected = (2 * curvature * s**4 + eps * s**3 * root) / (
        curvature * s**2 + eps * s * root
    )
    assert (expected / (T / curvature) > 1.5).all()  # far from the target

    def variance(rate):
        tx = optax_flat.psgld(rate, T, decay=0.0, eps=eps, noise_kind=kind, key=0)
        start = exact_start(np.diag(expected))
        x = run_chains(tx, lambda x: curvature * (x - CENTER), start, int(8 / rate))
        squares = (x - CENTER) ** 2
        return squares.mean(axis=0), squares.std(axis=0) / np.sqrt(CHAINS)

    (coarse, coarse_error), (fine, fine_error) = variance(0.04), variance(0.02)
    # The bias of the steps is of first order: it cancels here.
    error = np.sqrt(4 * fine_error**2 + coarse_error**2)
    assert (np.abs(2 * fine - coarse - expected) < 5 * error).all()
    assert (np.abs(fine - expected) < 5 * fine_error + 0.05 * expected).all()


def test_psgld_bias_grows_as_steps_shrink():
    """At a fixed decay the preconditioner follows a slow chain."""
    curvature, decay = np.array([4.0, 1.0]), 0.95

    def excess(rate):
        tx = optax_flat.psgld(
            rate, T, decay=decay, eps=0.5, noise_kind="rademacher", key=0
        )
        start = exact_start(np.diag(T / curvature))
        x = run_chains(
            tx,
            lambda x: curvature * (x - CENTER),
            start,
            int(8 / rate),
            nu=jnp.full((CHAINS, 2), T, jnp.float32) * jnp.asarray(curvature, "f4"),
        )
        G = 1 / (np.sqrt(curvature * T) + 0.5)
        step_bias = 1 / (1 - rate * G * curvature / 2)
        return x.var(axis=0) / (T / curvature) - step_bias

    error = np.sqrt(2 / CHAINS)
    assert (excess(0.01) > excess(0.1) + 5 * error).all()


def test_noise_is_right_under_schedules():
    """Rate and temperature at the same count make the noise of each update."""
    rates, temperatures = np.array([0.1, 0.02, 0.3]), np.array([0.5, 2.0, 0.0])
    tx = optax_flat.sgld(
        lambda t: jnp.asarray(rates, jnp.float32)[t],
        lambda t: jnp.asarray(temperatures, jnp.float32)[t],
        key=0,
    )
    x = jnp.zeros(100_000)
    state = tx.init(x)
    for rate, temperature in zip(rates, temperatures, strict=True):
        updates, state = tx.update(jnp.ones_like(x), state)
        variance = 2 * rate * temperature
        mean_error = np.sqrt(variance / x.size)
        variance_error = variance * np.sqrt(2 / x.size)
        updates = np.asarray(updates, float)
        assert abs(updates.mean() + rate) <= 5 * mean_error + 1e-7
        assert abs(updates.var() - variance) <= 5 * variance_error


@pytest.fixture
def blackjax_draws(monkeypatch):
    """Our samplers with blackjax's random draws."""
    blackjax = pytest.importorskip("blackjax")
    monkeypatch.setattr(
        langevin,
        "draw",
        lambda key, like, kind: blackjax.util.generate_gaussian_noise(key, like),
    )
    return blackjax


N = 50  # examples


def log_posterior_gradient(params, batch):
    """N times the minus gradient of a mean, as samplers of sums want it."""
    return jax.tree.map(lambda g: -N * g, jax.grad(mean_loss)(params, batch))


def mean_loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - batch[:, 0]) ** 2)


def test_sgld_is_blackjax_sgld(blackjax_draws, x64):
    """Mean loss and T = 1 / N is their sum and T = 1, with 1 / N of our step size."""
    start = {"w": jnp.array([0.3, -1.0, 2.0]), "b": jnp.array(0.5)}
    data = np.random.default_rng(0).normal(size=(40, 8, 3))

    def rates(t):
        return 0.3 - 0.006 * jnp.asarray(t, float)

    ours = optax_flat.sgld(rates, 1 / N, key=3)
    theirs = blackjax_draws.sgld(log_posterior_gradient)
    params, state, position = start, ours.init(start), start
    for t, batch in enumerate(jnp.asarray(data)):
        grads = jax.grad(mean_loss)(params, batch)
        updates, state = ours.update(grads, state)
        params = optax.apply_updates(params, updates)
        key = jax.random.fold_in(jax.random.key(3), t)
        position = theirs.step(key, position, batch, rates(t) / N)
        assert_close(params, position, jnp.float64)
    assert float(jnp.abs(params["w"] - start["w"]).max()) > 0.1


def test_sghmc_is_the_diffusion_of_blackjax(blackjax_draws, x64):
    """One step of its momentum p: mu = h p, learning rate h^2, friction alpha h."""
    h, alpha = 0.1, 3.0
    x = {"w": jnp.array([0.3, -1.0, 2.0]), "b": jnp.array(0.5)}
    p = jax.tree.map(jnp.cos, x)
    g = jax.tree.map(lambda leaf: jnp.sin(3 * leaf), x)
    tx = optax_flat.sghmc(h**2, T, friction=alpha * h, key=3)
    state = tx.init(x)._replace(mu=jax.tree.map(lambda leaf: h * leaf, p))
    updates, _ = tx.update(g, state)
    _, momentum = blackjax_draws.sgmcmc.diffusions.sghmc(alpha)(
        jax.random.fold_in(jax.random.key(3), 0),
        x, p, jax.tree.map(jnp.negative, g), h, T,
    )  # fmt: skip
    assert_close(updates, jax.tree.map(lambda leaf: h * leaf, momentum), jnp.float64)


def test_sghmc_without_friction_conserves():
    """Friction 0 has no noise either: momentum that is never lost."""
    data = batches(5, 1)
    hot = optax_flat.sghmc(0.05, 1.0, friction=0.0, key=0)
    momentum = optax.chain(optax.scale_by_learning_rate(0.05), optax.trace(1.0))
    assert_close(
        train(hot, "plain", ragged_params(), data).params,
        train(momentum, "plain", ragged_params(), data).params,
    )


def test_noise_behind_a_chain_is_not_scaled():
    """The noise of add_langevin_noise is what sgld adds, whatever stands in front."""
    data = batches(3, 1)
    rate = optax.linear_schedule(0.1, 0.01, 3)
    chained = optax.chain(
        optax.scale_by_learning_rate(rate),
        optax_flat.add_langevin_noise(rate, 0.1, key=7),
    )
    sgld = optax_flat.sgld(rate, 0.1, key=7)
    assert_close(
        train(chained, "plain", ragged_params(), data).params,
        train(sgld, "plain", ragged_params(), data).params,
    )


@pytest.mark.parametrize(
    "factory",
    [
        optax_flat.sgld,
        optax_flat.psgld,
        optax_flat.sghmc,
        optax_flat.add_langevin_noise,
    ],
)
def test_zero_temperature_draws_nothing(factory):
    tx = factory(0.1, 0.0, key=0)
    x = ragged_params()
    program = jax.jit(tx.update).lower(x, tx.init(x)).as_text()
    assert "threefry" not in program
    hot = factory(0.1, 0.1, key=0)
    assert "threefry" in jax.jit(hot.update).lower(x, hot.init(x)).as_text()


def test_schedule_may_reach_zero_temperature():
    """A temperature of 0 at one count is plain descent there."""
    tx = optax_flat.sgld(0.1, lambda t: jnp.where(t == 0, 0.0, 1.0), key=0)
    x = jnp.array([1.0, -2.0])
    first, state = tx.update(x, tx.init(x))
    assert_equal(first, -0.1 * x)
    second, _ = tx.update(x, state)
    assert float(jnp.abs(second + 0.1 * x).max()) > 1e-2
