"""Posteriors of IVON and bSAM, draws from them, and noise that prefers wide valleys."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS
from problem import (
    assert_close,
    assert_equal,
    batches,
    largest_difference,
    loss,
    ragged_params,
    train,
)

import optax_flat
from optax_flat import sample_params
from optax_flat.training import predict

CHAINS = 64


def make(name, **arguments):
    settings = {
        "ivon": {"ess": 50.0, "hess_init": 0.5, "b2": 0.9, "num_samples": 2},
        "bsam": {"num_data": 50.0, "b2": 0.9, "s_init": 0.7},
    }[name]
    settings |= {"weight_decay": 0.05, "key": 0} | arguments
    return getattr(optax_flat, name)(0.1, **settings)


def memory_deviations(name, memory):
    """The formulas of the posteriors, from the state's fields."""
    if name == "ivon":
        return jax.tree.map(lambda h: 1 / np.sqrt(50.0 * (h + 0.05)), memory.hess)
    return jax.tree.map(lambda s: 1 / np.sqrt(50.0 * s), memory.scale)


@functools.cache
def regression():
    """Examples of a skewed linear regression: H, the gradient at 0, N."""
    rng = np.random.default_rng(1)
    mixing = np.array([[1.0, 0.6, 0.0], [0.0, 0.8, 0.3], [0.2, 0.0, 1.5]])
    X = rng.normal(size=(200, 3)) @ mixing
    y = X @ np.array([1.0, -2.0, 0.5]) + 0.5 * rng.normal(size=200)
    return X.T @ X / 200, -X.T @ y / 200, 200


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_ivon_finds_the_mean_field_posterior(kind):
    """Bayesian linear regression: the exact mean, and variances of the diagonal of H.

    Over independent chains, within five of their standard errors.
    """
    H, slope, N = regression()
    decay = 0.1

    def gradient(w):
        return jnp.asarray(H, jnp.float32) @ w + jnp.asarray(slope, jnp.float32)

    @jax.jit
    @jax.vmap
    def run(key):
        tx = optax_flat.ivon(
            optax.exponential_decay(0.1, 1000, 0.3), ess=N, hess_init=2.0,
            b2=lambda t: 1 - 1 / (100 + t / 4), weight_decay=decay, noise_kind=kind,
            key=key,
        )  # fmt: skip

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(gradient(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.zeros(3)
        (w, state), _ = jax.lax.scan(step, (w, tx.init(w)), length=3000)
        return optax_flat.eval_params(state, w), state.memory.deviations() ** 2

    found = run(jax.random.split(jax.random.key(0), CHAINS))
    identity = np.eye(3)
    expected = (
        np.linalg.solve(H + decay * identity, -slope),
        1 / (N * (np.diag(H) + decay)),
    )
    # Not the variances of the exact posterior, which is correlated.
    exact = np.diag(np.linalg.inv(N * (H + decay * identity)))
    for chains, value in zip(found, expected, strict=True):
        chains = np.asarray(chains, float)
        errors = chains.std(axis=0, ddof=1) / np.sqrt(CHAINS)
        assert (np.abs(chains.mean(axis=0) - value) < 5 * errors).all()
        assert (errors < 0.01 * np.abs(value)).all()
    assert (exact[:2] > 1.3 * expected[1][:2]).all()


def test_ivon_first_gradient_tells_nothing_of_h():
    """It is taken at m itself: m moves, h stays, for one sample and for several."""
    x = ragged_params()
    grads = jax.tree.map(jnp.ones_like, x)
    tx = make("ivon", num_samples=1)
    updates, state = tx.update(grads, tx.init(x), x)
    assert_equal(state.memory.hess, tx.init(x).memory.hess)
    m = optax_flat.eval_params(state, optax.apply_updates(x, updates))
    assert largest_difference(m, x) > 0.05
    # A first walk of two: only the second sample tells.
    data = jnp.zeros((1, 2))
    tx = make("ivon", num_samples=2, b2=0.5)

    def quadratic(p, batch):
        return 1.5 * jnp.sum((p - 3.0) ** 2)

    start = jnp.ones(100_000)
    run = train(tx, "scanned", start, data, loss=quadratic)
    # E f = 3, and the correction: E (h - f)^2 with f = (3 d^2 - 6 d) 50 (h + 0.05).
    d = 1 / np.sqrt(50 * 0.55)
    squares = 3**2 * 2 + 6**2 / d**2 + (3 - 0.5) ** 2
    expected = 0.5 * 0.5 + 0.5 * 3 + 0.5**2 * squares / (2 * 0.55)
    assert abs(float(run.state.memory.hess.mean()) / expected - 1) < 0.02


def test_ivon_h_is_not_clamped():
    """On a hilltop h falls below 0 and h + delta stays above."""
    tx = optax_flat.ivon(0.0, ess=100.0, hess_init=0.5, b2=0.9, weight_decay=1.0, key=0)

    def step(carry, _):
        w, state = carry
        center = optax_flat.eval_params(state, w)
        updates, state = tx.update(-0.5 * (w - center), state, w)
        return (optax.apply_updates(w, updates), state), state.memory.hess

    w = jnp.zeros(1000)
    _, hess = jax.lax.scan(step, (w, tx.init(w)), length=200)
    assert (hess + 1.0 > 0).all()
    assert hess[-1].mean() < -0.3


def test_ivon_clips_and_scales_steps():
    x, grads = jnp.zeros(3), jnp.array([100.0, -100.0, 0.1])

    def mean_after(**arguments):
        tx = optax_flat.ivon(0.5, ess=1e6, hess_init=2.0, weight_decay=0.0, key=0,
                             **arguments)  # fmt: skip
        updates, state = tx.update(grads, tx.init(x), x)
        return optax_flat.eval_params(state, x + updates)

    assert_close(mean_after(), -0.5 * grads)
    assert_close(mean_after(rescale_lr=False), -0.25 * grads)
    assert_close(mean_after(debias=False), -0.05 * grads)
    clipped = -0.5 * 2.0 * jnp.array([0.3, -0.3, 0.05])
    assert_close(mean_after(clip_radius=0.3), clipped)
    assert_close(mean_after(clip_radius=lambda t: 0.3 + t), clipped)


@pytest.mark.parametrize("name", ["ivon", "bsam"])
def test_draws_read_their_schedule_one_update_ahead(name):
    """What the params stand on has the spread of the update that will use it."""
    size = optax.piecewise_constant_schedule(100.0, {1: 100.0})
    tx = make(name, b2=1.0, **{"ivon": {"ess": size}, "bsam": {"num_data": size}}[name])
    x = jnp.zeros(10_000)
    state, deviations = tx.init(x), []
    for _ in range(2):
        grads = jnp.zeros_like(x)
        updates, state = tx.update(grads, state, x, grad_fn=lambda p, b: p * 0.0)
        x = optax.apply_updates(x, updates)
        deviations.append(float(state.memory.offset.std()))
        assert_close(state.memory.deviations().mean(), deviations[-1], factor=5e3)
    # The first draw belongs to update 1, from which on the size is 100 times larger.
    assert abs(deviations[0] / deviations[1] - 1) < 0.05
    assert deviations[0] < 0.02


@pytest.mark.parametrize("name", ["ivon", "bsam"])
def test_hyperparameters_are_not_rounded_by_bfloat16(name):
    """With equal gradients the momentum and the numbers of the state are the same."""
    start = jax.tree.map(jnp.zeros_like, ragged_params())

    def linear(params, batch):  # its gradients are exact in bfloat16
        return sum(jnp.sum(0.5 * x) for x in jax.tree.leaves(params))

    def kept(dtype):
        params = jax.tree.map(lambda x: x.astype(dtype), start)
        run = train(tx, "scanned", params, jnp.zeros((2, 2)), loss=linear)
        memory = run.state.memory._asdict()
        names = {"ivon": ("mu", "ess", "weight_decay"), "bsam": ("scale", "num_data")}
        return [memory[field] for field in names[name]]

    tx = make(name, weight_decay=0.001)
    assert_close(kept(jnp.bfloat16), kept(jnp.float32))


@pytest.mark.parametrize("name", ["ivon", "bsam"])
def test_small_updates_survive_bfloat16(name):
    """The anchor is kept in float32 behind params of bfloat16."""
    settings = {"b2": 1.0, "weight_decay": 0.0, "key": 0}
    tx = {
        "ivon": lambda: optax_flat.ivon(0.1, ess=1e4, **settings),
        "bsam": lambda: optax_flat.bsam(0.1, num_data=1e4, **settings),
    }[name]()
    x = jnp.ones(1000, jnp.bfloat16)
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        grads = jnp.full_like(x, 1e-3)  # steps of 1e-4, 40 times below the spacing
        updates, state = tx.update(grads, state, x, grad_fn=lambda p, b: grads)
        return optax.apply_updates(x, updates), state

    for _ in range(100):
        x, state = step(x, state)
    anchor = x.astype(jnp.float32) + state.memory.offset
    # The momentum of bSAM is not debiased: sum of 0.9^t, 9 steps, is missing.
    steps = {"ivon": 100, "bsam": 100 - 9}[name]
    moved = np.asarray(1.0 - anchor)
    np.testing.assert_allclose(moved, 1e-4 * steps, rtol=5e-3)


WRAPPERS = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "inject": lambda tx: optax.inject_hyperparams(lambda unused: tx)(unused=1.0),
    "multi_steps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax_flat.masked(
        tx, {"layer": {"w": True, "b": False}, "scale": True}
    ),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1)}, {"layer": {"w": "a", "b": "b"}, "scale": "a"}
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", ["ivon", "bsam"])
def test_sample_params(name, wrapper):
    """Draws at every moment: the anchor, and its deviations times standard normals."""
    tx = WRAPPERS[wrapper](make(name, mode="transparent"))
    params, state = ragged_params(), tx.init(ragged_params())
    keys = jax.random.split(jax.random.key(5), 4000)
    step = jax.jit(tx.update)
    draw = jax.jit(jax.vmap(sample_params, (None, None, 0)))
    for batch in batches(3, 1)[:, 0]:  # ends in mid-walk
        updates, state = step(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    (memory,) = (
        node
        for node in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "deviations"))
        if hasattr(node, "deviations")
    )
    draws = draw(state, params, keys)
    anchor = optax_flat.eval_params(state, params)
    frozen = wrapper in ("masked", "partition")
    deviations = memory_deviations(name, memory)
    for place, leaf in (("layer", "w"), ("layer", "b"), ("scale", None)):
        got, mean, deviation = (
            t[place] if leaf is None else t[place][leaf]
            for t in (draws, anchor, deviations)
        )
        if leaf == "b" and frozen:
            assert (got == mean).all()
            continue
        z = (np.asarray(got, float) - mean) / deviation
        assert abs(z.mean()) < 5 / np.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / z.size)
        flat = z.reshape(4000, -1)
        correlation = np.corrcoef(flat.T) - np.eye(flat.shape[1])
        assert np.abs(correlation).max() < 5 / np.sqrt(4000)
    assert largest_difference(anchor, params) > 1e-4


