"""The draws: moments, distribution, independence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import optax_flat
from benchmarks import hlo
from optax_flat._core.noise import (
    _SCALE,
    KINDS,
    _mix,
    _normal,
    _numbers,
    draw,
    draw_from,
    first_seed,
    next_seed,
)

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


def test_normal_inverts_the_distribution():
    """On all levels of the words alike, against SciPy; and its moments."""
    words = (np.arange(-(2**31), 2**31, 2**12) + 2**11).astype(np.int32)
    z = np.asarray(_SCALE * _normal(jnp.asarray(words)), float)
    level = (words.astype(float) + 2**31 + 0.5) / 2**32
    assert np.abs(scipy.stats.norm.cdf(z) - level).max() < 4e-5
    assert np.abs(z).max() < 5.4
    assert abs(z.mean()) < 1e-6
    assert abs((z**2).mean() - 1) < 2e-5
    assert abs((z**4).mean() - 3) < 2e-3


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


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_any_key_implementation(impl):
    """A key of another generator seeds the same kind of draws."""
    z = draw(jax.random.key(0, impl=impl), jnp.zeros((400, 400)), "normal")
    assert abs(float(z.mean())) < 5 / 400
    assert abs(float(z.std()) - 1) < 5 / 400
    other = draw(jax.random.key(1, impl=impl), jnp.zeros((400, 400)), "normal")
    assert abs(np.corrcoef(z.ravel(), other.ravel())[0, 1]) < 5 / 400


def test_scale():
    """The draws times a number, in the leaf's dtype."""
    like = {"w": jnp.zeros((30, 7)), "half": jnp.zeros(5, jnp.bfloat16)}
    for kind in KINDS:
        one, three = (draw(jax.random.key(0), like, kind, s) for s in (1.0, 3.0))
        for name, factor in {"w": 1e-6, "half": 0.02}.items():
            a, b = (np.asarray(z[name], float) for z in (one, three))
            np.testing.assert_allclose(b, 3 * a, rtol=factor)
            assert three[name].dtype == like[name].dtype


def test_no_word_repeats():
    """Until 2^32 numbers are used up, and in no two blocks of them by plan."""
    seed = first_seed(jax.random.key(0), jnp.zeros(1))
    numbers = jnp.arange(2**20, dtype=jnp.uint32) + seed[0]
    words = np.asarray(_mix(numbers, seed[1]))
    assert np.unique(words).size == words.size
    shapes = [(3, 5), (2**17, 2**20), (7,), (2**32,), (2**31, 3), ()]
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    found = [(int(first[0]), int(block)) for first, block in _numbers(leaves)]
    # A row of the second one has 2^20 entries, and a block of 2^32 numbers to itself.
    end = 2**17
    assert found[:4] == [(0, 0), (0, 1), (2**20, end), (0, end + 1)]
    assert found[4:] == [(0, end + 2), (3, end + 2 + 2**31 - 1)]


def test_axes_that_are_too_long():
    with pytest.raises(ValueError, match=r"2\*\*33|8589934592.*no axis .* 2\^32"):
        draw(jax.random.key(0), jax.ShapeDtypeStruct((2**33, 1), jnp.float32), "normal")


def test_loops_are_independent():
    """The draws of consecutive seeds, and seeds that start with almost equal ones."""
    like = jnp.zeros(2**17)
    near = first_seed(jax.random.key(0), like) + np.array([0, 1], np.uint32)
    seeds = [first_seed(jax.random.key(0), like), near]
    seeds += [next_seed(seed) for seed in seeds]
    seeds += [next_seed(seed) for seed in seeds[-2:]]
    for kind in KINDS:
        z = np.stack([draw_from(seed, like, kind) for seed in seeds]).astype(float)
        correlation = np.corrcoef(z) - np.eye(len(seeds))
        assert np.abs(correlation).max() < 5 / np.sqrt(like.size)


