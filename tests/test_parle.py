"""What replicas do together; the contract tests run one of them alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import Quadratic, gibbs_mean_step
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from problem import (
    assert_close,
    assert_equal,
    batches,
    largest_difference,
    loss,
    ragged_params,
    train,
    update,
)

import optax_flat
from optax_flat.training import make_train_step

MODES = ["scanned", "transparent"]
AXIS = "replica"
REPLICAS = 3
WALK = {"num_steps": 4, "gamma": 0.5, "averaging": 0.6}
COUPLED = WALK | {"coupling": 0.8, "momentum": 0.9, "key": 0}


@functools.cache
def parle(learning_rate=0.5, axis_name=AXIS, **arguments):
    return optax_flat.parle(learning_rate, axis_name=axis_name, **COUPLED | arguments)


def stacked(replicas=REPLICAS):
    """Replicas that start at places of their own."""
    shifts = jnp.linspace(-0.2, 0.4, replicas)
    return jax.vmap(lambda s: jax.tree.map(lambda x: x + s, ragged_params()))(shifts)


def data_of(replicas=REPLICAS, updates=3, length=4):
    """Minibatches [updates, replicas, length, ...], each replica's own."""
    data = batches(updates, replicas * length)
    return data.reshape(updates, replicas, length, *data.shape[2:])


@functools.cache
def runner(tx, mode, loss):
    """All updates of stacked params on [updates, replicas, ...], one program."""

    def run(params, data):
        def body(carry, stack):
            step = functools.partial(update, tx, mode, loss=loss)
            return jax.vmap(step, axis_name=AXIS)(*carry, stack), None

        state = jax.vmap(tx.init, axis_name=AXIS)(params)
        return jax.lax.scan(body, (params, state), data)[0]

    return jax.jit(run)


def together(tx, mode, params, data, loss=loss):
    """Params and state after all updates, the replica axis in front."""
    return runner(tx, mode, loss)(params, data)


def evaluated(state, params):
    return jax.vmap(optax_flat.eval_params)(state, params)


def pick(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def own_key(i):
    return jax.random.fold_in(jax.random.key(0), i)


def entropy_sgd(key):
    return optax_flat.entropy_sgd(
        0.5, momentum=0.9, noise=0.1, key=key, scoping=1e-3, **WALK
    )


def test_one_replica_is_entropy_sgd():
    """Noise and coupling on: the spring to a mean of one has no length."""
    data = data_of(1)
    params, state = together(parle(noise=0.1), "scanned", stacked(1), data)
    alone = train(entropy_sgd(own_key(0)), "scanned", pick(stacked(1), 0), data[:, 0])
    assert_close(pick(params, 0), alone.params)
    assert_close(pick(evaluated(state, params), 0), alone.params)
    # Without an axis not even the key differs.
    unnamed = train(
        parle(noise=0.1, axis_name=None), "scanned", ragged_params(), data[:, 0]
    )
    expected = train(entropy_sgd(0), "scanned", ragged_params(), data[:, 0])
    assert_close(unnamed.params, expected.params)


def test_uncoupled_replicas_are_independent():
    """Each with a key of its own, so that equal replicas part on equal minibatches."""
    data = data_of()
    tx = parle(noise=0.1, coupling=0.0)
    params, _ = together(tx, "scanned", stacked(), data)
    for i in range(REPLICAS):
        alone = train(
            entropy_sgd(own_key(i)), "scanned", pick(stacked(), i), data[:, i]
        )
        assert_close(pick(params, i), alone.params)
    coupled, _ = together(parle(noise=0.1), "scanned", stacked(), data)
    assert largest_difference(params, coupled) > 1e-2

    equal = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), stacked())
    repeated = jnp.broadcast_to(data[:, :1], data.shape)
    parted, _ = together(tx, "scanned", equal, repeated)
    assert largest_difference(pick(parted, 0), pick(parted, 1)) > 1e-3


