"""The draws: moments, distribution, independence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_flat._core.noise import KINDS, draw

SHAPES = {"w": (784, 500), "b": (500,), "odd": (333, 7), "s": ()}


def sample(kind, key=0, shapes=None):
    shapes = SHAPES if shapes is None else shapes
    like = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return draw(jax.random.key(key), like, kind)


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    """Mean, variance, third and fourth moment within five standard errors."""
    z = flat(sample(kind, shapes={"w": (2000, 1000)}))
    fourth = {"normal": 3.0, "rademacher": 1.0}[kind]
    # The variances of z, z^2, z^3, z^4 under N(0, 1); signs have no more.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, fourth, 96)]:
        assert abs((z**power).mean() - moment) < 5 * np.sqrt(variance / z.size)


def test_rademacher_is_signs():
    assert set(np.unique(flat(sample("rademacher")))) == {-1.0, 1.0}


def test_normal_is_normal():
    """Kolmogorov and Smirnov's distance at a million draws, and the tail."""
    z = np.sort(flat(sample("normal", shapes={"w": (1000, 1000)})))
    cdf = np.asarray(jax.scipy.stats.norm.cdf(z.astype(np.float32)), float)
    distance = np.abs(cdf - np.arange(1, z.size + 1) / z.size).max()
    assert distance < 2.0 / np.sqrt(z.size)  # exceeded with probability 7e-4
    beyond_4 = (np.abs(z) > 4).sum()  # expected 63
    assert 25 < beyond_4 < 105


@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_independent(kind):
    """No correlation between neighbours, leaves, keys, or the two normals of a word."""
    shape = (500, 400)
    tree = sample(kind, shapes={"a": shape, "b": shape})
    other = sample(kind, key=1, shapes={"a": shape, "b": shape})
    alone = sample(kind, shapes={"a": shape})
    group = sample(kind, shapes={"c": shape})
    a = np.asarray(tree["a"], float)
    pairs = {
        "leaf": (a, tree["b"]),
        "key": (a, other["a"]),
        "group with the same key": (alone["a"], group["c"]),
        "row": (a[1:], a[:-1]),
        "column": (a[:, 1:], a[:, :-1]),
    }
    if kind == "normal":  # the squares of signs are constant
        half = shape[0] // 2
        pairs["squares of a word's two normals"] = (a[0::2] ** 2, a[1::2] ** 2)
        pairs["squares of halves"] = (a[:half] ** 2, a[half:] ** 2)
    for name, (x, y) in pairs.items():
        x, y = np.ravel(x), np.ravel(np.asarray(y, float))
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(x.size), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(kind, dtype):
    like = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    like |= {"empty": jnp.zeros((0, 3), dtype), "none": jnp.zeros((3, 0), dtype)}
    z = draw(jax.random.key(0), like, kind)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), z) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert draw(jax.random.key(0), {}, kind) == {}


def test_any_key_implementation():
    """A key of another generator seeds the same kind of draws."""
    z = draw(jax.random.key(0, impl="rbg"), jnp.zeros((400, 400)), "normal")
    assert abs(float(z.mean())) < 5 / 400
    assert abs(float(z.std()) - 1) < 5 / 400
