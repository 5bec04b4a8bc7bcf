"""Measures of params and batches on an Explicit mesh: what they are on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_flat import flatness

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
SPECS = {"w": P("data", "model"), "b": P("model")}


def loss(params, batch):
    x, y = batch
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden.sum(axis=-1) - y) ** 2)


def loss_on_mesh(params, batch):
    """Types that carry shardings want to be told where the weights are gathered."""
    w = jax.sharding.reshard(params["w"], NamedSharding(MESH, P()))
    return loss(params | {"w": w}, batch)


def given():
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 2)) / 2, "b": rng.normal(size=2)}
    batch = rng.normal(size=(8, 4)), rng.normal(size=8)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, batch))


def on_mesh(params, batch):
    placed = {
        k: jax.device_put(v, NamedSharding(MESH, SPECS[k])) for k, v in params.items()
    }
    return placed, jax.device_put(batch, NamedSharding(MESH, P("data")))


MEASURES = {
    "hvp": lambda f, p, b: flatness.hvp(f, p, b, p),
    # Without the vectors, whose signs are by chance.
    "top_eigenvalues": lambda f, p, b: (
        flatness.top_eigenvalues(f, p, b, k=2, which="both", key=0).values
    ),
    "trace": lambda f, p, b: flatness.trace(f, p, b, num_samples=3, key=0),
    "frobenius_norm": lambda f, p, b: flatness.frobenius_norm(
        f, p, b, num_samples=3, key=0
    ),
    "spectral_density": lambda f, p, b: flatness.spectral_density(
        f, p, b, num_matvecs=3, num_samples=2, key=0
    ),
    "worst": lambda f, p, b: flatness.sharpness(f, p, b, rho=0.1, num_steps=3, key=0),
    "adaptive": lambda f, p, b: flatness.sharpness(
        f, p, b, rho=0.1, norm="linf", adaptive=True
    ),
    "average": lambda f, p, b: flatness.sharpness(
        f, p, b, rho=0.1, kind="average", num_samples=3, key=0
    ),
    "m": lambda f, p, b: flatness.sharpness(f, p, b, rho=0.1, m=4).value,
    "local_energy": lambda f, p, b: flatness.local_energy(
        f, p, b, sigma=0.1, num_samples=3, key=0
    ),
    "local_entropy": lambda f, p, b: flatness.local_entropy(
        f, p, b, gamma=10.0, num_steps=3, num_chains=3, key=0
    ),
    "line": lambda f, p, b: flatness.line(f, p, b, key=0, positions=[0.0, 1.0]),
    "plane": lambda f, p, b: flatness.plane(f, p, b, key=0, x=[0.0, 1.0], y=[0.0, 1.0]),
}


# A program of one batch knows its devices; loops in Python know the context, if any.
CASES = [
    *((name, "one", True) for name in MEASURES),
    *((name, "many", False) for name in MEASURES),
    *((name, "many", True) for name in ("top_eigenvalues", "m", "plane")),
    *((name, "one", False) for name in ("top_eigenvalues", "m", "plane")),
]


@pytest.mark.parametrize(("measure", "number", "in_context"), CASES)
def test_equal_to_one_device(measure, number, in_context):
    """One batch or two; with or without a context that names the mesh."""
    params, batch = given()
    expected = MEASURES[measure](loss, params, batch)
    params, batch = on_mesh(params, batch)
    if number == "many":
        batch = [batch, batch]
    if in_context:
        with jax.set_mesh(MESH):
            found = MEASURES[measure](loss_on_mesh, params, batch)
    else:
        found = MEASURES[measure](loss_on_mesh, params, batch)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    rounding = 1e3 * float(jnp.finfo(jnp.float32).eps) * size
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            jax.device_get(a), b, rtol=1e-4, atol=rounding
        ),
        found, expected,
    )  # fmt: skip


def test_eigenvectors_lie_like_the_params():
    """So that `line` and other uses of them stay as sharded."""
    params, batch = on_mesh(*given())
    with jax.set_mesh(MESH):
        found = flatness.top_eigenvalues(loss_on_mesh, params, batch, k=2, key=0)
    for name, leaf in found.vectors.items():
        expected = NamedSharding(MESH, P(None, *SPECS[name]))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    alone = flatness.top_eigenvalues(loss, *given(), k=2, key=0).vectors
    product = sum(
        jnp.sum(jax.device_get(a)[0] * b[0])
        for a, b in zip(*map(jax.tree.leaves, (found.vectors, alone)), strict=True)
    )
    np.testing.assert_allclose(abs(product), 1.0, rtol=1e-4)


def test_report():
    params, batch = given()
    settings = {
        "key": 0, "measures": ("loss", "top_eigenvalues", "m_sharpness", "random_line"),
        "m": 4, "num_matvecs": 10,
    }  # fmt: skip
    expected = flatness.report(loss, params, batch, **settings).numbers()
    with jax.set_mesh(MESH):
        params, batch = on_mesh(params, batch)
        found = flatness.report(loss_on_mesh, params, batch, **settings).numbers()
    for name in expected:
        np.testing.assert_allclose(found[name].value, expected[name].value, rtol=1e-3)
