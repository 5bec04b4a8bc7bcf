"""The sharpness-aware family beyond the catalogue: rules, groups, skipped gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, batches, loss, ragged_params, train, update

import optax_flat
from optax_flat import ascent, descent
from optax_flat.training import make_train_step

SGD = optax.sgd(0.1, momentum=0.9)


def perturbation(rule, grads, params, rho=1.0, **arguments):
    """What SAM adds to the params: its first update in transparent mode."""
    tx = optax_flat.sam(
        optax.sgd(0.0), rho=rho, ascent=rule, mode="transparent", **arguments
    )
    return tx.update(grads, tx.init(params), params)[0]


def test_train_step_takes_one_minibatch_in_scanned_mode():
    """Both gradients on it; transparent mode calls the step twice with it."""
    data = batches(3, 1)[:, 0]

    def run(mode, repeats):
        tx = optax_flat.sam(SGD, rho=0.1, mode=mode)
        step = make_train_step(loss, tx)
        params, state = ragged_params(), tx.init(ragged_params())
        losses = []
        for batch in data:
            for _ in range(repeats):
                params, state, value = step(params, state, batch)
                losses.append(value)
        return params, losses[::repeats]

    scanned, values = run("scanned", 1)
    transparent, others = run("transparent", 2)
    assert_close(scanned, transparent)
    assert_close(values, others)
    by_hand = train(
        optax_flat.sam(SGD, rho=0.1), "scanned", ragged_params(),
        jnp.repeat(data[:, None], 2, axis=1),
    )  # fmt: skip
    assert_close(scanned, by_hand.params)


@pytest.mark.parametrize("p", [1.3, 2.0, 3.0, np.inf])
@pytest.mark.parametrize("per_leaf", [False, True])
def test_unit_is_the_steepest_direction_of_its_norm(p, per_leaf):
    """Of p-norm 1, and along the gradient no other of that norm rises more."""
    rng = np.random.default_rng(0)
    grads = {"a": rng.normal(size=(3, 2)), "b": 1e-3 * rng.normal(size=4)}
    grads = jax.tree.map(jnp.float32, grads)
    a = ascent.unit(p, per_leaf=per_leaf).update(grads, optax.EmptyState())[0]
    parts = [[x] for x in jax.tree.leaves(a)] if per_leaf else [jax.tree.leaves(a)]
    for part in parts:
        flat = np.concatenate([np.ravel(x) for x in part])
        np.testing.assert_allclose(np.linalg.norm(flat, p), 1.0, rtol=1e-5)
    if per_leaf:
        return
    rise, g = (
        optax.tree.vdot(a, grads),
        np.concatenate([*map(np.ravel, grads.values())]),
    )
    for _ in range(200):
        other = rng.normal(size=g.shape)
        assert g @ other / np.linalg.norm(other, p) < rise


def test_unit_of_tiny_huge_and_zero_gradients():
    for p in (1.3, 2.0, np.inf):
        rule = ascent.unit(p)
        for size in (1e-15, 1e15):
            a, _ = rule.update(jnp.array([3.0, -4.0]) * size, optax.EmptyState())
            expected, _ = rule.update(jnp.array([3.0, -4.0]), optax.EmptyState())
            assert_close(a, expected)
        a, _ = rule.update({"w": jnp.zeros(3), "e": jnp.zeros([0])}, optax.EmptyState())
        assert (a["w"] == 0).all()


def test_adaptive_unit_leaves_biases_alone():
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.full(2, 7.0)}
    grads = jax.tree.map(jnp.ones_like, params)
    e = perturbation(ascent.adaptive_unit(0.5), grads, params)
    norm = np.sqrt(4 * 3.5**2 + 2)
    assert_close(e, {"w": jnp.full((2, 2), 3.5**2 / norm), "b": jnp.full(2, 1 / norm)})


def test_mask_perturbs_and_measures_only_what_it_selects():
    """SAM-ON: the norm is that of the selected leaves."""
    grads = {"norm": jnp.array([3.0, 4.0]), "w": jnp.full((5, 5), 100.0)}
    params = jax.tree.map(jnp.ones_like, grads)
    for mask in (
        {"norm": True, "w": False},
        lambda p: jax.tree.map(lambda x: x.ndim == 1, p),
    ):
        e = perturbation(ascent.unit(), grads, params, rho=10.0, mask=mask)
        assert_close(e, {"norm": jnp.array([6.0, 8.0]), "w": jnp.zeros((5, 5))})


def test_random_leaves():
    """Each leaf in about its share of the updates, over that share."""
    rule = ascent.random_leaves(0.25, key=0)
    leaves = [jnp.ones(2)] * 40
    state, kept = rule.init(leaves), []
    for _ in range(25):
        a, state = rule.update(leaves, state)
        kept += [float(x[0]) for x in a]
        assert all((x == x[0]).all() for x in a)
    assert set(kept) == {0.0, 4.0}
    # A binomial of 1000 draws: five deviations.
    assert abs(np.mean(kept) - 1.0) < 5 * np.sqrt(3 / 1000)


def test_rules_compose_freely():
    """A combination that no paper has, against its formula."""
    grads = {"w": jnp.array([[1.0, -2.0], [0.5, 4.0]]), "b": jnp.array([3.0, 0.1])}
    params = jax.tree.map(lambda g: g + 1.0, grads)
    rule = optax.chain(optax.clip(2.0), ascent.adaptive_unit(0.1, p=np.inf))
    e = perturbation(rule, grads, params, rho=0.3)
    t = jax.tree.map(lambda w: jnp.abs(w) + 0.1 if w.ndim == 2 else 1.0 + 0 * w, params)
    assert_close(e, jax.tree.map(lambda t, g: 0.3 * t * jnp.sign(g), t, grads))


def counted(calls):
    """A loss that notes when it is differentiated at run time."""

    def noting(params, batch):
        jax.debug.callback(lambda: calls.append(None))
        return loss(params, batch)

    return noting


def test_skipped_gradients_are_not_computed():
    """LookSAM's second one in scanned mode, jitted: 1 + 1/k per update."""
    calls = []
    tx = optax_flat.looksam(SGD, period=4)
    run = train(
        tx, "scanned", ragged_params(), batches(8, 2), loss=counted(calls)
    )  # fmt: skip
    jax.effects_barrier()
    assert len(calls) == int(run.state.gradient_evaluations) == 10


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_skipped_perturbations_are_not_computed(mode):
    """In scanned mode; in neither does a rule of ascent with a state move on."""
    calls = []

    def update(grads, count, params=None):
        jax.debug.callback(lambda: calls.append(None))
        return grads, count + 1

    rule = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    reuse = descent.reuse(period=4, alpha=0.5)
    tx = optax_flat.sam(SGD, rho=0.1, ascent=rule, descent=reuse, mode=mode)
    run = train(tx, mode, ragged_params(), jnp.repeat(batches(8, 1), 2, axis=1))
    jax.effects_barrier()
    assert int(run.state.memory.ascent_state) == 2
    assert mode == "transparent" or len(calls) == 2


