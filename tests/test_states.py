"""States: plain arrays that any tool saves, refused where they do not belong."""

import functools

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from problem import assert_equal, ragged_params

import optax_flat
from optax_flat._core.noise import draw, first_seed

make = functools.partial(optax_flat.entropy_sgd, 0.5, num_steps=3, noise=0.0, key=0)
WALK = make(mode="transparent")


@functools.cache
def begin(tx=WALK):
    """Params and state in the middle of a walk, after one gradient; where it began."""
    start = ragged_params()
    return *first_gradient(tx, start), start


@functools.partial(jax.jit, static_argnums=0)
def first_gradient(tx, start):
    grads = jax.tree.map(jnp.ones_like, start)
    updates, state = tx.update(grads, tx.init(start), start)
    return optax.apply_updates(start, updates), state


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_every_kind(kind):
    """The state holds the data, and the draws are those of the typed key."""
    key = jax.random.key(3, impl=kind)
    x = jnp.linspace(-1.0, 1.0, 5)
    tx = optax_flat.add_langevin_noise(
        0.5, temperature=1.0, noise_kind="rademacher", key=key
    )
    state = tx.init(x)
    assert_equal(state.key, jax.random.key_data(key))
    updates, after = tx.update(jnp.zeros(5), state)
    assert_equal(after.key, state.key)
    own = jax.random.fold_in(key, 0)
    assert_equal(updates, draw(own, x, "rademacher"))
    walk = make(mode="transparent", key=key).init(x)
    assert_equal(walk.inner.seed, first_seed(own, x))


# The state of one optimizer, given to another: which field differs, and how.
OTHER_LAYOUTS = {
    "mode": (make(), WALK, r"`state` differs.*ScannedState of .*TransparentState of"),
    "momentum": (
        make(momentum=0.9),
        make(),
        r"`state.memory.outer_state\[0\]` differs.* TraceState of .* EmptyState of n",
    ),
    "diagnostics": (
        make(),
        make(diagnostics=True),
        r"`state.memory.diagnostics` differs.* None\n.* Diagnostics of",
    ),
    "method": (
        optax_flat.sgld(0.1, 1.0, key=0),
        optax_flat.sghmc(0.1, 1.0, key=0),
        r"`state` differs.* LangevinNoiseState of .count, .key\n.* SGHMCState of",
    ),
    "key": (
        optax_flat.sgld(0.1, 1.0, key=jax.random.key(0, impl="rbg")),
        optax_flat.sgld(0.1, 1.0, key=0),
        r"`state.key` differs.* array of shape \(4,\)\n.* array of shape \(2,\)",
    ),
    "patience": (
        optax_flat.scale_by_loss_slope(5),
        optax_flat.scale_by_loss_slope(4),
        r"`state.losses` differs.* shape \(5,\)\n.* shape \(4,\)",
    ),
    "accumulators": (
        optax_flat.psgld(0.1, 1.0, key=0),
        optax_flat.psgld(0.1, 1.0, key=0),
        r"`state.nu\['scale'\]` differs.* shape \(7,\)\n.* shape \(\)",
    ),
}


@pytest.mark.parametrize("case", OTHER_LAYOUTS)
def test_a_state_of_another_layout_is_refused(case):
    made_by, given_to, words = OTHER_LAYOUTS[case]
    params = ragged_params()
    scale = jnp.ones(7) if case == "accumulators" else params["scale"]
    state = made_by.init(params | {"scale": scale})
    step = functools.partial(given_to.update, value=1.0)
    with pytest.raises(TypeError, match=f"(?s){words}.*begin with a new one"):
        jax.eval_shape(step, params, state, params)


def test_a_state_of_other_params_is_refused():
    params, state, _ = begin()
    renamed = {"layer": params["layer"], "size": params["scale"]}
    words = r"`state.first_point` differs.*dict of \['layer'\], \['scale'\]\n.*'size'"
    with pytest.raises(TypeError, match=f"(?s){words}"):
        jax.eval_shape(WALK.update, renamed, state, renamed)


def test_an_older_checkpoint_is_refused():
    """Typed keys in the place of their data, and a field that did not exist."""
    tx = optax_flat.sgld(0.1, 1.0, key=0)
    params = ragged_params()
    state = tx.init(params)
    typed = state._replace(key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"(?s)`state.key` differs.*shape \(\)\n.*\(2,"):
        jax.eval_shape(tx.update, params, typed)
    for older in ({"count": state.count}, tuple(state), None):
        with pytest.raises(TypeError, match="(?s)`state` differs.*as target"):
            jax.eval_shape(tx.update, params, older)


