"""CoolMomentum beyond the contract and the golden trajectories."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, assert_equal, batches, ragged_params, train

import optax_flat
from optax_flat import schedules


def test_constant_momentum_is_sgd_up_to_its_factor():
    """With rho constant, SGD with momentum and the rate lr (1 + rho) / 2."""
    data = batches(8, 1)
    cool = optax_flat.coolmomentum(0.1, 0.8)
    sgd = optax.sgd(0.1 * 1.8 / 2, momentum=0.8)
    assert_close(
        train(cool, "plain", ragged_params(), data).params,
        train(sgd, "plain", ragged_params(), data).params,
    )


def test_cooling_is_trace_behind_its_rate():
    """Rate and (1 + rho) / 2 are inside the buffer, also while both move."""
    data = batches(8, 1)
    rate = optax.linear_schedule(0.2, 0.05, 6)
    momentum = schedules.linear_cooling(0.95, 6)
    expression = optax.chain(
        optax.scale_by_schedule(lambda t: -rate(t) * (1 + momentum(t)) / 2),
        optax.inject_hyperparams(optax.trace)(decay=momentum),
    )
    cool = train(
        optax_flat.coolmomentum(rate, momentum), "plain", ragged_params(), data
    )
    assert_close(cool.params, train(expression, "plain", ragged_params(), data).params)


def test_weight_decay_is_that_of_a_chain():
    """Also with a mask; so the argument needs none."""
    data = batches(5, 1)
    momentum = schedules.linear_cooling(0.9, 4)
    cool = optax_flat.coolmomentum(0.1, momentum, weight_decay=0.3)
    chain = optax.chain(
        optax.add_decayed_weights(0.3), optax_flat.coolmomentum(0.1, momentum)
    )
    run = train(cool, "plain", ragged_params(), data)
    assert_close(run.params, train(chain, "plain", ragged_params(), data).params)
    with pytest.raises(ValueError, match="`params` must be passed"):
        cool.update(ragged_params(), cool.init(ragged_params()))


@pytest.mark.parametrize(
    "cooling",
    [
        schedules.exponential_cooling,
        schedules.temperature_cooling,
        schedules.linear_cooling,
    ],
)
def test_ends_as_sgd_with_half_the_rate(cooling):
    data = batches(8, 1)
    cool = train(
        optax_flat.coolmomentum(0.1, cooling(0.9, 3)), "plain", ragged_params(), data
    )
    assert int(cool.state.count) == 8
    # rho is 0 from the fourth update on: the past is forgotten.
    sgd = train(optax.sgd(0.05), "plain", cool.path[2], data[3:])
    assert_close(cool.params, sgd.params)
    never = train(optax_flat.coolmomentum(0.1, 0.9), "plain", ragged_params(), data)
    assert not np.allclose(never.params["scale"], cool.params["scale"], rtol=1e-2)


def test_first_update_moves():
    tx = optax_flat.coolmomentum(0.01, schedules.exponential_cooling(0.99, 100))
    x = jnp.array([1.0, 2.0])
    updates, _ = tx.update(x, tx.init(x))
    assert_close(updates, -0.01 * (1 + 0.99) / 2 * x)


def test_temperature_is_the_mean_squared_step():
    """Over the trained parameters, inside any chain, also in a scan."""
    frozen = {"layer": {"w": True, "b": False}, "scale": True}
    tx = optax.chain(
        optax.clip(1.0), optax_flat.masked(optax_flat.coolmomentum(0.1, 0.9), frozen)
    )
    run = train(tx, "plain", ragged_params(), batches(3, 1))

    def temperature(state):
        return optax.tree.get(state, "CoolMomentumState").temperature

    assert float(temperature(tx.init(ragged_params()))) == 0.0
    before, after = run.path[-2:]
    steps = [after["layer"]["w"] - before["layer"]["w"]]
    steps += [after["scale"] - before["scale"]]
    squares = np.concatenate([np.ravel(step) for step in steps]) ** 2
    assert squares.size == 13
    assert_close(jax.jit(temperature)(run.state), squares.mean(), factor=10)


def test_masked_leaves_do_not_dilute_the_temperature():
    state = optax_flat.CoolMomentumState(
        jnp.zeros([], jnp.int32), {"a": jnp.full(4, 3.0), "b": optax.MaskedNode()}
    )
    assert float(state.temperature) == 9.0
    empty = optax_flat.CoolMomentumState(jnp.zeros([], jnp.int32), {})
    assert_equal(empty.temperature, jnp.zeros([]))
