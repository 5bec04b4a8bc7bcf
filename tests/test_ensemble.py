"""Ensemble Kalman inversion and perturbation gradients beyond the contract."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, assert_equal, batches, ragged_params
from problem import loss as nonlinear_loss

import optax_flat
from optax_flat.training import make_train_step

RNG = np.random.default_rng(0)
A = RNG.normal(size=(6, 4))
Y = RNG.normal(size=6)


def linear(x):
    return A @ x


def misfit(z):
    return jnp.sum((z - Y) ** 2) / 2


def run(tx, x, steps, **functions):
    state = tx.init(x)

    @jax.jit
    def step(x, state):
        updates, state = tx.update(None, state, x, **functions)
        return optax.apply_updates(x, updates), state

    for _ in range(steps):
        x, state = step(x, state)
    return x, state


LEAST_SQUARES = {"output_fn": linear, "loss_fn": misfit}


# Perturbation gradients.


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_perturbation_gradient_is_unbiased(kind, antithetic, x64):
    """Its mean on a linear model is the gradient, within five standard errors."""
    spread = {"a": 0.3, "b": 0.5}
    members = 40_000

    def output_fn(p):
        return linear(jnp.concatenate([p["a"], p["b"]]))

    x = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5, 3.0])}
    tx = optax_flat.perturbation_gradient(
        optax.sgd(1.0), ensemble_size=members, spread=spread, noise_kind=kind,
        antithetic=antithetic, key=1,
    )  # fmt: skip
    updates, state = tx.update(None, tx.init(x), x, output_fn=output_fn, loss_fn=misfit)
    exact = jax.grad(lambda p: misfit(output_fn(p)))(x)
    exact, found = (np.concatenate([t["a"], t["b"]]) for t in (exact, updates))
    s = np.array([0.3, 0.3, 0.5, 0.5])
    # Entry i is the mean of sum_j g_j s_j z_j z_i / s_i, whose variance is at most
    # sum_j (g_j s_j)^2 (2 for j = i under normal draws) / s_i^2.
    error = np.sqrt(2 * np.sum((exact * s) ** 2) / members) / s
    assert (np.abs(found + exact) < 5 * error).all()
    assert (5 * error < 0.3 * np.abs(exact).max()).all()
    assert int(state.forward_passes) == members * (1 + antithetic) + 1


def test_antithetic_cancels_second_order(x64):
    """On a quadratic output the pairs give the slope along z exactly."""

    def output_fn(x):
        return x @ jnp.diag(jnp.array([1.0, 2.0])) @ x

    x = jnp.array([1.0, -1.0])
    tx = optax_flat.perturbation_gradient(
        optax.sgd(1.0), ensemble_size=1, spread=0.5, antithetic=True, key=0
    )
    updates, _ = tx.update(
        None, tx.init(x), x, output_fn=output_fn, loss_fn=lambda z: z
    )
    slope = jnp.array([2.0, -4.0])
    candidates = [slope @ z * z for z in (jnp.array([1.0, 1]), jnp.array([1.0, -1]))]
    assert any(np.allclose(-updates, c, atol=1e-12) for c in candidates)


def test_chunks_change_nothing():
    x = ragged_params()
    batch = batches(1, 1)[0, 0]
    functions = {
        "output_fn": lambda p: nonlinear_loss(p, batch),
        "loss_fn": lambda z: z**2,
    }
    make = {
        "perturbation": lambda size: optax_flat.perturbation_gradient(
            optax.sgd(1e-3), ensemble_size=6, spread=0.1, batch_size=size, key=0
        ),
        "kalman": lambda size: optax_flat.ensemble_kalman(
            ensemble_size=6, spread=0.1, batch_size=size, key=0
        ),
    }
    for factory in make.values():
        whole = run(factory(None), x, 3, **functions)
        chunked = run(factory(2), x, 3, **functions)
        assert_close(whole[0], chunked[0], factor=10)
        assert int(whole[1].forward_passes) == int(chunked[1].forward_passes) > 0


def test_trains_through_signs():
    """Where backpropagation sees a zero gradient."""
    x = jnp.asarray(RNG.normal(size=(200, 5)), jnp.float32)
    labels = (x[:, 0] * x[:, 1] > 0).astype(jnp.float32)

    def output_fn(params, batch):
        return jnp.sign(x @ params["w"] + params["b"]) @ params["v"]

    def loss_fn(outputs, batch):
        return optax.sigmoid_binary_cross_entropy(outputs, labels).mean()

    start = {
        "w": jnp.asarray(RNG.normal(size=(5, 30)), jnp.float32),
        "b": jnp.zeros(30),
        "v": jnp.zeros(30),
    }
    tx = optax_flat.perturbation_gradient(
        optax.adam(0.05), ensemble_size=64, spread=0.2, key=0
    )
    step = make_train_step(loss_fn, tx, output_fn=output_fn)
    params, state = start, tx.init(start)
    for _ in range(150):
        params, state, loss = step(params, state, None)
    backpropagated = jax.grad(lambda p: loss_fn(output_fn(p, None), None))(params)
    assert float(jnp.abs(backpropagated["w"]).max()) == 0.0
    assert float(loss) < 0.45 < float(loss_fn(output_fn(start, None), None))
    assert float(jnp.abs(params["w"] - start["w"]).max()) > 0.1


# Ensemble Kalman inversion.


def test_textbook_update(x64):
    """The implicit form is the analysis step of the ensemble Kalman filter."""
    gamma = np.diag(RNG.uniform(0.5, 2.0, 6)) + 0.1
    tx = optax_flat.ensemble_kalman(
        0.7, ensemble_size=9, spread=1.3, noise_covariance=gamma, key=2
    )
    x = jnp.asarray(RNG.normal(size=4))
    state = tx.init(x)
    u = np.asarray(x + state.deviations)  # [J, d]
    z = u @ A.T
    du, dz = u - u.mean(0), z - z.mean(0)
    c_uz, c_zz = du.T @ dz / 9, dz.T @ dz / 9
    u = u + (Y - z) @ np.linalg.inv(c_zz + gamma / 0.7).T @ c_uz.T
    updates, state = tx.update(None, state, x, output_fn=linear, target=jnp.asarray(Y))
    np.testing.assert_allclose(x + updates, u.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(x + updates + state.deviations, u, rtol=0, atol=1e-12)


def test_perturbed_observations_sample_the_posterior(x64):
    """Mean and covariance after one textbook update, within five standard errors."""
    gamma, members = 0.5, 3000
    tx = optax_flat.ensemble_kalman(
        1.0, ensemble_size=members, spread=1.0, noise_covariance=gamma,
        output_noise=1.0, key=0,
    )  # fmt: skip
    x = jnp.zeros(4)
    updates, state = tx.update(
        None, tx.init(x), x, output_fn=linear, target=jnp.asarray(Y)
    )
    covariance = np.linalg.inv(A.T @ A / gamma + np.eye(4))
    mean = covariance @ A.T @ Y / gamma
    error = np.sqrt(np.diag(covariance) / members)
    assert (np.abs(updates - mean) < 5 * error).all()
    found = np.cov(np.asarray(state.deviations).T)
    variances = np.diag(covariance)
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / members)
    assert (np.abs(found - covariance) < 5 * errors).all()
    without = optax_flat.ensemble_kalman(
        1.0, ensemble_size=members, spread=1.0, noise_covariance=gamma, key=0
    )
    _, collapsed = without.update(
        None, without.init(x), x, output_fn=linear, target=jnp.asarray(Y)
    )
    assert np.trace(np.cov(np.asarray(collapsed.deviations).T)) < 0.5 * np.trace(found)


@pytest.mark.parametrize("covariance", [0.5, np.full(6, 0.5), 0.5 * np.eye(6)])
def test_kinds_of_covariance(covariance, x64):
    tx = optax_flat.ensemble_kalman(
        ensemble_size=5, spread=1.0, noise_covariance=covariance, key=0
    )
    scalar = optax_flat.ensemble_kalman(
        ensemble_size=5, spread=1.0, noise_covariance=0.5, key=0
    )
    functions = {"output_fn": linear, "target": jnp.asarray(Y)}
    x = jnp.ones(4)
    assert_close(
        run(tx, x, 2, **functions)[0], run(scalar, x, 2, **functions)[0], jnp.float64
    )


def test_explicit_converges_to_least_squares(x64):
    """With more members than dimensions, slowly."""
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=5, spread=1.0, eps=0.5, key=0)
    solution = np.linalg.lstsq(A, Y, rcond=None)[0]
    state, x = tx.init(jnp.zeros(4)), jnp.zeros(4)

    @jax.jit
    def many(x, state):
        def body(carry, _):
            x, state = carry
            updates, state = tx.update(None, state, x, **LEAST_SQUARES)
            return (x + updates, state), None

        return jax.lax.scan(body, (x, state), length=2000)[0]

    errors = [np.abs(x - solution).max()]
    for _ in range(3):
        x, state = many(x, state)
        errors.append(np.abs(x - solution).max())
    assert errors[1] < 0.2 * errors[0]
    assert errors[3] < 0.8 * errors[1]
    assert errors[3] < 0.1


def test_span(x64):
    """Fewer members stay in their affine hull and tend to the best point in it."""
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=3, spread=1.0, eps=0.5, key=0)
    start = jnp.asarray(RNG.normal(size=4))
    state = tx.init(start)
    basis = np.asarray(state.deviations).T  # [4, 3] of rank 2
    x, state = run(tx, start, 3000, **LEAST_SQUARES)
    outside = np.eye(4) - basis @ np.linalg.pinv(basis)
    assert np.abs(outside @ (x - start)).max() < 1e-12
    assert np.abs(outside @ np.asarray(state.deviations).T).max() < 1e-12
    best = start + basis @ np.linalg.lstsq(A @ basis, Y - A @ start, rcond=None)[0]
    assert np.abs(x - best).max() < 0.1 * np.abs(start - best).max()
    unbounded = np.linalg.lstsq(A, Y, rcond=None)[0]
    assert np.abs(unbounded - best).max() > 3 * np.abs(x - best).max()


@pytest.mark.parametrize("resample", [1, 5])
def test_resampling_leaves_the_span(resample, x64):
    tx = optax_flat.ensemble_kalman(
        0.3, ensemble_size=3, spread=0.1, eps=1e-3, resample=resample, key=0
    )
    start = jnp.zeros(4)
    basis = np.asarray(tx.init(start).deviations).T
    x, state = run(tx, start, 1500, **LEAST_SQUARES)
    outside = np.eye(4) - basis @ np.linalg.pinv(basis)
    assert np.abs(outside @ x).max() > 1e-2
    solution = np.linalg.lstsq(A, Y, rcond=None)[0]
    assert np.abs(x - solution).max() < 0.2 * np.abs(solution).max()
    # 1500 is a multiple of both: the last deviations are fresh ones.
    assert 0.02 < float(jnp.std(state.deviations)) < 0.3


def test_deviations_stay_centred_and_steps_bounded():
    """A member moves by at most step_size (sum_k |e_k|^2)^(1/2)."""
    tx = optax_flat.ensemble_kalman(0.8, ensemble_size=6, spread=0.5, eps=0.0, key=0)
    x = jnp.asarray(RNG.normal(size=4), jnp.float32)
    state = tx.init(x)
    assert float(jnp.abs(state.deviations.mean(axis=0)).max()) < 1e-6
    before = x + state.deviations
    bound = 0.8 * float(jnp.linalg.norm(state.deviations))
    updates, after = tx.update(None, state, x, **LEAST_SQUARES)
    moved = jnp.linalg.norm(x + updates + after.deviations - before, axis=1)
    assert 0.1 * bound < float(moved.max()) <= bound * (1 + 1e-5)
    assert float(jnp.abs(after.deviations.mean(axis=0)).max()) < 1e-6


def test_momentum_is_nesterov(x64):
    """Outputs and step start from u + beta (u - u_old), member by member."""
    beta, step, eps = 0.6, 0.4, 0.5
    tx = optax_flat.ensemble_kalman(
        step, ensemble_size=5, spread=1.0, eps=eps, momentum=beta, key=0
    )
    x = jnp.asarray(RNG.normal(size=4))
    state = tx.init(x)
    u = old = np.asarray(x + state.deviations)
    for _ in range(4):
        v = u + beta * (u - old)
        z = v @ A.T
        D = (z - Y) @ (z - z.mean(0)).T / 5
        old, u = u, v - step / (np.linalg.norm(D) + eps) * D @ (v - v.mean(0))
    found, state = run(tx, x, 4, **LEAST_SQUARES)
    np.testing.assert_allclose(found + state.deviations, u, rtol=0, atol=1e-12)


def test_only_members_matter(x64):
    """Not how they are split into params and deviations: the rows of D sum to 0."""
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=5, spread=1.0, eps=0.5, key=0)
    x = jnp.asarray(RNG.normal(size=4))
    state, shift = tx.init(x), jnp.array([0.3, -1.0, 2.0, 0.1])
    moved = state._replace(deviations=state.deviations + shift)
    members = []
    for start, start_state in ((x, state), (x - shift, moved)):
        updates, after = tx.update(None, start_state, start, **LEAST_SQUARES)
        members.append(start + updates + after.deviations)
    assert_close(*members, jnp.float64)


def test_small_noise_in_float32():
    """The implicit form keeps its digits where a normal matrix would lose them."""
    operator = jnp.asarray(RNG.normal(size=(300, 20)), jnp.float32)
    truth = jnp.asarray(RNG.normal(size=20), jnp.float32)
    tx = optax_flat.ensemble_kalman(
        ensemble_size=50, spread=3.0, noise_covariance=1e-6, key=0
    )
    x, state = run(
        tx, jnp.zeros(20), 3,
        output_fn=lambda x: operator @ x, target=operator @ truth,
    )  # fmt: skip
    assert int(state.replaced) == 0
    assert float(jnp.abs(x - truth).max()) < 1e-2


def test_large_outputs_do_not_overflow():
    """Entries of D whose squares are beyond float32."""
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=6, spread=1.0, eps=0.0, key=0)
    x = jnp.ones(4)
    plain = tx.update(None, tx.init(x), x, **LEAST_SQUARES)[0]
    scaled = tx.update(
        None, tx.init(x), x,
        output_fn=lambda x: 1e10 * linear(x), loss_fn=lambda z: misfit(z / 1e10) * 1e15,
    )[0]  # fmt: skip
    assert_close(scaled, plain, factor=10)


def test_replaced_members_join_the_others(x64):
    """In the mean, a new member stands where the healthy ones went, as wide as they."""
    size = 400
    tx = optax_flat.ensemble_kalman(
        0.5, ensemble_size=size, spread=1.0, noise_covariance=1.0, key=3
    )
    x = jnp.zeros(4)
    state = tx.init(x)

    def half(x):
        return jnp.where(x[0] > 0, jnp.nan, linear(x))

    updates, after = tx.update(None, state, x, output_fn=half, target=jnp.asarray(Y))
    members = np.asarray(x + updates + after.deviations)
    failed = np.asarray(state.deviations[:, 0] > 0)
    assert int(after.replaced) == failed.sum() > size / 3
    healthy, new = members[~failed], members[failed]
    error = np.sqrt(np.diag(np.cov(healthy.T)) / len(new))
    assert (np.abs(new.mean(0) - healthy.mean(0)) < 5 * error).all()
    ratio = np.cov(new.T) / np.cov(healthy.T)
    assert (np.abs(np.diag(ratio) - 1) < 5 * np.sqrt(2 / len(new)) + 0.1).all()


def test_replaced_members_have_no_velocity():
    def sometimes(x):
        return jnp.where(x[0] > bad_above, jnp.nan, linear(x))

    tx = optax_flat.ensemble_kalman(
        1.0, ensemble_size=8, spread=1.0, eps=0.5, momentum=0.9, key=0
    )
    x = jnp.zeros(4)
    state = tx.init(x)
    highest = np.sort(state.deviations[:, 0])
    bad_above = (highest[-1] + highest[-2]) / 2
    updates, after = tx.update(None, state, x, output_fn=sometimes, loss_fn=misfit)
    assert int(after.replaced) == 1
    assert_close(after.previous, (x + updates, after.deviations))


def test_output_noise_differs_between_shards():
    """Examples on different devices are perturbed independently."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax_flat.ensemble_kalman(
        ensemble_size=4, spread=0.5, output_noise=1.0, output_axis_name="data", key=0
    )
    seen = []

    def loss_fn(z):
        jax.debug.callback(lambda z: seen.append(np.asarray(z)), z)
        return jnp.mean(z**2)

    def update(x, inputs):
        return tx.update(
            None, tx.init(x), x, output_fn=lambda p: 0.0 * inputs @ p, loss_fn=loss_fn
        )[0]

    P = jax.sharding.PartitionSpec
    spread_out = jax.shard_map(
        update, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False
    )
    jax.jit(spread_out)(jnp.ones(4), jnp.ones((8, 4)))
    jax.effects_barrier()
    assert len(np.unique(np.concatenate([np.ravel(z) for z in seen]))) == 32