def test_sample_params_of_two_groups():
    """Two posteriors of one key share no draws; what has none stays."""
    x = {"a": jnp.zeros(1000), "b": jnp.zeros(1000), "c": jnp.ones(3)}
    same = optax_flat.ivon(0.1, ess=4.0, hess_init=0.25, weight_decay=0.0, key=0)
    other = optax_flat.bsam(0.1, num_data=1.0, mode="transparent", key=0)
    tx = optax.partition(
        {"a": same, "b": other, "c": optax.sgd(0.1)}, {"a": "a", "b": "b", "c": "c"}
    )
    draw = sample_params(tx.init(x), x, 3)
    assert abs(np.corrcoef(draw["a"], draw["b"])[0, 1]) < 5 / np.sqrt(1000)
    assert abs(draw["a"].std() - 1) < 0.15
    assert_equal(draw["c"], x["c"])


def test_sample_params_dtype_and_keys():
    x = jnp.ones(50, jnp.bfloat16)
    tx = make("ivon")
    draws = [sample_params(tx.init(x), x, key) for key in (3, jax.random.PRNGKey(3))]
    assert draws[0].dtype == jnp.bfloat16
    assert_equal(*draws)
    assert largest_difference(draws[0], sample_params(tx.init(x), x, 4)) > 0.01


