"""What must not be lost: extra arguments, the anchor, a run that goes wrong."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from problem import assert_close, assert_equal, largest_difference

import optax_flat
from optax_flat.training import make_train_step

MODES = ["scanned", "transparent"]
every_mode = pytest.mark.parametrize("mode", MODES)


def square(params):
    return jnp.sum(params**2) / 2


GRAD = jax.grad(square)


def run(tx, params, grads, state=None, **extra):
    """One call of `update` for each gradient."""
    state = tx.init(params) if state is None else state
    for g in grads:
        g = GRAD(params) if g is None else jnp.full_like(params, g)
        updates, state = tx.update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


# Extra arguments


def recording(seen):
    """An optimizer that writes the extra arguments that it is given down."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    init = lambda params: optax.EmptyState()
    return optax.GradientTransformationExtraArgs(init, update)


WALKS = {
    "sam": optax_flat.sam,
    "local_entropy": functools.partial(optax_flat.local_entropy, num_steps=2, key=0),
    "sampa": optax_flat.sampa,
    "lookbehind_sam": functools.partial(optax_flat.lookbehind_sam, num_steps=1),
}


@every_mode
@pytest.mark.parametrize("walk", WALKS)
def test_extra_arguments_reach_both_optimizers(walk, mode):
    outer, inner = [], []
    tx = WALKS[walk](recording(outer), inner_transform=recording(inner), mode=mode)
    x = jnp.array([1.0, -2.0])
    extra = {"value": square(x), "grad": GRAD(x), "value_fn": square, "mine": "x"}
    more = {"grad_fn": lambda p, i: GRAD(p)} if mode == "scanned" else {}
    run(tx, x, [None] * (1 if mode == "scanned" else 2), **extra, **more)
    for seen in (outer, inner):
        assert seen
        for arguments in seen:
            assert arguments.keys() == extra.keys()
            assert arguments["value_fn"](x) == square(x)


LOSS_READERS = {
    "reduce_on_plateau": optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "momo": optax.contrib.momo(),
    "polyak_sgd": optax.polyak_sgd(),
    "lbfgs": optax.lbfgs(),
    "loss_slope": optax.chain(
        optax.sgd(0.1), optax_flat.scale_by_loss_slope(3, factor=0.5)
    ),
}


@every_mode
@pytest.mark.parametrize("outer", LOSS_READERS)
def test_optimizers_that_read_the_loss_may_be_outside(outer, mode):
    tx = optax_flat.sam(LOSS_READERS[outer], rho=0.01, mode=mode)
    step = make_train_step(lambda p, batch: jnp.sum((p - batch) ** 2), tx)
    params = jnp.array([3.0, -2.0])
    state = tx.init(params)
    batch, losses = jnp.array([1.0, 0.5]), []
    for _ in range(8):
        params, state, loss = step(params, state, batch)
        losses.append(loss)
    assert losses[-1] < losses[0]


def test_bfloat16_params_give_the_loss_functions_of_the_caller():
    """What the outer optimizer asks is asked at points in the params' dtype."""
    seen = []

    def value_fn(params):
        seen.append(params.dtype)
        return jnp.sum(params.astype(jnp.float32) ** 2)

    x = jnp.array([1.0, -2.0], jnp.bfloat16)
    tx = optax_flat.sam(optax.lbfgs())
    grads = jax.grad(value_fn)(x)
    updates, _ = tx.update(
        grads, tx.init(x), x, value=value_fn(x), grad=grads, value_fn=value_fn,
        grad_fn=lambda p, i: jax.grad(value_fn)(p),
    )  # fmt: skip
    assert updates.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}


def test_an_error_of_the_users_stays_what_it_is():
    class MineError(ValueError):
        pass

    def grad_fn(params, batch):
        raise MineError("mine")

    tx = optax_flat.sam(optax.sgd(0.1))
    x = jnp.ones(2)
    with pytest.raises(MineError, match="mine"):
        tx.update(x, tx.init(x), x, grad_fn=grad_fn)


# Accumulation


