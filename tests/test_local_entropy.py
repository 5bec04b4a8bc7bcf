"""What is special about local entropy; the contract tests cover the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, batches, loss, ragged_params, train, update

import optax_flat
from optax_flat import schedules

MODES = ["scanned", "transparent"]

# A skewed quadratic off the origin, and an anchor that is neither.
ROTATION = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
H = ROTATION @ np.diag([2.0, 0.7, 0.1]) @ ROTATION.T
C = np.array([1.0, -2.0, 0.5])
X = np.array([0.3, 0.9, -1.2])


def quadratic(x, batch=0):
    return (x - C) @ H @ (x - C) / 2


def final_displacement(keys, num_steps, **arguments):
    """x - x'_L of independent walks from X: `averaging` 1 keeps the last iterate."""

    def one(key):
        tx = optax_flat.local_entropy(
            optax.sgd(1.0), num_steps=num_steps, averaging=1.0, scoping=0.0, key=key,
            **arguments,
        )  # fmt: skip
        grad_fn = jax.grad(quadratic)
        x = jnp.asarray(X)
        return tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)[0]

    return np.asarray(jax.jit(jax.vmap(one))(keys))


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("step_size", [0.1, 0.4])
def test_stationary_distribution_of_the_walk(kind, step_size, x64):
    """Mean (H + g)^-1 (H c + g x); covariance from A = I - eta (H + g):
    S = A S A + eta noise^2 I, so S = eta noise^2 (I - A^2)^-1."""
    gamma, noise, chains = 0.5, 0.3, 4000
    keys = jax.random.split(jax.random.key(7), chains)
    moved = final_displacement(
        keys, 150, step_size=step_size, gamma=gamma, noise=noise, noise_kind=kind
    )
    x = X + moved
    stiff = H + gamma * np.eye(3)
    mean = np.linalg.solve(stiff, H @ C + gamma * X)
    A = np.eye(3) - step_size * stiff
    S = step_size * noise**2 * np.linalg.inv(np.eye(3) - A @ A)
    error = np.sqrt(np.diag(S) / chains)
    np.testing.assert_array_less(np.abs(x.mean(0) - mean), 5 * error)
    # Standard error of a covariance entry of normal samples; signs have smaller tails.
    spread = np.sqrt((np.outer(np.diag(S), np.diag(S)) + S**2) / chains)
    np.testing.assert_array_less(np.abs(np.cov(x.T) - S), 5 * spread)


def test_gradient_of_local_entropy(x64):
    """gamma d equals -grad F in its closed form, and by differentiating F."""
    gamma = 0.8

    def local_entropy(x):  # exact on a quadratic around C, up to a constant
        stiff = H + gamma * np.eye(3)
        return -gamma / 2 * (x - C) @ H @ np.linalg.inv(stiff) @ (x - C)

    d = -final_displacement(
        jax.random.split(jax.random.key(0), 1), 4000, gamma=gamma, noise=0.0
    )[0]
    np.testing.assert_allclose(
        gamma * d, -jax.grad(local_entropy)(jnp.asarray(X)), rtol=1e-10
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 5])
def test_is_lookahead_without_noise_and_spring(mode, length, x64):
    """averaging 1: optax.lookahead around SGD, synchronised every `length` steps."""
    data = batches(6, length, jnp.float64)
    tx = optax_flat.entropy_sgd(
        0.6, num_steps=length, step_size=0.1, gamma=0.0, noise=0.0, averaging=1.0,
        mode=mode, key=0,
    )  # fmt: skip
    ours = train(tx, mode, ragged_params(jnp.float64), data).params
    slow = optax.lookahead(optax.sgd(0.1), sync_period=length, slow_step_size=0.6)
    params = optax.LookaheadParams.init_synced(ragged_params(jnp.float64))
    state = slow.init(params)
    for batch in data.reshape(-1, *data.shape[2:]):
        updates, state = slow.update(jax.grad(loss)(params.fast, batch), state, params)
        params = optax.apply_updates(params, updates)
    assert_close(ours, params.slow, jnp.float64)


def test_weight_of_the_start_in_the_mean(x64):
    """On a linear loss, d is eta g sum_k k weight_k: the start keeps (1 - a)^L."""
    a, L, eta = 0.25, 5, 0.1
    tx = optax_flat.local_entropy(
        optax.sgd(1.0), num_steps=L, step_size=eta, gamma=0.0, noise=0.0, averaging=a,
        key=0,
    )  # fmt: skip
    grad_fn = lambda x, batch: jnp.ones_like(x)
    x = jnp.zeros(2)
    updates, _ = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
    k = np.arange(1, L + 1)
    weights = a * (1 - a) ** (L - k)
    np.testing.assert_allclose(weights.sum(), 1 - 0.24, atol=0.01)  # 0.24 stays at x
    np.testing.assert_allclose(updates, -eta * (k * weights).sum(), rtol=1e-12)


