"""What every public method must show, in every mode, driven by the catalogue."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import KINDS_OF_WALKS, METHODS, WALK_MODES, Quadratic
from problem import (
    assert_close,
    assert_equal,
    batches,
    in_parts,
    jitted_update,
    largest_difference,
    loss,
    ragged_params,
    train,
    update,
)
from savers import SAVERS

import optax_flat
from optax_flat._core.modes import states

CASES = [
    pytest.param(
        method, mode, id=f"{method.name}-{mode}",
        marks=[] if mode in method.tried else pytest.mark.slow,
    )
    for method in METHODS
    for mode in method.modes
]  # fmt: skip
every_case = pytest.mark.parametrize(("method", "mode"), CASES)
key_case = pytest.mark.parametrize(
    ("method", "mode"), [case for case in CASES if case.values[0].has_key]
)
# What cannot differ between methods of one engine is tested for a few of them, and for
# all by `make test-all`.
engine_case, engine_gradient_case, engine_walk_case, engine_transparent_case = (
    pytest.mark.parametrize(
        ("method", "mode"),
        [
            pytest.param(
                *case.values,
                id=case.id,
                marks=[]
                if case.values[0].is_tried(case.values[1])
                else pytest.mark.slow,
            )
            for case in CASES
            if case.values[1] in modes
        ],
    )
    for modes in (
        (*WALK_MODES, "plain", "forward"),
        (*WALK_MODES, "plain"),
        WALK_MODES,
        WALK_MODES[1:],
    )
)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)


def specs(tree):
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree)
    )


def test_catalogue_is_complete():
    public = {
        name
        for name, value in vars(optax_flat).items()
        if inspect.isfunction(value) and hasattr(value, "static_args")
    }
    makes_optimizer = {
        name
        for name, value in vars(optax_flat).items()
        if inspect.isfunction(value)
        and "GradientTransformation" in str(inspect.signature(value).return_annotation)
    }
    # `test_precision.py` has the last two.
    adapters = {
        "scanned", "transparent", "masked", "master_weights", "stochastic_rounding"
    }  # fmt: skip
    assert public == {method.name for method in METHODS}
    assert makes_optimizer == public | adapters


@every_method
def test_catalogue_lists_every_float(method):
    parameters = inspect.signature(method.factory).parameters.values()
    floats = {p.name for p in parameters if p.annotation == optax.ScalarOrSchedule}
    assert floats == set(method.floats)


@engine_case
def test_jit_equals_eager(method, mode):
    tx = method.make(mode=mode)
    stack = batches(1, method.length)
    jitted = train(tx, mode, ragged_params(), stack)
    with jax.disable_jit():
        eager, _ = update(tx, mode, ragged_params(), tx.init(ragged_params()), stack[0])
    assert_close(jitted.params, eager)


@pytest.mark.parametrize(
    ("method", "mode"), [case for case in CASES if case.values[0].promotes_nothing]
)
@pytest.mark.parametrize("x64", [False, True])
def test_strict_tracing(method, mode, x64):
    """No implicit promotion of ranks or dtypes and no leaks, in both precisions."""
    with (
        jax.enable_x64(x64),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks(),
    ):
        tx = method.factory(**method.arguments | method.loop(mode) | method.noisy)
        dtype = jnp.float64 if x64 else jnp.bfloat16
        params, data = ragged_params(dtype), batches(1, method.length, dtype)
        state = jax.eval_shape(tx.init, params)
        step = functools.partial(update, tx, mode, loss=_strict_loss)
        after = jax.eval_shape(step, params, state, data[0])
        assert jax.tree.map(lambda x: x.dtype, after[0]) == jax.tree.map(
            lambda x: x.dtype, params
        )


def _strict_loss(params, batch):
    layer = params["layer"]
    return jnp.mean(batch @ layer["w"]) * jnp.mean(layer["b"]) * params["scale"]


@engine_case
def test_no_transfer_and_no_nan_inside(method, mode):
    """A compiled update moves nothing between host and device, and makes no NaN."""
    tx = method.make(mode=mode, **method.noisy)
    params, data = ragged_params(), batches(1, method.length)
    train(tx, mode, params, data)  # compiles what tests share
    state, stack = tx.init(params), data[0]
    with jax.debug_nans(True), jax.transfer_guard("disallow"):
        params, _, _ = jitted_update(tx, mode, loss)(params, state, stack)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@engine_case
def test_no_retrace(method, mode):
    tx = method.make(mode=mode, **method.noisy)
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss(params, batch)

    step = jax.jit(functools.partial(update, tx, mode, loss=counted))
    data = batches(3, method.length)
    params, state = ragged_params(), tx.init(ragged_params())
    params, state = step(params, state, data[0])
    first = len(traces)
    for stack in data[1:]:
        params, state = step(params, state, stack)
    assert first > 0
    assert len(traces) == first


@engine_case
def test_accepts_extra_args(method, mode):
    """Unknown names are ignored, whatever they hold, and chain mates get theirs."""
    plateau = optax.contrib.reduce_on_plateau()
    tx = optax.chain(method.make(mode=mode), plateau)
    params, stack = ragged_params(), batches(1, method.length)[0]

    @jax.jit
    def step(params, state):
        return update(tx, mode, params, state, stack, value=1.0, unknown="x")

    params, _ = step(params, tx.init(params))
    assert_close(
        params, train(method.make(mode=mode), mode, ragged_params(), [stack]).params
    )


@pytest.mark.slow  # the next test compares schedules with floats, too
@every_case
def test_float_or_schedule(method, mode):
    """All floats as constant schedules are all floats."""
    data = batches(2, method.length)
    floats = method.make(mode=mode, **method.floats)
    schedules = {k: optax.constant_schedule(v) for k, v in method.floats.items()}
    scheduled = train(method.make(mode=mode, **schedules), mode, ragged_params(), data)
    assert_close(scheduled.params, train(floats, mode, ragged_params(), data).params)


@every_case
def test_schedules_count_outer_updates(method, mode):
    """A float that jumps at outer update 2 changes the third update and none before."""
    data = batches(4, method.length)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(method.factory).parameters.items()
    }
    names = list(method.floats)

    @jax.jit
    def run(jumping):
        def schedule(index, before, after):
            return lambda t: jnp.where((t >= 2) & (jumping == index), after, before)

        schedules = {
            name: schedule(i, (defaults | method.arguments)[name], method.floats[name])
            for i, name in enumerate(names)
        }
        tx = method.make(mode=mode, **schedules)

        def body(carry, stack):
            params, state = update(tx, mode, *carry, stack)
            return (params, state), optax_flat.eval_params(state, params)

        start = ragged_params()
        return jax.lax.scan(body, (start, tx.init(start)), data)[1]

    # First, since what is made inside `run` has tracers for keys.
    plain = train(method.make(mode=mode), mode, ragged_params(), data)
    none = run(-1)
    for t in range(4):
        assert_close(jax.tree.map(lambda x, t=t: x[t], none), plain.path[t])
    for i, name in enumerate(names):
        jumped, seen = run(i), 2 + (name in method.late)
        for t in range(seen + 1):
            at_t = jax.tree.map(lambda x, t=t: x[t], (jumped, none))
            difference = largest_difference(*at_t)
            assert (difference > 1e-6) == (t == seen), (name, t)


@every_case
def test_inject_hyperparams(method, mode):
    """Every float, and nothing else, can be changed in the state."""
    injected = optax.inject_hyperparams(
        method.factory, static_args=method.factory.static_args
    )(**method.arguments | method.loop(mode))
    data = batches(3, method.length)
    plain = train(method.make(mode=mode), mode, ragged_params(), data)
    run = train(injected, mode, ragged_params(), data)
    assert_close(run.params, plain.params)
    assert set(run.state.hyperparams) == set(method.floats)
    start = injected.init(ragged_params())
    for name, value in method.floats.items():
        hyperparams = start.hyperparams | {name: jnp.float32(value)}
        state = start._replace(hyperparams=hyperparams)
        changed = train(injected, mode, ragged_params(), data, state)
        difference = largest_difference(method.read(changed), method.read(run))
        assert difference > 1e-6, name


@pytest.mark.parametrize(
    ("name", "extra"),
    [("adagrad", {"initial_accumulator_value"}), ("adadelta", {"initial_update"}),
     ("sgld", {"key"}), ("sghmc", {"key"})],
)  # fmt: skip
def test_inject_hyperparams_without_static_args(name, extra):
    """Starts of accumulators and int keys may be traced, as in Optax's own methods."""
    method = next(m for m in METHODS if m.name == name)
    arguments = method.arguments | method.noisy
    injected = optax.inject_hyperparams(method.factory)(**arguments)
    data = batches(2, method.length)
    run = train(injected, "plain", ragged_params(), data)
    assert set(run.state.hyperparams) == set(method.floats) | extra
    plain = train(method.make(**method.noisy), "plain", ragged_params(), data)
    assert_close(run.params, plain.params)