def test_low_precision_params_under_x64(x64):
    """float64 outputs, spreads and rates leave state and updates as they were."""
    x = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float32)}

    def output_fn(p):
        return (p["a"] * p["b"]).astype(jnp.float64) * np.arange(3.0)

    for tx in (
        optax_flat.ensemble_kalman(
            lambda t: jnp.asarray(0.5, float), ensemble_size=4, spread=np.sqrt(0.1),
            momentum=lambda t: jnp.asarray(0.5, float), key=0,
        ),
        optax_flat.perturbation_gradient(
            optax.adam(0.1), ensemble_size=4, spread=np.sqrt(0.1), key=0
        ),
    ):  # fmt: skip
        state = tx.init(x)
        updates, after = tx.update(
            None, state, x, output_fn=output_fn, loss_fn=lambda z: jnp.sum(z**2)
        )
        types = [jax.tree.map(lambda leaf: leaf.dtype, t) for t in (state, after)]
        assert types[0] == types[1]
        assert updates["a"].dtype == jnp.bfloat16
        assert updates["b"].dtype == jnp.float32


def test_failed_members_do_no_harm():
    """NaN outputs of one member: replaced, counted, and the mean goes on descending."""

    def sometimes(x):
        return jnp.where(x[0] > bad_above, jnp.nan, linear(x))

    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=8, spread=1.0, eps=0.5, key=0)
    x = jnp.zeros(4)
    state = tx.init(x)
    highest = np.sort(state.deviations[:, 0])
    bad_above = (highest[-1] + highest[-2]) / 2  # exactly one member fails at first
    _, after = tx.update(None, state, x, output_fn=sometimes, loss_fn=misfit)
    assert int(after.replaced) == 1
    x, state = run(tx, x, 300, output_fn=sometimes, loss_fn=misfit)
    leaves = jax.tree.leaves((x, state.deviations))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in leaves)
    assert float(misfit(linear(x))) < 0.5 * float(misfit(linear(jnp.zeros(4))))


