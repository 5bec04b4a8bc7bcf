"""Walks that users write themselves, and what `update` says to wrong input."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
from optax_flat import Walk, scanned, transparent
from optax_flat._core.modes import states


class Memory(NamedTuple):
    velocity: optax.Updates
    offset: optax.Updates  # anchor minus first point


class Inner(NamedTuple):
    point: optax.Params
    grads: optax.Updates


def nesterov_walk(lr=0.05, m=0.9):
    """Nesterov's momentum as it is written in textbooks: the gradient is wanted at the
    look-ahead point, so the first point of the walk is not the anchor."""

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return Memory(zeros, zeros)

    def start(memory, params):
        return Inner(params, optax.tree.zeros_like(params))

    def step(memory, inner, grads):
        return Inner(inner.point, grads)

    def finish(memory, inner, params):
        velocity = optax.tree.add_scale(
            optax.tree.scale(m, memory.velocity), lr, inner.grads
        )
        # The anchor moves by -v, and the next look-ahead is m v further.
        offset = optax.tree.scale(m, velocity)
        updates = jax.tree.map(
            lambda old, v, new: old - v - new, memory.offset, velocity, offset
        )
        return updates, Memory(velocity, offset)

    return Walk(1, init, start, step, finish)


@pytest.mark.parametrize(
    ("mode", "adapter"), [("scanned", scanned), ("transparent", transparent)]
)
def test_first_point_need_not_be_the_anchor(mode, adapter, x64):
    """params are look-ahead points, which optax.sgd(nesterov=True) walks on as well;
    eval_params are the textbook's iterates."""
    data = batches(8, 1, jnp.float64)
    run = train(adapter(nesterov_walk()), mode, ragged_params(jnp.float64), data)
    known = optax.sgd(0.05, 0.9, nesterov=True)
    assert_close(
        run.params,
        train(known, "transparent", ragged_params(jnp.float64), data).params,
        jnp.float64,
    )
    theta = ragged_params(jnp.float64)
    v = optax.tree.zeros_like(theta)
    for batch in data[:, 0]:
        ahead = jax.tree.map(lambda t, v: t - 0.9 * v, theta, v)
        g = jax.grad(loss)(ahead, batch)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.05 * g, v, g)
        theta = optax.tree.sub(theta, v)
    evaluated = optax_flat.eval_params(run.state, run.params)
    assert_close(evaluated, theta, jnp.float64)


def test_eval_params_of_a_frozen_leaf_with_offset():
    mask = {"layer": True, "scale": False}
    tx = optax_flat.masked(scanned(nesterov_walk()), mask)
    run = train(tx, "scanned", ragged_params(), batches(2, 1))
    evaluated = optax_flat.eval_params(run.state, run.params)
    assert evaluated["scale"] == run.params["scale"]
    assert (evaluated["layer"]["w"] != run.params["layer"]["w"]).any()


def test_eval_params_of_any_optimizer():
    params = ragged_params()
    state = optax.adam(0.1).init(params)
    assert optax_flat.eval_params(state, params) is params


def test_unroll_changes_nothing_but_the_program():
    data = batches(2, 5)
    runs = [
        train(
            optax_flat.entropy_sgd(0.5, num_steps=5, noise=0.1, unroll=unroll, key=0),
            "scanned", ragged_params(), data,
        ).params
        for unroll in (1, 2, True)
    ]  # fmt: skip
    assert_close(runs[1], runs[0])
    assert_close(runs[2], runs[0])

    def loops(unroll):
        tx = optax_flat.entropy_sgd(0.5, num_steps=5, noise=0.0, unroll=unroll, key=0)
        params = ragged_params()
        step = jax.jit(lambda *args: update(tx, "scanned", *args))
        return step.lower(params, tx.init(params), data[0]).as_text().count("while")

    assert loops(True) < loops(1)


def test_default_batches_are_indices():
    """grad_fn(params, i), i = 0 ... L - 2, as in optax.contrib.sam."""
    stack = batches(1, 4)[0]
    tx = optax_flat.entropy_sgd(0.5, num_steps=4, noise=0.0, key=0)
    params, state = ragged_params(), tx.init(ragged_params())
    grad = jax.grad(loss)
    by_index, _ = tx.update(
        grad(params, stack[0]), state, params,
        grad_fn=lambda p, i: grad(p, stack[i + 1]),
    )  # fmt: skip
    by_batch, _ = tx.update(
        grad(params, stack[0]), state, params, grad_fn=grad, batches=stack[1:]
    )
    assert_close(by_index, by_batch)