def test_scoping_schedule_and_arguments_agree(x64):
    data = batches(4, 3, jnp.float64)
    arguments = {"num_steps": 3, "noise": 0.0, "key": 0}
    by_arguments = optax_flat.entropy_sgd(0.5, gamma=0.4, scoping=0.3, **arguments)
    gamma = schedules.scoping(0.4, 0.3)
    by_schedule = optax_flat.entropy_sgd(0.5, gamma=gamma, scoping=0.0, **arguments)
    runs = [
        train(tx, "scanned", ragged_params(jnp.float64), data).params
        for tx in (by_arguments, by_schedule)
    ]
    assert_close(*runs, jnp.float64)


@pytest.mark.parametrize("gamma", [15.0, 30.0, 1e30])
def test_stiff_spring_does_not_diverge(gamma):
    """Beyond step_size * gamma = 1 the walk returns to the anchor at every step."""
    x = jnp.asarray(X, jnp.float32)
    tx = optax_flat.local_entropy(
        optax.sgd(1.0), num_steps=50, step_size=0.1, gamma=gamma, noise=0.0, key=0
    )
    grad_fn = jax.grad(quadratic)
    updates, _ = tx.update(grad_fn(x), tx.init(x), x, grad_fn=grad_fn)
    # Every step is x' = x - eta g(x'_before), which contracts to this fixed point:
    fixed = np.linalg.solve(np.eye(3) + 0.1 * H, X + 0.1 * H @ C)
    np.testing.assert_allclose(x + updates, fixed, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.03])
@pytest.mark.parametrize("step_size", [0.0, 0.1])
def test_scoping_never_overflows(gamma, step_size):
    """After a million updates gamma_t is at the end of float32, and all is finite."""
    x = jnp.asarray(X, jnp.float32)
    tx = optax_flat.local_entropy(
        optax.sgd(1.0), num_steps=5, step_size=step_size, gamma=gamma, noise=0.0,
        diagnostics=True, skip_nonfinite=True, key=0,
    )  # fmt: skip
    state = optax.tree.set(tx.init(x), count=jnp.array(10**6, jnp.int32))
    grad_fn = jax.grad(quadratic)
    updates, state = tx.update(grad_fn(x), state, x, grad_fn=grad_fn)
    assert jnp.isfinite(updates).all() and int(state.skipped) == 0
    assert jnp.isfinite(optax.tree.get(state, "diagnostics").gamma)
    assert (jnp.abs(updates).max() > 0) == (step_size > 0)


@pytest.mark.parametrize("mode", MODES)
def test_diagnostics(mode, x64):
    """The five numbers, recomputed from the walk's definition in NumPy."""
    eta, gamma, a, L = 0.2, 0.5, 0.75, 4
    tx = optax_flat.entropy_sgd(
        0.7, num_steps=L, step_size=eta, gamma=gamma, scoping=0.1, noise=0.0,
        averaging=a, mode=mode, diagnostics=True, key=0,
    )  # fmt: skip
    run = train(tx, mode, jnp.asarray(X), jnp.zeros((3, L)), loss=quadratic)
    anchor = X
    for t in range(3):
        point, mean, distance = anchor, anchor, 0.0
        for _ in range(L):
            force = H @ (point - C) + gamma * 1.1**t * (point - anchor)
            point = point - eta * force
            mean = (1 - a) * mean + a * point
            distance += np.linalg.norm(point - anchor) / L
        g, d = H @ (anchor - C), anchor - mean
        if t < 2:
            anchor = anchor - 0.7 * d
    report = optax.tree.get(run.state, "diagnostics")
    norms = np.linalg.norm(g), np.linalg.norm(d)
    expected = [*norms, g @ d / np.prod(norms), distance, gamma * 1.1**2]
    np.testing.assert_allclose(report, expected, rtol=1e-10)


