"""Lines and planes: where the points are, and what random directions look like."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import FEATURES, assert_close, batches, loss, ragged_params

from optax_flat.flatness import line, plane, random_direction

DATA = batches(1, 4)[0].reshape(-1, FEATURES)  # 20 examples
PARAMS = ragged_params()
OTHER = jax.tree.map(lambda x: 0.5 * x - 0.2, PARAMS)
A = jnp.array([-1.0, 0.0, 0.4, 2.0])


def moved(*steps):
    """The params plus each (amount, direction)."""
    point = PARAMS
    for amount, direction in steps:
        point = optax.tree.add_scale(point, amount, direction)
    return point


def test_filters_have_the_norms_of_the_params():
    shapes = {"conv": (3, 3, 2, 4), "dense": (5, 6), "bias": (6,), "scale": ()}
    params = {name: jnp.full(shape, 2.0) for name, shape in shapes.items()}
    params["dense"] *= jnp.arange(6.0)  # the first filter is zero
    d = random_direction(params, 0)
    for name, axes in [("conv", (0, 1, 2)), ("dense", 0)]:
        norms = [np.sqrt(np.sum(t[name] ** 2, axis=axes)) for t in (d, params)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        assert np.std(d[name], axis=axes).max() > 0.1
    assert not jnp.any(d["bias"]) and d["scale"] == 0
    first = random_direction(params, 0, filter_axis=0)  # Equinox's layout
    for name, axes in [("conv", (1, 2, 3)), ("dense", 1)]:
        norms = [np.sqrt(np.sum(t[name] ** 2, axis=axes)) for t in (first, params)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
    raw = random_direction(params, 0, normalize="none")
    assert abs(jnp.std(raw["conv"]) - 1) < 5 / 72**0.5 and raw["scale"] != 0


def test_line_along_a_direction():
    found = line(loss, PARAMS, DATA, direction=OTHER, positions=A, batch_size=3)
    expected = [loss(moved((a, OTHER)), DATA) for a in A]
    assert_close(tuple(found), (A, jnp.stack(expected)))


def test_line_to_other_params():
    """It goes on for half the distance at either end, where nothing else is said."""
    found = line(loss, PARAMS, DATA, to=OTHER)
    np.testing.assert_allclose(found.positions, np.linspace(-0.5, 1.5, 51), atol=1e-6)
    between = line(loss, PARAMS, DATA, to=OTHER, positions=[0.0, 1.0, 1.5]).losses
    ends = [loss(PARAMS, DATA), loss(OTHER, DATA), found.losses[-1]]
    assert_close(between, jnp.stack(ends))


def test_plane_has_a_row_for_each_y():
    x, y = jnp.array([0.0, 1.0, -0.5]), jnp.array([0.0, 2.0])
    d1, d2 = OTHER, jax.tree.map(jnp.ones_like, PARAMS)
    found = plane(loss, PARAMS, DATA, directions=(d1, d2), x=x, y=y)
    expected = [[loss(moved((a, d1), (b, d2)), DATA) for a in x] for b in y]
    assert_close(tuple(found), (x, y, jnp.array(expected)), factor=4)


def test_random_directions():
    """A key each; a line and its key give `random_direction`'s."""
    found = line(loss, PARAMS, DATA, key=3, positions=A)
    d = random_direction(PARAMS, 3)
    assert_close(found.losses, line(loss, PARAMS, DATA, direction=d, positions=A)[1])
    surface = plane(loss, PARAMS, DATA, key=3, x=A, y=A).losses
    assert surface.shape == (4, 4)
    assert_close(surface[1, 1], loss(PARAMS, DATA))  # both positions are 0
    assert not np.allclose(surface, surface.T, rtol=0.01)
    first = line(loss, PARAMS, DATA, key=3, positions=A, filter_axis=0)
    d = random_direction(PARAMS, 3, filter_axis=0)
    assert_close(first.losses, line(loss, PARAMS, DATA, direction=d, positions=A)[1])
    assert not np.allclose(first.losses, found.losses, rtol=0.01)
    turned = plane(loss, PARAMS, DATA, key=3, x=A, y=A, filter_axis=0).losses
    assert not np.allclose(turned, surface, rtol=0.01)


def test_ten_unequal_batches_jit_and_sharding(x64):
    data = np.asarray(DATA, np.float64)[:16]
    params = ragged_params(jnp.float64)

    def measure(p, b):
        return line(loss, p, b, key=0, positions=A)

    one = measure(params, data)
    ten = np.split(data, np.cumsum([1, 1, 2, 1, 4, 1, 2, 1, 1]))
    assert_close(measure(params, iter(ten)), one, jnp.float64)
    axes = {"x": A[:2], "y": A[1:3]}  # as many points as on the line
    surfaces = [plane(loss, params, b, key=0, **axes) for b in (iter(ten), data)]
    assert_close(*map(tuple, surfaces), jnp.float64)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(data, jax.NamedSharding(mesh, jax.P("d")))
    assert_close(jax.jit(measure)(params, sharded), one, jnp.float64)


def test_bfloat16_params_are_computed_in_float32():
    low = ragged_params(jnp.bfloat16)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    found, expected = (line(loss, p, DATA, key=0, positions=A) for p in (low, high))
    assert found.losses.dtype == jnp.float32
    np.testing.assert_array_equal(found, expected)


def test_progress_changes_nothing(capsys):
    settings = {"to": OTHER, "positions": A, "batch_size": 3}
    data = [DATA, DATA[:5]]
    quiet = line(loss, PARAMS, data, **settings)
    shown = line(loss, PARAMS, data, progress=True, **settings)
    assert_close(quiet, shown)
    assert "8point" in capsys.readouterr().err  # 4 positions, 2 batches


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: line(loss, PARAMS, DATA), ValueError, "Give a key, or `direction`"),
        (lambda: plane(loss, PARAMS, DATA), ValueError, "Give a key, or `directions`"),
        (
            lambda: line(loss, PARAMS, DATA, to=OTHER, direction=OTHER),
            ValueError,
            "either `direction` or `to`",
        ),
        (
            lambda: line(loss, PARAMS, DATA, to=OTHER["layer"]),
            ValueError,
            "`to` must have the structure",
        ),
        (
            lambda: plane(loss, PARAMS, DATA, directions=OTHER),
            ValueError,
            r"two trees like the params, \(d1, d2\)",
        ),
        (
            lambda: line(loss, PARAMS, DATA, key=0, positions=5),
            ValueError,
            r"one-dimensional array .* got shape \(\)",
        ),
        (
            lambda: random_direction(PARAMS, 0, normalize="layer"),
            ValueError,
            "one of 'filter', 'none'",
        ),
        (
            lambda: random_direction(PARAMS, 0, filter_axis=1),
            ValueError,
            "must be -1 .* or 0 .*, got 1",
        ),
        (
            lambda: line(lambda p, b: b, PARAMS, DATA, key=0),
            TypeError,
            "mean loss of the batch, a scalar",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()