def test_a_rule_that_does_without_says_what_it_makes_of_g():
    rule = descent.reuse(period=4, alpha=0.5)._replace(alone=None)
    with pytest.raises(ValueError, match="both `wants_second` and `alone`.*alone=None"):
        optax_flat.sam(SGD, descent=rule)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_period_one_is_sam(mode):
    data = jnp.repeat(batches(4, 1), 2, axis=1)
    looked = train(
        optax_flat.looksam(SGD, period=1, mode=mode), mode, ragged_params(), data
    )
    sam = train(optax_flat.sam(SGD, rho=0.1, mode=mode), mode, ragged_params(), data)
    assert_close(looked.params, sam.params)


def test_unused_second_gradient_does_not_leak():
    """A second minibatch of NaN, which LookSAM does not look at."""
    data = batches(4, 2)
    poisoned = data.at[1:, 1].set(jnp.nan)
    tx = optax_flat.looksam(SGD, period=4)
    clean, dirty = (train(tx, "scanned", ragged_params(), x) for x in (data, poisoned))
    assert_close(clean.params, dirty.params)


def per_group(params, state_of, data, groups, tx):
    """What as many devices do, each with its own perturbation, one mean gradient."""
    grad = jax.grad(loss)
    parts = data.reshape(groups, -1, data.shape[-1])

    def perturbed(part):
        g = grad(params, part)
        return grad(optax.tree.add(params, optax.tree.scale(
            0.1 / optax.tree.norm(g), g)), part)  # fmt: skip

    mean = jax.tree.map(lambda x: x.mean(0), jax.vmap(perturbed)(parts))
    updates, state_of = tx.update(mean, state_of, params)
    return optax.apply_updates(params, updates), state_of


