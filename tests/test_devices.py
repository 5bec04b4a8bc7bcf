"""Every method on eight devices, on every kind of mesh: what one device gives."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import METHODS
from jax.sharding import AxisType, NamedSharding
from problem import assert_close, update

import optax_flat
from benchmarks import hlo
from optax_flat.training import make_train_step

P = jax.P
pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices, which conftest gives on CPU"
)
AXES = ("data", "model")  # 4 x 2 devices
# All ways to lay out params, side by side in one model: leaves of one shape that differ
# in nothing else, and examples that are spread as data parallelism wants it.
SPECS = {
    "data_parallel": P(),
    "fsdp": P(AXES),
    "tensor_parallel": P(None, "model"),
    "bias": P("model"),
}
EXAMPLES = P(None, "data")  # of minibatches [length, examples, features]
CASES = [
    pytest.param(
        method, mode, id=f"{method.name}-{mode}",
        # Of the pairs of rules only ZSharp looks at all leaves in more than a norm.
        marks=pytest.mark.slow
        if not method.is_tried(mode) and (method.name, mode) != ("zsharp", "scanned")
        else [],
    )
    for method in METHODS
    for mode in method.modes
]  # fmt: skip
SLOW = pytest.mark.slow
EXPLICIT = {
    "entropy_sgd-scanned", "entropy_sgd-transparent", "looksam-scanned",
    "ensemble_kalman-forward",
}  # fmt: skip
every_case = pytest.mark.parametrize(("method", "mode"), CASES)
noisy_case = pytest.mark.parametrize(
    ("method", "mode"),
    [case for case in CASES if case.values[0].has_key and case.values[1] != "forward"],
)


def params() -> dict[str, jax.Array]:
    kernel = jnp.linspace(-0.5, 0.5, 64).reshape(8, 8)
    return {
        "data_parallel": kernel,
        "fsdp": kernel.T,
        "tensor_parallel": kernel[::-1],
        "bias": jnp.linspace(-0.2, 0.3, 8),
    }


def minibatches(length: int) -> jax.Array:
    shape = (length, 16, 8)
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def loss(params, batch, gather=lambda leaf: leaf):
    hidden = jnp.tanh(batch @ params["data_parallel"]) @ gather(params["fsdp"])
    hidden = jnp.tanh(hidden @ params["tensor_parallel"] + params["bias"])
    return jnp.mean((hidden.sum(-1) - batch[:, 0]) ** 2)


def explicit_loss(params, batch):
    """An Explicit mesh wants to be told that FSDP gathers what it uses."""
    return loss(params, batch, lambda leaf: jax.sharding.reshard(leaf, P()))


def make(method, mode, noisy, **overrides):
    tx = method.make(mode=mode, **(method.noisy if noisy else {}) | overrides)
    return optax.with_extra_args_support(tx)


@functools.cache
def on_one_device(name, mode, noisy):
    """Params and state after one update."""
    method = next(method for method in METHODS if method.name == name)
    tx = make(method, mode, noisy)
    step = jax.jit(functools.partial(update, tx, mode, loss=loss))
    return jax.device_get(step(params(), tx.init(params()), minibatches(method.length)))


def floats(tree: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def assert_matches(found, expected):
    # x - mu cancels digits; RMSProp's learning rate / eps = 100 brings them back.
    assert_close(floats(found), floats(expected), factor=10)


def assert_sharded(tree, mesh):
    """Params, and all buffers that are like them or stacks of them, lie as they should.

    Returns:
      How many they are.
    """
    shapes = {name: leaf.shape for name, leaf in params().items()}
    found = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        where, name = jax.tree_util.keystr(path), getattr(path[-1], "key", None)
        if name not in shapes or not leaf.ndim:  # one number stands for a buffer
            assert leaf.size < 8, where  # nothing else is large
            continue
        stacked = leaf.ndim - len(shapes[name])
        assert leaf.shape[stacked:] == shapes[name]
        expected = NamedSharding(mesh, P(*[None] * stacked, *SPECS[name]))
        # What is replicated may be sharded by the compiler, never the other way round.
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim) or (
            expected.is_fully_replicated
        ), where
        found += 1
    return found


@pytest.mark.parametrize(
    ("method", "mode", "kind"),
    [
        pytest.param(
            *case.values, kind, id=f"{kind}-{case.id}",
            marks=case.marks if kind == "Auto" or case.id in EXPLICIT else SLOW,
        )
        for case in CASES
        for kind in ("Auto", "Explicit")
    ],
)  # fmt: skip
def test_meshes(method, mode, kind):
    """`jit` does the rest: state and params stay where they are, the noise its own."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType[kind],) * 2)
    tx = make(method, mode, noisy=True)
    of_mesh = {"Auto": loss, "Explicit": explicit_loss}[kind]
    step = functools.partial(update, tx, mode, loss=of_mesh)
    with jax.set_mesh(mesh):
        start = jax.device_put(params(), SPECS)
        data = jax.device_put(minibatches(method.length), EXAMPLES)
        state = jax.jit(tx.init)(start)
        after = jax.jit(step)(start, state, data)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, (start, state))
    buffers = assert_sharded(state, mesh)
    assert assert_sharded(after, mesh) == buffers + len(SPECS)
    assert_matches(after, on_one_device(method.name, mode, True))


