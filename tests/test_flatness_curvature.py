"""Curvature against dense Hessians and known spectra."""

import dataclasses
import functools
import gc
import itertools
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from optax_flat.flatness import (
    frobenius_norm,
    hvp,
    spectral_density,
    top_eigenvalues,
    trace,
)

SIZES = (3, 16, 8, 1)
SMALL = (3, 6, 1)  # where a program is compiled piece by piece, or often


def net(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2)


def net_params(dtype=jnp.float64, sizes=SIZES):
    rng = np.random.default_rng(0)
    return [
        {
            "w": jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), dtype),
            "b": jnp.asarray(rng.normal(size=o), dtype),
        }
        for i, o in itertools.pairwise(sizes)
    ]


def net_batch(examples=40, dtype=jnp.float64):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(examples, SIZES[0]))
    y = np.sin(3 * x[:, :1]) + 0.1 * rng.normal(size=(examples, 1))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def dense(loss_fn, params, batch):
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.hessian(lambda x: loss_fn(unravel(x), batch))(flat))


def quadratic(x, spectrum):
    """Hessian diag(spectrum); the batch is [1, n]."""
    return jnp.mean(jnp.sum(spectrum * x**2, axis=-1)) / 2


def on_quadratic(measure, spectrum, **settings):
    spectrum = jnp.asarray(spectrum)[None]
    return measure(quadratic, jnp.ones_like(spectrum[0]), spectrum, **settings)


class Loader:
    """A data loader: an iterable that is no list, and counts its passes."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


LENGTHS = (3, 20, 8, 3, 20, 8, 3, 3, 20, 8)


def unequal(batch):
    """A batch in ten batches of different lengths."""
    cuts = np.cumsum(LENGTHS)[:-1]
    x, y = (np.split(np.asarray(leaf), cuts) for leaf in batch)
    return list(zip(x, y, strict=True))


def test_hvp_is_exact(x64):
    params, batch = net_params(), net_batch()
    vector = jax.tree.map(jnp.cos, params)
    found, _ = ravel_pytree(hvp(net, params, batch, vector))
    expected = dense(net, params, batch) @ ravel_pytree(vector)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_eigenvalues_are_exact(x64):
    params, batch = net_params(), net_batch()
    matrix = dense(net, params, batch)
    exact = np.linalg.eigvalsh(matrix)
    assert exact[0] < 0 < exact[-1]
    found = top_eigenvalues(net, params, batch, k=2, which="both", key=0)
    expected = [exact[-1], exact[-2], exact[0], exact[1]]
    np.testing.assert_allclose(found.values, expected, rtol=1e-6)
    assert jax.tree.structure(found.vectors) == jax.tree.structure(params)
    vectors = jax.vmap(lambda tree: ravel_pytree(tree)[0])(found.vectors)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(4), atol=1e-6)
    residuals = vectors @ matrix - found.values[:, None] * vectors
    np.testing.assert_allclose(
        found.residuals, np.linalg.norm(residuals, axis=1), rtol=1e-3, atol=1e-12
    )
    assert (found.residuals < 1e-3 * exact[-1]).all()


def test_residuals_tell_what_is_not_converged(x64):
    spectrum = np.linspace(0.0, 1.0, 200)
    found = on_quadratic(top_eigenvalues, spectrum, num_matvecs=5, key=0)
    error = 1.0 - found.values[0]
    assert 1e-4 < error <= found.residuals[0]


def test_large_degenerate_and_indefinite(x64):
    n, ends = 10**5, [50.0, 50.0, -8.0]
    spectrum = np.random.default_rng(0).uniform(-1, 1, n)
    spectrum[[5, n // 2, n - 2]] = ends
    find = functools.partial(on_quadratic, top_eigenvalues, spectrum)
    found = find(k=2, which="both", num_matvecs=15, key=0)
    np.testing.assert_allclose(found.values[:3], ends, rtol=1e-6)
    copies = found.vectors[:2, [5, n // 2]]
    np.testing.assert_allclose(copies @ copies.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "spectrum",
    [[0.0] * 6, [2.0] * 6, [-2.0] * 6, [1.0, -2.0, 3.0] * 2],
    ids=["zero", "positive", "negative", "three values"],
)
def test_exhausted_krylov_space(x64, spectrum, dtype):
    """Lanczos breaks down before its last step: no NaN, nothing spurious."""
    spectrum = np.array(spectrum, dtype)
    close = {"atol": 100 * jnp.finfo(dtype).eps, "rtol": 0}
    found = on_quadratic(top_eigenvalues, spectrum, k=4, key=0)
    assert found.values.dtype == dtype
    np.testing.assert_allclose(found.values, np.sort(spectrum)[:1:-1], **close)
    np.testing.assert_allclose(found.vectors @ found.vectors.T, np.eye(4), **close)
    density = functools.partial(spectral_density, num_matvecs=6, num_samples=2)
    grid, heights = on_quadratic(density, spectrum, key=0)
    np.testing.assert_allclose(jnp.trapezoid(heights, grid), 1.0, atol=1e-5)
    mean = jnp.trapezoid(grid * heights, grid)
    np.testing.assert_allclose(mean, spectrum.mean(), atol=1e-5)


def test_eigenvalues_below_the_rounding_of_the_largest():
    """A small length in Lanczos' method is no end: the bulk lies behind it."""
    bulk = np.random.default_rng(0).uniform(-1, 1, 1999)
    spectrum = np.append(bulk, 1e5).astype(np.float32)
    settings = {"which": "smallest", "num_matvecs": 80, "key": 0}
    found = on_quadratic(top_eigenvalues, spectrum, **settings)
    np.testing.assert_allclose(found.values, [spectrum.min()], rtol=0.02)