def test_averages_count_updates_and_not_micro_batches():
    steps = optax.MultiSteps(optax.sgd(0.1), 4)
    makers = {
        "ema": lambda inner: optax_flat.ema_weights(inner, decay=0.9),
        "swa": lambda inner: optax_flat.swa(inner, start=5),
        "lawa": lambda inner: optax_flat.lawa(inner, k=3),
    }
    x = jnp.zeros(1)
    for make in makers.values():
        alone = make(optax.sgd(0.1))
        expected = optax_flat.eval_params(*reversed(run(alone, x, [1.0] * 10)))
        for inner in (steps, steps.gradient_transformation()):
            params, state = run(make(inner), x, [1.0] * 40)
            assert int(state.count) == 10
            assert_close(optax_flat.eval_params(state, params), expected)


def test_accumulation_around_a_scanned_walk_is_refused():
    """`grad_fn` knows the last micro-batch only."""
    x, batch = jnp.ones(2), jnp.zeros(2)
    loss = lambda p, batch: jnp.sum((p - batch) ** 2)
    tx = optax.MultiSteps(optax_flat.sam(optax.sgd(0.1)), 2)
    with pytest.raises(ValueError, match='MultiSteps.*mode="transparent"'):
        make_train_step(loss, tx)(x, tx.init(x), batch)
    tx = optax.MultiSteps(optax_flat.sam(optax.sgd(0.1), mode="transparent"), 2)
    params, state, step = x, tx.init(x), make_train_step(loss, tx)
    for micro in (batch, batch + 1.0) * 2:
        params, state, _ = step(params, state, micro)
    w = x - 0.5  # the gradient of both micro-batches is 2 (x - 1/2)
    there = w + 0.05 * w / jnp.linalg.norm(w)
    assert_close(params, x - 0.1 * 2 * there)


# A walk resumed with other arguments


@pytest.mark.parametrize("stopped", range(1, 8))
def test_a_walk_resumed_with_fewer_gradients_begins_anew(stopped):
    def make(num_steps):
        return optax_flat.entropy_sgd(
            1.0, num_steps=num_steps, noise=0.0, mode="transparent", key=0
        )

    start = jnp.array([1.0, -2.0])
    params, state = run(make(8), start, [None] * stopped)
    if stopped < 3:  # a longer walk is still one of three gradients
        params, state = run(make(3), params, [None] * (3 - stopped), state)
        assert int(state.memory.count) == 1
        return
    params, state = run(make(3), params, [None], state)
    assert_equal(params, start)
    assert int(state.memory.count) == 0 and int(state.step) == 0
    resumed, _ = run(make(3), params, [None] * 3, state)
    assert_close(resumed, run(make(3), start, [None] * 3)[0])


def test_states_of_averages_are_told_apart():
    x = jnp.ones(2)
    swa, ema = optax_flat.swa(start=0), optax_flat.ema_weights()
    with pytest.raises(TypeError, match="(?s)SWAState.*EMAState"):
        ema.update(x, swa.init(x), x)


READ = {
    "average": optax_flat.ema_weights(optax.sgd(0.1)),
    "ring": optax_flat.lawa(optax.sgd(0.1)),
    "walk": optax_flat.sam(optax.sgd(0.1), mode="transparent"),
    "posterior": optax_flat.ivon(0.1, ess=9.0, key=0),
    "center": optax_flat.elastic_averaging(
        optax.sgd(0.1), coupling=1.0, axis_name=None
    ),
    "master": optax_flat.master_weights(optax.sgd(0.1)),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
}


@pytest.mark.parametrize("shape", [(1, 4), (4,), (7,), (2, 3, 4)])
@pytest.mark.parametrize("kind", READ)
def test_readers_refuse_params_of_other_shapes(kind, shape):
    dtype = jnp.bfloat16 if kind == "master" else jnp.float32
    state = READ[kind].init(jnp.zeros((3, 4), dtype))
    with pytest.raises(ValueError, match=r"(?s)belongs to other params.*jax\.vmap"):
        optax_flat.eval_params(state, jnp.ones(shape, dtype))