def averaged(loss, axis):
    """The mean of a loss over an axis of `jax.shard_map`, checked or not.

    Without `pcast` the check would make a sum of the gradients of what is everywhere.
    """

    def value_and_grads(params, batch):
        params = jax.lax.pcast(params, axis, to="varying")
        return jax.lax.pmean(jax.value_and_grad(loss)(params, batch), axis)

    mean = jax.custom_vjp(lambda params, batch: value_and_grads(params, batch)[0])
    mean.defvjp(
        lambda params, batch: (*value_and_grads(params, batch), batch)[:2],
        lambda grads, weight: (optax.tree.scale(weight, grads), None),
    )
    return mean


@every_case
@pytest.mark.parametrize(
    "check_vma",
    [pytest.param(True, id="vma"), pytest.param(False, id="no_vma", marks=SLOW)],
)
def test_shard_map(method, mode, check_vma):
    """Examples spread by hand, gradients averaged, everything else on all devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = make(method, mode, noisy=False)
    step = functools.partial(update, tx, mode, loss=averaged(loss, "data"))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(None, "data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def run(params, data):
        return step(params, tx.init(params), data)

    after = run(params(), minibatches(method.length))
    assert_matches(after, on_one_device(method.name, mode, False))


@noisy_case
def test_shards_with_a_key_each(method, mode):
    """Shards of params that begin alike part, update after update."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("data"))

    def own():
        key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("data"))
        return make(method, mode, noisy=True, key=key)

    def with_axis(state):  # numbers and keys too are each shard's own
        return jax.tree.map(lambda leaf: leaf[None], state)

    def init(params):
        return with_axis(own().init(params))

    def step(params, state, data):
        state = jax.tree.map(lambda leaf: leaf[0], state)
        params, state = update(own(), mode, params, state, data, loss=well)
        return params, with_axis(state)

    def well(params, batch):
        return 1e-3 * jnp.sum(jnp.cosh(params) - batch)  # the noise is larger

    start = jnp.ones(8 * 16)
    state = jax.jit(spread(init, in_specs=P("data")))(start)
    step = jax.jit(spread(step, in_specs=(P("data"), P("data"), P())))
    once, state = step(start, state, jnp.zeros(method.length))
    twice, _ = step(once, state, jnp.zeros(method.length))
    for points in (once - start, twice - once):
        rows = points.reshape(8, 16)
        assert len(np.unique(rows.round(6), axis=0)) == 8


def local_gradient(params, batch):
    """That of the examples on one device, in `jax.shard_map`, checked or not."""
    return jax.grad(loss)(jax.lax.pcast(params, "data", to="varying"), batch)


AVERAGE = optax.stateless(lambda grads, _: jax.lax.pmean(grads, "data"))
SGD = optax.sgd(0.1, momentum=0.9)


