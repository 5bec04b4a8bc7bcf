"""What quantize_later, uncertainty and recurrent measure."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from benchmarks import models, situations
from benchmarks.training import quantize_later, recurrent, uncertainty


def kernels():
    random = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(random.normal(size=(50, 4)) * [1, 2, 5, 0.1]),
        "bias": jnp.asarray(random.normal(size=4)),
    }


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_rounding(bits):
    """At most half a level away, on 2^bits - 1 levels; the largest weights stay."""
    params = kernels()
    w = params["kernel"]
    for per_channel, axis in ((False, None), (True, 0)):
        damaged = quantize_later.rounded(params, bits, per_channel=per_channel)
        np.testing.assert_array_equal(damaged["bias"], params["bias"])
        largest = jnp.abs(w).max(axis=axis, keepdims=True)
        level = largest / (2 ** (bits - 1) - 1)
        multiples = damaged["kernel"] / level
        np.testing.assert_allclose(multiples, jnp.round(multiples), atol=1e-4)
        assert jnp.all(jnp.abs(damaged["kernel"] - w) <= level * 0.5001)
        np.testing.assert_allclose(
            jnp.abs(damaged["kernel"]).max(axis=axis, keepdims=True), largest, rtol=1e-6
        )


def test_pruning():
    """Over all kernels together, the smallest ones."""
    params = [kernels(), kernels()]
    params[1]["kernel"] *= 100
    damaged = quantize_later.pruned(params, 75)
    assert sum(int((p["kernel"] == 0).sum()) for p in damaged) == 300
    kept = jnp.concatenate([jnp.abs(p["kernel"]).ravel() for p in damaged])
    lost = jnp.concatenate([jnp.abs(p["kernel"]).ravel() for p in params])[kept == 0]
    assert lost.max() < kept[kept > 0].min()
    np.testing.assert_array_equal(damaged[0]["bias"], params[0]["bias"])


def test_shaking_is_relative():
    params = {"kernel": jnp.full((100, 100), 3.0), "bias": jnp.ones(5)}
    damaged = quantize_later.shaken(params, 0.2, jax.random.key(0))
    noise = damaged["kernel"] - params["kernel"]
    assert noise.std() == pytest.approx(0.6, rel=0.03)
    np.testing.assert_array_equal(damaged["bias"], params["bias"])


def test_calibration_error():
    """Two bins: 0.25 with all right, 0.9 with half of them right."""
    error = uncertainty.calibration_error
    confidence = np.array([0.25] * 6 + [0.9] * 4)
    right = np.array([1] * 6 + [1, 1, 0, 0])
    assert error(confidence, right) == pytest.approx(0.6 * 0.75 + 0.4 * 0.4)
    certain = np.ones(3)  # the edge of the last bin
    assert error(certain, np.array([True, True, False])) == pytest.approx(1 / 3)


def test_the_floor_is_the_error_of_calibrated_models():
    random = np.random.default_rng(0)
    log_p = np.log(random.dirichlet(np.ones(10), size=2000))
    labels = (random.random((2000, 1)) > np.exp(log_p).cumsum(axis=1)).sum(axis=1)
    found = uncertainty.scores(log_p, np.minimum(labels, 9))
    assert found["ece_floor"] > 1.0
    assert found["ece"] == pytest.approx(found["ece_floor"], abs=1.0)
    overconfident = uncertainty.tempered(log_p, 0.3)
    again = uncertainty.scores(overconfident, np.minimum(labels, 9))
    assert again["ece"] > 5 * again["ece_floor"]
    assert again["accuracy"] == found["accuracy"]
    temperature = uncertainty.best_temperature(overconfident, np.minimum(labels, 9))
    assert temperature == pytest.approx(1 / 0.3, rel=0.1)


def test_auroc_agrees_with_scipy():
    random = np.random.default_rng(0)
    known, unknown = random.integers(8, size=40), random.integers(2, 10, size=30)
    statistic = scipy.stats.mannwhitneyu(unknown, known).statistic
    found = uncertainty.auroc(known, unknown)
    assert found == pytest.approx(statistic / (40 * 30))


def test_members_of_an_ensemble_are_trained_alone():
    """Each as a network of its own start, with a quarter of the minibatches."""
    random = np.random.default_rng(0)
    images = random.normal(size=(32, 2, 2, 1)).astype(np.float32)
    data = situations.Data(*[(images, random.integers(3, size=32))] * 3)
    model = models.mlp((2, 2, 1), (8,), 3)
    cell = situations.Cell(
        "cell", situations.image_task(model), lambda _: data, 32, 16, 4,
        others=uncertainty.OTHERS,
    )  # fmt: skip
    method = cell.method("ensemble")
    trained, _, row = situations.run(cell, "ensemble", situations.Candidate(0, 0), 5)
    assert row["gradient_evaluations"] == 16
    order = situations.ordered(cell, method, 5)  # [points, updates, members, batch]
    assert order.shape == (1, 4, 4, 4)
    key, noise_key = jax.random.split(jax.random.key(5))
    setup = (*map(jnp.float32, (method.start, 0.0, 32)), noise_key)
    for i, start in enumerate(jax.random.split(key, 4)):
        alone = situations.train(
            model.init(start), data.train, order[:, :, i], setup,
            task=cell.task, method=cell.method("sgd"),
        )  # fmt: skip
        found = jax.tree.map(lambda x, i=i: x[i], trained.params)
        for a, b in zip(*map(jax.tree.leaves, (found, alone.params)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_lstm_are_clipped():
    sizes = recurrent.Sizes(11, 5, 2, 4, 10)
    task = recurrent.words_task(sizes)
    windows = jax.random.randint(jax.random.key(1), (2, 6), 0, 11)
    params = jax.tree.map(lambda x: 30 * x, task.init(jax.random.key(0)))
    grads = jax.grad(task.loss)(params, windows)
    assert optax.tree.norm(grads) == pytest.approx(recurrent.CLIP, rel=1e-5)
    small = jax.grad(lambda p: 1e-3 * recurrent.clipped(p)["a"])({"a": 1.0})
    assert small["a"] == pytest.approx(1e-3)


def test_the_most_frequent_words_are_kept():
    train = np.array([4, 4, 4, 2, 2, 0, 1, 3], np.int32)
    text = recurrent.Text(train, train[::-1], train[:2], 5)
    kept, _, test = recurrent.frequent(text, 3)
    np.testing.assert_array_equal(kept, [1, 1, 1, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(test, [1, 1])