@pytest.mark.parametrize("groups", [2, 5])
def test_groups_have_perturbations_of_their_own(groups):
    data = jnp.asarray(np.random.default_rng(0).normal(size=(3, 20, 3)), jnp.float32)
    tx = optax_flat.sam(SGD, rho=0.1, num_groups=groups)
    step = make_train_step(loss, tx, num_groups=groups)
    params, state = ragged_params(), tx.init(ragged_params())
    expected, sgd_state = ragged_params(), SGD.init(ragged_params())
    for batch in data:
        before = params
        params, state, value = step(params, state, batch)
        assert_close(value, loss(before, batch))
        expected, sgd_state = per_group(expected, sgd_state, batch, groups, SGD)
    assert_close(params, expected)
    whole = train(
        optax_flat.sam(SGD, rho=0.1), "scanned", ragged_params(),
        jnp.repeat(data[:, None], 2, axis=1),
    )  # fmt: skip
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, whole.params)
    assert max(jax.tree.leaves(difference)) > 1e-4


def test_groups_refuse_what_cannot_work():
    tx = optax_flat.sam(SGD, num_groups=4)
    params = ragged_params()
    state, grad = tx.init(params), jax.grad(loss)
    batch = batches(1, 1)[0, 0]
    with pytest.raises(ValueError, match="one gradient for each of num_groups=4 gr"):
        tx.update(grad(params, batch), state, params, grad_fn=grad)
    stacked = jax.vmap(grad, (None, 0))(params, batches(1, 4)[0])
    with pytest.raises(ValueError, match="`batches` must be passed .* num_groups=4"):
        tx.update(stacked, state, params, grad_fn=grad)
    with pytest.raises(ValueError, match=r"leading axes \[L - 1, 4\] .* \(1, 5, 3\)"):
        tx.update(stacked, state, params, grad_fn=grad, batches=batch[None])
    with pytest.raises(ValueError, match="`num_groups` must be 1 in transparent mode"):
        optax_flat.sam(SGD, num_groups=4, mode="transparent")
    with pytest.raises(ValueError, match="multiple of num_groups=4 long, got 5 samp"):
        make_train_step(loss, tx, num_groups=4)(params, state, batch)


def test_schedule_of_the_radius_follows_the_learning_rate():
    rate = optax.linear_schedule(0.2, 0.1, 10)
    rho = optax_flat.schedules.proportional_radius(
        rate, rate_range=(0.1, 0.2), rho_range=(0.05, 0.25)
    )
    np.testing.assert_allclose([rho(0), rho(5), rho(10)], [0.25, 0.15, 0.05], rtol=1e-5)


def test_descent_must_be_a_rule():
    with pytest.raises(TypeError, match="`descent` must be a rule of optax_flat.desce"):
        optax_flat.sam(SGD, descent=optax.sgd(0.1))


