"""Averages of the weights: of which points, read where, and the training untouched.

The tables of docs/methods/averaging.md are evaluated, line by line.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
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
from test_golden import cross_entropy, load

import optax_flat
from optax_flat import ema_weights, lawa, swa
from optax_flat.training import make_train_step, update_batch_stats

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "averaging.md"
ROWS = re.findall(r"^\|.*\| `(.*)` \| (\w+) \|$", PAGE.read_text(), re.MULTILINE)
GOLDEN = [pytest.param(*row, id=row[1]) for row in ROWS if "_" in row[1]]
ANNEALS = [pytest.param(*row, id=row[1]) for row in ROWS if "_" not in row[1]]


def evaluate(expression, **names):
    return eval(expression, {"optax": optax, "optax_flat": optax_flat} | names)


@pytest.mark.parametrize(("expression", "name"), GOLDEN)
def test_published_averages(expression, name, x64):
    meta, golden = load(name)
    tx = evaluate(expression, **meta["config"])
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    data = [
        (jnp.asarray(X)[None], jnp.asarray(y)[None])
        for X, y in zip(golden["X"], golden["y"], strict=True)
    ]
    run = train(tx, "plain", params, data, loss=cross_entropy)
    first = meta["config"].get("start", 0)  # before, torch's is the start
    assert len(run.path) == 40 and first in {0, 10}
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        theirs = golden[f"{leaf}_avg"]
        np.testing.assert_allclose(ours[first:], theirs[first:], rtol=0, atol=1e-10)
        np.testing.assert_allclose(
            ours[:first], golden[leaf][:first], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize(("expression", "strategy"), ANNEALS)
def test_swalr(expression, strategy, x64):
    """The formula of torch's SWALR, transcribed."""
    lr, swa_lr, steps, before = 0.3, 0.05, 8, 5
    schedule = evaluate(expression, lr=lr, swa_lr=swa_lr, steps=steps, before=before)
    t = np.clip((np.arange(20) - before) / steps, 0, 1)
    alpha = {"cos": (1 - np.cos(np.pi * t)) / 2, "linear": t}[strategy]
    ours = [schedule(jnp.asarray(i, float)) for i in range(20)]
    np.testing.assert_allclose(ours, lr * (1 - alpha) + swa_lr * alpha, rtol=1e-6)


def test_tables_are_complete():
    assert [row[1] for row in ROWS] == [
        "swa_torch", "ema_torch", "lawa_kaddour", "cos", "linear"
    ]  # fmt: skip


def falling(t):
    return jnp.where(t < 3, 0.9, 0.6)


def weighted(points, weights):
    """The mean of some trees."""
    return jax.tree.map(lambda *x: np.average(x, axis=0, weights=weights), *points)


def decayed(decays, debias):
    """The weights of an exponential average of as many points."""
    weights = [1 - d for d in decays] if debias else [1, *(1 - d for d in decays[1:])]
    return [
        w * np.prod(decays[i + 1 :]) for i, w in enumerate(weights)
    ]  # later decays shrink it


# A rule, and its average of the points so far; None before there is one.
RULES = {
    "swa": (
        functools.partial(swa, start=2, period=2),
        lambda path: weighted(path[2::2], None) if path[2::2] else None,
    ),
    "ema_weights": (
        functools.partial(ema_weights, decay=falling),
        lambda path: weighted(
            path, decayed([float(falling(t)) for t in range(len(path))], True)
        ),
    ),
    "ema_weights as torch": (
        functools.partial(ema_weights, decay=falling, debias=False),
        lambda path: weighted(
            path, decayed([float(falling(t)) for t in range(len(path))], False)
        ),
    ),
    "lawa": (
        functools.partial(lawa, k=2, period=2),
        lambda path: weighted(path[1::2][-2:], None) if path[1::2] else None,
    ),
}
rule_case = pytest.mark.parametrize("rule", RULES)


def walk(mode="transparent", num_steps=3, **arguments):
    settings = {"noise": 0.05, "momentum": 0.9, "key": 0}
    return optax_flat.entropy_sgd(
        0.5, num_steps=num_steps, mode=mode, **settings | arguments
    )