def test_states_are_known_inside_shards_and_members():
    """The check compares with what `init` makes of the params that are here."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    shards, everywhere = jax.P("d"), jax.P()
    tx = make(mode="transparent", momentum=0.9)
    x = jnp.linspace(-1.0, 1.0, 16)
    state = tx.init(x)
    specs = jax.tree.map(lambda s: shards if s.shape == x.shape else everywhere, state)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(shards, specs, shards),
        out_specs=(shards, specs), check_vma=False,
    )  # fmt: skip
    updates, after = jax.eval_shape(update, x, state, x)
    assert updates.shape == x.shape
    assert after.first_point.shape == x.shape
    members = jax.vmap(tx.init)(x[:, None])
    grown = jax.eval_shape(jax.vmap(tx.update), x[:, None], members, x[:, None])
    assert grown[1].first_point.shape == (16, 1)


LOST = {
    "nothing": lambda state: None,
    "empty": lambda state: {},
    "leaves": jax.tree.leaves,
    "chain of leaves": lambda state: (optax.EmptyState(), jax.tree.leaves(state)),
    "flax": flax.serialization.to_state_dict,
    "chain in flax": lambda state: flax.serialization.to_state_dict((state,)),
    "fields": lambda state: state._asdict(),
    "nnx": nnx.state,
}


@pytest.mark.parametrize("how", LOST)
def test_eval_params_refuses_a_state_without_classes(how):
    params, state, _ = begin()
    with pytest.raises(ValueError, match="its classes,.* at opt_state.*as target"):
        optax_flat.eval_params(LOST[how](state), params)


def test_eval_params_refuses_what_orbax_restores_without_target(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, state, start = begin(optax.chain(optax.clip(9.0), WALK))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        bare = checkpointer.restore(tmp_path / "state")
        whole = checkpointer.restore(tmp_path / "state", state)
    with pytest.raises(ValueError, match="its classes,.* at opt_state.*as target"):
        optax_flat.eval_params(bare, params)
    assert_equal(optax_flat.eval_params(whole, params), start)


@pytest.mark.parametrize(
    "tx",
    [
        optax.identity(),
        optax.sgd(0.1),
        optax.adam(0.1),
        optax.lbfgs(),
        optax.MultiSteps(optax.adam(0.1), 2),
        optax.masked(optax.adam(0.1), True),
        optax.named_chain(("first", optax.clip(1.0)), ("then", optax.sgd(0.1, 0.9))),
        optax.partition({"a": optax.sgd(0.1, 0.9)}, "a"),
        optax.inject_hyperparams(optax.adam)(0.1),
        make(),
    ],
)
def test_eval_params_leaves_the_params_of_other_optimizers_alone(tx):
    params = ragged_params()
    assert optax_flat.eval_params(tx.init(params), params) is params


def test_eval_params_reads_named_chains():
    tx = optax.named_chain(("clip", optax.clip(9.0)), ("walk", WALK))
    params, state, start = begin(tx)
    assert_equal(optax_flat.eval_params(state, params), start)


def test_eval_params_refuses_other_params():
    params, state, _ = begin()
    with pytest.raises(ValueError, match="(?s)belongs to other params.*PyTreeDef"):
        optax_flat.eval_params(state, {"w": params["scale"]})


@pytest.mark.parametrize("tx", [WALK, optax.chain(optax.clip(9.0), WALK)])
def test_eval_params_of_nnx_as_it_is(tx):
    """Variables in the state and in the params; what comes back updates the model."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    start = nnx.as_pure(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    assert (nnx.as_pure(params)["kernel"] != start["kernel"]).any()
    for state in (optimizer.opt_state, nnx.as_pure(optimizer.opt_state)):
        evaluated = optax_flat.eval_params(state, params)
        assert jax.tree.structure(evaluated) == jax.tree.structure(params)
        assert_equal(nnx.as_pure(evaluated), start)
        assert_equal(optax_flat.eval_params(state, nnx.as_pure(params)), start)
    nnx.update(model, evaluated)
    assert_equal(nnx.as_pure(nnx.state(model, nnx.Param)), start)
    with pytest.raises(ValueError, match="pass an nnx.Optimizer's `opt_state` itself"):
        optax_flat.eval_params(nnx.state(optimizer.opt_state), params)


def test_eval_params_of_an_equinox_model():
    """The model as it is, or its arrays alone; functions and counts stay."""
    model = eqx.nn.MLP(2, 1, 3, 1, key=jax.random.key(0))
    start, static = eqx.partition(model, eqx.is_inexact_array)
    params, state = first_gradient(WALK, start)
    moved = eqx.combine(params, static)
    assert (moved.layers[0].weight != model.layers[0].weight).any()
    evaluated = optax_flat.eval_params(state, moved)
    assert eqx.tree_equal(evaluated, model)
    assert eqx.tree_equal(optax_flat.eval_params(state, params), start)