@pytest.mark.parametrize("form", ["explicit", "implicit"])
def test_huge_outputs_do_no_harm(form):
    """One member's outputs, finite and huge: the others go on, or it is counted."""
    huge = [1e16, 1e18, 1e20, 3e38]
    if form == "explicit":
        arguments, functions = {"eps": 0.5}, {"loss_fn": misfit}
    else:
        arguments, functions = {"noise_covariance": 1.0}, {"target": jnp.asarray(Y)}
    tx = optax_flat.ensemble_kalman(
        0.1, ensemble_size=8, spread=1.0, key=0, **arguments
    )
    start = jnp.zeros(4)
    highest = np.sort(tx.init(start).deviations[:, 0])
    bad_above = (highest[-1] + highest[-2]) / 2

    @jax.jit
    def train(size):
        def output_fn(x):
            return jnp.where(x[0] > bad_above, size, linear(x))

        def body(carry, _):
            x, state = carry
            updates, state = tx.update(None, state, x, output_fn=output_fn, **functions)
            return (optax.apply_updates(x, updates), state), state.replaced

        (x, state), replaced = jax.lax.scan(body, (start, tx.init(start)), length=50)
        return misfit(linear(x)), state, replaced[0]

    for size in huge:
        loss, state, replaced = train(size)
        assert float(loss) < 0.3 * float(misfit(linear(start)))
        assert jnp.abs(state.deviations).max() < 3.0
        assert int(replaced) == (size > 1e19)  # whose square is beyond float32
        assert int(state.skipped) == 0