INNER = {
    "sgd": lambda mode: optax.sgd(0.1, momentum=0.9),
    "adam": lambda mode: optax.chain(optax.clip(0.5), optax.adam(0.05)),
    "entropy_sgd": walk,
    "nesterov": lambda mode: optax_flat.multipoint_nesterov(
        0.05, nodes="thirds", mode=mode
    ),
    "parle": lambda mode: optax_flat.parle(
        0.5, num_steps=3, center_step=0.4, axis_name=None, mode=mode, key=0
    ),
}
INNER_CASES = [
    ("sgd", "plain", 1),
    ("adam", "plain", 1),
    *(
        pytest.param(
            name, mode, 3, marks=() if name == "entropy_sgd" else pytest.mark.slow
        )
        for name in ("entropy_sgd", "nesterov", "parle")
        for mode in ("scanned", "transparent")
    ),
]


@functools.cache
def without_average(name, mode, length):
    data = batches(6, length)
    return train(INNER[name](mode), mode, ragged_params(), data)


@rule_case
@pytest.mark.parametrize(("name", "mode", "length"), INNER_CASES)
def test_averages_of_anchors_leave_the_training_alone(rule, name, mode, length):
    """The params to the bit, and the average of what `eval_params` gave without it."""
    make, average = RULES[rule]
    plain = without_average(name, mode, length)
    run = train(make(INNER[name](mode)), mode, ragged_params(), batches(6, length))
    assert_equal(run.params, plain.params)
    assert_equal(run.state.inner_state, plain.state)
    assert int(run.state.count) == 6
    for t in range(6):
        expected = average(plain.path[: t + 1])
        if expected is None:
            assert_equal(run.path[t], plain.path[t])
        else:
            assert_close(run.path[t], expected)
    assert largest_difference(run.path[-1], plain.path[-1]) > 1e-3


@rule_case
def test_in_the_middle_of_a_walk_nothing_moves(rule):
    make, _ = RULES[rule]
    tx = make(walk())
    data = batches(5, 3)
    params, state, _ = train(tx, "transparent", ragged_params(), data[:4])
    before = optax_flat.eval_params(state, params)
    for i in range(2):
        params, state, _ = train(tx, "transparent", params, data[4:, i : i + 1], state)
        assert int(state.inner_state.step) == i + 1
        assert int(state.count) == 4
        assert_equal(optax_flat.eval_params(state, params), before)


def test_before_the_first_point_the_anchor_is_read():
    tx = swa(walk(), start=1)
    start, data = ragged_params(), batches(1, 3)
    run = train(tx, "transparent", start, data[:, :2])  # on the walk's third point
    assert largest_difference(run.params, start) > 1e-3
    assert_equal(run.path[0], start)


@rule_case
def test_last_in_a_chain(rule):
    """Without `inner` it is what stands in front that is averaged."""
    make, _ = RULES[rule]
    tx = optax.chain(optax.clip(0.5), optax.sgd(0.1, 0.9), make())
    around = make(optax.chain(optax.clip(0.5), optax.sgd(0.1, 0.9)))
    data = batches(5, 1)
    ours, theirs = (train(t, "plain", ragged_params(), data) for t in (tx, around))
    assert_equal(ours.params, theirs.params)
    assert_close(ours.path[-1], theirs.path[-1])


def beside(*members):
    return optax.chain(*members)