def test_diagnostics_at_a_flat_point_are_finite():
    tx = optax_flat.entropy_sgd(0.7, num_steps=3, noise=0.0, diagnostics=True, key=0)
    grad_fn = lambda x, batch: jnp.zeros_like(x)
    x = jnp.ones(3)
    _, state = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
    assert float(optax.tree.get(state, "diagnostics").cosine) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_small_steps_survive_bfloat16(mode):
    """100 inner steps of 1e-3 add up, although each alone vanishes beside 1.0."""
    x = jnp.ones(4, jnp.bfloat16)
    assert x[0] - jnp.bfloat16(1e-3) == x[0]
    tx = optax_flat.entropy_sgd(
        1.0, num_steps=100, step_size=1e-3, gamma=0.0, noise=0.0, averaging=1.0,
        mode=mode, key=0,
    )  # fmt: skip
    x, _ = update(
        tx, mode, x, tx.init(x), jnp.zeros((100, 1)), loss=lambda x, _: x.sum()
    )
    np.testing.assert_allclose(np.asarray(x, float), 0.9, atol=4e-3)  # bfloat16's step


@pytest.mark.parametrize("amsgrad", [False, True])
def test_entropy_adam_is_adam_on_the_displacement(amsgrad, x64):
    """Bias correction counts outer updates: the run is optax.adam fed with x - mu."""
    data = batches(4, 5, jnp.float64)
    arguments = {"num_steps": 5, "noise": 0.0, "key": 0}
    tx = optax_flat.entropy_adam(0.03, b1=0.8, amsgrad=amsgrad, **arguments)
    ours = train(tx, "scanned", ragged_params(jnp.float64), data).params
    displacement = optax_flat.local_entropy(optax.sgd(1.0), **arguments)
    adam = (optax.amsgrad if amsgrad else optax.adam)(0.03, b1=0.8)
    params = ragged_params(jnp.float64)
    walk_state, adam_state = displacement.init(params), adam.init(params)
    for stack in data:
        moved, walk_state = update(displacement, "scanned", params, walk_state, stack)
        d = optax.tree.sub(params, moved)
        updates, adam_state = adam.update(d, adam_state, params)
        params = optax.apply_updates(params, updates)
    assert_close(ours, params, jnp.float64, factor=100)


@pytest.mark.parametrize(
    ("noise", "eps", "expected"),
    [(1e-4, 1e-8, 1.0), (1e-6, 1e-8, 1.0), (1e-4, 1e-2, 0.0), (0.0, 1e-8, 0.0)],
)
def test_entropy_adam_walks_where_there_is_no_gradient(noise, eps, expected):
    """At random, as far as the rate says, whatever the noise that is not below eps.

    Adam's first moment of white noise has the variance (1 - b1) / (1 + b1).
    """
    rate = 0.01
    tx = optax_flat.entropy_adam(rate, num_steps=5, noise=noise, eps=eps, key=0)
    grad_fn = jax.grad(lambda x, batch: jnp.sum((x["alive"] - 1.0) ** 2))

    def step(carry, _):
        x, state = carry
        updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
        return (optax.apply_updates(x, updates), state), updates["dead"]

    x = {"alive": jnp.asarray(X), "dead": jnp.zeros(500)}
    _, updates = jax.lax.scan(step, (x, tx.init(x)), length=100)
    size = jnp.sqrt(jnp.mean(updates[50:] ** 2)) / rate
    assert size == pytest.approx(expected * (0.1 / 1.9) ** 0.5, rel=0.05, abs=0.01)


def test_no_key_default():
    for factory in (optax_flat.entropy_sgd, optax_flat.entropy_adam):
        with pytest.raises(TypeError, match="missing a required .* 'key'"):
            factory(0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_every_update_has_noise_of_its_own_and_of_its_kind(mode, kind):
    tx = optax_flat.local_entropy(
        optax.sgd(1.0), num_steps=1, step_size=1.0, gamma=0.0, noise=1.0,
        averaging=1.0, noise_kind=kind, mode=mode, key=0,
    )  # fmt: skip
    start = jnp.zeros((100, 100))
    run = train(tx, mode, start, jnp.zeros((2, 1)), loss=lambda p, _: 0.0 * p.sum())
    first, second = run.path[0], run.path[1] - run.path[0]
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / 100
    assert (set(np.unique(first)) == {-1.0, 1.0}) == (kind == "rademacher")


@pytest.mark.parametrize("mode", MODES)
def test_accumulator_dtype(mode, x64):
    tx = optax_flat.entropy_sgd(
        1.0, momentum=0.9, num_steps=2, mode=mode, accumulator_dtype=jnp.float64, key=0
    )
    state = tx.init(ragged_params())
    moments = jax.tree.leaves(optax.tree.get(state, "trace"))
    assert {x.dtype for x in moments} == {jnp.dtype("float64")}
    if mode == "transparent":
        assert state.inner.point["scale"].dtype == jnp.float64
