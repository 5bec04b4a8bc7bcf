"""16-bit params around every method: what is kept, what is rounded, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS, WALK_MODES
from problem import (
    assert_close,
    assert_equal,
    batches,
    jitted_update,
    loss,
    ragged_params,
    train,
    update,
)
from savers import SAVERS

import optax_flat
from benchmarks import hlo
from optax_flat._core import trees
from optax_flat._core.modes import states
from optax_flat._core.noise import draw
from optax_flat._core.precision import _rounded_at_random
from optax_flat.training import make_train_step

BF16 = jnp.bfloat16
HALVES = [jnp.bfloat16, jnp.float16]
# Walks, samplers, averages, params that stand elsewhere, and no gradients at all.
NAMES = {
    "entropy_sgd", "sam", "momentum_sam", "sghmc", "ema_weights", "adagrad",
    "ensemble_kalman",
}  # fmt: skip
SLOW = {"sam", "sghmc", "adagrad"}  # in `make test-all`
CASES = [
    pytest.param(
        method, mode, id=f"{method.name}-{mode}",
        marks=[pytest.mark.slow] if method.name in SLOW else [],
    )
    for method in METHODS
    if method.name in NAMES
    for mode in method.modes
]  # fmt: skip
case = pytest.mark.parametrize(("method", "mode"), CASES)
MOVED = {"parle", "elastic_averaging", "multipoint_nesterov", "momentum_sam", "sampa"}
rounding_case = pytest.mark.parametrize(
    ("method", "mode"),
    [
        c for c in CASES if c.values[0].name in NAMES - MOVED
        and c.values[1] != "transparent"
    ],
)  # fmt: skip


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def mastered(method, mode):
    """With master weights; equal ones are one object."""
    return _mastered(method.name, mode)


@functools.cache
def _mastered(name, mode):
    method = next(method for method in METHODS if method.name == name)
    return optax_flat.master_weights(method.make(mode=mode, **method.noisy))


def by_call(method, mode, data):
    """Minibatches [calls, gradients per call, ...]."""
    if mode != "transparent":
        return data
    return data.reshape(-1, *data.shape[2:])[:, None]


def in_float32(params, batch):
    """The loss, computed in float32, of params in any dtype. Some methods climb."""
    return 0.1 * loss(cast(params, jnp.float32), batch)


def read_rounded(params, batch):
    """The loss of params that are cast inside."""
    rounded = trees.rounded_like(params, cast(params, BF16))
    params = jax.tree.map(
        lambda x, r: x + jax.lax.stop_gradient(r - x), params, rounded
    )
    return in_float32(params, batch)


@case
def test_float32_params_are_trained_as_without(method, mode):
    """Bit for bit; a master of what is wide already would be waste."""
    data = batches(3, method.length)
    plain = train(method.make(mode=mode, **method.noisy), mode, ragged_params(), data)
    run = train(mastered(method, mode), mode, ragged_params(), data)
    assert not jax.tree.leaves(run.state.master)
    assert_equal(run.params, plain.params)
    assert_equal(run.path, plain.path)
    assert_equal(run.state.inner_state, plain.state)


@pytest.mark.parametrize(
    ("method", "mode"),
    # "forward" has no gradients to round.
    [c for c in CASES if c.values[1] != "forward" and not c.values[0].shares_engine],
)
def test_master_runs_as_float32_params_that_the_loss_rounds(method, mode):
    """The run of float32 params, at every moment rounded; so are those to evaluate."""
    data = batches(3, method.length)
    start = ragged_params(BF16)
    tx = method.make(mode=mode, **method.noisy)
    wide = train(tx, mode, cast(start, jnp.float32), data, loss=read_rounded)
    run = train(mastered(method, mode), mode, start, data, loss=in_float32)
    # Gradients of the one are rounded on their way back, once more.
    assert_close(run.state.master, wide.params, BF16)
    assert {x.dtype for x in jax.tree.leaves(run.path)} == {jnp.dtype(BF16)}
    assert_close(run.path, wide.path, BF16)


@case
@pytest.mark.parametrize("dtype", HALVES)
def test_params_are_the_rounded_master(method, mode, dtype):
    """Exactly, but for entries that a single update more than halves or doubles."""
    tx = mastered(method, mode)
    params, data = ragged_params(dtype), batches(3, method.length, dtype)
    state = tx.init(params)
    step = jitted_update(tx, mode, loss)
    for stack in by_call(method, mode, data):
        before = params
        params, state, _ = step(params, state, stack)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        trees = (params, state.master, before)
        for p, m, old in zip(*map(jax.tree.leaves, trees), strict=True):
            expected, old = (cast(x, jnp.float32) for x in (m.astype(dtype), old))
            miss = jnp.abs(cast(p, jnp.float32) - expected)
            ratio = expected / old
            assert (miss[(ratio >= 0.5) & (ratio <= 2)] == 0).all()
            assert (miss <= jnp.finfo(dtype).eps * jnp.abs(expected - old)).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_small_updates_survive(dtype):
    """100 of +1e-3 on 1.0 (of 2e-4 in float16, whose spacing is 1e-3)."""
    size = {jnp.bfloat16: 1e-3, jnp.float16: 2e-4}[dtype]
    params = jnp.ones(20_000, dtype)

    def ascend(tx):
        step = jax.jit(lambda p, s: tx.update(-jnp.ones_like(p), s, p))
        p, state = params, tx.init(params)
        for _ in range(100):
            updates, state = step(p, state)
            assert updates.dtype == dtype
            p = optax.apply_updates(p, updates)
        return p

    sgd = optax.sgd(size)
    assert (ascend(sgd) == 1).all()
    assert (ascend(optax_flat.master_weights(sgd)) == dtype(1 + 100 * size)).all()
    p = ascend(optax_flat.stochastic_rounding(sgd, key=0)).astype(float)
    spread = np.sqrt(100 * size * float(jnp.finfo(dtype).eps))  # at most
    assert abs(p.mean() - 1 - 100 * size) < 5 * spread / np.sqrt(p.size)
    assert p.std() < spread


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1.0, 3e-5, 0.0, -7.0])
def test_rounding_at_random_keeps_the_mean(dtype, size):
    """Between the two neighbours, with the right odds; what is exact stays."""
    n = 40_000
    for t in size * np.linspace(1.0, 1.5, 7, dtype=np.float32):
        uniform = draw(jax.random.key(1), jnp.zeros(n), "uniform")
        param = jnp.zeros(n, dtype)
        found = jax.jit(_rounded_at_random)(jnp.full(n, t), uniform, param)
        assert (found.astype(dtype).astype(jnp.float32) == found).all()
        near = np.float32(jnp.asarray(t, dtype))
        if near == t:
            assert (found == t).all()
            continue
        bound = jnp.asarray(jnp.inf if t > near else -jnp.inf, dtype)
        other = np.float32(jnp.nextafter(jnp.asarray(t, dtype), bound))
        assert set(np.unique(found)) <= {near, other}
        error = abs(np.mean(np.asarray(found, float)) - float(t))
        odds = (t - near) / (other - near)
        deviation = abs(other - near) * np.sqrt(odds * (1 - odds) / n)
        assert error < 5 * deviation


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_at_random_leaves_infinity_and_nan(dtype):
    t = jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1e30])
    found = _rounded_at_random(t, jnp.full(4, 0.5), jnp.zeros(4, dtype)).astype(dtype)
    expected = [jnp.inf, -jnp.inf, jnp.nan, 1e30 if dtype == BF16 else jnp.inf]
    np.testing.assert_allclose(cast(found, float), expected, rtol=1e-2)


@rounding_case
def test_stochastic_rounding_of_float32_params_is_none(method, mode):
    data = batches(2, method.length)
    tx = method.make(mode=mode, **method.noisy)
    plain = train(tx, mode, ragged_params(), data)
    run = train(optax_flat.stochastic_rounding(tx, key=0), mode, ragged_params(), data)
    assert_equal(run.params, plain.params)
    assert_equal(run.state.inner_state, plain.state)


@rounding_case
def test_mean_of_stochastic_rounding_is_the_update(method, mode):
    """One update from one point, by many keys, against the same one in float32."""
    tx = method.make(mode=mode)
    start, stack = ragged_params(BF16), batches(1, method.length)[0]
    wide = cast(start, jnp.float32)
    stepped = functools.partial(update, mode=mode, stack=stack, loss=in_float32)
    # Its inner points are rounded all the same, which is why the master is the oracle.
    master = optax_flat.master_weights(tx)
    _, state = stepped(master, params=start, state=master.init(start))

    @jax.jit
    @jax.vmap
    def by_key(key):
        rounding = optax_flat.stochastic_rounding(tx, key=key)
        return stepped(rounding, params=start, state=rounding.init(start))[0]

    keys = jax.random.split(jax.random.key(0), 1000)
    leaves = (by_key(keys), state.master, wide)
    moved = 0
    for found, expected, w in zip(*map(jax.tree.leaves, leaves), strict=True):
        found = np.asarray(found, float)
        spacing = np.ptp(found, axis=0)
        # A large step may miss its point, see the docstring.
        slack = 2**-8 * np.abs(expected - w) + 1e-6
        error = np.abs(found.mean(axis=0) - expected)
        assert (error <= 5 * spacing / 2 / np.sqrt(1000) + slack).all()
        moved += (spacing > 0).sum()
    assert moved > 5


@pytest.mark.parametrize("name", sorted(MOVED | {"sam", "entropy_sgd"}))
def test_stochastic_rounding_refuses_exact_points(name):
    """In a chain and inside masked too, at `init`."""
    method = next(method for method in METHODS if method.name == name)
    for mode in method.modes:
        if mode != "transparent" and name not in MOVED:
            continue
        inner = optax.chain(optax.clip(1.0), method.make(mode=mode))
        tx = optax_flat.stochastic_rounding(inner, key=0)
        with pytest.raises(ValueError, match="exact points.* use optax_flat.master_w"):
            tx.init(ragged_params(BF16))


def test_wrong_arguments():
    for make in (
        optax_flat.master_weights,
        functools.partial(optax_flat.stochastic_rounding, key=0),
    ):
        with pytest.raises(TypeError, match="`inner` must be an optax.GradientTransf"):
            make(0.1)
        with pytest.raises(ValueError, match="`params` must be passed"):
            make(optax.sgd(0.1)).init(None)
        tx = make(optax.adam(0.1))
        with pytest.raises(ValueError, match="`params` must be passed"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        with pytest.raises(TypeError, match="made by another optimizer"):
            tx.update(jnp.ones(2), tx.init(jnp.ones(3)), jnp.ones(2))
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        optax_flat.master_weights(optax.sgd(0.1), int)
    with pytest.raises(ValueError, match="`key` must be one typed key"):
        optax_flat.stochastic_rounding(optax.sgd(0.1), key=None)


def adapters(method, mode):
    """Both around a method, where both can be."""
    tx = method.make(mode=mode, **method.noisy)
    made = [optax_flat.master_weights(tx)]
    if mode != "transparent" and method.name not in MOVED:
        made.append(optax_flat.stochastic_rounding(tx, key=3))
    return made


@case
def test_jit_scan_donation_and_types(method, mode):
    data = batches(3, method.length, BF16)
    for tx in adapters(method, mode):
        start = ragged_params(BF16)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, BF16), start)
        step = jax.jit(functools.partial(update, tx, mode), donate_argnums=(0, 1))
        params, state = ragged_params(BF16), tx.init(start)
        types = jax.tree.map(jax.typeof, (params, state))
        assert jax.tree.map(jax.typeof, tx.init(abstract)) == types[1]
        for stack in data:
            params, state = step(params, state, stack)
            assert jax.tree.map(jax.typeof, (params, state)) == types

        def body(carry, stack, tx=tx):
            return update(tx, mode, *carry, stack), None

        scanned, _ = jax.jit(functools.partial(jax.lax.scan, body))(
            (start, tx.init(start)), data
        )
        assert_close(scanned[0], params, BF16)


@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if m.modes == WALK_MODES and m.name in NAMES],
    ids=lambda m: m.name,
)
def test_modes_agree_around_a_master(method):
    runs = [
        train(
            mastered(method, mode), mode, ragged_params(BF16),
            batches(4, method.length), loss=in_float32,
        )
        for mode in WALK_MODES
    ]  # fmt: skip
    assert_close(runs[0].path[-1], runs[1].path[-1], BF16)


@case
def test_resume(method, mode, tmp_path):
    """Every tool saves, in mid-walk."""
    data = by_call(method, mode, batches(4, method.length, BF16))
    half = len(data) // 2 + (mode == "transparent")
    for tx in adapters(method, mode):
        straight = train(tx, mode, ragged_params(BF16), data)
        saved = train(tx, mode, ragged_params(BF16), data[:half])[:2]
        fresh = (ragged_params(BF16), tx.init(ragged_params(BF16)))
        for number, through in enumerate(SAVERS):
            if through.__name__ == "with_numpy":  # has no bfloat16
                continue
            folder = tmp_path / f"{number}{type(saved[1]).__name__}"
            folder.mkdir()
            restored = through(saved, fresh, folder)
            assert_equal(restored, saved)
        resumed = train(tx, mode, restored[0], data[half:], restored[1])
        assert_equal((resumed.params, resumed.state), (straight.params, straight.state))


@pytest.mark.parametrize(
    ("method", "mode"), [c for c in CASES if c.values[1] == "transparent"]
)
def test_eval_params_in_mid_walk(method, mode):
    """The anchor, as the master has it, wherever the params are; also in wrappers."""
    tx = optax.chain(optax.clip(10.0), mastered(method, mode))
    params, state = ragged_params(BF16), tx.init(ragged_params(BF16))
    step = jitted_update(tx, mode, loss)
    anchor = optax_flat.eval_params(state, params)
    for stack in by_call(method, mode, batches(2, method.length, BF16)):
        (walk,) = states(state, optax_flat.TransparentState)
        evaluated = optax_flat.eval_params(state, params)
        if walk.step == 0:
            anchor = evaluated
            wide = optax_flat.eval_params(state[1].inner_state, state[1].master)
            assert_equal(anchor, cast(wide, BF16))
        assert_equal(evaluated, anchor)
        params, state, _ = step(params, state, stack)


def test_wrappers():
    """masked inside and around, MultiSteps, apply_if_finite, an average inside."""
    mask = {"layer": {"w": True, "b": False}, "scale": True}
    walk = optax_flat.entropy_sgd(0.5, num_steps=3, key=0)
    data, start = batches(2, 3, BF16), ragged_params(BF16)
    outside = optax_flat.masked(optax_flat.master_weights(walk), mask)
    inside = optax_flat.master_weights(optax_flat.masked(walk, mask))
    runs = [train(tx, "scanned", start, data) for tx in (outside, inside)]
    assert_equal(runs[0].params, runs[1].params)
    assert_equal(runs[0].params["layer"]["b"], start["layer"]["b"])
    once = optax_flat.master_weights(walk)
    plain = train(once, "scanned", start, data)
    for wrapped in (
        optax.apply_if_finite(once, 3),
        optax.MultiSteps(once, 1),
        optax_flat.master_weights(optax.MultiSteps(walk, 1)),
    ):
        assert_equal(train(wrapped, "scanned", start, data).params, plain.params)
    averaged = optax_flat.master_weights(optax_flat.swa(walk, start=0))
    run = train(averaged, "scanned", start, data)
    assert_equal(run.params, plain.params)
    mean = run.state.inner_state.average
    assert_equal(run.path[-1], cast(mean, BF16))
    assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype(jnp.float32)}


def test_mixed_leaves():
    """Only the narrow ones get a master, and only they are rounded."""
    params = {"half": jnp.ones(3, BF16), "full": jnp.ones(3)}
    grads = jax.tree.map(lambda x: -jnp.ones_like(x), params)
    tx = optax_flat.master_weights(optax.sgd(1e-3))
    state = tx.init(params)
    assert state.master["half"].dtype == jnp.float32
    assert isinstance(state.master["full"], optax.MaskedNode)
    updates, state = tx.update(grads, state, params)
    assert (updates["half"] == 0).all() and (updates["full"] == 1e-3).all()
    assert (state.master["half"] == np.float32(1.001)).all()


def test_line_search():
    """`value_fn` and `grad` of a caller in bfloat16, for an optimizer in float32."""
    tx = optax_flat.master_weights(optax.lbfgs(memory_size=3))
    step = make_train_step(in_float32, tx)
    params = ragged_params(BF16)
    state, batch = tx.init(params), batches(1, 1)[0, 0]
    values = []
    for _ in range(4):
        params, state, value = step(params, state, batch)
        values.append(float(value))
    assert values[-1] < values[0]


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_train_step(mode):
    """It works unchanged, with one minibatch or a stack, as the state says."""
    method = next(method for method in METHODS if method.name == "sam")
    tx = mastered(method, mode)
    step = make_train_step(in_float32, tx, mode=mode, donate=True)
    params, batch = ragged_params(BF16), batches(1, 1)[0, 0]
    state = tx.init(params)
    for _ in range(1 if mode == "scanned" else 2):
        params, state, value = step(params, state, batch)
    by_hand = train(
        tx, mode, ragged_params(BF16), jnp.stack([batch, batch])[None], loss=in_float32
    )
    assert_close(params, by_hand.params, BF16)
    assert value.dtype == jnp.float32


@pytest.mark.parametrize(
    "kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"]
)
@pytest.mark.parametrize(
    ("method", "mode"),
    [c for c in CASES if c.values[0].name in {"sam", "entropy_sgd", "ema_weights"}],
)
def test_shardings_are_kept(method, mode, kind):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType[kind],))
    start = {"w": jnp.linspace(-1.0, 1.0, 64).reshape(8, 8).astype(BF16)}

    def bowl(params, batch):
        return jnp.sum((cast(params["w"], jnp.float32) - 0.3) ** 2) + jnp.sum(batch)

    for tx in adapters(method, mode):
        step = functools.partial(update, tx, mode, loss=bowl)
        data = jnp.zeros((method.length, 2))
        expected = jax.jit(step)(start, tx.init(start), data)
        spread = jax.device_put(start, jax.NamedSharding(mesh, jax.P("model")))
        with jax.set_mesh(mesh):
            state = jax.jit(tx.init)(spread)
            after = jax.jit(step)(spread, state, data)
        for tree in (state, after):
            for leaf in jax.tree.leaves(tree):
                if leaf.shape[-2:] == (8, 8):
                    assert leaf.sharding.spec[leaf.ndim - 2] == "model"
        assert_close(after[0], expected[0], BF16)


def test_rounding_is_that_of_one_device():
    """The same bits wherever the shards are, and no collectives."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax_flat.stochastic_rounding(optax.sgd(1e-3), key=0)
    params = jnp.linspace(1.0, 2.0, 4096).astype(BF16)
    step = jax.jit(tx.update)
    one, _ = step(params, tx.init(params), params)
    spread = jax.device_put(params, jax.NamedSharding(mesh, jax.P("model")))
    arguments = spread, tx.init(spread), spread
    eight, _ = step(*arguments)
    assert_equal(jax.device_get(eight), jax.device_get(one))
    assert not hlo.costs(hlo.compiled(step, *arguments)).collectives