def test_value_fn_is_differentiated():
    """Hosts that pass `value`, `grad` and `value_fn` work."""
    tx = optax_flat.entropy_sgd(0.5, num_steps=4, noise=0.0, key=0)
    params, state = ragged_params(), tx.init(ragged_params())
    batch = batches(1, 1)[0, 0]
    value, grad = jax.value_and_grad(loss)(params, batch)
    from_value_fn, _ = tx.update(
        grad, state, params, value=value, grad=grad, value_fn=lambda p: loss(p, batch)
    )
    same_batch = jnp.stack([batch] * 3)
    from_grad_fn, _ = tx.update(
        grad, state, params, grad_fn=jax.grad(loss), batches=same_batch
    )
    assert_close(from_value_fn, from_grad_fn)


def test_aux_is_threaded_and_dropped():
    """Each inner pass sees what the one before left; the caller keeps its own."""
    tx = optax_flat.entropy_sgd(0.5, num_steps=4, noise=0.0, has_aux=True, key=0)
    seen = []

    def grad_fn(params, batch, aux):
        jax.debug.callback(lambda c: seen.append(int(c)), aux["count"], ordered=True)
        return jax.grad(loss)(params, batch), {"count": aux["count"] + 1}

    stack = batches(1, 4)[0]
    params = ragged_params()
    tx.update(
        jax.grad(loss)(params, stack[0]), tx.init(params), params,
        grad_fn=grad_fn, batches=stack[1:], aux={"count": jnp.array(10)},
    )  # fmt: skip
    jax.effects_barrier()
    assert seen == [10, 11, 12]


def wrong(**changes: Any):
    """One call of `update` in scanned mode with something wrong."""
    stack = batches(1, 4)[0]
    params = ragged_params()
    tx = optax_flat.entropy_sgd(0.5, num_steps=4, key=0)
    arguments = {
        "updates": jax.grad(loss)(params, stack[0]),
        "state": tx.init(params),
        "params": params,
        "grad_fn": jax.grad(loss),
        "batches": stack[1:],
    }
    return lambda: tx.update(**arguments | changes)


def optax_masked():
    """optax.masked around scanned mode, which cannot work."""
    tx = optax.masked(
        optax_flat.entropy_sgd(0.5, num_steps=4, key=0), {"layer": True, "scale": False}
    )
    params, stack = ragged_params(), batches(1, 4)[0]
    grad_fn = jax.grad(loss)
    return tx.update(
        grad_fn(params, stack[0]), tx.init(params), params,
        grad_fn=grad_fn, batches=stack[1:],
    )  # fmt: skip


def aux_in_the_optimizer_only():
    tx = optax_flat.entropy_sgd(0.5, num_steps=4, has_aux=True, key=0)
    params, stack = ragged_params(), batches(1, 4)[0]
    return tx.update(
        params, tx.init(params), params,
        grad_fn=lambda p, batch, aux: p, batches=stack[1:],
    )  # fmt: skip


def swapped_eval_params():
    tx = optax_flat.entropy_sgd(0.5, key=0)
    return optax_flat.eval_params(ragged_params(), tx.init(ragged_params()))