def test_master_weights_follow_params_that_were_replaced():
    tx = optax_flat.master_weights(optax.sgd(2.0**-10))
    params = jnp.ones(4, jnp.bfloat16)
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(-jnp.ones_like(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    replaced = params.at[:2].set(5.0)  # two entries, as by pretrained ones
    assert_equal(optax_flat.eval_params(state, replaced), replaced)
    _, state = step(replaced, state)
    assert_close(
        state.master,
        jnp.array([5.0, 5.0, 1.0, 1.0]) + jnp.array([1, 1, 2, 2]) * 2.0**-10,
    )


@every_mode
@pytest.mark.parametrize("name", ["sam", "lookbehind_sam", "sampa"])
def test_rules_that_read_the_params_see_no_infinities(name, mode):
    """|w| times a gradient of 0 would be NaN, and with it the norm: all else is trained
    as if the mask were not there, and its gradient is not looked at."""
    make = {"lookbehind_sam": {"num_steps": 1}}.get(name, {})
    rule = optax_flat.ascent.adaptive_unit()
    tx = getattr(optax_flat, name)(
        optax.adamw(0.1), rho=0.5, ascent=rule, mode=mode, skip_nonfinite=True, **make
    )

    def grad(params, i):
        grads = {name: jnp.full_like(leaf, jnp.nan) for name, leaf in params.items()}
        return grads | {"w": params["w"] ** 3}

    def trained(params):
        extra = {"grad_fn": grad} if mode == "scanned" else {}
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(grad(params, 0), state, params, **extra)
            params = optax.apply_updates(params, updates)
        assert int(state.skipped) == 0
        return params

    w, mask = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([[-jnp.inf, -jnp.inf]])
    params = trained({"w": w, "mask": mask})
    assert_equal(params["mask"], mask)
    assert_close(params["w"], trained({"w": w})["w"])


# 16 bits


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hyperparameters_of_16_bits_are_refused(dtype):
    make = optax.inject_hyperparams(
        optax_flat.ema_weights, static_args=optax_flat.ema_weights.static_args
    )
    tx = make(optax.sgd(0.1), decay=0.999)
    with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
        tx.init(jnp.ones(4, dtype))
    with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
        jax.jit(tx.init)(jnp.ones(4, dtype))


def test_an_average_takes_points_as_the_params_are_rounded():
    """Compiled, too, where XLA would leave the rounding out."""
    tx = optax_flat.swa(optax.sgd(1.0), start=0)
    x = jnp.array([1.0, -3.0, 0.1], jnp.bfloat16)
    g = jnp.array([1e-3, 3e-3, 7e-4], jnp.bfloat16)

    def step(x, state):
        updates, state = tx.update(g, state, x)
        return optax.apply_updates(x, updates), state

    there, state = jax.jit(step)(x, tx.init(x))
    assert_equal(state.average, there.astype(jnp.float32))


def test_bfloat16_params_do_not_drift_in_transparent_mode():
    tx = optax_flat.sam(optax.sgd(0.0), rho=0.5, mode="transparent")
    start = jax.random.normal(jax.random.key(0), (1000,), jnp.bfloat16) ** 3
    grads = jax.random.normal(jax.random.key(1), (600, 1000), jnp.bfloat16)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(step, (start, tx.init(start)), grads)
    # The next walk starts from the anchor: the params are off by one step's rounding.
    moved, state = run(tx, params, [0.0], state)
    assert_equal(optax_flat.eval_params(state, moved), start)
    largest = 0.5 * float(jnp.finfo(jnp.bfloat16).eps)
    assert largest_difference(params, start) <= largest


# A run that goes wrong


HUGE = [jnp.nan, jnp.inf, -jnp.inf, 1e30, 1e8, 1e3]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("moment", range(3))
def test_a_skipped_update_leaves_no_trace(moment, value):
    start = jnp.array([1.234567, -0.7654321])
    tx = optax_flat.entropy_sgd(
        0.5, num_steps=3, noise=0.0, mode="transparent", skip_nonfinite=True, key=0
    )
    grads = [1.0, 1.0, 1.0]
    grads[moment] = value
    grads[2] = grads[2] if moment == 2 and not np.isfinite(value) else jnp.nan
    params, state = run(tx, start, grads)
    assert int(state.skipped) == 1
    # Farther than eight times the anchor the walk does not take the params.
    rounding = 8 * float(jnp.finfo(jnp.float32).eps)
    np.testing.assert_allclose(params, start, rtol=rounding)
    assert_close(run(tx, params, [None] * 3, state)[0], run(tx, start, [None] * 3)[0])


@pytest.mark.parametrize("size", [1e3, 1e9, 1e20])
def test_the_anchor_survives_a_huge_gradient(size):
    """As in scanned mode, where the anchor is not found by going back."""
    outer = optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))
    start = jnp.array([1.234567, -0.7654321])
    ends = []
    for mode in MODES:
        tx = optax_flat.local_entropy(outer, num_steps=2, noise=0.0, mode=mode, key=0)
        if mode == "scanned":
            ends.append(run(tx, start, [size], grad_fn=lambda p, i: GRAD(p))[0])
        else:
            ends.append(run(tx, start, [size, None])[0])
    assert_close(*ends)
    assert largest_difference(ends[0], start) > 1e-3