def test_injected_zeros_are_on_unless_static():
    """0 switches a buffer off only where it is known when the program is built."""
    factory = optax_flat.entropy_sgd
    params = jnp.zeros(1000)

    def state_bytes(static_args):
        make = optax.inject_hyperparams(factory, static_args=static_args)
        state = make(1.0, num_steps=5, noise=0.0, key=0).init(params)
        return sum(x.nbytes for x in jax.tree.leaves(state.inner_state.memory))

    assert state_bytes(factory.static_args) > params.nbytes
    off = (*factory.static_args, "momentum", "noise")
    assert state_bytes(off) < 100


@pytest.mark.parametrize(
    ("method", "mode"), [case for case in CASES if case.values[0].keeps_floats]
)
def test_hyperparameters_stay_float32(method, mode):
    """bfloat16 params do not round the hyperparameters: the state that they shape is
    the same as with float32 params of the same values."""
    data = batches(1, method.length)
    coarse = jax.tree.map(lambda x: x.astype(jnp.bfloat16), ragged_params())
    fine = jax.tree.map(lambda x: x.astype(jnp.float32), coarse)

    def linear(params, batch):  # its gradients, powers of two, are exact in bfloat16
        return sum(jnp.sum(0.5 * x) for x in jax.tree.leaves(params))

    tx = method.make(mode=mode)
    states = [train(tx, mode, p, data, loss=linear).state for p in (coarse, fine)]
    assert_close(*(_floats(state) for state in states))