INT_PARAMS = ragged_params() | {"scale": jnp.array(2)}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (optax_masked, ValueError, "placeholders .* use optax_flat.masked"),
        (aux_in_the_optimizer_only, ValueError, "must return .grads, aux. where"),
        (
            swapped_eval_params,
            ValueError,
            "eval_params.opt_state, params.*swap the two",
        ),
        (wrong(params=None), ValueError, "`params` must be passed .* third argument"),
        (wrong(grad_fn=None), ValueError, "`grad_fn` must be passed .* 4 gradients"),
        (
            wrong(grad_fn=lambda p, b: (p, 0)),
            ValueError,
            r"(?s)`grad_fn` returns must have the structure .* has_aux=True",
        ),
        (
            wrong(grad_fn=lambda p, b: p["layer"]),
            ValueError,
            r"(?s)`grad_fn` returns must have the structure .* got: .* expected:",
        ),
        (
            wrong(grad_fn=lambda p, b: jax.tree.map(lambda x: x[None], p)),
            ValueError,
            "must have the shapes of `params`",
        ),
        (
            wrong(updates=ragged_params()["layer"]),
            ValueError,
            "The gradient given to `update` must have the structure",
        ),
        (
            wrong(batches=batches(1, 4)[0]),
            ValueError,
            r"leading axis 3, got shape \(4, 5, 3\) .* give `update` only `x\[1:\]`",
        ),
        (wrong(batches=jnp.array(1.0)), ValueError, r"leading axis 3, got shape \(\)"),
        (
            wrong(params=INT_PARAMS),
            TypeError,
            r"floating-point arrays only, .* int32 at \['scale'\]. .*optax_flat.masked",
        ),
        (
            lambda: optax_flat.entropy_sgd(0.5, key=0).init(INT_PARAMS),
            TypeError,
            "floating-point arrays only",
        ),
        (
            lambda: optax_flat.entropy_sgd(0.5, key=0).update(
                jnp.ones(2),
                optax_flat.entropy_sgd(0.5, mode="transparent", key=0).init(
                    jnp.ones(2)
                ),
                jnp.ones(2),
            ),
            TypeError,
            "(?s)`state` differs.*got: +TransparentState .*expected: ScannedState",
        ),
        (
            lambda: optax_flat.entropy_sgd(0.5, mode="transparent", key=0).update(
                jnp.ones(2), optax.adam(0.1).init(jnp.ones(2)), jnp.ones(2)
            ),
            TypeError,
            "(?s)`state` differs.*got: +tuple .*expected: TransparentState",
        ),
        (
            lambda: optax_flat.masked(optax.sgd(0.1), True).update(1.0, None),
            ValueError,
            "`params` must be passed to `update` of optax_flat.masked",
        ),
        (
            lambda: scanned(nesterov_walk()._replace(length=0)),
            ValueError,
            "`walk.length` must be an int >= 1, got 0",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_frozen_integers_are_fine():
    params = ragged_params() | {"scale": jnp.array(2)}
    mask = {"layer": True, "scale": False}
    tx = optax_flat.masked(optax_flat.entropy_sgd(0.5, num_steps=3, key=0), mask)

    def grad_fn(p, batch):
        grads = jax.grad(lambda layer: loss(p | {"layer": layer}, batch))(p["layer"])
        return {"layer": grads, "scale": jnp.zeros((), int)}

    stack = batches(1, 3)[0]
    updates, _ = tx.update(
        grad_fn(params, stack[0]), tx.init(params), params,
        grad_fn=grad_fn, batches=stack[1:],
    )  # fmt: skip
    assert optax.apply_updates(params, updates)["scale"] == 2
    assert (np.asarray(updates["layer"]["w"]) != 0).any()


class Ascent(NamedTuple):
    point: optax.Params
    anchor: optax.Params
    grads: optax.Updates
    taken: int


def forgetful_walk():
    """Sharpness-aware in shape: the second point does not depend on the first gradient
    when that is zero, and the update only on the second gradient."""

    def start(memory, params):
        return Ascent(params, params, optax.tree.zeros_like(params), 0)

    def step(memory, inner, grads):
        # A guarded division forgets a NaN: the next point is the anchor then.
        norm = optax.tree.norm(grads)
        scale = jnp.where(norm > 0, 0.1 / jnp.where(norm > 0, norm, 1.0), 0.0)
        safe = jax.tree.map(lambda g: jnp.where(jnp.isnan(g), 0.0, g), grads)
        point = optax.tree.add_scale(inner.anchor, scale, safe)
        first = inner.taken == 0
        # What the walk keeps of a NaN is in `grads`, until the next one replaces it.
        point = jax.tree.map(lambda a, b: jnp.where(first, a, b), point, inner.point)
        return Ascent(point, inner.anchor, grads, inner.taken + 1)

    def finish(memory, inner, params):
        return optax.tree.scale(-0.1, inner.grads), memory

    return Walk(2, lambda params: (), start, step, finish)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    ("mode", "adapter"), [("scanned", scanned), ("transparent", transparent)]
)
def test_a_walk_cannot_forget_that_it_was_nonfinite(mode, adapter, position):
    data = batches(2, 2)
    poisoned = data.at[1, position].set(jnp.nan)
    tx = adapter(forgetful_walk(), skip_nonfinite=True)
    run = train(tx, mode, ragged_params(), poisoned)
    assert int(run.state.skipped) == 1
    assert_close(run.params, run.path[0])
    assert_close(run.params, train(tx, mode, ragged_params(), data[:1]).params)


@pytest.mark.parametrize(
    ("mode", "adapter"), [("scanned", scanned), ("transparent", transparent)]
)
def test_a_move_to_nowhere_is_skipped(mode, adapter):
    """Points that overflow, of gradients that do not."""
    walk = descent_by_moves()
    far = walk._replace(
        move=lambda memory, inner: inner._replace(
            point=optax.tree.scale(jnp.where(memory == 2, jnp.inf, 1.0), inner.ahead)
        ),
    )  # fmt: skip
    run = train(
        adapter(far, skip_nonfinite=True), mode, ragged_params(), batches(4, 4)
    )  # fmt: skip
    (state,) = states(run.state, (optax_flat.ScannedState, optax_flat.TransparentState))
    assert int(state.skipped) == 2
    plain = train(adapter(walk), mode, ragged_params(), batches(4, 4)[:2])
    assert_close(run.params, plain.params)