def test_sample_params_refuses():
    x = jnp.ones(3)
    for tx in (optax.adam(0.1), optax_flat.sgld(0.1, 0.1, key=0)):
        with pytest.raises(
            ValueError, match="learns a posterior, .*ivon or .*bsam, got"
        ):
            sample_params(tx.init(x), x, 0)
        with pytest.raises(ValueError, match="learns a posterior"):
            predict(jnp.sum, tx.init(x), x, 0)
    state = make("ivon").init(x)
    with pytest.raises(ValueError, match="`key` must be one typed key"):
        sample_params(state, x, None)
    with pytest.raises(ValueError, match="state first"):
        sample_params(x, state, 0)
    with pytest.raises(ValueError, match="`num_samples` must be an int >= 1, got 0"):
        predict(jnp.sum, state, x, 0, num_samples=0)


@pytest.mark.parametrize("shape", [(1, 4), (4,), (3, 1), (), (7,), (2, 3, 4)])
@pytest.mark.parametrize("name", ["ivon", "bsam"])
def test_params_of_other_shapes_have_no_draws(name, shape):
    """Whether or not they broadcast, and within an optimizer that leaves some out."""
    state = make(name).init(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"`params` must have the shapes .*\(3, 4\)"):
        sample_params(state, jnp.ones(shape), 0)
    tx = optax_flat.masked(make(name), {"a": True, "b": False})
    state = tx.init({"a": jnp.ones((3, 4)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match="`params` must have the shapes"):
        sample_params(state, {"a": jnp.ones(shape), "b": jnp.ones(2)}, 0)


def test_a_field_of_deviations_is_no_posterior():
    """The methods without gradients are told what they have; what is around is not."""
    x = jnp.ones(3)
    arguments = {"ensemble_size": 4, "spread": 0.1, "key": 0}
    for tx in (
        optax_flat.ensemble_kalman(**arguments),
        optax_flat.perturbation_gradient(optax.sgd(0.1), **arguments),
    ):
        with pytest.raises(ValueError, match="The members of ensemble_kalman are"):
            sample_params(tx.init(x), x, 0)

    class Around(NamedTuple):
        deviations: jax.Array
        inner: optax.OptState

    state = make("ivon").init(x)
    wrapped = Around(jnp.zeros(2), state)
    assert_equal(sample_params(wrapped, x, 0), sample_params(state, x, 0))


def test_predict_is_the_mean_over_draws():
    x, tx = ragged_params(), make("bsam")
    state = tx.init(x)

    def predict_fn(params, shift):
        return {"w": jnp.tanh(params["layer"]["w"]) + shift}

    mean = predict(predict_fn, state, x, 7, num_samples=5, aux=jnp.float32(2.0))
    keys = jax.random.split(jax.random.key(7), 5)
    by_hand = [predict_fn(sample_params(state, x, key), 2.0)["w"] for key in keys]
    assert_close(mean["w"], sum(by_hand) / 5)
    assert float(jnp.std(jnp.stack(by_hand), axis=0).max()) > 0.01
    alone = predict(lambda p: p["scale"].astype(jnp.bfloat16), state, x, 7)
    assert alone.dtype == jnp.float32


def valley(x):
    """(a b)^2 / 2, [2, runs]: minimal on both axes."""
    return jnp.sum(jnp.prod(x, axis=0) ** 2) / 2


def test_anti_pgd_lowers_the_trace():
    """Along the valley b = 0, of trace a^2: E a shrinks by 1 - rate noise^2 a step.

    Gradient descent stays, and ordinary noise of the same size wanders off.
    """
    rate, sigma, steps, runs = 0.1, 0.2, 600, 4000

    def run(tx):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(valley)(x), state)
            return (optax.apply_updates(x, updates), state), None

        x = jnp.array([[1.0], [0.0]]) * jnp.ones(runs)
        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    last = optax.piecewise_constant_schedule(sigma, {steps - 1: 0.0})
    a, b = run(optax_flat.anti_pgd(rate, last, key=0))
    # v's own b adds rate v_b^2 to each factor, of variance about rate sigma^2 / 2.
    expected = (1 - rate * sigma**2) ** steps
    assert abs(a.mean() / expected - 1) < 0.1
    assert b.std() < 0.5 * sigma
    assert_equal(run(optax.sgd(rate))[0], jnp.ones(runs))
    temperature = sigma**2 / (2 * rate)
    walk = run(optax_flat.sgld(rate, temperature, key=0))
    assert walk.std() > 3 * sigma


def test_anti_pgd_takes_its_noise_out():
    """Also a noise that was changed from outside: the state knows what is in."""
    x = ragged_params()
    zeros = jax.tree.map(jnp.zeros_like, x)
    tx = optax.inject_hyperparams(
        optax_flat.anti_pgd, static_args=optax_flat.anti_pgd.static_args
    )(0.1, noise=0.5, key=0)
    params, state = x, tx.init(x)
    distances = []
    for noise in (0.5, 0.01, 2.0, 0.0):
        state.hyperparams["noise"] = jnp.float32(noise)
        updates, state = tx.update(zeros, state)
        params = optax.apply_updates(params, updates)
        distances.append(largest_difference(params, x))
    assert distances[0] > 0.5 and 1e-3 < distances[1] < 0.1 and distances[2] > 2
    assert distances[3] < 1e-6


@pytest.mark.parametrize("factory", [optax_flat.anti_pgd, optax_flat.entropy_mcmc])
def test_without_noise_nothing_is_drawn(factory):
    x = ragged_params()
    texts = []
    for amount in (0.0, 0.1):
        tx = factory(0.1, amount, key=0)
        texts.append(jax.jit(tx.update).lower(x, tx.init(x), x).as_text())
    assert ["threefry" in text for text in texts] == [False, True]


def test_entropy_mcmc_anchor():
    """At least float32, on its way behind the params, found in a chain."""
    x = jnp.zeros(1000, jnp.bfloat16)
    tx = optax.chain(
        optax.clip(1.0), optax_flat.entropy_mcmc(0.1, 1e-4, gamma=0.0, key=0)
    )
    updates, state = tx.update(jnp.ones_like(x), tx.init(x), x)
    anchor = optax.tree.get(state, "anchor")
    assert anchor.dtype == jnp.float32
    # Without a spring it is a walk of its own draws.
    noise = np.asarray(updates + 0.1, float)
    assert abs(anchor.std() / np.sqrt(2 * 0.1 * 1e-4) - 1) < 0.1
    assert abs(np.corrcoef(noise, anchor)[0, 1]) < 5 / np.sqrt(1000)
    with pytest.raises(ValueError, match="`params` must be passed"):
        tx.update(x, state)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_bsam_order_of_gradients(num_shards):
    """Noisy, perturbed, noisy, perturbed: each perturbed point is around w."""
    points = []

    def grad_fn(point, i):
        jax.debug.callback(lambda i, p: points.append((int(i), np.array(p))), i, point)
        return jnp.float32([3.0, -2.0]) * (i + 1)

    tx = optax_flat.bsam(
        0.0, num_data=1e4, rho=0.5, s_init=2.0, b2=1.0, num_shards=num_shards, key=0
    )
    w = jnp.array([1.0, -1.0])
    state = tx.init(w)
    first = jnp.array([8.0, 4.0])
    tx.update(first, state, w, grad_fn=grad_fn)
    jax.effects_barrier()
    seen = dict(points)
    assert sorted(seen) == list(range(2 * num_shards - 1))
    assert_close(seen[0], w + 0.5 * first / 2.0)
    if num_shards == 3:
        draws = [(seen[i] - w) * np.sqrt(1e4 * 2.0) for i in (1, 3)]
        assert all(0.01 < np.abs(z).max() < 6 for z in draws)
        assert np.abs(draws[0] - draws[1]).min() > 0.01
        assert_close(seen[2], w + 0.5 * jnp.array([6.0, -4.0]) / 2.0)
        assert_close(seen[4], w + 0.5 * jnp.array([12.0, -8.0]) / 2.0)


@pytest.mark.parametrize("name", ["ivon", "bsam", "entropy_mcmc", "anti_pgd"])
def test_updates_that_are_not_jitted_compile_once(name):
    method = next(method for method in METHODS if method.name == name)
    tx = method.make(**method.noisy)
    compilations, counts = [], []

    def count(event, duration, **unused):
        if "backend_compile" in event:
            compilations.append(event)

    params = ragged_params()
    grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for _ in range(4):
            _, state = tx.update(grads, state, params, grad_fn=lambda p, b: grads)
            counts.append(len(compilations))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert counts[0] > 0
    assert counts[-1] == counts[1]