def test_nan_stays_nan():
    """A breakdown is repaired, a broken loss is not hidden."""
    found = on_quadratic(top_eigenvalues, np.full(6, np.nan, np.float32), key=0)
    assert np.isnan(found.values).all() and np.isnan(found.residuals).all()


def test_agrees_with_power_iteration(x64):
    batch = net_batch()

    def descend(params, _):
        grads = jax.grad(net)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.02 * g, params, grads), None

    params, _ = jax.lax.scan(descend, net_params(), length=300)
    assert net(params, batch) < 0.5 * net(net_params(), batch)

    def power(carry, _):  # as PyHessian does
        vector, _ = carry
        image = hvp(net, params, batch, vector)
        value = sum(map(jnp.vdot, *map(jax.tree.leaves, (image, vector))))
        norm = jnp.linalg.norm(ravel_pytree(image)[0])
        return (jax.tree.map(lambda x: x / norm, image), value), None

    start = jax.tree.map(jnp.ones_like, params)
    (_, value), _ = jax.lax.scan(power, (start, jnp.zeros([])), length=300)
    found = top_eigenvalues(net, params, batch, k=2, which="both", key=0)
    np.testing.assert_allclose(found.values[0], value, rtol=1e-6)


def test_trace_and_frobenius_norm(x64):
    """Within four standard errors, which are themselves as theory has them."""
    params, batch = net_params(), net_batch()
    matrix = dense(net, params, batch)
    found = trace(net, params, batch, num_samples=400, key=0)
    assert abs(found.value - np.trace(matrix)) < 4 * found.standard_error
    off_diagonal = np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)
    expected = np.sqrt(2 * off_diagonal / 400)
    np.testing.assert_allclose(found.standard_error, expected, rtol=0.3)

    found = frobenius_norm(net, params, batch, num_samples=400, key=1)
    norm, square = np.linalg.norm(matrix), matrix @ matrix
    assert abs(found.value - norm) < 4 * found.standard_error
    off_diagonal = np.sum(square**2) - np.sum(np.diag(square) ** 2)
    expected = np.sqrt(2 * off_diagonal / 400) / (2 * norm)
    np.testing.assert_allclose(found.standard_error, expected, rtol=0.3)
    zero = on_quadratic(frobenius_norm, np.zeros(6), num_samples=2, key=0)
    assert zero == (0.0, 0.0)


def test_density_has_its_moments(x64):
    """1, tr H / n and ||H||^2 / n + width^2, of the very vectors that were drawn."""
    params, batch, n = net_params(), net_batch(), 209
    settings = {"num_samples": 5, "key": 3}
    grid, density = spectral_density(net, params, batch, num_matvecs=30, **settings)
    moments = [float(jnp.trapezoid(grid**i * density, grid)) for i in range(3)]
    ends = top_eigenvalues(net, params, batch, k=2, which="both", key=0).values
    width = 0.01 * (ends[0] - ends[2])
    norm = frobenius_norm(net, params, batch, **settings).value
    first = trace(net, params, batch, **settings).value / n
    expected = [1.0, first, norm**2 / n + width**2]
    np.testing.assert_allclose(moments, expected, rtol=1e-6)
    np.testing.assert_allclose(grid[0], ends[2] - 6 * width, rtol=1e-6)