def test_skipped_updates_are_counted():
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=4, spread=1.0, key=0)
    x = jnp.ones(4)
    functions = {"output_fn": lambda x: 1e20 * x, "loss_fn": lambda z: jnp.sum(z**2)}
    after, state = run(tx, x, 3, **functions)
    assert_equal(after, x)
    assert int(state.skipped) == 3
    assert int(state.count) == 3


@pytest.mark.parametrize(
    ("form", "outputs"),
    [
        ("explicit", "several"),
        ("implicit", "matrix"),
        pytest.param("explicit", "vector", marks=pytest.mark.slow),
        pytest.param("explicit", "matrix", marks=pytest.mark.slow),
        pytest.param("implicit", "vector", marks=pytest.mark.slow),
        pytest.param("implicit", "several", marks=pytest.mark.slow),
    ],
)
def test_sharded_outputs_on_explicit_mesh(form, outputs):
    """Examples spread over eight devices by type: as on one device."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    inputs = RNG.normal(size=(16, 4)).astype(np.float32)
    arguments = {"noise_covariance": 1.0} if form == "implicit" else {"eps": 0.1}
    tx = optax_flat.ensemble_kalman(
        0.5, ensemble_size=5, spread=0.5, output_noise=0.1, key=0, **arguments
    )

    def shaped(z):
        return {"vector": z, "matrix": z[:, None], "several": (z, z.sum())}[outputs]

    def update(x, inputs):
        target = inputs[:, 0]
        functions = {
            "output_fn": lambda x: shaped(jnp.tanh(inputs @ x)),
            "loss_fn": lambda z: jnp.mean((jax.tree.leaves(z)[0].T - target) ** 2),
            "target": shaped(target),
        }
        if form == "implicit":
            del functions["loss_fn"]
        else:
            del functions["target"]
        return tx.update(None, tx.init(x), x, **functions)[0]

    alone = jax.jit(update)(jnp.ones(4), inputs)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(inputs, jax.P("data"))
        together = jax.jit(update)(jnp.ones(4), sharded)
    assert_close(jax.device_get(together), alone, factor=10)
    assert float(jnp.abs(alone).max()) > 1e-3


def test_all_members_fail():
    """Then nothing happens, and it is counted."""
    tx = optax_flat.ensemble_kalman(1.0, ensemble_size=4, spread=1.0, key=0)
    x = jnp.ones(4)
    state = tx.init(x)
    updates, after = tx.update(
        None, state, x, output_fn=lambda x: x * jnp.nan, loss_fn=jnp.sum
    )
    assert_equal(updates, jnp.zeros(4))
    assert_equal(after.deviations, state.deviations)
    assert int(after.replaced) == 4
    assert int(after.skipped) == 1
    gradient = optax_flat.perturbation_gradient(
        optax.adam(1.0), ensemble_size=4, spread=1.0, key=0
    )
    _, state = gradient.update(
        None, gradient.init(x), x, output_fn=lambda p: p, loss_fn=jnp.sum
    )
    updates, after = gradient.update(
        None, state, x,
        output_fn=lambda p: jnp.where(p == x, p, jnp.nan), loss_fn=jnp.sum,
    )  # fmt: skip
    assert_equal(updates, jnp.zeros(4))  # although Adam has momentum
    assert_equal(after.outer_state, state.outer_state)
    assert int(after.replaced) == 4


def test_initializer_function():
    """Members drawn by a function are moved around the params."""

    def member(key):
        return {"w": 3.0 + 2.0 * jax.random.normal(key, (50, 40))}

    tx = optax_flat.ensemble_kalman(ensemble_size=10, spread=member, key=0)
    state = tx.init({"w": jnp.zeros((50, 40))})
    assert float(jnp.abs(state.deviations["w"].mean(axis=0)).max()) < 1e-5
    assert 1.7 < float(state.deviations["w"].std()) < 2.1


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_sharded_ensemble():
    """Two members a device: as on one device, and nowhere the full ensemble."""
    mesh = jax.make_mesh((8,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("members"))
    settings = {
        "ensemble_size": 16, "spread": 0.5, "eps": 0.1, "momentum": 0.7,
        "output_noise": 0.1, "resample": 3, "key": 0,
    }  # fmt: skip
    rng = np.random.default_rng(0)  # its own, for the order of tests may change
    x = {"w": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32), "b": jnp.zeros(5)}
    inputs = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)

    def output_fn(p):
        # Members with a large bias fail.
        return jnp.tanh(inputs @ p["w"] + p["b"]) / (p["b"][0] < 0.7)

    functions = {"output_fn": output_fn, "loss_fn": lambda z: jnp.sum((z - 1.0) ** 2)}
    spread_out = optax_flat.ensemble_kalman(sharding=sharding, **settings)
    here = optax_flat.ensemble_kalman(**settings)
    x_sharded, state = run(spread_out, x, 5, **functions)
    x_here, state_here = run(here, x, 5, **functions)
    assert_close(x_sharded, x_here, factor=10)
    assert_close(state.deviations, state_here.deviations, factor=10)
    assert int(state.replaced) == int(state_here.replaced) > 0
    for leaf in jax.tree.leaves(state.deviations):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 2
    old = state.previous[1]["w"]
    assert old.sharding.shard_shape(old.shape)[0] == 2
    state = spread_out.init(x)
    program = (
        jax.jit(lambda s, x: spread_out.update(None, s, x, **functions))
        .lower(state, x)
        .compile()
        .as_text()
    )
    assert "f32[2,4,5]" in program
    first = jax.jit(spread_out.init).lower(x).compile().as_text()
    for text in (program, first):
        full = re.findall(r"f32\[(?:16,4,5|16,20|20,16|320|16,1,4,5)\]", text)
        assert not full


def test_outputs_spread_over_devices():
    """Examples sharded inside shard_map: the ensemble sees all of them."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = jnp.asarray(RNG.normal(size=(16, 4)), jnp.float32)
    tx = optax_flat.ensemble_kalman(
        ensemble_size=5, spread=0.5, eps=0.1, output_axis_name="data", key=0
    )
    alone = optax_flat.ensemble_kalman(ensemble_size=5, spread=0.5, eps=0.1, key=0)
    x = jnp.ones(4)
    highest = np.sort(x[0] + alone.init(x).deviations[:, 0])
    bad_above = (highest[-1] + highest[-2]) / 2
    hard = np.sort(inputs[:, 1])[-1]  # the example, of one device, that a member fails

    def output_fn(p, inputs):
        fails = (p[0] > bad_above) & (inputs[:, 1] >= hard)
        return jnp.where(fails, jnp.nan, jnp.tanh(inputs @ p))

    def update(tx, x, inputs):
        updates, state = tx.update(
            None, tx.init(x), x,
            output_fn=lambda p: output_fn(p, inputs),
            loss_fn=lambda z: jnp.mean((z - 0.5) ** 2),
        )  # fmt: skip
        return updates, state.replaced

    P = jax.sharding.PartitionSpec
    spread_out = jax.shard_map(
        lambda x, inputs: update(tx, x, inputs),
        mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=False,
    )  # fmt: skip
    shared, replaced = jax.jit(spread_out)(x, inputs)
    whole, _ = jax.jit(lambda x: update(alone, x, inputs))(x)
    assert int(replaced) == 1
    assert_close(shared, whole, factor=10)
    assert float(jnp.abs(shared).max()) > 1e-2