def test_rounding_draws_are_not_a_methods_own():
    """Given one key, the noise of a sampler and the rounding do not know each other."""
    n = 20_000
    params = jnp.ones(n, BF16)
    sampler = optax_flat.add_langevin_noise(1e-5, 1.0, key=0)
    wide = params.astype(jnp.float32)
    noise, _ = sampler.update(jnp.zeros(n), sampler.init(wide), wide)
    tx = optax_flat.stochastic_rounding(sampler, key=0)
    found, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    error = np.asarray(found, float) - np.asarray(noise, float)
    assert error.std() > 1e-3
    assert abs(np.corrcoef(error, noise)[0, 1]) < 5 / np.sqrt(n)


@pytest.mark.parametrize("mode", WALK_MODES)
def test_loss_scaling(mode):
    """float16 gradients of 1e-8 are zero, unless scaled; those that overflow skip."""

    def scaled(params, batch):
        return batch * jnp.float16(1e-4) * jnp.sum(params * jnp.float16(1e-4))

    def run(scale):
        sam = optax_flat.sam(
            optax.sgd(1e5), rho=0.1, mode=mode, skip_nonfinite=True,
            inner_transform=optax.scale(1 / scale),
        )  # fmt: skip
        step = make_train_step(scaled, optax_flat.master_weights(sam))
        params, factor = (
            jnp.ones(4, jnp.float16),
            jnp.float32(scale).astype(jnp.float16),
        )
        state = optax_flat.master_weights(sam).init(params)
        for _ in range(1 if mode == "scanned" else 2):
            params, state, _ = step(params, state, factor)
        return params, int(state.inner_state.skipped)

    params, skipped = run(1.0)
    assert (params == 1).all() and not skipped
    params, skipped = run(2.0**12)
    assert_close(params, jnp.full(4, 1 - 1e5 * 1e-8), jnp.float16)
    assert not skipped
    params, skipped = run(2.0**20)
    assert (params == 1).all() and skipped == 1


def test_rounded_like_is_a_cast():
    """Subnormal numbers of float16 too."""
    exponents = np.linspace(-26, 15.9, 5000)
    x = jnp.asarray(np.outer([1, -1], 2.0**exponents), jnp.float32)
    for dtype in HALVES:
        there_and_back = np.asarray(x.astype(dtype)).astype(np.float32)
        found = jax.jit(trees.rounded_like)(x, x.astype(dtype))
        np.testing.assert_array_equal(found, there_and_back)