@engine_case
def test_metrics(method, mode):
    """The same names and types before and after updates and under jit; it counts."""
    tx = method.make(mode=mode)
    before = optax_flat.metrics(tx.init(ragged_params()))
    state = train(tx, mode, ragged_params(), batches(2, method.length)).state
    after = optax_flat.metrics(state)
    assert specs(after) == specs(before)
    assert specs(jax.eval_shape(optax_flat.metrics, state)) == specs(after)
    assert [int(report["count"]) for report in (before, after)] == [0, 2]
    assert mode not in WALK_MODES or after.keys() >= {"gradient_evaluations", "skipped"}
    assert mode != "forward" or int(after["forward_passes"]) > 0


@engine_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(method, mode, dtype):
    """Updates have the params' dtype; what is accumulated has at least float32."""
    tx = method.make(mode=mode, **method.noisy)
    params = ragged_params(dtype)
    stack = batches(1, method.length, dtype)[0]

    def one_update(params, state):
        if mode == "forward":
            return tx.update(None, state, params, **in_parts(loss, stack[0]))
        grad = jax.grad(loss)
        grads = grad(params, stack[0])
        given = {"grad_fn": grad, "batches": stack[1:]} if mode == "scanned" else {}
        return tx.update(grads, state, params, value=jnp.ones([]), **given)

    updates, state = jax.eval_shape(one_update, params, jax.eval_shape(tx.init, params))
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    own = state._replace(first_point=None) if mode == "transparent" else state
    assert {x.dtype for x in _floats(own)} <= {jnp.dtype("float32")}


@engine_case
def test_abstract_init(method, mode):
    tx = method.make(mode=mode, **method.noisy)
    params = ragged_params()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert specs(tx.init(abstract)) == specs(tx.init(params))


@engine_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_types_stable(method, mode, dtype):
    tx = method.make(mode=mode, **method.noisy)
    params = ragged_params(dtype)
    state = tx.init(params)
    stack = batches(1, method.length, dtype)[0]
    out = jax.eval_shape(functools.partial(update, tx, mode), params, state, stack)
    assert specs((params, state)) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), out
    )


@engine_case
def test_scan_training_loop(method, mode):
    tx = method.make(mode=mode, **method.noisy)
    data = batches(3, method.length)

    @jax.jit
    def run(params, state):
        def body(carry, stack):
            return update(tx, mode, *carry, stack), None

        return jax.lax.scan(body, (params, state), data)[0]

    params, _ = run(ragged_params(), tx.init(ragged_params()))
    assert_close(params, train(tx, mode, ragged_params(), data).params)


@engine_case
def test_donation(method, mode):
    tx = method.make(mode=mode, **method.noisy)
    expected = train(tx, mode, ragged_params(), batches(2, method.length)).params
    step = jax.jit(functools.partial(update, tx, mode), donate_argnums=(0, 1))
    params = ragged_params()
    state = tx.init(params)
    for stack in batches(2, method.length):
        params, state = step(params, state, stack)
    assert_close(params, expected)