@every_mode
def test_one_overflow_is_one_skipped_update(mode):
    """Of Adam's second moment: the memory is what it was before."""
    tx = optax_flat.sam(optax.adam(0.1), skip_nonfinite=True, mode=mode)
    x = jnp.array([1.0, -2.0])
    extra = {"grad_fn": lambda p, i: jnp.full(2, 1e25)} if mode == "scanned" else {}
    huge = [1e25] * (1 if mode == "scanned" else 2)
    before = tx.init(x)
    params, state = run(tx, x, huge, before, **extra)
    assert int(state.skipped) == 1
    assert_equal(state.memory, before.memory)
    assert_close(params, x)


AVERAGES = {
    "swa": (optax_flat.swa(start=0), np.mean),
    "lawa": (optax_flat.lawa(k=4), lambda points: np.mean(points[-4:])),
    "ema": (
        optax_flat.ema_weights(decay=0.5),
        lambda points: np.average(points, weights=2.0 ** np.arange(len(points))),
    ),
}


def follow(tx, points):
    """The average of points where a run has led."""
    params = jnp.full(2, 7.0)
    state = tx.init(params)
    for point in points:
        _, state = tx.update(jnp.zeros(2), state, jnp.full(2, point))
    return optax_flat.eval_params(state, jnp.full(2, points[-1]))


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("good", range(6))
@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_outlives_a_lost_run(average, good, value):
    """Lost for good after any number of points."""
    tx, expected = AVERAGES[average]
    points = [1.0, 5.0, 2.0, 8.0, 4.0, 3.0][:good]
    found = follow(tx, points + [value] * 5)
    if good:
        np.testing.assert_allclose(found, expected(points), rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, value)  # where the params are


@pytest.mark.parametrize("average", AVERAGES)
def test_a_lost_first_point_leaves_nothing(average):
    """Neither itself nor the params of `init`, which are 7, enter."""
    tx, _ = AVERAGES[average]
    found = follow(tx, [jnp.nan, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(found, 2.0, rtol=1e-6)


# What Optax takes


def test_masks_may_be_models():
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
    grads = jax.tree.map(jnp.ones_like, params)
    tx = optax_flat.masked(optax_flat.sam(optax.sgd(0.1)), mask)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=lambda p, i: grads)
    for leaf in jax.tree.leaves(updates):
        assert bool(jnp.any(leaf != 0)) == (leaf.ndim == 2)
    for make in (
        functools.partial(optax_flat.sam, mask=mask),
        functools.partial(optax_flat.sam, mask=lambda params: mask),
        functools.partial(optax_flat.asam, weights=mask),
    ):
        tx = make(optax.sgd(0.1))
        tx.update(grads, tx.init(params), params, grad_fn=lambda p, i: grads)


def test_labels_are_no_mask():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = optax_flat.masked(optax.sgd(0.1), {"a": "train", "b": "freeze"})
    with pytest.raises(TypeError, match="tree of bools.*'train'"):
        tx.init(params)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: optax_flat.masked(optax.adam(0.1), mask),
        lambda mask: optax_flat.sam(optax.adam(0.1), mask=mask),
        lambda mask: optax_flat.asam(optax.adam(0.1), weights=mask),
    ],
)
def test_map_params_with_masks(make):
    mask = {"a": True, "b": False}
    tx = make(mask)
    state = tx.init({"a": jnp.ones(2), "b": jnp.ones(3)})
    found = optax.tree.map_params(
        tx, lambda leaf: leaf + 1, state, transform_non_params=lambda leaf: leaf
    )
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert largest_difference(found, state) == 1


STRANGERS = [(), None, {}, {"m": jnp.zeros(2)}, [jnp.zeros(2)], jnp.zeros([]), 0]


