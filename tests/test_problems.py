"""The test surfaces against their tables and minima, the signals against their laws."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_flat import problems
from optax_flat.problems import ARTICLE, SURFACES, signals, skewed_quadratic

GOLDEN = Path(__file__).parent / "golden" / "habr_signals.npz"
ALL = (*SURFACES.values(), skewed_quadratic)
each = pytest.mark.parametrize("problem", ALL, ids=[problem.name for problem in ALL])

# At the start, and at the minima in the order of the table.
VALUES = {
    "wobbly": (14.96914, [0.915506, 5.100992]),
    "basins_and_walls": (8.003789, [0, *[0.299051] * 2, *[1.195858] * 2]),
    "ripple": (4.719390, [0, *[0.008123] * 4]),
    "giant_plateau": (3.999997, [0]),
    "hills_and_canyon": (8.788171, [0.089717, 2.954275, 6.644055]),
    "two_minimums": (3.543032, [0.999998, 3.499989]),
    "rosenbrock": (24.2, [0]),
    "beale": (14.203125, [0]),
    "himmelblau": (170, [0] * 4),
    "wide_and_narrow": (14.125, [-0.2, 0]),
}


class Scan(NamedTuple):
    """A problem's values and gradients on a grid, at the start and at the minima."""

    values: np.ndarray
    grads: np.ndarray
    start: int  # where it is
    minima: slice


@functools.cache
def scan(name):
    """Call it with x64 on. The grids have the lines x = 0 and y = 0."""
    problem = next(problem for problem in ALL if problem.name == name)
    side = 121 if len(problem.start) == 2 else 7
    axes = [np.union1d(np.linspace(*bounds, side), 0) for bounds in problem.bounds]
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, len(axes))
    points = np.concatenate([grid, problem.start[None], problem.minima])
    evaluate = jax.jit(jax.vmap(jax.value_and_grad(problem.function)))
    values, grads = map(np.asarray, evaluate(points))
    return Scan(values, grads, len(grid), slice(len(grid) + 1, None))


@each
def test_minima(x64, problem):
    """They are, and the first is the lowest of all."""
    run = scan(problem.name)
    both = jax.jit(lambda: (problem.values(), problem.hessians()))
    values, hessians = map(np.asarray, both())
    curvature = np.linalg.eigvalsh(hessians)
    assert curvature.min() > 0.1
    # A minimum rounded to double precision is off by its own rounding.
    rounding = 1e-14 * (1 + curvature.max())
    np.testing.assert_allclose(run.grads[run.minima], 0, atol=rounding)
    np.testing.assert_allclose(values, run.values[run.minima], rtol=0, atol=1e-13)
    assert np.argmin(values.round(12)) == 0
    assert run.values.min() >= values[0] - 1e-12


@each
def test_window(x64, problem):
    """It holds the start and the minima, and all is finite in it."""
    d = len(problem.start)
    assert problem.bounds.shape == (d, 2)
    assert problem.minima.shape[1:] == (d,)
    low, high = problem.bounds.T
    for points in (problem.start, problem.minima):
        assert np.all((low < points) & (points < high))
    run = scan(problem.name)
    assert np.isfinite(run.values).all()
    assert np.isfinite(run.grads).all()


@pytest.mark.parametrize("name", VALUES)
def test_values(x64, name):
    run = scan(name)
    start, minima = VALUES[name]
    np.testing.assert_allclose(run.values[run.start], start, rtol=1e-6)
    found = run.values[run.minima][: len(minima)]
    np.testing.assert_allclose(found, minima, rtol=0, atol=5.1e-7)


@each
def test_keeps_the_dtype(problem):
    for dtype in (jnp.bfloat16, jnp.float32):
        point = jnp.zeros(len(problem.start), dtype)
        value, grad = jax.eval_shape(jax.value_and_grad(problem.function), point)
        assert (value.shape, value.dtype) == ((), dtype)
        assert (grad.shape, grad.dtype) == (point.shape, dtype)