MASK = {"layer": {"w": True, "b": False}, "scale": True}


@engine_case
def test_frozen_leaves_bit_equal(method, mode):
    tx = optax_flat.masked(method.make(mode=mode), MASK)
    start = ragged_params()
    run = train(tx, mode, start, batches(2, method.length))
    assert_equal(run.params["layer"]["b"], start["layer"]["b"])
    assert largest_difference(run.params["layer"]["w"], start["layer"]["w"]) > 1e-3
    assert run.params["scale"] != start["scale"]
    # The selected leaves move as if the frozen ones were constants of the loss.
    selected = {"layer": {"w": start["layer"]["w"]}, "scale": start["scale"]}

    def closed_over(params, batch):
        layer = params["layer"] | {"b": start["layer"]["b"]}
        return loss({"layer": layer, "scale": params["scale"]}, batch)

    tx = method.make(mode=mode)
    alone = train(tx, mode, selected, batches(2, method.length), loss=closed_over)
    assert_close(run.params["layer"]["w"], alone.params["layer"]["w"])


@pytest.mark.slow
@engine_case
def test_frozen_leaves_nested(method, mode):
    inner = optax_flat.masked(
        method.make(mode=mode), {"layer": {"w": True, "b": True}, "scale": False}
    )
    tx = optax_flat.masked(inner, MASK)
    start = ragged_params()
    run = train(tx, mode, start, batches(2, method.length))
    assert_equal(
        (run.params["layer"]["b"], run.params["scale"]),
        (start["layer"]["b"], start["scale"]),
    )
    assert largest_difference(run.params["layer"]["w"], start["layer"]["w"]) > 1e-3


@engine_transparent_case
def test_optax_masked_and_partition(method, mode):
    data = batches(2, method.length)
    ours = train(
        optax_flat.masked(method.make(mode=mode, **method.noisy), MASK),
        mode,
        ragged_params(),
        data,
    )
    labels = jax.tree.map(lambda selected: "ours" if selected else "frozen", MASK)
    transforms = {
        "ours": method.make(mode=mode, **method.noisy),
        "frozen": optax.set_to_zero(),
    }
    partition = train(optax.partition(transforms, labels), mode, ragged_params(), data)
    assert_close(partition.params, ours.params)
    frozen = jax.tree.map(lambda selected: not selected, MASK)
    masked = optax.chain(
        optax.masked(method.make(mode=mode, **method.noisy), MASK),
        optax.masked(optax.set_to_zero(), frozen),
    )
    assert_close(train(masked, mode, ragged_params(), data).params, ours.params)


def _wrappers(tx):
    labels = {"layer": "a", "scale": "b"}
    return {
        "chain": optax.chain(optax.clip(10.0), tx),
        "masked": optax_flat.masked(tx, MASK),
        "inject": optax.inject_hyperparams(lambda unused: tx)(unused=1.0),
        "multi_steps": optax.MultiSteps(tx, 1),
        "apply_if_finite": optax.apply_if_finite(tx, 3),
        "partition": optax.partition({"a": tx, "b": optax.sgd(0.1)}, labels),
    }


@pytest.mark.parametrize(
    ("method", "mode", "wrapper"),
    [
        pytest.param(
            *case.values,
            wrapper,
            id=f"{case.id}-{wrapper}",
            # A wrapper does not see which method it holds.
            marks=pytest.mark.slow
            if wrapper != "chain"
            and case.values[0].name not in {"entropy_sgd", "looksam", "ivon"}
            else [],
        )
        for case in CASES
        if case.values[1] == "transparent"
        for wrapper in _wrappers(optax.sgd(0.1))
    ],
)
def test_eval_params(method, mode, wrapper):
    """The anchor, inside every wrapper and at every moment of the walk."""
    tx = _wrappers(method.make(mode=mode))[wrapper]
    trained = {
        "masked": MASK,
        "partition": {"layer": {"w": True, "b": True}, "scale": False},
    }
    params, state = ragged_params(), tx.init(ragged_params())

    @jax.jit
    def step(params, state, batch):
        return update(tx, mode, params, state, batch[None])

    for stack in batches(2, method.length):
        for batch in stack:
            evaluated = optax_flat.eval_params(state, params)
            (walk,) = states(state, optax_flat.TransparentState)
            if walk.step == 0:
                anchor = evaluated
                assert method.looks_ahead or _equal(anchor, params)
            elif not method.looks_ahead:
                assert largest_difference(params, anchor) > 1e-4
            mask = trained.get(wrapper, jax.tree.map(lambda _: True, anchor))
            jax.tree.map(
                lambda e, a, p, m: np.testing.assert_array_equal(e, a if m else p),
                evaluated, anchor, params, mask,
            )  # fmt: skip
            params, state = step(params, state, batch)
    (walk,) = states(state, optax_flat.TransparentState)
    anchor = optax_flat.eval_params(state, params)
    assert (method.looks_ahead or walk.step > 0) != _equal(anchor, params)


