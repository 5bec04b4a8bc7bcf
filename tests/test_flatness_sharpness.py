"""Sharpness, local energy and local entropy against closed forms on quadratics."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from optax_flat.flatness import local_energy, local_entropy, sharpness

SIZE, EXAMPLES, RHO = 7, 24, 0.3
RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(SIZE, SIZE)))[0]
CURVATURES = np.array([-0.2, 0.0, 0.01, 0.5, 1.0, 3.0, 8.0])
H = BASIS @ np.diag(CURVATURES) @ BASIS.T
DATA = RNG.normal(size=(EXAMPLES, SIZE)) + np.linspace(-1.0, 2.0, SIZE)
W = np.linspace(-1.5, 0.9, SIZE) ** 3  # skewed, no weight 0
G = H @ (W - DATA.mean(0))


def tree(vector=W, dtype=None):
    v = jnp.asarray(vector, dtype)
    return {"kernel": v[:6].reshape(2, 3), "scale": v[6]}


LOW = tree(dtype=jnp.bfloat16)
HIGH = jax.tree.map(lambda x: x.astype(jnp.float32), LOW)
SINGLE = DATA.astype(np.float32)


def loss(params, batch):
    """Mean of (w - x)' H (w - x) / 2 over the examples x."""
    r = ravel_pytree(params)[0] - batch
    return 0.5 * jnp.mean(jnp.sum((r @ jnp.asarray(H, r.dtype)) * r, axis=-1))


def rise(e, g=G):
    return g @ e + 0.5 * e @ H @ e


def first_order(g, norm, t):
    if norm == "l2":
        return RHO * t**2 * g / np.linalg.norm(t * g)
    return RHO * t * np.sign(g)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_sam(x64, norm, adaptive):
    t = np.abs(W) if adaptive else np.ones(SIZE)
    found = sharpness(loss, tree(), DATA, rho=RHO, norm=norm, adaptive=adaptive)
    np.testing.assert_allclose(found.value, rise(first_order(G, norm, t)), rtol=1e-12)
    assert found.standard_error == 0


def test_ascent_finds_the_maximum_on_the_ball(x64):
    """The maximum is (mu - H)^-1 g with mu such that its norm is rho."""
    offset = BASIS @ [0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.01]  # not along the sharpest
    w, g = DATA.mean(0) + offset, H @ offset
    found = sharpness(loss, tree(w), DATA, rho=RHO, num_steps=40).value
    low, high = CURVATURES[-1], CURVATURES[-1] + np.linalg.norm(g) / RHO
    for _ in range(60):
        mu = (low + high) / 2
        e = np.linalg.solve(mu * np.eye(SIZE) - H, g)
        low, high = (mu, high) if np.linalg.norm(e) > RHO else (low, mu)
    np.testing.assert_allclose(found, rise(e, g), rtol=1e-4)
    assert found > 1.05 * rise(first_order(g, "l2", 1.0), g)


def test_ascent_in_the_cube_finds_a_corner(x64):
    found = sharpness(loss, tree(), DATA, rho=2.0, norm="linf", num_steps=40).value
    corners = 2.0 * np.array(list(itertools.product([-1, 1], repeat=SIZE)))
    rises = corners @ G + 0.5 * np.einsum("ni,ij,nj->n", corners, H, corners)
    assert np.abs(rises - found).min() < 1e-9
    assert found >= 0.9 * rises.max()


def test_stationary_point(x64):
    """Without gradient nothing rises."""
    data = np.broadcast_to(W, DATA.shape)
    for norm in ("l2", "linf"):
        found = sharpness(loss, tree(), data, rho=RHO, norm=norm, num_steps=40)
        assert found.value == 0


def test_a_key_leads_away_from_a_stationary_point():
    data = np.broadcast_to(ravel_pytree(HIGH)[0], DATA.shape)
    found = MEASURES["ascent"](loss, HIGH, data).value
    np.testing.assert_allclose(found, RHO**2 / 2 * CURVATURES[-1], rtol=5e-3)


def test_losses_far_from_one():
    """No square of a gradient overflows; what overflows is no small rise."""

    def scaled(params, batch):
        return batch["scale"] * loss(params, batch["data"])

    def found(scale, rho=RHO):
        batch = {"data": SINGLE, "scale": np.float32(scale)}
        return float(sharpness(scaled, HIGH, batch, rho=rho).value)

    one = found(1.0)
    for scale in (1e-25, 1e20):
        np.testing.assert_allclose(found(scale) / scale, one, rtol=1e-5)
    assert found(1e36, rho=100.0) == np.inf