def test_names():
    for name, problem in SURFACES.items():
        assert problem is getattr(problems, name)
        assert problem.name == name
        assert problem.start.shape == (2,)
    assert ARTICLE[0] == "wobbly"
    assert ARTICLE[-1] == "two_minimums"
    with pytest.raises(ValueError, match="read-only"):
        SURFACES["wobbly"].start[0] = 0


def test_plateau_is_flat_at_the_start(x64):
    run = scan("giant_plateau")
    assert 1e-5 < np.linalg.norm(run.grads[run.start]) < 1e-4


def test_skewed_quadratic_has_its_spectrum(x64):
    """And no axis of it is an axis of the coordinates."""
    hessian = np.asarray(skewed_quadratic.hessians()[0])
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian), [1, 4, 15, 60], rtol=1e-12)
    assert np.abs(hessian).min() > 0.1


def descend(function, start):
    def step(_, x):
        return x - 0.04 * jax.grad(function)(x)

    return jax.jit(lambda x: jax.lax.fori_loop(0, 300, step, x))(start)


def test_wide_and_narrow(x64):
    """Descent falls into the hole; smoothed over 0.6 it passes on to the valley."""
    function, start = problems.wide_and_narrow.function, problems.wide_and_narrow.start
    narrow, wide = problems.wide_and_narrow.minima
    np.testing.assert_allclose(descend(function, start), narrow, atol=1e-6)

    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    offsets = 0.6 * np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / (2 * np.pi)

    def smoothed(x):
        return weights @ jax.vmap(function)(x + offsets)

    np.testing.assert_allclose(descend(smoothed, start), wide, atol=0.05)

    hessians = problems.wide_and_narrow.hessians()
    exact = [40 * np.eye(2), np.eye(2)]
    np.testing.assert_allclose(hessians, exact, atol=1e-10)


def test_share_of_the_valley(x64):
    """The density at temperature 0.1 is the mixture that the docstring says."""
    line = np.linspace(-4, 5, 1801)
    points = np.stack(np.meshgrid(line, line), -1)
    function = problems.wide_and_narrow.function
    values = np.asarray(jax.jit(function)(np.moveaxis(points, -1, 0)))
    density = np.exp(-values / 0.1)
    hole = np.linalg.norm(points - (-1, -1), axis=-1) < 0.5
    share = density[~hole].sum() / density.sum()
    np.testing.assert_allclose(share, 1 / (1 + np.exp(2) / 40), atol=1e-3)


def test_import_runs_nothing():
    """With a platform that does not exist, any computation would fail."""
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    code = "import optax_flat.problems"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_signals_are_the_articles(x64):
    found = signals(key=0)
    with np.load(GOLDEN, allow_pickle=False) as golden:
        names = {k.removeprefix("signal_") for k in golden if k.startswith("signal_")}
        assert set(found) == names
        for name in names - {"noisy_sin", "very_noisy_sin"}:
            np.testing.assert_array_equal(found[name], golden[f"signal_{name}"])


def test_noise_of_the_signals():
    """Uniform on [-0.5, 0.5), independent, another one for another key."""
    length = 20_000
    t = np.arange(length)
    draws = []
    for key in (0, jax.random.key(1)):
        found = signals(length, key=key)
        draws += [
            np.asarray(found["noisy_sin"]) - np.sin(t / 20),
            np.asarray(found["very_noisy_sin"]) - np.sin(t / 20) / 5,
        ]
    draws = np.stack(draws)
    assert np.abs(draws).max() <= 0.5 + 1e-6
    # Standard errors of the mean, the variance and the correlation of n draws.
    errors = np.sqrt(np.array([1 / 12, 1 / 180, 1]) / length)
    assert np.abs(draws.mean(axis=1)).max() < 5 * errors[0]
    assert np.abs(draws.var(axis=1) - 1 / 12).max() < 5 * errors[1]
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 5 * errors[2]


def test_signals_may_be_jitted_and_shorter():
    found = jax.jit(lambda key: signals(7, key=key))(jax.random.key(0))
    assert {x.shape for x in found.values()} == {(7,)}
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match="`length` must be an int >= 1, got 0"):
        signals(0, key=0)
    with pytest.raises(ValueError, match="`key` must be one typed key"):
        signals(key=None)