def _equal(a, b):
    return largest_difference(a, b) == 0


@engine_gradient_case
def test_multi_steps_outermost(method, mode):
    """Two equal micro-batches are one minibatch; the inner loop is paid for each."""
    data = batches(2, method.length)
    tx = optax.MultiSteps(method.make(mode=mode), 2)
    # Twice every gradient in transparent mode, twice every update in scanned mode.
    axis = 1 if mode == "transparent" else 0
    run = train(tx, mode, ragged_params(), jnp.repeat(data, 2, axis=axis))
    expected = train(method.make(mode=mode), mode, ragged_params(), data)
    assert_close(run.params, expected.params)


@pytest.mark.slow  # it is the caller's loop, in the caller's function
@engine_walk_case
def test_accumulation_inside_grad_fn(method, mode):
    """Micro-batches inside grad_fn equal one large batch."""

    def accumulated(params, batch):
        return jnp.mean(jax.lax.map(lambda micro: loss(params, micro), batch))

    data = batches(2, method.length)
    micro = data[:, :, :4].reshape(*data.shape[:2], 2, 2, -1)
    tx = method.make(mode=mode)
    assert_close(
        train(tx, mode, ragged_params(), micro, loss=accumulated).params,
        train(tx, mode, ragged_params(), data[:, :, :4]).params,
    )


@every_case
def test_zero_gradient_is_finite(method, mode):
    tx = method.make(mode=mode)
    data = batches(11, method.length)
    run = train(
        tx, mode, ragged_params(), data, loss=lambda p, batch: 0.0 * loss(p, batch)
    )
    floats = [
        leaf
        for leaf in jax.tree.leaves((run.params, run.state))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    assert all(jnp.isfinite(leaf).all() for leaf in floats)


@engine_gradient_case
def test_wraps_in_apply_if_finite(method, mode):
    """A NaN gradient given from outside leaves params and state as they were."""
    dtype = jnp.bfloat16  # updates must have the dtype of the gradients
    tx = optax.apply_if_finite(method.make(mode=mode), 5)
    params = ragged_params(dtype)
    data = batches(2, method.length, dtype)
    params, state, _ = train(tx, mode, params, data[:1])
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)

    @jax.jit
    def give(grads, state, params):
        given = {}
        if mode == "scanned":
            given = {"grad_fn": jax.grad(loss), "batches": data[1, 1:]}
        return tx.update(grads, state, params, value=1.0, **given)

    updates, after = give(bad, state, params)
    assert_equal(optax.apply_updates(params, updates), params)
    assert_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    recovered = train(tx, mode, params, data[1:], after)
    assert_equal(recovered.params, train(tx, mode, params, data[1:], state).params)


@engine_walk_case
def test_nonfinite_skipped_and_counted(method, mode):
    """NaN or infinity anywhere in a walk: no update, nothing poisoned, one counted."""
    tx = method.make(mode=mode, skip_nonfinite=True, **method.noisy)
    data = batches(3, method.length)
    without = train(tx, mode, ragged_params(), data[jnp.array([0, 2])])
    for position in range(1 if method.ends_early else method.length):
        for value in (jnp.nan, jnp.inf):
            poisoned = data.at[1, position].set(value)
            run = train(tx, mode, ragged_params(), poisoned)
            assert_close(run.path[1], run.path[0])
            assert int(run.state.skipped) == 1
            count = int(run.state.gradient_evaluations)
            assert method.ends_early or count == 3 * method.length
            # All else is as if that update had not been asked for.
            assert_close(run.params, without.params)
            assert_close(_floats(run.state.memory), _floats(without.state.memory))
    # Without the guard the run is lost, so the test above tests something.
    lost = train(method.make(mode=mode), mode, ragged_params(), poisoned)
    assert not np.isfinite(lost.params["scale"])