def test_m_sharpness(x64):
    """Each shard of 4 has its own e and its own loss."""
    shards = iter([DATA[:8], DATA[8:]])
    found = sharpness(loss, tree(), shards, rho=RHO, m=4, batch_size=None)
    g = [H @ (W - shard.mean(0)) for shard in np.split(DATA, 6)]
    rises = np.array([rise(first_order(gs, "l2", 1.0), gs) for gs in g])
    np.testing.assert_allclose(found.value, rises.mean(), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, rises.std(ddof=1) / 6**0.5)


@pytest.mark.parametrize(("norm", "adaptive"), [("l2", True), ("linf", False)])
def test_average(x64, norm, adaptive):
    """Mean and standard error of the quadratic form at uniform directions."""
    samples = 4000
    found = sharpness(
        loss, tree(), DATA, rho=RHO, kind="average", norm=norm, adaptive=adaptive,
        num_samples=samples, batch_size=None, key=0,
    )  # fmt: skip
    t = np.abs(W) if adaptive else np.ones(SIZE)
    A = RHO**2 / 2 * t[:, None] * H * t
    trace, squares, diagonal = np.trace(A), (A**2).sum(), (np.diag(A) ** 2).sum()
    if norm == "l2":
        mean = trace / SIZE
        variance = 2 * (SIZE * squares - trace**2) / (SIZE**2 * (SIZE + 2))
    else:  # the square of a coordinate has the mean 1/3 and the variance 4/45
        mean = trace / 3
        variance = 4 / 45 * diagonal + 2 / 9 * (squares - diagonal)
    assert abs(found.value - mean) < 5 * found.standard_error
    np.testing.assert_allclose(
        found.standard_error, (variance / samples) ** 0.5, rtol=0.1
    )


def test_local_energy(x64):
    samples, sigma = 4000, 0.2
    found = local_energy(
        loss, tree(), DATA, sigma=sigma, num_samples=samples, batch_size=None, key=0
    )
    A = sigma**2 / 2 * W[:, None] * H * W
    assert abs(found.value - np.trace(A)) < 5 * found.standard_error
    deviation = (2 * (A**2).sum()) ** 0.5
    np.testing.assert_allclose(found.standard_error, deviation / samples**0.5, rtol=0.1)


def test_shared_rounding_is_in_the_standard_error():
    """Of many weights near a minimum that is not 0."""
    w, minimum, rho = np.ones(200_000, np.float32), np.ones(1, np.float32), 0.5
    found = sharpness(
        lambda w, batch: 2.5 + 3.0 * jnp.mean((w - batch) ** 2), w, minimum,
        rho=rho, kind="average", num_samples=8, key=0,
    )  # fmt: skip
    assert abs(found.value - 3.0 * rho**2 / w.size) < 4 * found.standard_error


def exact_entropy(w, gamma, temperature):
    r = w - DATA
    g = H @ r.mean(0)
    pull = g @ np.linalg.solve(H + gamma * np.eye(SIZE), g)
    entropy = np.log1p(CURVATURES / gamma).sum()
    value = 0.5 * np.einsum("ni,ij,nj->", r, H, r) / EXAMPLES
    return -value + pull / 2 - temperature / 2 * entropy


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_local_entropy_on_a_quadratic(temperature):
    """Right within its standard error, which says how keys differ."""
    gamma, center = 4.0, DATA.mean(0)
    w = center + 0.3 * temperature**0.5 * (W - center)
    params, data = tree(w, jnp.float32), jnp.asarray(DATA, jnp.float32)

    def of_key(key):
        return local_entropy(
            loss, params, data, gamma=gamma, temperature=temperature, num_steps=50,
            num_chains=48, batch_size=None, key=key,
        )  # fmt: skip

    found = jax.vmap(of_key)(jax.random.split(jax.random.key(0), 40))
    error = np.asarray(found.value) - exact_entropy(w, gamma, temperature)
    typical = np.sqrt(np.mean(np.square(found.standard_error)))
    assert typical < 0.2 * temperature
    assert abs(error.mean()) < 5 * typical / 40**0.5
    assert 0.6 < error.std() / typical < 1.4