def test_masked_merges_the_frozen_leaves():
    seen = []

    def output_fn(params):
        seen.append(jax.tree.structure(params))
        return params["a"] * params["b"]

    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, -1.0])}

    def member(key):
        return jax.tree.map(lambda leaf: jax.random.normal(key, leaf.shape), params)

    for tx in (
        optax_flat.ensemble_kalman(ensemble_size=4, spread=0.1, key=0),
        optax_flat.ensemble_kalman(ensemble_size=4, spread=member, key=0),
        optax_flat.perturbation_gradient(
            optax.sgd(0.1), ensemble_size=4, spread=0.1, key=0
        ),
    ):
        tx = optax_flat.masked(tx, {"a": True, "b": False})
        updates, _ = tx.update(
            None, tx.init(params), params, output_fn=output_fn, loss_fn=jnp.sum
        )
        assert_equal(updates["b"], jnp.zeros(2))
        assert float(jnp.abs(updates["a"]).max()) > 1e-3
    assert set(seen) == {jax.tree.structure(params)}


def test_train_step_knows_methods_without_gradients():
    """One call for them and for any other optimizer."""

    def output_fn(params, batch):
        return batch @ params["layer"]["w"]

    def loss_fn(outputs, batch):
        return jnp.mean((outputs - batch[:, :1]) ** 2)

    batch = batches(1, 1)[0, 0]
    whole = jax.value_and_grad(lambda p: loss_fn(output_fn(p, batch), batch))
    params = ragged_params()
    sgd = optax.sgd(0.1)
    after, _, value = make_train_step(loss_fn, sgd, output_fn=output_fn)(
        params, sgd.init(params), batch
    )
    expected, grads = whole(params)
    assert_close(value, expected)
    assert_close(after, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
    tx = optax_flat.ensemble_kalman(ensemble_size=6, spread=0.1, key=0)
    state = tx.init(params)
    after, _, value = make_train_step(loss_fn, tx, output_fn=output_fn)(
        params, state, batch
    )
    assert_close(value, expected)
    updates, _ = tx.update(
        None, state, params,
        output_fn=lambda p: output_fn(p, batch), loss_fn=lambda z: loss_fn(z, batch),
    )  # fmt: skip
    assert_close(after, optax.apply_updates(params, updates))
    with pytest.raises(ValueError, match="Give make_train_step `output_fn=`"):
        make_train_step(nonlinear_loss, tx)(params, state, batch)
    with pytest.raises(ValueError, match="Leave one of the two out"):
        make_train_step(loss_fn, tx, output_fn=output_fn, has_aux=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"loss_fn": misfit}, "`output_fn` must be passed to `update`"),
        ({"output_fn": linear}, "`loss_fn` must be passed to `update`"),
    ],
)
def test_missing_functions(arguments, words):
    x = jnp.ones(4)
    for tx in (
        optax_flat.ensemble_kalman(ensemble_size=4, spread=0.1, key=0),
        optax_flat.perturbation_gradient(
            optax.sgd(0.1), ensemble_size=4, spread=0.1, key=0
        ),
    ):
        with pytest.raises(ValueError, match=words):
            tx.update(None, tx.init(x), x, **arguments)