def test_unused_branch_does_not_leak():
    """Transparent mode without a guard: a NaN in the middle of a walk is not in the
    outer moments before the walk ends, although both branches see it."""
    tx = optax_flat.entropy_adam(0.1, num_steps=3, noise=0.0, mode="transparent", key=0)
    data = batches(2, 3)
    run = train(tx, "transparent", ragged_params(), data[:1])
    poisoned = data[1, :2].at[1].set(jnp.nan)
    _, state = update(tx, "transparent", run.params, run.state, poisoned)
    assert not all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.inner.point))
    for name in ("mu", "nu"):
        jax.tree.map(
            np.testing.assert_array_equal,
            optax.tree.get(state, name),
            optax.tree.get(run.state, name),
        )


def test_masked_forwards_to_multi_steps():
    tx = optax_flat.entropy_sgd(0.5, num_steps=3, key=0)
    wrapped = optax_flat.masked(optax.MultiSteps(tx, 1), True)
    data = batches(2, 3)
    runs = [train(t, "scanned", ragged_params(), data).params for t in (tx, wrapped)]
    assert_close(*runs)


def test_one_gradient_takes_no_batches():
    """A stack of minibatches is not silently dropped when one gradient is enough."""
    tx = optax_flat.entropy_sgd(0.5, num_steps=1, key=0)
    params = ragged_params()
    stack = batches(1, 4)[0]
    with pytest.raises(ValueError, match="leading axis 0, got shape"):
        tx.update(params, tx.init(params), params, batches=stack[1:])


def test_a_transparent_walk_starts_at_the_params_it_is_given():
    """Params that were replaced after `init`, by a checkpoint for example."""
    tx = optax_flat.entropy_sgd(0.5, num_steps=3, mode="transparent", key=0)
    params, data = ragged_params(), batches(2, 3)
    other = tx.init(jax.tree.map(jnp.zeros_like, params))
    assert_equal(
        train(tx, "transparent", params, data, other).params,
        train(tx, "transparent", params, data).params,
    )


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_counters_saturate(mode):
    tx = optax_flat.entropy_sgd(0.5, num_steps=2, mode=mode, key=0)
    top = jnp.iinfo(jnp.int32).max
    state = tx.init(ragged_params())._replace(gradient_evaluations=jnp.int32(top - 1))
    state = train(tx, mode, ragged_params(), batches(2, 2), state).state
    assert int(state.gradient_evaluations) >= top - 1


def test_masked_merges_for_value_fn():
    tx = optax_flat.masked(
        optax_flat.entropy_sgd(0.5, num_steps=3, noise=0.0, key=0),
        {"layer": True, "scale": False},
    )
    params, batch = ragged_params(), batches(1, 1)[0, 0]
    given = jax.grad(loss)(params, batch), tx.init(params), params
    from_value_fn, _ = tx.update(*given, value_fn=lambda p: loss(p, batch))
    from_grad_fn, _ = tx.update(*given, grad_fn=lambda p, _: jax.grad(loss)(p, batch))
    assert_close(from_value_fn, from_grad_fn)