@pytest.mark.parametrize("center_step", [1.0, 0.4])
def test_one_step_without_spring_is_elastic_averaging(center_step):
    """The walk divides d by nothing: its step size multiplies gradients only."""
    arguments = {"center_step": center_step, "axis_name": AXIS}
    walk = optax_flat.parle(
        0.5, num_steps=1, step_size=0.2, gamma=0.0, averaging=1.0, momentum=0.0,
        coupling=0.8 * 0.2, key=0, **arguments,
    )  # fmt: skip
    plain = optax_flat.elastic_averaging(
        optax.sgd(0.5 * 0.2), coupling=0.8, **arguments
    )
    data = data_of(length=1)
    ours, state = together(walk, "scanned", stacked(), data)
    params, plain_state = together(plain, "transparent", stacked(), data)
    assert_close(ours, params)
    centers = evaluated(state, ours), evaluated(plain_state, params)
    assert_close(*centers)
    mean = jax.tree.map(lambda x: jnp.broadcast_to(x.mean(0), x.shape), params)
    if center_step == 1.0:
        assert_close(centers[1], mean)
    else:
        assert largest_difference(centers[1], mean) > 1e-3


def test_steps_between_communications_are_elastic_averaging_with_a_period():
    """As `elastic_averaging` says: tau steps of SGD, then the spring."""
    tau, rate, coupling = 4, 0.2, 0.7
    walk = optax_flat.parle(
        1.0, num_steps=tau, step_size=rate, gamma=0.0, averaging=1.0, momentum=0.0,
        coupling=rate * coupling, axis_name=AXIS, key=0,
    )  # fmt: skip
    data = data_of(length=tau)
    ours, _ = together(walk, "scanned", stacked(), data)

    def epoch(x, stack):
        spring = jax.tree.map(lambda x: rate * coupling * (x - x.mean(0)), x)
        for k in range(tau):
            grads = jax.vmap(jax.grad(loss))(x, stack[:, k])
            x = optax.tree.add_scale(x, -rate, grads)
        return optax.tree.sub(x, spring), None

    expected, _ = jax.lax.scan(epoch, stacked(), data)
    assert_close(ours, expected)