def test_other_errors():
    x = jnp.ones(4)
    implicit = optax_flat.ensemble_kalman(
        ensemble_size=4, spread=0.1, noise_covariance=1.0, key=0
    )
    with pytest.raises(ValueError, match="`target` must be passed to `update`"):
        implicit.update(None, implicit.init(x), x, output_fn=linear)
    explicit = optax_flat.ensemble_kalman(ensemble_size=4, spread=0.1, key=0)
    with pytest.raises(ValueError, match="Give ensemble_kalman its `noise_covariance`"):
        explicit.update(None, explicit.init(x), x, output_fn=linear, target=Y)
    with pytest.raises(ValueError, match="begins like that of the params"):
        optax_flat.ensemble_kalman(ensemble_size=4, spread={"a": 1.0}, key=0).init(
            {"b": x}
        )
    with pytest.raises(ValueError, match="cannot be spread over"):
        optax_flat.ensemble_kalman(
            ensemble_size=4, spread=0.1, noise_covariance=1.0, output_axis_name="d",
            key=0,
        )  # fmt: skip
    with pytest.raises(ValueError, match="Use optax_flat.masked"):
        masked = optax.masked(
            optax_flat.ensemble_kalman(ensemble_size=4, spread=0.1, key=0),
            {"a": True, "b": False},
        )
        params = {"a": x, "b": x}
        masked.update(
            optax.tree.zeros_like(params), masked.init(params), params,
            output_fn=lambda p: p["a"] + p["b"], loss_fn=jnp.sum,
        )  # fmt: skip
    with pytest.raises(ValueError, match="positive definite"):
        optax_flat.ensemble_kalman(
            ensemble_size=4, spread=0.1, noise_covariance=-np.eye(2), key=0
        )
    mesh = jax.make_mesh((2,), ("m",), devices=jax.devices()[:2])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("m"))
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        optax_flat.ensemble_kalman(
            ensemble_size=5, spread=0.1, sharding=sharding, key=0
        )