@pytest.mark.parametrize("own", STRANGERS, ids=str)
def test_states_of_strangers_in_a_chain(own):
    stranger = optax.GradientTransformation(
        lambda params: own, lambda updates, state, params=None: (updates, state)
    )
    x = jnp.ones(2)
    ema = optax_flat.ema_weights(optax.sgd(0.1), decay=0.5)
    for tx in (
        optax.chain(stranger, ema),
        optax_flat.ema_weights(optax.chain(stranger, optax.sgd(0.1)), decay=0.5),
        optax_flat.sam(optax.chain(stranger, optax.sgd(0.1)), mode="transparent"),
    ):
        params, state = run(tx, x, [None] * 2)
        assert optax_flat.eval_params(state, params).shape == (2,)
        assert int(optax_flat.metrics(state)["count"]) > 0


def test_numpy_params():
    """float64 there is float32 here."""
    x = np.array([1.0, -2.0])
    for tx in (
        optax_flat.momentum_sam(optax.sgd(0.1, momentum=0.9)),
        optax_flat.sam(optax.adam(0.1), mode="transparent"),
        optax_flat.ema_weights(optax.sgd(0.1)),
        optax_flat.sgld(0.1, 1.0, key=0),
    ):
        updates, state = tx.update(x, tx.init(x), x)
        moved = optax.apply_updates(x, updates)
        tx.update(moved, state, moved)


# Readers


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax_flat.masked(tx, True),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        lambda tx: optax_flat.sam(tx, mode="transparent"),
    ],
)
def test_schedule_free_is_read_wherever_it_lies(wrap):
    tx = wrap(optax.contrib.schedule_free_sgd(0.3, b1=0.8))
    params, state = run(tx, jnp.array([1.0, -2.0]), [None] * 6)
    kind = optax.contrib.ScheduleFreeState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
    (found,) = [leaf for leaf in leaves if isinstance(leaf, kind)]
    expected = optax.contrib.schedule_free_eval_params(found, params)
    assert largest_difference(expected, params) > 1e-3
    assert_close(optax_flat.eval_params(state, params), expected)


@pytest.mark.parametrize("wrap", [lambda make: make, nnx.jit], ids=["eager", "jit"])
def test_lawa_in_flax_with_sharded_params(wrap):
    """What Flax's variables say of their axes is not said of the ring's."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optax_flat.lawa(optax.adam(0.1), k=3)
    kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", None))

    @wrap
    def make():
        model = nnx.Linear(16, 8, kernel_init=kernel_init, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.mean(m(jnp.ones((8, 16))) ** 2))(model)
        optimizer.update(model, grads)

    with jax.set_mesh(mesh):
        model, optimizer = make()
        for _ in range(3):
            step(model, optimizer)
        params = nnx.state(model, nnx.Param)
        average = optax_flat.eval_params(optimizer.opt_state, params)
    rings = [leaf for leaf in jax.tree.leaves(optimizer.opt_state) if leaf.ndim == 3]
    assert [ring.sharding.spec for ring in rings] == [jax.P(None, "data")]
    np.testing.assert_allclose(average["kernel"][...], rings[0].mean(0), rtol=1e-6)


def test_draws_on_an_explicit_mesh_need_no_context():
    """Outside `jit` nothing but an array tells on which devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jnp.ones((16, 4))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    tx = optax_flat.ivon(0.1, ess=10.0, key=0)
    drawn, expected = (
        optax_flat.sample_params(tx.init(params), params, 1) for params in (sharded, x)
    )
    assert_equal(np.asarray(drawn), np.asarray(expected))


def test_a_walk_is_no_outer_optimizer():
    for mode in MODES:
        inner = optax_flat.sam(optax.sgd(0.1), mode=mode)
        tx = optax_flat.local_entropy(inner, num_steps=3, key=0)
        with pytest.raises(ValueError, match="`outer` is a walk"):
            tx.init(jnp.ones(2))


def test_an_eager_state_lies_where_the_params_do():
    """So a training step is compiled once."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.ones((16, 4)), sharding)
    for tx in (
        optax_flat.momentum_sam(optax.sgd(0.1, momentum=0.9)),
        optax_flat.entropy_adam(0.1, num_steps=2, mode="transparent", key=0),
        optax_flat.sgld(0.1, 1.0, key=0),
        optax_flat.lawa(optax.adam(0.1), k=2),
    ):
        state = tx.init(x)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(state)} == {8}
        shards = {
            leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state)
        }
        assert max(shards) <= 2 * x.size // 8
        step = jax.jit(tx.update)
        for _ in range(2):
            _, state = step(x, state, x)
        assert step._cache_size() == 1
