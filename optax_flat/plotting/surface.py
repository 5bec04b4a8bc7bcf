"""Paths of optimizers on a surface over the plane."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_flat._core import checks, figures
from optax_flat.plotting._runs import Source, make_runs, split_keys
from optax_flat.problems import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID = 201  # points of the surface along each axis
_LEVELS = 24

# What makes a path, or positions that `paths` returned.
Drawn = Source | np.ndarray | jax.Array


def paths(
    tx: Source,
    problem: Problem,
    *,
    num_steps: int = 125,
    seeds: int = 1,
    key: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Where an optimizer stands after each gradient of a two-dimensional problem.

    Row k is the position after k gradients, the params to evaluate: a walk of L
    gradients moves every L rows, by the same path in both modes, and makes
    ``num_steps // L`` updates. A method without gradients makes `num_steps` updates and
    gets ``output_fn = [function]`` with the output as the loss.

    Args:
      tx: any optimizer in any mode, or a function ``key -> optimizer``.
      problem: an `optax_flat.problems.Problem`.
      num_steps: gradient evaluations, >= 1.
      seeds: runs of a function, >= 1.
      key: a typed or raw PRNG key, or an int, split into those of the runs. The runs
        are those of `trajectory` and `animate` with the same seeds and key.

    Returns:
      Positions [num_steps + 1, 2], the start first; of a function, all of its runs,
      [seeds, num_steps + 1, 2].

    Raises:
      TypeError: `tx` is not a gradient transformation.
      ValueError: the problem is not two-dimensional, or a number is too small; walks
        need `num_steps` for one.

    Example:
      A walk of 5 gradients moves after each fifth:

      >>> import jax.numpy as jnp, optax_flat
      >>> from optax_flat.plotting import paths
      >>> from optax_flat.problems import wobbly
      >>> walk = optax_flat.entropy_sgd(0.5, num_steps=5, key=0)
      >>> path = paths(walk, wobbly, num_steps=10)
      >>> jnp.any(path[1:] != path[:-1], axis=1).nonzero()[0].tolist()
      [4, 9]
    """
    num_steps = checks.integer("num_steps", num_steps, 1)
    keys = split_keys(seeds, key)
    check_problem(problem)
    runs = _make_runs("tx", tx, problem, keys)(_weights(problem, num_steps))
    return runs if callable(tx) else runs[0]


def trajectory(
    transforms: Mapping[str, Drawn],
    problem: Problem,
    *,
    num_steps: int = 125,
    seeds: int = 1,
    key: jax.typing.ArrayLike = 0,
) -> "Figure":
    """Draws the paths of optimizers on the contours of a two-dimensional problem.

    Every method spends the same number of gradients, see `paths`. The levels of the
    contours are closer together where the function is low, so that valleys are seen;
    what leaves the window is not drawn. A path that becomes NaN or infinite ends there,
    and the legend says so.

    Args:
      transforms: optimizers by name. A function ``key -> optimizer`` is drawn `seeds`
        times, in thin lines with a marker at each end. Positions that `paths` returned
        are drawn as they are, so that several pictures can share them.
      problem: an `optax_flat.problems.Problem`.
      num_steps: gradient evaluations of each method, >= 1.
      seeds: runs of each function, >= 1.
      key: a typed or raw PRNG key, or an int; every function is given the same keys,
        split from it.

    Returns:
      A figure 8 inches wide, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: not a mapping, or a value that is no gradient transformation.
      ValueError: an empty mapping, a problem that is not two-dimensional or has no
        finite value in its window, a number that is too small; more than 21
        optimizers, 7 with several seeds.
      ImportError: matplotlib, the extra `plot`, is missing.

    Example:
      >>> import optax, optax_flat
      >>> from optax_flat.plotting import trajectory
      >>> from optax_flat.problems import hills_and_canyon
      >>> figure = trajectory(
      ...     {"Adam": optax.adam(0.1),
      ...      "SGLD": lambda key: optax_flat.sgld(0.02, temperature=0.1, key=key)},
      ...     hills_and_canyon, num_steps=20, seeds=3)
      >>> figure.axes[0].get_title()
      'hills and canyon, 20 gradients'
    """
    runs, figure = prepare(transforms, problem, num_steps, seeds, key)
    axes = draw_problem(figure, problem)
    Paths(axes, runs).show(num_steps)
    set_title(axes, problem, num_steps)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def prepare(
    transforms: Mapping[str, Drawn],
    problem: Problem,
    num_steps: int,
    seeds: int,
    key: Any,
) -> tuple[dict[str, np.ndarray], "Figure"]:
    """Runs by name, each [runs, num_steps + 1, 2], and an empty figure."""
    figures.check_names("transforms", transforms, "optimizers")
    num_steps = checks.integer("num_steps", num_steps, 1)
    keys = split_keys(seeds, key)
    several = len(keys) > 1 and any(map(callable, transforms.values()))
    thin = several or any(
        getattr(drawn, "ndim", 0) == 3 for drawn in transforms.values()
    )
    figures.check_count("transforms", len(transforms), thin=thin)
    check_problem(problem)
    make = {}
    for name, drawn in transforms.items():
        where = f"transforms[{name!r}]"
        if isinstance(drawn, np.ndarray | jax.Array):
            _check_positions(where, drawn, num_steps)
            make[name] = lambda weights, positions=drawn: positions
        else:
            make[name] = _make_runs(where, drawn, problem, keys)
    # Before the runs: without matplotlib they would be made for nothing.
    figure = figures.new_figure(8.0, 5.6, layout="compressed")
    weights = _weights(problem, num_steps)
    runs = {
        name: np.reshape(runs(weights), (-1, num_steps + 1, 2))
        for name, runs in make.items()
    }
    return runs, figure