def _floats(tree):
    leaves = jax.tree.leaves(tree)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


@key_case
def test_typed_raw_and_int_keys(method, mode):
    """All kinds of key begin alike, with a state that holds all; another is another."""
    data = batches(2, method.length)

    def run(key):
        tx = method.make(mode=mode, **method.noisy | {"key": key})
        return train(tx, mode, ragged_params(), data).params

    first, *others = (
        method.make(mode=mode, **method.noisy | {"key": key}).init(ragged_params())
        for key in (3, jax.random.PRNGKey(3), jax.random.key(3))
    )
    for other in others:
        assert_equal(other, first)
    assert largest_difference(run(3), run(4)) > 1e-6


@key_case
def test_population(method, mode):
    """vmap over the factory and init: members with equal params and own keys differ."""
    data = batches(2, method.length)

    def gentle(params, batch):  # add_langevin_noise alone climbs
        return 0.1 * loss(params, batch)

    @jax.jit
    def member(key):
        tx = method.make(mode=mode, **method.noisy | {"key": key})

        def body(carry, stack):
            return update(tx, mode, *carry, stack, loss=gentle), None

        start = ragged_params()
        return jax.lax.scan(body, (start, tx.init(start)), data)[0][0]

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.vmap(member)(keys)
    for i, key in enumerate(keys):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), member(key))
    w = together["layer"]["w"]
    assert (jnp.abs(w[0] - w[1]).max() > 1e-6) == bool(method.noisy)


@every_case
def test_off_is_the_known_optimizer(method, mode):
    """In a limit of its arguments the method is an optimizer that everybody knows."""
    data = batches(6, 1)
    repeated = jnp.repeat(data, method.off_length, axis=1)
    off = train(method.make(**method.off, mode=mode), mode, ragged_params(), repeated)
    known = train(method.off_is, "transparent", ragged_params(), data)
    # x - mu cancels digits, which Adam's division brings back.
    assert_close(method.read(off), known.params, factor=10)


@every_case
def test_on_closed_form(method, mode, x64):
    """A few updates on a shifted, skewed quadratic; they are not the *off* ones."""
    rng = np.random.default_rng(5)
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    H = rotation @ np.diag([3.0, 1.0, 0.3, 0.05]) @ rotation.T
    quadratic = Quadratic(H, np.array([1.0, -2.0, 0.5, 3.0]))
    x = np.array([-0.7, 0.4, 2.0, 1.1])

    def f(params, batch):
        return (params - quadratic.c) @ H @ (params - quadratic.c) / 2

    tx = method.make(**method.closed_form_arguments, mode=mode)
    length = method.closed_form_arguments.get("num_steps", method.length)
    updates = method.closed_form_updates
    run = train(tx, mode, jnp.asarray(x), jnp.zeros((updates, length)), loss=f)
    expected = x + method.closed_form(quadratic, x)
    np.testing.assert_allclose(method.read(run), expected, rtol=0, atol=1e-12)
    off = train(
        method.make(**method.closed_form_arguments | method.off, mode=mode),
        mode, jnp.asarray(x), jnp.zeros((updates, method.off_length)), loss=f,
    )  # fmt: skip
    assert largest_difference(method.read(off), method.read(run)) > 1e-3


INNER_TRANSFORMS = {
    "none": None,
    "clip": optax.clip_by_global_norm(0.1),
    "decay_and_momentum": optax.chain(
        optax.add_decayed_weights(0.1), optax.trace(0.9, nesterov=True)
    ),
}


@pytest.mark.parametrize(
    ("method", "inner", "dtype"),
    [
        pytest.param(
            m,
            inner,
            dtype,
            id=f"{inner}-{dtype.__name__}-{m.name}",
            marks=pytest.mark.slow
            if inner == "none"
            or (
                m.name not in KINDS_OF_WALKS and (inner, dtype) != ("clip", jnp.float32)
            )
            or (dtype == jnp.bfloat16 and m.name not in {"entropy_sgd", "ivon"})
            else [],
        )
        for m in METHODS
        if m.modes == WALK_MODES
        for inner, dtype in [
            *((name, jnp.float32) for name in INNER_TRANSFORMS),
            ("clip", jnp.bfloat16),
        ]
    ],
)
def test_modes_agree(method, inner, dtype):
    data = batches(4, method.length, dtype)
    scanned, transparent = (
        train(
            method.make(
                mode=mode, inner_transform=INNER_TRANSFORMS[inner], **method.noisy
            ),
            mode,
            ragged_params(dtype),
            data,
        )
        for mode in ("scanned", "transparent")
    )
    assert_close(scanned.params, transparent.params, dtype)
    assert_equal(
        scanned.state.gradient_evaluations, transparent.state.gradient_evaluations
    )
    if inner != "none":
        without = train(
            method.make(**method.noisy), "scanned", ragged_params(dtype), data
        )
        effect = largest_difference(scanned.params, without.params)
        assert effect > 1e-2
        difference = largest_difference(scanned.params, transparent.params)
        assert difference < 0.2 * effect  # rounding cannot hide a missing transform