def test_gsam_can_minimize_the_plain_loss():
    g, g_r = jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0])
    rule = descent.surrogate_gap(0.5, minimize_perturbed=False)
    combined = rule.combine((), descent.Gradients(g, g_r), 0)
    assert_close(combined.gradient, g + 0.5 * jnp.array([-1.0, 1.0]))


def test_no_compilation_at_the_second_unjitted_update():
    tx = optax_flat.looksam(SGD, period=2)
    params, stack = ragged_params(), batches(1, 2)[0]
    state = tx.init(params)
    step = functools.partial(update, tx, "scanned")
    for _ in range(3):
        params, state = step(params, state, stack)
    assert int(state.gradient_evaluations) == 5


def optax_sam(outer):
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    tx = optax.contrib.sam(outer, ascend, sync_period=2)
    # It takes no other arguments.
    return optax.GradientTransformationExtraArgs(
        tx.init, lambda grads, state, params, **_: tx.update(grads, state, params)
    )


def test_agrees_with_optax_where_that_is_right():
    """One minibatch, gradients that are not zero."""
    data = jnp.repeat(batches(3, 1), 2, axis=1)
    ours = train(
        optax_flat.sam(optax.sgd(0.1), rho=0.1), "scanned", ragged_params(), data
    )
    theirs = train(optax_sam(optax.sgd(0.1)), "transparent", ragged_params(), data)
    assert_close(ours.params, theirs.params)


def test_faults_of_optax_sam():
    """Each of these ends with NaN there, and not here."""

    def run(tx, mode, data, loss):
        return train(tx, mode, ragged_params(), data, loss=loss).params

    def finite(params):
        return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(params))

    ours = optax_flat.sam(optax.sgd(0.1), rho=0.1, mode="transparent")
    data = jnp.repeat(batches(3, 1), 2, axis=1)
    zero = lambda p, batch: 0.0 * loss(p, batch)
    assert finite(run(ours, "transparent", data, zero))
    assert not finite(run(optax_sam(optax.sgd(0.1)), "transparent", data, zero))
    # NaN on the second pass stays in the moments for good.
    adam = optax.adam(0.1)
    ours = optax_flat.sam(adam, rho=0.1, mode="transparent", skip_nonfinite=True)
    theirs = optax_sam(adam)
    poisoned = data.at[1, 1].set(jnp.nan)
    assert finite(run(ours, "transparent", poisoned, loss))
    assert not finite(run(theirs, "transparent", poisoned, loss))


def test_momentum_sam_perturbs_along_the_coming_step():
    """Some optimizers keep minus the learning rate in their momentum."""
    outers = (
        optax.sgd(1e-3, momentum=0.9),
        optax.rmsprop(1e-3, momentum=0.9),
        optax.rmsprop(optax.linear_schedule(0.0, 1e-3, 1), momentum=0.9),
        optax.chain(optax.scale(-1e-3), optax.trace(0.9)),
        optax.adamw(1e-3),
        optax.inject_hyperparams(optax.sgd)(1e-3, momentum=0.9),
        optax.MultiSteps(optax.sgd(1e-3, momentum=0.9), 2).gradient_transformation(),
        optax.chain(optax.apply_every(2), optax.sgd(1e-3, momentum=0.9)),
        optax.chain(
            optax.scale_by_schedule(optax.linear_schedule(0.0, 1e-3, 2)),
            optax.trace(0.9),
            optax.scale(-1.0),
        ),
    )

    def f(x):
        return jnp.sum(jnp.array([3.0, 1.0]) * x**2) / 2

    for outer in outers:
        tx, x = optax_flat.momentum_sam(outer, rho=0.5), jnp.array([1.0, -2.0])
        state = tx.init(x)
        for _ in range(3):
            updates, state = tx.update(jax.grad(f)(x), state, x)
            x = optax.apply_updates(x, updates)
        assert f(x) < f(optax_flat.eval_params(state, x)) - 0.5
    with pytest.raises(ValueError, match="`outer` must keep a momentum"):
        optax_flat.momentum_sam(optax.rmsprop(0.1)).init(x)


