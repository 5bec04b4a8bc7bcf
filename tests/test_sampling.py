"""collect_samples against a plain loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import assert_close, batches, largest_difference, loss, ragged_params

import optax_flat
from optax_flat.training import collect_samples, make_train_step

BURN_IN, THIN, SAMPLES = 3, 4, 5
DATA = batches(BURN_IN + THIN * SAMPLES, 1)[:, 0]


def sampler():
    return optax_flat.sgld(0.05, 0.02, key=1)


def predict(params):
    return {"w": params["layer"]["w"] ** 2, "scale": jnp.exp(params["scale"])}


def by_hand(tx):
    step = make_train_step(loss, tx)
    params, state = ragged_params(), tx.init(ragged_params())
    losses, samples = [], []
    for t, batch in enumerate(DATA):
        params, state, value = step(params, state, batch)
        losses.append(value)
        if t >= BURN_IN and (t - BURN_IN + 1) % THIN == 0:
            samples.append(optax_flat.eval_params(state, params))
    return params, state, jnp.stack(losses), samples


@pytest.mark.parametrize(
    "tx",
    [
        sampler(),
        # A walk's samples are its anchors: 3 gradients per update do not divide 4.
        optax_flat.entropy_sgd(0.5, num_steps=3, mode="transparent", key=0),
    ],
    ids=["sgld", "walk"],
)
def test_equals_a_plain_loop(tx):
    start = ragged_params()
    run = collect_samples(
        make_train_step(loss, tx), start, tx.init(start), DATA,
        burn_in=BURN_IN, thin=THIN, predict_fn=predict,
    )  # fmt: skip
    params, state, losses, samples = by_hand(tx)
    assert len(samples) == SAMPLES
    assert_close(run.params, params)
    assert_close(optax.tree.get(run.opt_state, "count"), optax.tree.get(state, "count"))
    assert_close(run.losses, losses)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *samples)
    assert_close(run.samples, stacked)
    assert largest_difference(samples[-1], samples[-2]) > 1e-3
    predictions = [predict(sample) for sample in samples]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / SAMPLES, *predictions)
    assert_close(run.prediction, mean)


def test_goes_on_where_it_ended():
    """Two runs in a row are one."""
    tx, start = sampler(), ragged_params()
    step = make_train_step(loss, tx)
    whole = collect_samples(step, start, tx.init(start), DATA[:20], thin=2)
    first = collect_samples(step, start, tx.init(start), DATA[:12], thin=2)
    second = collect_samples(step, first.params, first.opt_state, DATA[12:20], thin=2)
    assert_close(second.params, whole.params)
    assert_close(second.samples["scale"], whole.samples["scale"][6:])


def test_is_compiled_once():
    """However often it is called with the same step."""
    traces = []

    def counted(params, batch):
        traces.append(None)
        return loss(params, batch)

    tx, start = sampler(), ragged_params()
    step = make_train_step(counted, tx)
    run = collect_samples(step, start, tx.init(start), DATA[:6], thin=3)
    first = len(traces)
    assert first > 0
    collect_samples(step, run.params, run.opt_state, DATA[6:12], thin=3)
    assert len(traces) == first


def test_aux_moves_along():
    """It goes through every step and to predict_fn."""

    def loss_fn(params, batch, aux):
        return loss(params, batch), aux + batch.sum()

    tx, start = sampler(), ragged_params()
    run = collect_samples(
        make_train_step(loss_fn, tx, has_aux=True), start, tx.init(start), DATA,
        burn_in=BURN_IN, thin=THIN, aux=jnp.zeros([]),
        predict_fn=lambda params, aux: (params["scale"], aux),
    )  # fmt: skip
    sums = np.cumsum(DATA.sum(axis=(1, 2)))
    assert_close(run.aux, sums[-1], factor=10)
    assert_close(run.prediction[1], sums[BURN_IN + THIN - 1 :: THIN].mean(), factor=10)
    without = by_hand(tx)
    assert_close(run.params, without[0])
    assert_close(run.prediction[0], np.mean([s["scale"] for s in without[3]]))


def test_samples_need_not_be_kept():
    tx, start = sampler(), ragged_params()
    run = collect_samples(
        make_train_step(loss, tx), start, tx.init(start), DATA,
        burn_in=BURN_IN, thin=THIN, predict_fn=predict, keep=False,
    )  # fmt: skip
    assert run.samples is None
    kept = collect_samples(
        make_train_step(loss, tx), start, tx.init(start), DATA,
        burn_in=BURN_IN, thin=THIN,
    )  # fmt: skip
    assert kept.prediction is None
    mean = jax.tree.map(lambda x: x.mean(axis=0), jax.vmap(predict)(kept.samples))
    assert_close(run.prediction, mean)


def test_bfloat16_predictions_are_averaged_in_float32():
    """Six samples of 1 + 2^-7 and one of 1 have a mean that bfloat16 cannot hold."""
    x = jnp.array(1.0 + 2**-7, jnp.bfloat16)

    def step(params, opt_state, batch):
        return jnp.where(batch, params, 1.0).astype(jnp.bfloat16), opt_state, 0.0

    run = collect_samples(
        step, x, (), jnp.array([True] * 6 + [False]), predict_fn=lambda p: p
    )
    assert run.prediction.dtype == jnp.float32
    np.testing.assert_allclose(run.prediction, 1 + 6 / 7 * 2**-7, rtol=1e-6)
    assert run.samples.dtype == jnp.bfloat16


def test_data_may_be_indices_and_all_may_be_jitted():
    tx, start = sampler(), ragged_params()

    def looked_up(params, index):
        return loss(params, DATA[index])

    @jax.jit
    def run(state):
        return collect_samples(
            make_train_step(looked_up, tx), start, state, jnp.arange(len(DATA)),
            burn_in=BURN_IN, thin=THIN,
        )  # fmt: skip

    assert_close(run(tx.init(start)).params, by_hand(tx)[0])


@pytest.mark.parametrize(
    ("arguments", "data", "error", "words"),
    [
        ({"thin": 0}, DATA, ValueError, "`thin` must be an int >= 1, got 0"),
        ({"burn_in": -1}, DATA, ValueError, "`burn_in` must be an int >= 0, got -1"),
        ({"burn_in": 1.0}, DATA, TypeError, "`burn_in` must be a Python int"),
        ({"thin": 4}, DATA[:10], ValueError, "S >= 1 samples, got 10 with burn_in=0"),
        ({"burn_in": 10}, DATA[:10], ValueError, "got 10 with burn_in=10 and thin=1"),
        ({"burn_in": 12}, DATA[:10], ValueError, "got 10 with burn_in=12"),
        ({}, (DATA, DATA[:3]), ValueError, r"got leading axes \['23', '3'\]"),
        ({}, jnp.zeros([]), ValueError, r"got leading axes \['None'\]"),
        ({}, None, ValueError, "one entry per step"),
    ],
)
def test_errors_say_what_to_do(arguments, data, error, words):
    tx, start = sampler(), ragged_params()
    with pytest.raises(error, match=words):
        collect_samples(
            make_train_step(loss, tx), start, tx.init(start), data, **arguments
        )