def test_a_target_unlike_the_outputs_is_refused():
    """Of every other shape, whether or not it has as many numbers, and by structure."""
    x = jnp.ones((3, 2))

    def model(x):
        return {"a": jnp.ones((4, 3)) @ x, "b": (x[0], x.sum())}

    arguments = {"ensemble_size": 4, "spread": 0.1, "key": 0}
    tx = optax_flat.ensemble_kalman(noise_covariance=1.0, **arguments)
    update = functools.partial(tx.update, None, tx.init(x), x, output_fn=model)
    right = model(x)
    jax.eval_shape(lambda: update(target=right))
    wrong = [
        right | {"a": right["a"].T},
        right | {"a": right["a"][:1]},
        right | {"a": right["a"].ravel()},
        right | {"b": (right["b"][0], jnp.ones(1))},
        right | {"b": list(right["b"])},
        right["a"],
        jnp.ones(11),
        0.0,
    ]
    for target in wrong:
        with pytest.raises(ValueError, match="(?s)`target` must have .*expected: "):
            update(target=target)
        with pytest.raises(ValueError, match="`target` must have the structure"):
            jax.eval_shape(lambda target=target: update(target=target))


@pytest.mark.parametrize("shape", [(1,), (2,), (1, 1), (2, 2), (1, 3), (3, 3, 3)])
def test_a_covariance_of_another_number_of_outputs_is_refused(shape):
    covariance = np.eye(shape[0]) if shape[:1] * 2 == shape else np.ones(shape)
    if shape in ((1, 3), (3, 3, 3)):  # no square matrix at all: known at once
        words = "`noise_covariance` must be"
    else:
        words = "for the M outputs, got shape .* for 3 outputs"
    x = jnp.ones(3)
    with pytest.raises(ValueError, match=words):
        tx = optax_flat.ensemble_kalman(
            ensemble_size=4, spread=0.1, noise_covariance=covariance, key=0
        )
        tx.update(None, tx.init(x), x, output_fn=lambda x: x, target=x)