@engine_walk_case
def test_inner_transform_reaches_every_gradient(method, mode):
    """A transformation that zeroes each gradient leaves nothing of the loss."""
    zero = optax.set_to_zero()
    data = batches(2, method.length)
    tx = method.make(mode=mode, inner_transform=zero)
    blind = train(tx, mode, ragged_params(), data)
    flat = train(tx, mode, ragged_params(), data, loss=lambda p, b: 0.0 * loss(p, b))
    assert_equal(blind.params, flat.params)
    seen = []

    def record(updates, state, params=None):
        jax.debug.callback(lambda g: seen.append(float(g)), optax.tree.norm(updates))
        return updates, state

    spy = optax.GradientTransformation(lambda params: (), record)
    clip = optax.chain(optax.clip_by_global_norm(1e-3), spy)
    train(method.make(mode=mode, inner_transform=clip), mode, ragged_params(), data)
    jax.effects_barrier()
    assert 2 * method.length - method.ends_early <= len(seen) <= 2 * method.length
    assert max(seen) < 1.001e-3


@engine_walk_case
def test_gradient_evaluations_counted(method, mode):
    calls = []

    def counted(params, batch):
        jax.debug.callback(lambda: calls.append(None))
        return loss(params, batch)

    run = train(
        method.make(mode=mode),
        mode,
        ragged_params(),
        batches(3, method.length),
        loss=counted,
    )
    jax.effects_barrier()
    count = int(optax.tree.get(run.state, "gradient_evaluations"))
    assert count == len(calls)
    assert (count < 3 * method.length) == method.ends_early
    assert count <= 3 * method.length


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m.of_length and m.modes == WALK_MODES],
    ids=lambda m: m.name,
)  # fmt: skip
def test_program_size_does_not_grow(method):
    def size(length):
        tx = method.make(**method.of_length(length))
        params = ragged_params()
        step = jax.jit(functools.partial(update, tx, "scanned"))
        text = step.lower(params, tx.init(params), batches(1, length)[0]).as_text()
        return text.count("\n")  # one operation per line

    assert size(60) < 1.02 * size(6)


@engine_case
def test_resume_bit_exact(method, mode, tmp_path):
    """Any tool saves, in mid-walk and while a schedule moves, and the run goes on."""
    schedules = {
        name: optax.linear_schedule(value, 2 * value, 5)
        for name, value in list(method.floats.items())[:1]
    }
    tx = method.make(mode=mode, **method.noisy | schedules)
    data = batches(4, method.length)
    if mode == "transparent":
        data = data.reshape(-1, *data.shape[2:])[:, None]  # one gradient per call
    half = len(data) // 2 + (mode == "transparent")
    assert mode != "transparent" or method.length == 1 or half % method.length
    straight = train(tx, mode, ragged_params(), data)
    saved = train(tx, mode, ragged_params(), data[:half])[:2]
    fresh = (ragged_params(), tx.init(ragged_params()))
    # They save the same kinds of leaves in both modes.
    for through in SAVERS if mode != "scanned" else SAVERS[:1]:
        restored = through(saved, fresh, tmp_path)
        assert_equal(restored, saved)
        params, state = restored
        resumed = train(tx, mode, params, data[half:], state)
        assert_equal((resumed.params, resumed.state), (straight.params, straight.state))


@every_method
def test_errors_say_what_to_do(method):
    for arguments, error, words in method.bad:
        with pytest.raises(error, match=words):
            method.make(**arguments)
    if method.has_key:
        arguments = {k: v for k, v in method.arguments.items() if k != "key"}
        with pytest.raises(TypeError, match="key"):
            method.factory(**arguments)