def test_masked_threads_aux():
    tx = optax_flat.masked(
        optax_flat.entropy_sgd(0.5, num_steps=3, noise=0.0, has_aux=True, key=0),
        {"layer": True, "scale": False},
    )
    params, stack = ragged_params(), batches(1, 3)[0]
    updates, _ = tx.update(
        jax.grad(loss)(params, stack[0]), tx.init(params), params,
        grad_fn=lambda p, b, aux: (jax.grad(loss)(p, b), aux + 1),
        batches=stack[1:], aux=jnp.array(0),
    )  # fmt: skip
    assert updates["scale"] == 0
    assert (np.asarray(updates["layer"]["w"]) != 0).any()


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_functions_see_their_dtypes(mode):
    """`grad_fn` gets points in the params' dtype, `inner_transform` in float32."""
    seen = {"grad_fn": set(), "inner_transform": set()}

    def grad_fn(params, batch):
        seen["grad_fn"] |= {x.dtype for x in jax.tree.leaves(params)}
        return jax.grad(loss)(params, batch)

    def record(updates, state, params=None):
        leaves = jax.tree.leaves((updates, params))
        seen["inner_transform"] |= {x.dtype for x in leaves}
        return updates, state

    spy = optax.GradientTransformation(lambda params: (), record)
    tx = optax_flat.entropy_sgd(0.5, num_steps=3, inner_transform=spy, mode=mode, key=0)
    params = ragged_params(jnp.bfloat16)
    stack = batches(1, 3, jnp.bfloat16)[0]
    more = {"grad_fn": grad_fn, "batches": stack[1:]} if mode == "scanned" else {}
    tx.update(grad_fn(params, stack[0]), tx.init(params), params, **more)
    assert seen["grad_fn"] == {jnp.dtype("bfloat16")}
    assert seen["inner_transform"] == {jnp.dtype("float32")}


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_the_guard_excuses_what_was_infinite_before(mode):
    """Such as the best value so far, which starts at infinity."""
    outer = optax.GradientTransformation(
        lambda params: jnp.array(jnp.inf),
        lambda updates, state, params=None: (optax.tree.scale(-1.0, updates), state),
    )
    tx = optax_flat.local_entropy(
        outer, num_steps=2, skip_nonfinite=True, mode=mode, key=0
    )
    run = train(tx, mode, ragged_params(), batches(1, 2))
    assert int(run.state.skipped) == 0
    assert largest_difference(run.params, ragged_params()) > 1e-4


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_updates_that_are_not_jitted_compile_once(mode):
    """The second one finds every operation compiled."""
    compilations = []

    def count(event, duration, **unused):
        if "backend_compile" in event:
            compilations.append(event)

    tx = optax_flat.entropy_sgd(0.5, num_steps=3, noise=0.1, mode=mode, key=0)
    params, stack = ragged_params(), batches(1, 3)[0]
    grad_fn = jax.grad(loss)
    more = {"grad_fn": grad_fn, "batches": stack[1:]} if mode == "scanned" else {}
    state, counts = tx.init(params), []
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for _ in range(5):  # all gradients of a transparent walk, and some again
            _, state = tx.update(grad_fn(params, stack[0]), state, params, **more)
            counts.append(len(compilations))
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert counts[-1] == counts[2]


class Short(NamedTuple):
    """One descent; memory is the number of updates made."""

    point: optax.Params
    taken: jax.Array


def descent_of_1_to_4():
    """Gradient steps, in update u as many as 1 + u mod 4."""

    def step(memory, inner, grads):
        point = jax.tree.map(lambda p, g: p - 0.1 * g, inner.point, grads)
        return Short(point, inner.taken + 1)

    return Walk(
        4,
        lambda params: jnp.zeros([], jnp.int32),
        lambda memory, params: Short(params, jnp.zeros([], jnp.int32)),
        step,
        lambda memory, inner, params: (
            optax.tree.sub(inner.point, params), memory + 1
        ),
        lambda memory, inner: inner.taken == 1 + memory % 4,
    )  # fmt: skip


class Halting(NamedTuple):
    """The descent, whose point follows where another gradient is wanted."""

    point: optax.Params
    ahead: optax.Params
    taken: jax.Array


def descent_by_moves():
    """The same, with the point moved apart from the step."""
    walk = descent_of_1_to_4()

    def step(memory, inner, grads):
        short = walk.step(memory, Short(inner.point, inner.taken), grads)
        return Halting(inner.point, *short)

    return walk._replace(
        start=lambda memory, params: Halting(params, params, jnp.zeros([], jnp.int32)),
        step=step,
        finish=lambda memory, inner, params: (
            optax.tree.sub(inner.ahead, params), memory + 1
        ),
        move=lambda memory, inner: inner._replace(point=inner.ahead),
    )  # fmt: skip


@pytest.mark.parametrize("make", [descent_of_1_to_4, descent_by_moves])
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    ("mode", "adapter"), [("scanned", scanned), ("transparent", transparent)]
)
def test_a_walk_may_end_after_any_gradient(mode, adapter, jit, make):
    data, tx = batches(5, 4), adapter(make())
    with jax.disable_jit(not jit):
        run = train(tx, mode, ragged_params(), data)
    expected = ragged_params()
    for u, stack in enumerate(data):
        for batch in stack[: 1 + u % 4]:
            grads = jax.grad(loss)(expected, batch)
            expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, grads)
    assert_close(run.params, expected)
    (state,) = states(run.state, (optax_flat.ScannedState, optax_flat.TransparentState))
    assert int(state.gradient_evaluations) == 1 + 2 + 3 + 4 + 1