def test_outputs_and_losses_of_other_kinds_are_refused():
    x = jnp.ones(3)
    arguments = {"ensemble_size": 4, "spread": 0.1, "key": 0}
    for tx in (
        optax_flat.ensemble_kalman(**arguments),
        optax_flat.perturbation_gradient(optax.sgd(0.1), **arguments),
    ):
        update = functools.partial(tx.update, None, tx.init(x), x)
        for loss_fn in (lambda z: z, lambda z: (z.sum(), z), jnp.argmax):
            with pytest.raises(TypeError, match="`loss_fn` must return the loss of"):
                update(output_fn=lambda x: x, loss_fn=loss_fn)
        with pytest.raises(ValueError, match="`output_fn` must return at least one"):
            update(output_fn=lambda x: (), loss_fn=lambda z: jnp.zeros([]))
        # Whole and Python numbers are as good as their floats.
        numbers = update(
            output_fn=lambda x: (jnp.round(40 * x).astype(int), 3),
            loss_fn=lambda z: jnp.sum(z[0]) * z[1],
        )
        floats = update(
            output_fn=lambda x: (jnp.round(40 * x), 3.0),
            loss_fn=lambda z: jnp.sum(z[0]) * z[1],
        )
        assert_equal(numbers, floats)
        assert float(jnp.abs(numbers[0]).max()) > 1e-3


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_outputs_of_16_bits_are_subtracted_in_float32(dtype, antithetic):
    """From 1 to -2^-13, which is further than 16 bits can tell."""

    def output_fn(x):
        return jnp.where(x > 0, -(2.0**-13), 1.0).astype(dtype)

    _, c = optax_flat.perturbed_sum(
        output_fn, jnp.sum, jnp.zeros([]), jnp.ones(1), antithetic=antithetic
    )
    exact = -(2.0**-13) - 1.0
    np.testing.assert_array_equal(c, [exact / 2 if antithetic else exact])


@pytest.mark.parametrize("kind", ["float", "tree", "prefix", "function"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_map_params_over_states(kind, momentum):
    """Optax's tool for sharding rules makes a state of a tree that holds nothing."""
    params = {"k": jnp.ones((4, 3)), "b": {"c": jnp.zeros(3)}}
    spread = {
        "float": 0.1,
        "tree": {"k": jnp.ones(3), "b": {"c": 0.2}},
        "prefix": {"k": 0.1, "b": 0.2},
        "function": lambda key: jax.tree.map(jnp.ones_like, params),
    }[kind]
    methods = [
        optax_flat.ensemble_kalman(
            ensemble_size=4, spread=spread, momentum=momentum, key=0
        )
    ]
    if kind != "function":
        methods.append(
            optax_flat.perturbation_gradient(
                optax.adam(0.1), ensemble_size=4, spread=spread, key=0
            )
        )
    specs = {"k": "K", "b": {"c": "C"}}
    for tx in methods:
        found = optax.tree.map_params(
            tx, lambda leaf, spec: spec, tx.init(params), specs,
            transform_non_params=lambda leaf: "other",
        )  # fmt: skip
        leaves = jax.tree.leaves(found)
        like_params = {"K": 1, "C": 1} if tx is methods[0] else {"K": 2, "C": 2}
        if tx is methods[0] and momentum:
            like_params = {"K": 3, "C": 3}
        for spec, number in like_params.items():
            assert leaves.count(spec) == number
        assert set(leaves) == {"K", "C", "other"}


@pytest.mark.parametrize("shape", [(2,), (1, 2, 3), (3, 3)])
def test_spread_that_does_not_fit(shape):
    spread, params = jnp.ones(shape), jnp.zeros((2, 3))
    for make in (
        lambda: optax_flat.ensemble_kalman(ensemble_size=3, spread=spread, key=0),
        lambda: optax_flat.perturbation_gradient(
            optax.sgd(0.1), ensemble_size=3, spread=spread, key=0
        ),
    ):
        with pytest.raises(ValueError, match="broadcasts .* for a leaf of shape"):
            make().init(params)


def test_an_axis_that_is_not_there_is_refused():
    tx = optax_flat.ensemble_kalman(
        ensemble_size=4, spread=0.1, output_axis_name="examples", key=0
    )
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="`output_axis_name` is 'examples'"):
        tx.update(
            None, tx.init(x), x, output_fn=lambda x: x, loss_fn=lambda z: jnp.sum(z**2)
        )