@every_method
@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        (None, ValueError, "`params` must be passed"),
        (
            {"a": jnp.ones(2, jnp.float8_e5m2)},
            TypeError,
            "at least 16 bits, .* at .'a'",
        ),
        ({"a": jnp.arange(2)}, TypeError, "floating-point arrays only"),
        ({"a": jnp.ones(2, complex)}, TypeError, "floating-point arrays only"),
        ({"a": 1.0}, TypeError, "floating-point arrays only"),
    ],
    ids=["None", "float8", "int", "complex", "float"],
)
def test_params_of_other_kinds_are_refused(method, params, error, words):
    with pytest.raises(error, match=words):
        method.make(mode=method.modes[0]).init(params)


@engine_transparent_case
@pytest.mark.parametrize("name", ["grad_fn", "batches"])
def test_transparent_refuses_a_walks_arguments(method, mode, name):
    tx = method.make(mode=mode)
    params = ragged_params()
    with pytest.raises(ValueError, match=f"`{name}` was passed .* one gradient per"):
        tx.update(params, tx.init(params), params, **{name: jax.grad(loss)})


@every_case
def test_entries_that_are_not_finite_stay(method, mode):
    """As Optax keeps a mask of -inf among the params; all else is trained as ever."""
    tx = method.make(mode=mode, skip_nonfinite=True) if mode in WALK_MODES else None
    tx = tx or method.make(mode=mode)
    params = ragged_params() | {"mask": jnp.array([0.0, -jnp.inf, 0.0])}

    def with_mask(params, batch):
        allowed = jax.nn.softmax(params["mask"])
        return loss(params, batch) + 1e-3 * allowed[0]

    data = batches(3, method.length)
    run = train(tx, mode, params, data, loss=with_mask)
    for ended in (run.params, run.path[-1]):
        assert ended["mask"][1] == -jnp.inf
        finite = ended | {"mask": ended["mask"][::2]}
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))
        assert largest_difference(ended["layer"], params["layer"]) > 0
    assert mode not in WALK_MODES or int(run.state.skipped) == 0


@every_case
def test_map_params(method, mode):
    """Every state tells Optax which of its trees are like the params."""
    tx = method.make(mode=mode)
    state = tx.init(ragged_params())
    same = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert_equal(same, state)
    like = optax.tree.map_params(
        tx, lambda leaf: True, state, transform_non_params=lambda leaf: False
    )
    flags = jax.tree.leaves(like)
    assert len(flags) == len(jax.tree.leaves(state))
    # The counter is no tree like the params; whole trees are marked, leaf by leaf.
    assert not all(flags)
    assert sum(flags) % len(jax.tree.leaves(ragged_params())) == 0


@every_case
def test_no_params(method, mode):
    """A model of which everything is frozen."""
    tx = method.make(mode=mode)
    parts = in_parts(lambda params, batch: jnp.ones(()), None)
    extra = {"value": 1.0} | (parts if mode == "forward" else {})
    if mode == "scanned":
        extra["grad_fn"] = lambda params, batch: params
    updates, state = tx.update({}, tx.init({}), {}, **extra)
    assert updates == {} and int(optax_flat.metrics(state)["count"]) <= 1


AVERAGES = (optax_flat.swa, optax_flat.ema_weights, optax_flat.lawa)
WRONG_GRADIENTS = {
    "shape": (lambda g: g | {"scale": jnp.ones(1)}, ValueError, "shapes of `params`"),
    "structure": (lambda g: {"layer": g["layer"]}, ValueError, "structure of `params`"),
    "dtype": (lambda g: jax.tree.map(jnp.int32, g), TypeError, "floating-point"),
}


@engine_gradient_case
@pytest.mark.parametrize("what", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_refused(method, mode, what):
    if what == "dtype" and method.factory in AVERAGES:
        return  # what the optimizer inside makes of integers is averaged
    change, error, words = WRONG_GRADIENTS[what]
    tx, params = method.make(mode=mode), ragged_params()
    state = tx.init(params)
    with pytest.raises(error, match=words):
        tx.update(change(params), state, params, value=1.0)


@every_case
def test_a_strange_state_is_refused(method, mode):
    tx, params = method.make(mode=mode), ragged_params()
    state, parts = optax.adam(0.1).init(params), in_parts(loss, batches(1, 1)[0, 0])
    extra = {"value": 1.0} | (parts if mode == "forward" else {})
    with pytest.raises(TypeError, match="`state` differs"):
        tx.update(params, state, params, **extra)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tx.init(params))
    with pytest.raises(TypeError, match=r"jax\.vmap"):
        tx.update(params, stacked, params, **extra)