def test_momentum_sam_of_centralized_gradients():
    """A constant gradient would be none."""
    outer = optax.chain(optax.centralize(), optax.sgd(1e-3, momentum=0.9))
    tx, x = optax_flat.momentum_sam(outer, rho=0.5), jnp.array([[1.0, -2.0]])
    f = lambda x: jnp.sum(x**2) / 2
    updates, state = tx.update(jax.grad(f)(x), tx.init(x), x)
    x = optax.apply_updates(x, updates)
    assert f(x) < f(optax_flat.eval_params(state, x)) - 0.5


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("accumulator_dtype", [None, jnp.bfloat16])
def test_momentum_sam_keeps_the_dtypes_of_its_state(x64, accumulator_dtype):
    with jax.enable_x64(x64):
        tx = optax_flat.momentum_sam(SGD, rho=0.1, accumulator_dtype=accumulator_dtype)
        params = ragged_params(jnp.float32)
        state = tx.init(params)
        _, after = tx.update(params, state, params)
    for old, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


def test_rounding_is_no_direction():
    """Parallel gradients have no orthogonal part, a constant one nothing special."""
    tx = optax_flat.looksam(optax.sgd(1.0), period=2)
    grad_fn = jax.grad(lambda x, _: jnp.sum(x**2) / 2)
    x = jax.random.normal(jax.random.key(0), [1000])
    state = tx.init(x)
    for _ in range(2):
        g = grad_fn(x, 0)
        updates, state = tx.update(g, state, x, grad_fn=grad_fn)
    assert_close(updates, -g)
    rule = optax.chain(ascent.friendly(), ascent.unit())
    state = rule.init(x)
    for t in range(5):
        a, state = rule.update(x, state)
        assert t == 0 or (a == 0).all()


def test_huge_gradients_leave_no_nan():
    grad_fn = jax.grad(lambda x, _: 1e25 * jnp.sum(jnp.cosh(x)))
    clipped = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    for make in (
        optax_flat.sam, optax_flat.gsam, optax_flat.looksam, optax_flat.stable_sam
    ):  # fmt: skip
        tx, x = make(clipped), jnp.array([1.0, -2.0])
        state = tx.init(x)
        for _ in range(2):
            updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
        assert jnp.isfinite(updates).all()


def test_one_spike_does_not_blind_the_threshold():
    tx = optax_flat.ae_sam(optax.chain(optax.clip_by_global_norm(1.0), SGD))
    params, state = ragged_params(), tx.init(ragged_params())
    step = make_train_step(lambda p, b: b[1] * loss(p, b[0]), tx)
    for t, batch in enumerate(batches(9, 1)[:, 0]):
        params, state, _ = step(params, state, (batch, 1e20 if t == 5 else 1.0))
    rule = state.memory.descent_state
    assert 0 < rule.mean < 1e3
    assert 0 < rule.variance < 1e6


def test_threshold_decides_for_all_groups_together():
    """By the mean of their gradients: with no radius as without groups."""

    def counts(groups):
        tx = optax_flat.ae_sam(SGD, rho=0.0, num_groups=groups)
        step = make_train_step(loss, tx, num_groups=groups)
        params, state, found = ragged_params(), tx.init(ragged_params()), []
        for batch in batches(20, 2):
            params, state, _ = step(params, state, batch.reshape(10, 3))
            found.append(int(state.gradient_evaluations))
        return found

    whole = counts(1)
    assert 20 < whole[-1] < 40
    assert counts(2) == whole


