"""Batch statistics of any precision, of one batch or many; what is none is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from optax_flat.training import update_batch_stats

BATCHES = list(3.0 + jax.random.normal(jax.random.key(0), (8, 32, 4)))
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def linen_apply(net):
    def apply(params, batch, stats):
        given = {"params": params, "batch_stats": stats}
        return net.apply(given, batch, mutable=["batch_stats"])[1]["batch_stats"]

    return apply


def assert_of(stats, batches, dtype):
    """Mean and variance of the batches, rounded once."""
    for name, of in (("mean", np.mean), ("var", np.var)):
        found = stats[name][...]
        assert found.dtype == dtype
        expected = np.mean([of(np.asarray(x, float), axis=0) for x in batches], axis=0)
        rounding = 2 * float(jnp.finfo(dtype).eps) + 1e-3  # / (1 - momentum) of float32
        np.testing.assert_allclose(np.asarray(found, float), expected, rtol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.999])
def test_linen_statistics_of_any_precision(momentum, dtype):
    net = nn.BatchNorm(use_running_average=False, momentum=momentum)
    variables = net.init(jax.random.key(1), BATCHES[0])
    stats = jax.tree.map(lambda x: x.astype(dtype), variables["batch_stats"])
    found = update_batch_stats(linen_apply(net), variables["params"], BATCHES, stats)
    assert_of(found, BATCHES, dtype)


class Model(nnx.Module):
    def __init__(self, momentum, rngs):
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("momentum", [0.9, 0.999])
def test_an_nnx_model_of_16_bits(momentum, dtype):
    model = Model(momentum, nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
    graphdef, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def apply(params, batch, stats):
        model = nnx.merge(graphdef, params, stats, rest, copy=True)
        model.train()
        model(batch)
        return nnx.state(model, nnx.BatchStat)

    batches = [x.astype(dtype) for x in BATCHES]
    found = update_batch_stats(apply, params, batches, stats)
    assert_of(nnx.as_pure(found)["norm"], batches, dtype)


def running_mean(params, batch, stats):
    def mean(x):
        return 0.75 * stats["mean"] + 0.25 * jnp.mean(x, axis=0)

    return {"mean": mean(batch["x"] if isinstance(batch, dict) else batch)}


def test_one_batch_or_many():
    """An array, a dictionary, a list and a generator, as the flatness tools take."""
    x = jnp.arange(12.0).reshape(4, 3) ** 2
    stats = {"mean": jnp.zeros(3)}
    whole = x.mean(axis=0)
    parts = [x[:1], x[1:]]
    each = (parts[0].mean(axis=0) + parts[1].mean(axis=0)) / 2
    for batches, expected in (
        (x, whole),
        ([x], whole),
        ({"x": x}, whole),
        (parts, each),
        (iter(parts), each),
        ([{"x": part} for part in parts], each),
    ):
        found = update_batch_stats(running_mean, None, batches, stats)
        np.testing.assert_allclose(found["mean"], expected, rtol=1e-6)


class Spectral(nn.Module):
    """Vectors of a power iteration in the same collection, alone or beside averages."""

    beside: bool

    @nn.compact
    def __call__(self, x):
        x = nn.SpectralNorm(nn.Dense(4))(x, update_stats=True)
        return nn.BatchNorm(use_running_average=False)(x) if self.beside else x


@pytest.mark.parametrize("beside", [False, True])
def test_what_is_no_average_is_refused(beside):
    net = Spectral(beside)
    variables = net.init(jax.random.key(1), BATCHES[0])
    with pytest.raises(ValueError, match="otherwise at .*SpectralNorm_0"):
        update_batch_stats(
            linen_apply(net), variables["params"], BATCHES, variables["batch_stats"]
        )
    if beside:  # what the message says helps
        averages = {"BatchNorm_0": variables["batch_stats"]["BatchNorm_0"]}

        def apply(params, batch, stats):
            stats = variables["batch_stats"] | stats
            moved = linen_apply(net)(params, batch, stats)
            return {name: moved[name] for name in averages}

        found = update_batch_stats(apply, variables["params"], BATCHES, averages)
        moved = [
            linen_apply(net)(variables["params"], x, variables["batch_stats"])
            for x in BATCHES
        ]
        for name, start in (("mean", 0.0), ("var", 1.0)):
            each = [m["BatchNorm_0"][name] for m in moved]  # 0.99 start + 0.01 own
            expected = (sum(each) / len(each) - 0.99 * start) / 0.01
            np.testing.assert_allclose(
                found["BatchNorm_0"][name], expected, rtol=1e-3, atol=1e-4
            )


def test_an_nnx_spectral_norm_is_refused():
    model = nnx.SpectralNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    graphdef, stats, rest = nnx.split(model, nnx.BatchStat, ...)

    def apply(params, batch, stats):
        model = nnx.merge(graphdef, stats, rest, copy=True)
        model(batch, update_stats=True)
        return nnx.state(model, nnx.BatchStat)

    with pytest.raises(ValueError, match="otherwise at .*sigma"):
        update_batch_stats(apply, None, BATCHES, stats)


@pytest.mark.parametrize(
    "observe",
    [
        lambda old, x: jnp.maximum(old, x.max(axis=0)),
        lambda old, x: jnp.minimum(old, x.min(axis=0)),
        lambda old, x: 0.5 * old**2 + x.mean(axis=0),
        lambda old, x: 0.5 * old / (1 + jnp.abs(old)) + x.mean(axis=0),
    ],
)
def test_other_rules_are_refused(observe):
    with pytest.raises(ValueError, match="must move the statistics by m"):
        update_batch_stats(
            lambda params, batch, stats: observe(stats, batch),
            None, BATCHES, jnp.zeros(4),
        )  # fmt: skip


def test_a_layer_that_rounds_to_16_bits_is_refused():
    """Its momentum is lost, whatever is passed in."""
    with pytest.raises(ValueError, match="float32, got .* bfloat16.*not cast them"):
        update_batch_stats(
            lambda params, batch, stats: (0.99 * stats + 0.01 * batch.mean(0)).astype(
                jnp.bfloat16
            ),
            None, BATCHES, jnp.zeros(4, jnp.bfloat16),
        )  # fmt: skip
    with pytest.raises(ValueError, match="shapes and the dtypes"):
        update_batch_stats(
            lambda params, batch, stats: 0.9 * stats + 0.1 * batch.mean(0),
            None, BATCHES, jnp.zeros([]),
        )  # fmt: skip
