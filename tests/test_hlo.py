"""What `benchmarks/hlo.py` reads off a program, against counts by hand."""

from collections import Counter

import jax
import jax.numpy as jnp

from benchmarks import hlo

P = jax.P


def test_counts_products_and_collectives():
    """Loops count as often as they run, of branches the one that communicates."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    w = jax.device_put(jnp.ones((16, 4)), jax.NamedSharding(mesh, P()))
    x = jax.device_put(jnp.ones((5, 32, 16)), jax.NamedSharding(mesh, P(None, "data")))

    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    def step(w, x):
        w = w - jax.grad(loss)(w, x)
        return jax.lax.with_sharding_constraint(w, P()), None

    def run(w, x, often):
        w = jax.lax.scan(step, w, x)[0]
        return jax.lax.cond(often, lambda w: step(w, x[0])[0], lambda w: w, w)

    with jax.set_mesh(mesh):
        found = hlo.costs(hlo.compiled(jax.jit(run), w, x, True))
    assert found.flops == 6 * 2 * (2 * 4 * 16 * 4)  # of 4 examples on each device
    reduced = hlo.Collective("all-reduce", 4 * 16 * 4)
    assert found.collectives == Counter({reduced: 6})
    assert hlo.total_bytes(found) == 6 * 4 * 16 * 4


def test_gathers():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones((16, 3)), jax.NamedSharding(mesh, P("data")))
    whole = jax.jit(lambda x: 2 * x, out_shardings=jax.NamedSharding(mesh, P()))
    found = hlo.costs(hlo.compiled(whole, x))
    assert found == (0, Counter({hlo.Collective("all-gather", 4 * 16 * 3): 1}))