def test_groups_have_keys_of_their_own():
    """Dropout in two groups: with rho 0 the gradient shows which samples were kept."""

    def dropped(params, batch, key):
        kept = jax.random.bernoulli(key, 0.5, (len(batch),))
        return jnp.mean(jnp.where(kept, batch @ params, 0)), jax.random.split(key)[0]

    tx = optax_flat.sam(optax.sgd(1.0), rho=0.0, num_groups=2)
    step = make_train_step(dropped, tx, num_groups=2, has_aux=True)
    params, state, key = jnp.zeros(32), tx.init(jnp.zeros(32)), jax.random.key(0)
    params, _, _, key = step(params, state, jnp.eye(32), key)
    first, second = (params != 0).reshape(2, 16)
    assert 0 < first.sum() < 16
    assert (first != second).any()


def test_num_groups_of_the_step_must_be_the_optimizers():
    data = batches(1, 2)[0].reshape(10, 3)
    for tx in (optax.sgd(0.1), optax.adam(0.1)):
        step = make_train_step(loss, tx, num_groups=2)
        with pytest.raises(ValueError, match="this optimizer does not merge groups"):
            step(ragged_params(), tx.init(ragged_params()), data)
    functional = optax_flat.functional_sam(SGD)
    parts = {"output_fn": loss}
    step = make_train_step(lambda z, b: z**2, functional, num_groups=2, **parts)
    with pytest.raises(ValueError, match="makes no groups"):
        step(ragged_params(), functional.init(ragged_params()), data)
    steps = optax.MultiSteps(functional, 2)
    step = make_train_step(lambda z, b: z**2, steps, **parts)
    with pytest.raises(ValueError, match="optax.MultiSteps accumulates gradients"):
        step(ragged_params(), steps.init(ragged_params()), data)


@pytest.mark.parametrize("mask", ["norm", 0.5, {"layer": "w", "scale": True}])
def test_a_mask_is_made_of_bools(mask):
    with pytest.raises(TypeError, match="a mask must be a tree of bools like the par"):
        perturbation(ascent.unit(), ragged_params(), ragged_params(), mask=mask)


def test_one_gradient_walks_take_one_minibatch():
    batch = batches(1, 1)[0, 0]
    for tx in (
        optax_flat.momentum_sam(SGD, rho=0.1),
        optax_flat.ivon(0.1, ess=100.0, key=0),
        optax_flat.ivon(0.1, ess=100.0, num_samples=3, key=0),
    ):
        params, state = ragged_params(), tx.init(ragged_params())
        _, _, value = make_train_step(loss, tx)(params, state, batch)
        assert_close(value, loss(params, batch))


def test_eval_params_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        tx = optax_flat.momentum_sam(SGD, rho=0.1)
        params = ragged_params(jnp.bfloat16)
        evaluated = optax_flat.eval_params(tx.init(params), params)
    assert_close(evaluated, params, jnp.bfloat16)


@pytest.mark.parametrize("mask", [{}, {"layer": {"w": True}, "scale": True}])
def test_a_mask_fits_the_params(mask):
    for tx in (
        optax_flat.sam(SGD, mask=mask),
        optax_flat.asam(SGD, weights=mask, mode="transparent"),
    ):
        with pytest.raises(ValueError, match="a mask must be a tree of bools like"):
            state = tx.init(ragged_params())
            tx.update(ragged_params(), state, ragged_params())


def raw_optax_sam(outer, **arguments):
    ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    return optax.contrib.sam(outer, ascend, **arguments)