def test_density_is_that_of_the_eigenvalues(x64):
    """Mass above a few thresholds, within four standard errors over keys."""
    params, batch = net_params(), net_batch()
    exact = np.linalg.eigvalsh(dense(net, params, batch))
    width = 0.01 * (exact[-1] - exact[0])
    thresholds = np.array([-width, width, 0.1 * exact[-1], 0.9 * exact[-1]])
    scaled = (exact[:, None] - thresholds) / width
    expected = jax.scipy.stats.norm.cdf(scaled).mean(axis=0)
    masses = []
    for key in range(10):
        grid, density = spectral_density(
            net, params, batch, num_matvecs=30, num_samples=5, key=key
        )
        above = jax.nn.sigmoid(1e6 * (grid[:, None] - thresholds))
        masses.append(jnp.trapezoid(density[:, None] * above, grid, axis=0))
    error = np.std(masses, axis=0, ddof=1) / np.sqrt(len(masses))
    assert (abs(np.mean(masses, axis=0) - expected) < 4 * error + 2e-3).all()


@pytest.mark.parametrize("measure", ["top_eigenvalues", "spectral_density"])
def test_memory_is_that_of_the_lanczos_vectors(measure):
    """One vector per product and a few more: the compiled program says so."""
    n = 20_000
    settings = {"key": 0}
    if measure == "top_eigenvalues":
        find = functools.partial(top_eigenvalues, **settings)
    else:
        find = functools.partial(spectral_density, num_samples=3, **settings)

    def vectors_needed(num_matvecs):
        @jax.jit
        def found(x):
            return on_quadratic(find, x, num_matvecs=num_matvecs)[:1]

        memory = found.lower(jnp.linspace(0.0, 1.0, n)).compile().memory_analysis()
        return memory.temp_size_in_bytes / (4 * n)

    few, many = vectors_needed(20), vectors_needed(40)
    assert few < 20 + 10
    assert many - few < 1.05 * 20


def test_memory_with_many_batches_is_the_same():
    """There the loop is Python's, and each step could make the vectors anew."""
    n, num_matvecs = 2_000, 37
    held = []

    class Watched(Loader):
        def __iter__(self):
            arrays = [a for a in jax.live_arrays() if a.dtype == jnp.float32]
            held.append(sum(a.size for a in arrays if n in a.shape) / n)
            return super().__iter__()

    batches = Watched([jnp.ones((1, n)), jnp.linspace(0.0, 1.0, n)[None]])
    top_eigenvalues(quadratic, jnp.ones(n), batches, num_matvecs=num_matvecs, key=0)
    before, during = held[0], held[2:]
    assert max(during) >= num_matvecs
    assert max(during) - before < num_matvecs + 10