BESIDE = {
    "transparent": lambda: beside(walk(), swa(start=0)),
    "in front": lambda: beside(lawa(), walk()),
    "look-ahead": lambda: beside(
        optax_flat.multipoint_nesterov(0.1), ema_weights(decay=0.5)
    ),
    "center": lambda: beside(INNER["parle"]("scanned"), swa(start=0)),
    "around another": lambda: beside(walk(), swa(optax.identity(), start=0)),
    "masked": lambda: optax_flat.masked(beside(walk(), swa(start=0)), True),
    "of one leaf": lambda: beside(
        walk(), optax.masked(swa(start=0), {"layer": False, "scale": True})
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_beside_a_method_whose_params_leave_the_anchor(case):
    """Refused at any moment, under `jit` too, and not by the words for wrong params."""
    params = ragged_params()
    state = BESIDE[case]().init(params)
    words = r"^an average stands in a chain .* Wrap the optimizer: optax_flat.swa"
    with pytest.raises(ValueError, match=words):
        optax_flat.eval_params(state, params)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(optax_flat.eval_params, state, params)
    nested = swa(BESIDE[case](), start=0)
    with pytest.raises(ValueError, match=words):
        optax_flat.eval_params(nested.init(params), params)


def test_beside_a_scanned_walk_and_other_leaves():
    """There the anchor is known: params + updates, or nobody's but the average's."""
    data = batches(3, 3)
    around = train(swa(walk("scanned"), start=0), "scanned", ragged_params(), data)
    chained = optax.chain(walk("scanned"), swa(start=0))
    run = train(chained, "scanned", ragged_params(), data)
    assert_close(run.path[-1], around.path[-1])

    labels = {"layer": "walk", "scale": "average"}
    rules = {"walk": walk(), "average": swa(optax.sgd(0.1), start=0)}
    run = train(optax.partition(rules, labels), "transparent", ragged_params(), data)
    assert_equal(run.path[-1]["layer"], run.params["layer"])
    assert run.path[-1]["scale"] != run.params["scale"]


def test_averages_of_averages():
    """The outermost wins, and averages what the inner one gives; of several in one
    chain the last."""
    data = batches(6, 3)
    inner = train(ema_weights(walk(), decay=0.6), "transparent", ragged_params(), data)
    nested = train(
        swa(ema_weights(walk(), decay=0.6), start=2),
        "transparent", ragged_params(), data,
    )  # fmt: skip
    assert_equal(nested.params, inner.params)
    assert_equal(nested.path[:2], inner.path[:2])
    assert_close(nested.path[-1], weighted(inner.path[2:], None))

    sgd = optax.sgd(0.1)
    chained = optax.chain(sgd, ema_weights(decay=0.6), swa(start=2))
    run = train(chained, "plain", ragged_params(), data[:, :1])
    last = train(swa(sgd, start=2), "plain", ragged_params(), data[:, :1])
    first = train(ema_weights(sgd, decay=0.6), "plain", ragged_params(), data[:, :1])
    assert_close(run.path[1], first.path[1])
    assert_close(run.path[-1], last.path[-1])


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_as_the_outer_optimizer_of_a_walk(mode):
    """It sees the anchors there too."""
    data = batches(4, 3)
    settings = {"num_steps": 3, "noise": 0.0, "mode": mode, "key": 0}
    outer = optax_flat.local_entropy(swa(optax.sgd(0.5), start=1), **settings)
    around = swa(optax_flat.local_entropy(optax.sgd(0.5), **settings), start=1)
    ours, theirs = (train(t, mode, ragged_params(), data) for t in (outer, around))
    assert_close(ours.path, theirs.path)
    assert largest_difference(ours.path[-1], ours.params) > 1e-3


MASK = {"layer": {"w": True, "b": False}, "scale": True}


@rule_case
@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_masked(rule, mode):
    """Frozen leaves are no part of the average, nor of its state."""
    make, _ = RULES[rule]
    tx = optax_flat.masked(make(walk(mode)), MASK)
    run = train(tx, mode, ragged_params(), batches(4, 3))
    inside = make(optax_flat.masked(walk(mode), MASK))
    other = train(inside, mode, ragged_params(), batches(4, 3))
    assert_close(run.path, other.path)
    assert_equal(run.path[-1]["layer"]["b"], ragged_params()["layer"]["b"])
    assert len(jax.tree.leaves(run.state)) < len(jax.tree.leaves(other.state))
    if mode == "transparent":
        theirs = optax.chain(
            optax.masked(make(walk(mode)), MASK),
            optax.masked(optax.set_to_zero(), jax.tree.map(lambda m: not m, MASK)),
        )
        by_optax = train(theirs, mode, ragged_params(), batches(4, 3))
        assert_close(by_optax.path[-1], run.path[-1])


def test_multi_steps_counts_real_updates():
    tx = optax.MultiSteps(ema_weights(walk(), decay=0.5), 2)
    data = batches(4, 3)
    run = train(tx, "transparent", ragged_params(), jnp.repeat(data, 2, axis=1))
    alone = train(ema_weights(walk(), decay=0.5), "transparent", ragged_params(), data)
    assert int(run.state.inner_opt_state.count) == 4
    assert_close(run.path[-1], alone.path[-1])


def test_injected_decay():
    make = optax.inject_hyperparams(ema_weights, static_args=ema_weights.static_args)
    data = batches(4, 3)
    injected = train(make(walk(), decay=0.7), "transparent", ragged_params(), data)
    plain = train(ema_weights(walk(), decay=0.7), "transparent", ragged_params(), data)
    assert set(injected.state.hyperparams) == {"decay"}
    assert_close(injected.path, plain.path)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_train_step(mode):
    """It reads the mode off the state inside, and hands on all that a walk wants."""
    tx, data = swa(walk(mode), start=1), batches(3, 3)
    step = make_train_step(loss, tx, mode=mode, donate=True)
    params, state = ragged_params(), tx.init(ragged_params())
    for stack in data:
        for given in [stack] if mode == "scanned" else stack:
            params, state, _ = step(params, state, given)
    run = train(tx, mode, ragged_params(), data)
    assert_close(optax_flat.eval_params(state, params), run.path[-1])


def test_bfloat16_params_have_float32_averages():
    """Two neighbours: their mean is no bfloat16."""
    low, high = jnp.bfloat16(1.0), jnp.bfloat16(1.0) + jnp.finfo(jnp.bfloat16).eps
    params = {"w": jnp.full(3, low)}
    tx = swa(start=0)
    state = tx.init(params)
    for there in (high, low) * 8:
        updates = {"w": there - params["w"]}
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
    middle = (low.astype(float) + high.astype(float)) / 2
    np.testing.assert_allclose(state.average["w"], middle, rtol=1e-6)
    assert optax_flat.eval_params(state, params)["w"].dtype == jnp.bfloat16


@rule_case
def test_accumulator_dtype(rule):
    make, _ = RULES[rule]
    state = make(optax.sgd(0.1), accumulator_dtype=jnp.float16).init(ragged_params())
    kept = state.checkpoints if hasattr(state, "checkpoints") else state.average
    assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype("float16")}


@rule_case
def test_the_first_point_is_exact(rule):
    """However far the params were when the average was made."""
    tx = {"swa": swa(start=0), "lawa": lawa()}.get(rule) or RULES[rule][0]()
    state = tx.init(jnp.array([1e8]))
    _, state = tx.update(jnp.array([3.0]), state, jnp.zeros(1))
    assert optax_flat.eval_params(state, jnp.array([3.0])) == 3.0


def test_checkpoints_are_a_ring():
    state = lawa(k=4).init(ragged_params())
    assert state.checkpoints["layer"]["w"].shape == (4, 3, 4)
    assert state.checkpoints["scale"].shape == (4,)


@rule_case
@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_skipped_updates_poison_nothing(rule, mode):
    """The anchor stayed where it was, and is counted there once more."""
    make, average = RULES[rule]
    data = batches(5, 3).at[3, 1].set(jnp.nan)
    plain = train(walk(mode, skip_nonfinite=True), mode, ragged_params(), data)
    run = train(make(walk(mode, skip_nonfinite=True)), mode, ragged_params(), data)
    assert int(run.state.inner_state.skipped) == 1
    assert_equal(run.params, plain.params)
    assert_close(run.path[-1], average(plain.path))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(run.path[-1]))