def by_hand(tx, check_vma, updates, grad_fn):
    """Params after updates on all examples, which eight devices share by hand."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    def run(params, batch):
        state = tx.init(params)
        for _ in range(updates):
            steps, state = tx.update(
                local_gradient(params, batch), state, params,
                grad_fn=lambda point, _: grad_fn(point, batch),
            )  # fmt: skip
            params = optax.apply_updates(params, steps)
        return params

    return run(params(), minibatches(1)[0])


def by_jit(tx, updates=1, devices=8, kind="Auto", **arguments):
    """Params and state after updates in `make_train_step`, and one more call."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType[kind],),
                         devices=jax.devices()[:devices])  # fmt: skip
    step = make_train_step(loss, tx, **arguments)
    point = jax.device_put(params(), NamedSharding(mesh, P()))
    batch = jax.device_put(minibatches(1)[0], NamedSharding(mesh, P("data")))
    state = jax.jit(tx.init)(point)
    for _ in range(updates):
        point, state, _ = step(point, state, batch)
    return point, state, (step, point, state, batch)


every_check = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


@every_check
@pytest.mark.parametrize("name", ["sam", "gsam", "looksam", "ae_sam", "friendly_sam"])
def test_global_perturbation_in_shard_map(name, check_vma):
    """`pmean` as `inner_transform` averages both gradients: what one device gives."""
    factory = getattr(optax_flat, name)
    found = by_hand(
        factory(SGD, rho=0.5, inner_transform=AVERAGE), check_vma, 3, local_gradient
    )
    expected, _, _ = by_jit(factory(SGD, rho=0.5), 3, devices=1)
    assert_close(found, jax.device_get(expected), factor=10)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@every_check
def test_perturbation_per_device_is_a_group_per_device(check_vma, kind):
    """m-SAM: `pmean` first in `outer`, or as many groups as devices under `jit`."""
    tx = optax_flat.sam(optax.chain(AVERAGE, SGD), rho=0.5)
    # The perturbed point is each device's own already: no pcast.
    found = by_hand(tx, check_vma, 3, jax.grad(loss))
    groups = optax_flat.sam(SGD, rho=0.5, num_groups=8)
    grouped, _, _ = by_jit(groups, 3, kind=kind, num_groups=8)
    assert_close(found, jax.device_get(grouped), factor=10)
    whole, _, _ = by_jit(optax_flat.sam(SGD, rho=0.5), 3)
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, whole)
    assert max(jax.tree.leaves(difference)) > 1e-3


def test_each_device_may_decide_for_itself():
    """AE-SAM by the norms of the devices' own gradients, which the checks let pass."""
    rule = optax_flat.descent.when_large(0.9, 0.0)
    tx = optax_flat.sam(optax.chain(AVERAGE, SGD), rho=0.5, descent=rule)
    found = [by_hand(tx, check, 3, jax.grad(loss)) for check in (True, False)]
    assert_close(*found)
    alone = by_hand(optax.chain(AVERAGE, SGD), False, 3, jax.grad(loss))
    assert max(jax.tree.leaves(jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(), found[0], alone))) > 1e-3  # fmt: skip


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_groups_walk_without_the_others(kind):
    """One all-reduce of the params' size per update, not one for each gradient."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params()))

    def communicated(tx, **arguments):
        *_, call = by_jit(tx, kind=kind, **arguments)
        return hlo.total_bytes(hlo.costs(hlo.compiled(*call)))

    groups = optax_flat.sam(SGD, rho=0.5, num_groups=8)
    assert size <= communicated(groups, num_groups=8) < size + 64
    assert 2 * size <= communicated(optax_flat.sam(SGD, rho=0.5)) < 2 * size + 64


@pytest.mark.parametrize("name", ["looksam", "ae_sam"])
@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_skipped_gradients_are_skipped_on_all_devices(name, mode):
    tx = getattr(optax_flat, name)(optax.sgd(0.01), rho=0.1, mode=mode)
    eight, state, _ = by_jit(tx, 9)
    one, expected, _ = by_jit(tx, 9, devices=1)
    assert_close(floats(jax.device_get((eight, state))), floats(jax.device_get(
        (one, expected))), factor=10)  # fmt: skip
    count = int(state.gradient_evaluations)
    assert count == int(expected.gradient_evaluations)
    assert 9 <= count < 18