@pytest.mark.parametrize(
    ("power", "which"),
    [(-100, "one batch"), (-70, "many"), (70, "one batch"), (110, "many")],
)
def test_the_size_of_the_hessian_makes_no_difference(power, which):
    """By powers of two all numbers are the same, but for the unit."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(12, 12)).astype(np.float32)
    matrix = matrix + matrix.T
    exact = np.linalg.eigvalsh(matrix.astype(float))

    def loss_fn(x, batch):
        return jnp.mean(batch) * (x @ matrix @ x) / 2

    def measures(unit):
        batch = jnp.full(4, unit, jnp.float32)
        given = (loss_fn, jnp.zeros(12), batch if which == "one batch" else [batch] * 2)
        return {
            "eigenvalues": top_eigenvalues(*given, k=2, which="both", key=0)[:2],
            "trace": trace(*given, num_samples=5, key=0),
            "norm": frobenius_norm(*given, num_samples=5, key=0),
            "grid": spectral_density(*given, num_matvecs=12, num_samples=3, key=0).grid,
        }

    unit = 2.0**power
    expected, found = measures(1.0), measures(unit)
    close = {"rtol": 1e-5, "atol": 0}
    values, residuals = found.pop("eigenvalues")
    reference, rounding = expected.pop("eigenvalues")
    np.testing.assert_allclose(values / unit, exact[[-1, -2, 0, 1]], **close)
    np.testing.assert_allclose(values / unit, reference, **close)
    assert (residuals / unit <= 1e-5 * exact[-1]).all() and (residuals > 0).any()
    assert (rounding > 0).any()
    for name in found:
        scaled = jax.tree.map(lambda x: x / unit, found[name])
        np.testing.assert_allclose(scaled, expected[name], **close, err_msg=name)
    assert found["trace"].standard_error > 0 < found["norm"].standard_error


def test_large_estimates(x64):
    """A known spectrum at 10^5 parameters, not diagonal, or signs would be exact."""
    n = 10**5
    rng = np.random.default_rng(2)
    spectrum = np.append(rng.exponential(size=n - 1), 30.0)
    mirror = np.append(rng.normal(size=4), np.zeros(n - 4))
    mirror[-1] = 1.0  # the largest eigenvalue is mixed with a few others
    mirror /= np.linalg.norm(mirror)

    def loss_fn(x, batch):
        values, mirror = batch
        y = x - 2 * mirror * (mirror @ x)
        return y @ (values * y) / 2

    given = (loss_fn, jnp.ones(n), (jnp.asarray(spectrum), jnp.asarray(mirror)))
    settings = {"num_samples": 20, "key": 0}
    for measure, exact in (
        (trace, spectrum.sum()),
        (frobenius_norm, np.sqrt((spectrum**2).sum())),
    ):
        found = measure(*given, **settings)
        assert 0 < found.standard_error < 1e-3 * exact
        assert abs(found.value - exact) < 4 * found.standard_error
    grid, density = spectral_density(
        *given, num_matvecs=20, num_samples=4, sigma=0.02, key=0
    )
    above = np.trapezoid(np.where(grid > 3.0, density, 0.0), grid)
    assert abs(above - (spectrum > 3.0).mean()) < 0.03  # lines are 0.6 wide
    np.testing.assert_allclose(jnp.trapezoid(density, grid), 1.0, rtol=1e-6)


def test_unequal_batches_are_one_batch(x64):
    params, batch = net_params(sizes=SMALL), net_batch(sum(LENGTHS))
    vector = jax.tree.map(jnp.cos, params)
    parts = unequal(batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    for measure in (
        functools.partial(trace, num_samples=3, key=0),
        functools.partial(frobenius_norm, num_samples=3, key=0),
        functools.partial(spectral_density, num_matvecs=12, num_samples=2, key=0),
    ):
        jax.tree.map(close, measure(net, params, parts), measure(net, params, batch))
    loader = Loader(parts)
    find = functools.partial(top_eigenvalues, net, params, num_matvecs=12, k=2, key=0)
    close(find(loader).values, find(batch).values)
    # For each pair 12 and one for its residual; and a look at the first batch.
    assert loader.passes == 2 * (12 + 1) + 1
    expected = hvp(net, params, batch, vector)
    for given in (parts, iter(parts), loader):
        jax.tree.map(close, hvp(net, params, given, vector), expected)


def test_infinite_loss_of_a_batch():
    """Their mean is infinite, not inf - inf."""
    slopes = [jnp.full((2, 3), x) for x in (1.0, jnp.inf, jnp.inf, 1.0)]
    found = hvp(quadratic, jnp.ones(3), slopes, jnp.ones(3))
    np.testing.assert_array_equal(found, np.full(3, np.inf))


def test_many_batches_are_let_go(x64):
    """JAX keeps what it traced, but neither the loader nor the vectors."""
    params, loader = net_params(sizes=SMALL), Loader(unequal(net_batch(sum(LENGTHS))))
    found = top_eigenvalues(net, params, loader, num_matvecs=12, k=2, key=0)
    shape = (2, sum(leaf.size for leaf in jax.tree.leaves(params)))
    let_go = weakref.ref(loader)
    del loader, found
    gc.collect()
    assert let_go() is None
    assert shape not in [array.shape for array in jax.live_arrays()]


def test_is_compiled_once():
    traces = []

    def counted(params, batch):
        if isinstance(params[0]["w"], Tracer):
            traces.append(None)
        return net(params, batch)

    params, batch = net_params(jnp.float32, SMALL), net_batch(8, jnp.float32)
    find = functools.partial(top_eigenvalues, counted, num_matvecs=5)
    find(params, batch, key=0)
    first = len(traces)
    find(params, batch, key=1)
    assert len(traces) == first > 0


def test_jit_and_sharded_data():
    params, batch = net_params(jnp.float32, SMALL), net_batch(40, jnp.float32)
    find = functools.partial(top_eigenvalues, net, num_matvecs=20, key=0)
    expected = find(params, batch).values
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.device_put(batch, sharding)
    for got in (find(params, sharded), jax.jit(find)(params, batch)):
        np.testing.assert_allclose(got.values, expected, rtol=1e-4)
    many = jax.jit(lambda p, b: trace(net, p, [b, b], num_samples=2, key=0))
    once = trace(net, params, batch, num_samples=2, key=0)
    np.testing.assert_allclose(many(params, batch), once, rtol=1e-4)


def test_vmap_over_a_later_batch():
    later = jnp.array([[[2.0, 2.0, 2.0]], [[4.0, 4.0, 4.0]]])

    def measure(batch):
        batches = [jnp.zeros((1, 3)), batch]
        return trace(quadratic, jnp.ones(3), batches, num_samples=2, key=0).value

    np.testing.assert_allclose(jax.vmap(measure)(later), [3.0, 6.0])


def test_bfloat16_is_computed_in_float32():
    low = net_params(jnp.bfloat16, SMALL)
    high = jax.tree.map(lambda x: x.astype(jnp.float32), low)
    batch = net_batch(8, jnp.float32)
    found, expected = (hvp(net, p, batch, low) for p in (low, high))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_loss_with_two_values_is_refused():
    rng = np.random.default_rng(0)

    def noisy(x, batch):
        return quadratic(x, batch) * rng.uniform()

    for batches in (jnp.ones((1, 3)), [jnp.ones((1, 3))]):
        with pytest.raises(ValueError, match="same value.*Switch dropout"):
            trace(noisy, jnp.ones(3), batches, num_samples=2, key=0)
    with pytest.raises(TypeError, match="a scalar.*auxiliary"):
        hvp(lambda x, b: (x.sum(), b), jnp.ones(3), jnp.ones(3), jnp.ones(3))


def test_a_loss_that_changed_is_refused():
    """The compiled one would give the old numbers."""
    factor = [1.0]

    def changing(x, batch):
        return factor[0] * quadratic(x, batch)

    def measure(batches, loss_fn=changing):
        return trace(loss_fn, jnp.ones(3), batches, num_samples=2, key=0).value

    assert measure(jnp.ones((1, 3))) == 3.0
    factor[0] = 10.0
    for batches in (jnp.ones((1, 3)), [jnp.ones((1, 3))]):
        with pytest.raises(ValueError, match=r"eager value 15, compiled value 1\.5"):
            measure(batches)
    assert measure(jnp.ones((1, 3)), lambda x, b: 2 * changing(x, b)) == 60.0


def test_a_loss_that_rounds_is_not_refused():
    """Compiled in one piece it may round otherwise than step by step."""

    def cancelling(x, batch):
        large = jnp.where(isinstance(x, Tracer), 1.0, 2.0)  # stands for rounding
        return quadratic(x, batch) * large

    found = trace(cancelling, jnp.ones(3), jnp.ones((1, 3)), num_samples=2, key=0)
    assert found.value == 3.0


def test_an_unhashable_loss_is_refused():
    @dataclasses.dataclass
    class Model:
        scale: float

        def __call__(self, x, batch):
            return self.scale * quadratic(x, batch)

    with pytest.raises(
        TypeError, match="`loss_fn` must be hashable.* a plain function"
    ):
        trace(Model(2.0), jnp.ones(3), jnp.ones((1, 3)), num_samples=2, key=0)


@pytest.mark.parametrize(
    "batches, error, words",
    [
        (iter([jnp.ones((1, 3))]), TypeError, "one-shot iterator.*Give a list"),
        ([], ValueError, "at least one batch"),
        ([jnp.ones([])], ValueError, "one leading axis, got the shapes"),
        ([jnp.ones((0, 3))], ValueError, "no examples"),
    ],
    ids=["iterator", "empty", "scalar", "no examples"],
)
def test_wrong_batches(batches, error, words):
    with pytest.raises(error, match=words):
        trace(quadratic, jnp.ones(3), batches, num_samples=2, key=0)


def test_what_is_no_batch_is_kept_out_of_it():
    def weighted(x, batch):
        return quadratic(x, batch["x"]) * batch["class_weights"].mean()

    batch = {"class_weights": jnp.ones(10), "x": jnp.ones((4, 3))}
    assert hvp(weighted, jnp.ones(3), batch, jnp.ones(3)).shape == (3,)
    with pytest.raises(ValueError, match=r"'class_weights': \(10,\).*close over them"):
        hvp(weighted, jnp.ones(3), [batch], jnp.ones(3))


def test_passes_of_different_lengths_are_refused():
    class Shrinking(Loader):
        def __iter__(self):
            self.passes += 1
            return iter(self.batches[: 5 - self.passes])

    loader = Shrinking([jnp.ones((2, 3))] * 4)
    with pytest.raises(ValueError, match=r"(?s)6 in one pass and 4 in another.*drop_"):
        trace(quadratic, jnp.ones(3), loader, num_samples=2, key=0)


def test_one_batch_in_a_list_is_pointed_out():
    def unpacks(x, batch):
        features, targets = batch
        return jnp.mean((features @ x - targets) ** 2)

    with pytest.raises(ValueError) as error:
        hvp(unpacks, jnp.ones(3), [jnp.ones((8, 3))] * 2, jnp.ones(3))
    assert "give a tuple: (x, y)" in "".join(error.value.__notes__)


@pytest.mark.parametrize(
    "measure, settings, words",
    [
        (top_eigenvalues, {"k": 4}, "number of parameters, 3, got 4"),
        (top_eigenvalues, {"which": "top"}, "'largest', 'smallest', 'both'"),
        (trace, {"num_samples": 1}, "num_samples.* >= 2"),
        (
            spectral_density,
            {"num_matvecs": 2, "num_samples": 1, "sigma": 0.001},
            "num_points.* >= 1013",
        ),
    ],
)
def test_wrong_settings(measure, settings, words):
    with pytest.raises(ValueError, match=words):
        on_quadratic(measure, np.ones(3), key=0, **settings)


def test_wrong_vector():
    with pytest.raises(ValueError, match="shapes of `params`"):
        hvp(quadratic, jnp.ones(3), jnp.ones((1, 3)), jnp.ones(4))
    with pytest.raises(ValueError, match="`vector` must have the structure"):
        hvp(quadratic, jnp.ones(3), jnp.ones((1, 3)), [jnp.ones(3)])


def test_a_vector_in_a_custom_pytree():
    """Two of a class that is compared by identity have one structure."""

    @jax.tree_util.register_pytree_node_class
    class Params:
        def __init__(self, x):
            self.x = x

        def tree_flatten(self):
            return (self.x,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    params, vector = Params(jnp.ones(3)), Params(jnp.arange(3.0))
    batch = jnp.full((1, 3), 2.0)
    found = hvp(lambda p, b: quadratic(p.x, b), params, batch, vector)
    np.testing.assert_array_equal(found.x, [0.0, 2.0, 4.0])


def test_messages_fit_measures():
    """They speak of no optimizer's factory and of no schedule."""
    batch = jnp.ones((1, 3))
    with pytest.raises(ValueError, match="`params` must be passed .*got None"):
        hvp(quadratic, None, batch, jnp.ones(3))
    with pytest.raises(TypeError, match="close over them"):
        hvp(quadratic, jnp.ones(3, int), batch, jnp.ones(3))
    settings = {"num_matvecs": 2, "num_samples": 1, "key": 0}
    with pytest.raises(TypeError, match=r"`sigma` must be .* \(0, 1\], got 'a'"):
        on_quadratic(spectral_density, np.ones(3), sigma="a", **settings)


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matfree.stochtrace", None)
    with pytest.raises(ImportError, match=r"optax_flat\[flatness\]"):
        on_quadratic(trace, np.ones(7), num_samples=2, key=0)


def test_progress_of_many_batches(capsys):
    batches = [jnp.ones((1, 3))] * 2
    trace(quadratic, jnp.ones(3), batches, num_samples=4, key=0, progress=True)
    assert "4product" in capsys.readouterr().err


def test_a_list_of_the_parts_of_one_batch_is_an_error():
    x, y = net_batch(dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"parts of one batch, give a tuple: \(x, y\)"):
        trace(net, net_params(jnp.float32), [x, y[:, 0]], num_samples=2, key=0)