def test_extra_arguments_are_no_fault_of_ours():
    params = ragged_params()
    theirs = raw_optax_sam(optax.sgd(0.1), sync_period=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        theirs.update(params, theirs.init(params), params, value=1.0)
    ours = optax_flat.sam(optax.sgd(0.1), mode="transparent")
    ours.update(params, ours.init(params), params, value=1.0)


def test_one_gradient_per_update_is_the_outer_optimizer():
    """Their period of 1 undoes every other step; our walks of length 1 do not."""
    data = batches(4, 1)

    def run(tx):
        params, state = ragged_params(), tx.init(ragged_params())
        for (batch,) in data:
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            params = optax.apply_updates(params, updates)
        return params

    sgd = run(optax.sgd(0.1, momentum=0.9))
    ours = optax_flat.momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.0)
    assert_close(run(ours), sgd)
    theirs = run(raw_optax_sam(optax.sgd(0.1, momentum=0.9), sync_period=1))
    assert abs(theirs["scale"] - sgd["scale"]) > 1e-3


def test_typed_keys_in_the_outer_optimizer():
    """A selection by products cannot hold them."""
    outer = optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1))
    params = ragged_params()
    theirs = raw_optax_sam(outer, sync_period=2)
    with pytest.raises(TypeError, match="key<fry>"):
        theirs.update(params, theirs.init(params), params)
    data = jnp.repeat(batches(2, 1), 2, axis=1)
    both = [
        train(optax_flat.sam(outer, rho=0.1, mode=mode), mode, params, data).params
        for mode in ("scanned", "transparent")
    ]
    assert_close(*both)


def test_some_leaves_only_in_scanned_mode():
    """optax.masked hands placeholders to the loss; optax_flat.masked does not."""
    data, mask = batches(2, 2), {"layer": True, "scale": False}
    theirs = raw_optax_sam(optax.sgd(0.1), opaque_mode=True)
    theirs = optax.masked(optax.with_extra_args_support(theirs), mask)
    grad, params = jax.grad(loss), ragged_params()
    with pytest.raises(TypeError):  # from the loss
        theirs.update(
            grad(params, data[0, 0]), theirs.init(params), params,
            grad_fn=lambda p, i: grad(p, data[0, 0]),
        )  # fmt: skip
    ours = optax_flat.masked(optax_flat.sam(optax.sgd(0.1)), mask)
    moved = train(ours, "scanned", params, data).params
    assert moved["scale"] == params["scale"]
    assert (moved["layer"]["w"] != params["layer"]["w"]).any()


@pytest.mark.parametrize("quantile", [0.0, 0.31, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("steps", [3, 1000], ids=["ties", "none"])
def test_outliers_are_above_the_quantile(quantile, steps):
    """Which counts find; here a sort of all leaves does."""
    rng = np.random.default_rng(0)
    tree = {
        name: np.round(steps * rng.normal(size=shape)).astype(np.float32)
        for name, shape in {"a": (17, 5), "b": (31,), "c": (), "d": (0, 3)}.items()
    }
    z = {
        name: np.abs(g - g.mean()) / (g.std() or 1.0)
        for name, g in tree.items()
        if g.size
    }
    threshold = np.quantile(np.concatenate([x.ravel() for x in z.values()]), quantile)
    rule = ascent.outliers(quantile)
    found, _ = rule.update(jax.tree.map(jnp.asarray, tree), rule.init(tree))
    unclear = 0
    for name, scores in z.items():
        # Ties with the quantile are decided by rounding.
        clear = np.abs(scores - threshold) > 1e-5 * (1 + threshold)
        kept = np.asarray(found[name]) != 0
        expected = (scores > threshold) & (tree[name] != 0)
        np.testing.assert_array_equal(kept[clear], expected[clear])
        unclear += np.size(clear) - np.sum(clear)
    assert unclear <= (60 if steps == 3 else 1)


@pytest.mark.parametrize("size", [30, pytest.param(2**24 + 2, marks=pytest.mark.slow)])
def test_outliers_among_equal_entries(size):
    """One of them stands out, also among more than float32 can count."""
    g = jnp.ones(size).at[: size // 2].set(-1.0).at[-1].set(50.0)
    rule = ascent.outliers(0.5)
    (kept,) = jnp.nonzero(rule.update(g, rule.init(g))[0])
    assert kept.tolist() == [size - 1]