@pytest.mark.parametrize("wall", [np.inf, 1.0])
def test_local_entropy_is_unbiased_in_few_steps(wall):
    """A skewed double well, also in a box; right however short the path."""

    def double_well(x, wall):
        return jnp.where(abs(x) <= wall, (x**2 - 1) ** 2 + 0.3 * x, jnp.inf)

    gamma, temperature, x = 0.5, 0.4, 0.8
    grid = np.linspace(-8, 8, 20001)
    log_gauss = -gamma / (2 * temperature) * (grid - x) ** 2
    weight = np.exp(-((grid**2 - 1) ** 2 + 0.3 * grid) / temperature)
    weight *= abs(grid) <= wall
    ratio = (np.exp(log_gauss) * weight).sum() / np.exp(log_gauss).sum()
    found = [
        local_entropy(
            double_well, jnp.array(x), jnp.array(wall), gamma=gamma, batch_size=None,
            temperature=temperature, num_steps=4, num_chains=20_000, key=key,
        ).value
        for key in range(8)
    ]  # fmt: skip
    error = np.array(found) - temperature * np.log(ratio)
    assert error.std() < 0.02
    assert abs(error.mean()) < 4 * error.std(ddof=1) / 8**0.5


SMALL = {"gamma": 40.0, "num_chains": 4, "batch_size": None, "key": 1}
MEASURES = {
    "ascent": lambda f, p, b: sharpness(f, p, b, rho=RHO, num_steps=12, key=1),
    "average": lambda f, p, b: sharpness(
        f, p, b, rho=RHO, kind="average", num_samples=2, key=1
    ),
    "entropy": lambda f, p, b: local_entropy(f, p, b, num_steps=3, **SMALL),
}
TEN = np.split(SINGLE, np.cumsum([2, 4, 2, 2, 2, 4, 2, 2, 2]))


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_the_same_however_it_is_computed(measure):
    """On ten batches; in a program of the caller, sharded; with bfloat16 params."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(SINGLE, jax.NamedSharding(mesh, jax.P("d")))
    expected = jax.jit(lambda p, b: measure(loss, p, b))(HIGH, sharded)
    found, low = (measure(loss, p, TEN) for p in (HIGH, LOW))
    rounding = 50 * jnp.finfo(jnp.float32).eps * loss(HIGH, SINGLE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=rounding)
    assert low.value.dtype == jnp.float32
    np.testing.assert_array_equal(low, found)


@pytest.mark.parametrize(
    "measure",
    [functools.partial(sharpness, rho=RHO), functools.partial(local_entropy, **SMALL)],
    ids=["ascent", "entropy"],
)
def test_many_batches_in_a_program_do_not_unroll_the_path(measure):
    def length(num_steps):
        fn = functools.partial(measure, loss, num_steps=num_steps)
        return len(jax.make_jaxpr(fn)(HIGH, [SINGLE, SINGLE]).eqns)

    assert length(5) == length(50)


def test_local_entropy_tends_to_minus_the_loss():
    found = local_entropy(loss, HIGH, TEN, num_steps=3, **SMALL | {"gamma": 1e14})
    np.testing.assert_allclose(found.value, -loss(HIGH, SINGLE), rtol=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_noise_and_one_shot_iterators(name):
    measure, rng = MEASURES[name], np.random.default_rng(0)

    def noisy(params, batch):
        return loss(params, batch) * rng.uniform()

    data, params = TEN, HIGH
    with pytest.raises(ValueError, match="same value for the same input"):
        measure(noisy, params, data)
    if name == "average":  # one pass
        expected = measure(loss, params, data)
        np.testing.assert_array_equal(measure(loss, params, iter(data)), expected)
    else:
        with pytest.raises(TypeError, match="one-shot iterator"):
            measure(loss, params, iter(data))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rho": 0.0}, r"`rho` must lie in \(0, inf\)"),
        ({"kind": "mean"}, "`kind` must be one of 'worst', 'average'"),
        ({"norm": "l1"}, "`norm` must be one of 'l2', 'linf'"),
        ({"m": 5}, r"`m` must divide .* got m=5 and an array of shape \(24, 7\)"),
        ({"m": 4, "kind": "average", "key": 0}, "`m` must be None"),
        ({"kind": "average"}, "`key` must be one typed key"),
        ({"kind": "average", "key": 0, "num_samples": 1}, "`num_samples` .* >= 2"),
    ],
)
def test_errors_say_what_to_do(settings, words):
    with pytest.raises(ValueError, match=words):
        sharpness(loss, tree(), jnp.asarray(DATA), **({"rho": RHO} | settings))


def test_an_overflow_on_the_way_is_an_infinite_rise():
    def loss_fn(w, batch):
        e = jnp.exp(w).sum()
        return e + (e - e)  # NaN once e is infinite

    found = sharpness(loss_fn, jnp.zeros(2), jnp.zeros(1), rho=200.0)
    assert found.value == jnp.inf