def test_mean_and_spread_contract_at_their_own_rates(x64):
    """On a quadratic the mean goes like Entropy-SGD; the replicas' differences from it
    shrink by I - rate (M + coupling), x - mu = M (x - minimum)."""
    rng = np.random.default_rng(3)
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    q = Quadratic(
        rotation @ np.diag([3.0, 1.0, 0.3, 0.05]) @ rotation.T,
        np.array([1.0, -2.0, 0.5, 3.0]),
    )
    walk = {"num_steps": 7, "step_size": 0.15, "gamma": 0.8, "averaging": 0.6}
    rate, coupling, updates = 0.5, 0.9, 3
    M = np.column_stack([gibbs_mean_step(q, q.c + e, **walk) for e in np.eye(4)])
    x = rng.normal(size=(REPLICAS, 4))
    tx = optax_flat.parle(
        rate, coupling=coupling, momentum=0.0, scoping=0.0, axis_name=AXIS, key=0,
        **walk,
    )  # fmt: skip
    params, state = together(
        tx, "scanned", jnp.asarray(x), jnp.zeros((updates, REPLICAS, 7)),
        loss=lambda p, batch: (p - q.c) @ q.H @ (p - q.c) / 2,
    )  # fmt: skip
    power = lambda A: np.linalg.matrix_power(A, updates)
    mean = q.c + power(np.eye(4) - rate * M) @ (x.mean(0) - q.c)
    spread = (x - x.mean(0)) @ power(np.eye(4) - rate * (M + coupling * np.eye(4))).T
    np.testing.assert_allclose(params.mean(0), mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(params - params.mean(0), spread, rtol=0, atol=1e-12)
    center = evaluated(state, params)
    np.testing.assert_allclose(center, np.tile(mean, (3, 1)), rtol=0, atol=1e-12)


def test_modes_agree_and_evaluate_at_the_mean_at_every_moment():
    data = data_of()
    scanned, transparent = (
        together(parle(noise=0.1, mode=mode), mode, stacked(), data) for mode in MODES
    )
    assert_close(scanned[0], transparent[0])
    centers = [evaluated(s, p) for p, s in (scanned, transparent)]
    assert_close(*centers)
    mean = jax.tree.map(lambda x: x.mean(axis=0), scanned[0])
    assert_close(pick(centers[0], 0), mean)
    for i in range(1, REPLICAS):
        assert_close(pick(centers[0], i), pick(centers[0], 0))
    # One gradient later the params have left for the next walk.
    tx = parle(noise=0.1, mode="transparent")
    step = functools.partial(update, tx, "transparent")
    params, state = jax.jit(jax.vmap(step, axis_name=AXIS))(
        *transparent, data[0, :, :1]
    )
    assert largest_difference(params, transparent[0]) > 1e-3
    assert_equal(evaluated(state, params), centers[1])


def test_center_of_masked_params():
    tx = optax_flat.masked(parle(), {"layer": {"w": True, "b": False}, "scale": True})
    params, state = together(tx, "scanned", stacked(), data_of(updates=2))
    center = evaluated(state, params)
    assert_equal(params["layer"]["b"], stacked()["layer"]["b"])
    assert_equal(center["layer"]["b"], params["layer"]["b"])
    np.testing.assert_allclose(center["scale"], params["scale"].mean(), rtol=1e-6)


def test_all_replicas_skip_what_one_of_them_cannot_use():
    tx = parle(skip_nonfinite=True)
    data = data_of()
    poisoned = data.at[1, 2, 3].set(jnp.nan)  # the last gradient of one replica
    params, state = together(tx, "scanned", stacked(), poisoned)
    assert state.skipped.tolist() == [1, 1, 1]
    without, _ = together(tx, "scanned", stacked(), data[jnp.array([0, 2])])
    assert_close(params, without)


def test_train_step():
    """`make_train_step` is one replica's step, batch statistics included."""

    def with_aux(params, batch, aux):
        return loss(params, batch), {"seen": aux["seen"] + 1}

    data = data_of()
    expected, _ = together(parle(), "scanned", stacked(), data)
    tx = parle(has_aux=True)
    step = jax.vmap(make_train_step(with_aux, tx, has_aux=True), axis_name=AXIS)
    params = stacked()
    state = jax.vmap(tx.init, axis_name=AXIS)(params)
    aux = {"seen": jnp.zeros(REPLICAS, jnp.int32)}
    for stack in data:
        params, state, losses, aux = step(params, state, stack, aux)
    assert_close(params, expected)
    assert losses.shape == (REPLICAS,)
    assert aux["seen"].tolist() == [3, 3, 3]


def collectives(compiled):
    """Operations that cross devices, and whether each update meets them: in the main
    computation, not in the body of a loop or in a branch."""
    found = []
    for computation in compiled.as_text().split("\n\n"):
        names = re.findall(
            r" (all-[a-z]+|collective-\w+|reduce-scatter)\(", computation
        )
        found += [(name, computation.startswith("ENTRY")) for name in names]
    return found


def on_devices(function, mesh, check_vma):
    """`function` of one replica, a replica per device."""

    def one(*blocks):
        out = function(*jax.tree.map(lambda x: x[0], blocks))
        return jax.tree.map(lambda x: x[None], out)

    over = PartitionSpec(AXIS)
    return jax.shard_map(
        one, mesh=mesh, in_specs=over, out_specs=over, check_vma=check_vma
    )


def vectorized(function, mesh):
    return jax.vmap(function, axis_name=AXIS)


LAYOUTS = {
    "vmap": vectorized,
    "shard_map": functools.partial(on_devices, check_vma=True),
    "unchecked_shard_map": functools.partial(on_devices, check_vma=False),
}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_all_reduce_per_update(layout):
    """A replica per device: one message per update, outside of the walk, and nothing
    of the other replicas is kept."""
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec(AXIS))
    tx = parle(noise=0.1)
    step = functools.partial(update, tx, "scanned")
    init, step = (jax.jit(LAYOUTS[layout](f, mesh)) for f in (tx.init, step))
    params, data = jax.device_put((stacked(8), data_of(8)[0]), spread)
    state = init(params)
    compiled = step.lower(params, state, data).compile()
    assert collectives(compiled) == [("all-reduce", True)]
    params, state = compiled(params, state, data)
    floats = [x for x in jax.tree.leaves((params, state)) if x.dtype == jnp.float32]
    assert len(floats) == 3 * len(jax.tree.leaves(params))  # offset and momentum too
    for leaf in floats:
        assert leaf.sharding.is_equivalent_to(spread, leaf.ndim)
    one_device = tx, "scanned", stacked(8), data_of(8, updates=1)
    assert_close(jax.device_get(params), jax.device_get(together(*one_device)[0]))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_replicas_of_sharded_params():
    """Four replicas on two devices each: still one message, and no gathering."""
    mesh = jax.make_mesh((4, 2), (AXIS, "shard"), axis_types=(AxisType.Auto,) * 2)
    over = NamedSharding(mesh, PartitionSpec(AXIS, "shard"))
    tx = parle()
    step = functools.partial(
        update, tx, "scanned", loss=lambda x, batch: jnp.mean(jnp.cosh(x - 0.5) + batch)
    )
    step = jax.jit(jax.vmap(step, axis_name=AXIS))
    params = jax.device_put(jnp.linspace(-1.0, 1.0, 64).reshape(4, 16), over)
    arguments = params, jax.vmap(tx.init, axis_name=AXIS)(params), jnp.zeros((4, 4))
    compiled = step.lower(*arguments).compile()
    assert collectives(compiled) == [("all-reduce", True)]
    for leaf in jax.tree.leaves(compiled(*arguments)):
        if leaf.shape == params.shape:
            assert leaf.sharding.is_equivalent_to(over, leaf.ndim)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_transparent_replicas_speak_once_per_walk():
    """The message is in the branch that makes the outer update."""
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(AxisType.Auto,))
    tx = parle(noise=0.1, mode="transparent")

    def step(params, state, batch):
        return update(tx, "transparent", params, state, batch[None])

    init, step = (jax.jit(LAYOUTS["shard_map"](f, mesh)) for f in (tx.init, step))
    spread = NamedSharding(mesh, PartitionSpec(AXIS))
    params, data = jax.device_put((stacked(8), data_of(8)[0]), spread)
    state = init(params)
    compiled = step.lower(params, state, data[:, 0]).compile()
    assert collectives(compiled) == [("all-reduce", False)]
    for k in range(data.shape[1]):
        params, state = compiled(params, state, data[:, k])
    one_device = parle(noise=0.1), "scanned", stacked(8), data_of(8, updates=1)
    assert_close(jax.device_get(params), jax.device_get(together(*one_device)[0]))