def check_problem(problem: Problem) -> None:
    """The problem has two parameters and a scalar value."""
    shape, bounds = np.shape(problem.start), np.shape(problem.bounds)
    if shape != (2,) or bounds != (2, 2):
        raise ValueError(
            f"`problem` must be two-dimensional: `start` of shape (2,) and `bounds` of "
            f"shape (2, 2), got {shape} and {bounds}. Fix all but two parameters."
        )
    if not np.isfinite(problem.start).all():
        raise ValueError(
            f"`problem.start` must be finite, got {problem.start}. Start elsewhere."
        )
    value = jax.eval_shape(problem.function, _start(problem))
    if getattr(value, "shape", None) != ():
        raise ValueError(
            f"`problem.function` must map [2] to a scalar, got {value}. Sum or average "
            "its values."
        )


def draw_problem(figure: "Figure", problem: Problem) -> "Axes":
    """Contours, start and known minima."""
    axes = figure.add_subplot()
    low, high = np.asarray(problem.bounds, float).T
    first, second = (np.linspace(low[i], high[i], _GRID) for i in range(2))
    points = jnp.stack(jnp.meshgrid(first, second), axis=-1)
    function = jax.vmap(jax.vmap(problem.function))
    values = np.ma.masked_invalid(function(points.astype(_start(problem).dtype)))
    if not values.count():
        raise ValueError(
            f"`problem.function` is NaN or infinite in the whole window, from {low} to "
            f"{high}: nothing can be drawn. Change the function or `problem.bounds`."
        )
    bottom, middle, top = np.quantile(values.compressed(), [0, 0.5, 1])
    if bottom < top:
        # At least squares of equal steps, and half of the levels below the median.
        power = np.log2((top - bottom) / max(middle - bottom, 1e-4 * (top - bottom)))
        steps = np.linspace(0, 1, _LEVELS + 1) ** max(power, 2.0)
        # The lowest levels may be the same number.
        levels = np.unique(bottom + (top - bottom) * steps)
        shade = np.linspace(0.62, 1.0, len(levels) - 1)  # dark valleys, light heights
        axes.contourf(
            first, second, values, levels, colors=[(s, s, s) for s in shade], zorder=0
        )
        axes.contour(
            first, second, values, levels, colors="white", linewidths=0.5, zorder=0
        )
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_aspect("equal")
    axes.set_xlabel("$x_0$")
    axes.set_ylabel("$x_1$")
    marks = {"linestyle": "none", "markeredgecolor": "black", "zorder": 3}
    axes.plot(
        *_start(problem),
        marker="X",
        markersize=9,
        color="white",
        label="start",
        **marks,
    )
    minima = np.reshape(problem.minima, (-1, 2)).T
    if minima.size:
        axes.plot(
            *minima,
            marker="*",
            markersize=14,
            color="#F0E442",
            label="minimum",
            **marks,
        )
    return axes


def set_title(axes: "Axes", problem: Problem, gradients: int) -> None:
    """What is shown, and when."""
    axes.set_title(f"{problem.name.replace('_', ' ')}, {gradients} gradients")


class Paths:
    """The lines and end marks of all methods on one surface.

    Args:
      axes: where to draw.
      runs: positions by name, each [runs, num_steps + 1, 2].
    """

    def __init__(self, axes: "Axes", runs: Mapping[str, np.ndarray]):
        from matplotlib import patheffects

        self._drawn = []
        for i, (name, several) in enumerate(runs.items()):
            finite = [path[: _finite_rows(path)] for path in several]
            diverged = min(map(len, finite)) < several.shape[1]
            thin = len(several) > 1
            style = figures.style(i, thin=thin)
            width, size = (0.7, 6) if thin else (1.8, 7)
            outline = patheffects.withStroke(linewidth=width + 1.4, foreground="white")
            lines = [
                axes.plot(
                    [], [], **style, linewidth=width, path_effects=[outline], zorder=2
                )[0]
                for _ in finite
            ]
            if thin:  # one artist has all marks, which no line connects
                style["linestyle"] = "none"
            (mark,) = axes.plot(
                [], [], **style, marker=figures.marker(i), markersize=size,
                markeredgecolor="white", markeredgewidth=0.8, zorder=5,
                label=f"{name} (diverged)" if diverged else name,
            )  # fmt: skip
            self._drawn.append((finite, lines, mark))

    def show(self, gradients: int, trail: int | None = None) -> None:
        """Moves lines and marks to where the methods are after so many gradients.

        Args:
          gradients: how many.
          trail: how many of the last ones have a line; None is all.
        """
        first = 0 if trail is None else max(gradients - trail, 0)
        for finite, lines, mark in self._drawn:
            for path, line in zip(finite, lines, strict=True):
                line.set_data(*path[first : gradients + 1].T)
            mark.set_data(*np.array([path[: gradients + 1][-1] for path in finite]).T)


def _make_runs(name, source, problem, keys):
    return make_runs(name, source, problem.function, _start(problem), keys)


def _weights(problem, num_steps):
    return jnp.ones(num_steps, _start(problem).dtype)


def _start(problem):
    return jnp.asarray(problem.start, float)


def _check_positions(name, positions, num_steps):
    shape = positions.shape
    if len(shape) not in (2, 3) or shape[-2:] != (num_steps + 1, 2) or not shape[0]:
        raise ValueError(
            f"`{name}` must have shape [num_steps + 1, 2] or [seeds, num_steps + 1, 2] "
            f"with num_steps = {num_steps}, as `paths` returns it, got {shape}. Give "
            "both functions the same `num_steps`."
        )


def _finite_rows(path):
    """Number of rows in front of the first that is not finite."""
    finite = np.isfinite(path).all(axis=1)
    return len(path) if finite.all() else int(finite.argmin())