@rule_case
def test_an_average_outlives_a_lost_run(rule):
    """Entries that are not finite do not enter, all others do."""
    make, _ = RULES[rule]
    tx = make()

    def follow(points):
        params, state = jnp.zeros(2), tx.init(jnp.zeros(2))
        for point in points:
            _, state = tx.update(point, state, params)
        return optax_flat.eval_params(state, params)

    good = [jnp.array([1.0, 1.0]), jnp.array([2.0, 3.0])] * 3
    lost = [*good, *[jnp.array([jnp.nan, 4.0])] * 4]
    before, after = follow(good), follow(lost)
    assert jnp.isfinite(after).all()
    assert 1.0 <= after[0] <= 2.0
    assert after[1] == follow([*good, *[jnp.full(2, 4.0)] * 4])[1] != before[1]


@rule_case
def test_hand_made_shards_need_no_other(rule):
    """Inside `jax.shard_map` with a loop: numbers are equal on all shards."""
    make, _ = RULES[rule]
    tx = make(optax.sgd(0.1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(params):
        def body(carry, _):
            params, state = carry
            updates, state = tx.update(params, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), None, 5)
        return optax_flat.eval_params(state, params), state.count

    params = jnp.arange(16.0)
    specs = (jax.P("data"), jax.P())
    spread = jax.shard_map(run, mesh=mesh, in_specs=jax.P("data"), out_specs=specs)
    assert_close(jax.jit(spread)(params), jax.jit(run)(params))


@rule_case
def test_no_collectives_and_no_second_ring(rule):
    """On sharded params, with the state donated: elementwise, and in place."""
    make, _ = RULES[rule]
    tx = make(optax.sgd(0.1))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    params = jax.device_put(jnp.ones((1024, 8)), sharding)
    state = jax.jit(tx.init)(params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    text = compiled.as_text()
    collectives = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert not any(name in text for name in collectives)
    shard = params.nbytes / 8
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * shard


@pytest.mark.parametrize("argument", ["params", "gradient", "state"])
def test_wrong_input(argument):
    tx = swa(start=0)
    params = ragged_params()
    state = tx.init(params)
    words = {
        "params": (ValueError, "`params` must be passed"),
        "gradient": (ValueError, "The update to average must have the structure"),
        "state": (TypeError, "(?s)`state` differs.*got: +LawaState"),
    }[argument]
    given = {
        "params": (params, state, None),
        "gradient": (params["layer"], state, params),
        "state": (params, lawa().init(params), params),
    }[argument]
    with pytest.raises(words[0], match=words[1]):
        tx.update(*given)


def inputs():
    rng = np.random.default_rng(0)
    return [jnp.asarray(5 + 3 * rng.normal(size=(16, 3)), jnp.float32) for _ in "four"]


class Net(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x, train):
        for width in (4, 2):
            x = nn.Dense(width)(jnp.tanh(x))
            x = nn.BatchNorm(not train, momentum=self.momentum)(x)
        return x


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
def test_batch_stats_linen(momentum):
    net = Net(momentum)
    variables = net.init(jax.random.key(0), inputs()[0], train=False)
    params, old = variables["params"], variables["batch_stats"]

    def apply(params, batch, batch_stats):
        given = {"params": params, "batch_stats": batch_stats}
        _, moved = net.apply(given, batch, train=True, mutable=["batch_stats"])
        return moved["batch_stats"]

    ours = update_batch_stats(apply, params, iter(inputs()), old)
    assert jax.tree.structure(ours) == jax.tree.structure(old)
    alone = Net(momentum=0.0)  # whose statistics are those of the latest batch
    each = [
        alone.apply({"params": params}, x, train=True, mutable="batch_stats")[1]
        for x in inputs()
    ]
    assert_close({"batch_stats": ours}, weighted(each, None))
    running = old
    for x in inputs():
        running = apply(params, x, running)
    assert largest_difference(running, ours) > 0.1
    hidden = [jnp.tanh(x) @ params["Dense_0"]["kernel"] for x in inputs()]
    var = np.mean([np.var(h, axis=0) for h in hidden], axis=0)
    np.testing.assert_allclose(ours["BatchNorm_0"]["var"], var, rtol=1e-5)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


@pytest.mark.parametrize("pure", [False, True])
def test_batch_stats_nnx(pure):
    """The states as NNX splits them, or as arrays."""
    model = Model(nnx.Rngs(0))
    graphdef, *split = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    params, batch_stats, rest = nnx.as_pure(split) if pure else split

    def apply(params, batch, batch_stats):
        model = nnx.merge(graphdef, params, batch_stats, rest, copy=True)
        model(batch)
        moved = nnx.state(model, nnx.BatchStat)
        return nnx.as_pure(moved) if pure else moved

    nnx.update(model, update_batch_stats(apply, params, inputs(), batch_stats))
    hidden = [np.asarray(model.dense(x)) for x in inputs()]
    mean, var = (
        np.mean([f(h, axis=0) for h in hidden], axis=0) for f in (np.mean, np.var)
    )
    np.testing.assert_allclose(model.norm.mean[...], mean, rtol=1e-5)
    np.testing.assert_allclose(model.norm.var[...], var, rtol=1e-5)


@pytest.mark.parametrize(
    ("apply", "batches", "stats", "error", "words"),
    [
        (lambda p, b, s: s, [1.0], jnp.zeros(2), ValueError, "got m = 1.0 .* training"),
        (lambda p, b, s: 0 * s + b, [jnp.nan], jnp.zeros(2), ValueError, "got m = nan"),
        (lambda p, b, s: [s], [1.0], jnp.zeros(2), ValueError, "(?s)structure .*got:"),
        (lambda p, b, s: s, [], jnp.zeros(2), ValueError, "at least one batch"),
        (lambda p, b, s: s, [1.0], jnp.zeros(2, int), TypeError, "floating-point"),
    ],
)  # fmt: skip
def test_batch_stats_errors(apply, batches, stats, error, words):
    with pytest.raises(error, match=words):
        update_batch_stats(apply, None, batches, stats)


def test_population():
    """Members side by side by `vmap`, each with its average."""
    tx = lawa(walk(noise=0.0), k=2)

    def run(params):
        state = tx.init(params)
        for stack in batches(2, 3):
            params, state = update(tx, "transparent", params, state, stack)
        return optax_flat.eval_params(state, params)

    def shifted(s):
        return jax.tree.map(lambda x: x + s, ragged_params())

    together = jax.jit(jax.vmap(lambda s: run(shifted(s))))(jnp.array([0.0, 0.1]))
    alone = jax.jit(run)(shifted(0.1))
    assert_close(jax.tree.map(lambda x: x[1], together), alone)