def test_two_named_axes_are_one_of_their_product():
    def run(names, x):
        tx = optax_flat.elastic_averaging(optax.sgd(0.1), coupling=4.0, axis_name=names)

        def step(x):
            updates, _ = tx.update(jnp.sin(x), tx.init(x), x)
            return x + updates

        for name in names:
            step = jax.vmap(step, axis_name=name)
        return step(x)

    x = jnp.linspace(-1.0, 2.0, 6)
    assert_close(run(("a", "b"), x.reshape(2, 3)).ravel(), run(("a",), x))


def test_axis_without_that_name():
    def make(axis_name):
        return optax_flat.elastic_averaging(
            optax.sgd(0.1), coupling=1.0, axis_name=axis_name
        )

    params = jnp.ones(3)
    words = "`axis_name` is 'copy', but no axis has that name here. Call `init`"
    with pytest.raises(ValueError, match=words):
        make("copy").init(params)
    with pytest.raises(ValueError, match=words):
        make("copy").update(params, make(None).init(params), params)


def test_refuses_a_walk_as_outer_optimizer():
    walk = optax_flat.entropy_sgd(0.1, key=0)
    tx = optax_flat.elastic_averaging(walk, coupling=1.0, axis_name=None)
    with pytest.raises(ValueError, match="`outer` is a walk .* to the walk instead"):
        tx.init(ragged_params())


def test_published_schedules(x64):
    """min(0.01 growth^t, 1) and min(0.01 L n growth^t, 10), as `parle` writes them."""
    L, n, growth = 25, 3, 1 + 0.5 / 40
    gamma = optax.exponential_decay(0.01, 1, growth, end_value=1.0)
    coupling = optax.exponential_decay(0.01 * L * n, 1, growth, end_value=10.0)
    t = np.arange(1000)
    expected = np.minimum(0.01 * growth**t, 1.0), np.minimum(0.75 * growth**t, 10.0)
    np.testing.assert_allclose((gamma(t), coupling(t)), expected, rtol=1e-11)
    assert expected[0][-1] == 1.0 and expected[1][-1] == 10.0