def test_chain_of_seeds_is_random():
    """100,000 seeds from the weakest start: their bits, and neighbours' bits."""
    chain = jax.lax.scan(
        lambda seed, _: (next_seed(seed), seed), jnp.zeros(2, jnp.uint32), length=10**5
    )[1]
    chain = np.asarray(chain)
    assert len(np.unique(chain, axis=0)) == len(chain)
    bits = (chain[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    bits = 2.0 * bits.reshape(len(chain), 64) - 1
    # 64 means and 64^2 products of neighbours: the largest of them is below 5.5.
    assert np.abs(bits.mean(0)).max() < 5.5 / np.sqrt(len(chain))
    assert np.abs(bits[1:].T @ bits[:-1] / len(chain)).max() < 5.5 / np.sqrt(len(chain))


LAYOUTS = {  # of arrays of one shape
    "rows": jax.P("data"),
    "columns": jax.P(None, "model"),
    "both": jax.P("data", "model"),
    "replicated": jax.P(),
}


def sharded(tree, kind=jax.sharding.AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return mesh, {
        name: jax.device_put(leaf, jax.NamedSharding(mesh, LAYOUTS[name]))
        for name, leaf in tree.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_the_sharding(kind):
    like = {name: jnp.zeros((16, 8)) for name in LAYOUTS}
    expected = draw(jax.random.key(0), like, kind)
    for axis_type in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh, on_mesh = sharded(like, axis_type)
        with jax.set_mesh(mesh):
            drawn = jax.jit(
                lambda x: jax.tree.map(jnp.add, x, draw(jax.random.key(0), x, kind))
            )(on_mesh)
        for name, z in drawn.items():
            assert z.sharding.is_equivalent_to(on_mesh[name].sharding, 2)
            np.testing.assert_array_equal(z, expected[name])


@pytest.mark.parametrize("kind", KINDS)
def test_draws_do_not_depend_on_the_shape(kind):
    """A shard has another one: an entry's number alone makes its draw, to the bit."""

    def drawn(shape):
        moved = jax.jit(lambda x: x + draw(jax.random.key(0), x, kind, 0.1))
        like = jnp.zeros(shape)
        return np.asarray(hlo.compiled(moved, like)(like)).reshape(-1)

    expected = drawn(2**14)
    for shape in [(2**11, 8), (16, 8), (64,), (5,), ()]:
        found = drawn(shape)
        np.testing.assert_array_equal(found, expected[: found.size], str(shape))


def outer_update(tx, mode, params, state):
    grad_fn = jax.grad(lambda p, _: sum(jnp.sum(jnp.cos(x)) for x in p.values()))
    more = {"grad_fn": grad_fn} if mode == "scanned" else {}
    updates, state = tx.update(grad_fn(params, 0), state, params, **more)
    return optax.apply_updates(params, updates), state


def program(mode, params, **noise):
    tx = optax_flat.entropy_sgd(1.0, num_steps=5, mode=mode, key=0, **noise)
    step = jax.jit(functools.partial(outer_update, tx, mode))
    return hlo.compiled(step, params, jax.jit(tx.init)(params))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("scanned", "rademacher"),
        ("transparent", "normal"),
        pytest.param("scanned", "normal", marks=pytest.mark.slow),
        pytest.param("transparent", "rademacher", marks=pytest.mark.slow),
    ],
)
def test_noise_is_made_where_it_is_used(mode, kind):
    """On eight devices: nothing exchanged, no more memory, nothing of full size."""
    _, params = sharded({name: jnp.zeros((64, 32)) for name in LAYOUTS})
    with_noise = program(mode, params, noise_kind=kind)
    without = program(mode, params, noise=0.0)
    assert not hlo.costs(with_noise).collectives
    temporary = [p.memory_analysis().temp_size_in_bytes for p in (with_noise, without)]
    assert temporary[0] <= 1.5 * temporary[1]
    _, shards = sharded({"rows": params["rows"], "both": params["both"]})
    text = program(mode, shards, noise_kind=kind).as_text()
    assert "[16,32]" in text and "[16,16]" in text  # what a device has of the two
    assert "[64,32]" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_noise_adds_little_to_the_program(kind):
    """As users compile it: instructions per leaf, and one code for equal leaves."""

    def sizes(leaves, **noise):
        params = {f"leaf_{i}": jnp.zeros((24, 16)) for i in range(leaves)}
        text = program("scanned", params, **noise).as_text()
        instructions = sum(" = " in line for line in text.splitlines())
        return np.array([instructions, len(hlo.kernels(text))])

    few, many = sizes(4, noise_kind=kind), sizes(12, noise_kind=kind)
    growth = (many - few) / 8
    noiseless = (sizes(12, noise=0.0) - sizes(4, noise=0.0)) / 8
    assert growth[0] <= 3 * noiseless[0]
    assert growth[1] == 0
