r"""The loss along a line and over a plane through the params.

    f(w + a d)     f(w + a d1 + b d2)

All points share one pass over the batches.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, programs, trees
from optax_flat.flatness import _points, _progress
from optax_flat.flatness._batches import LossFn, mean_over
from optax_flat.flatness.directions import random_direction


class Line(NamedTuple):
    """What `line` returns."""

    positions: jax.Array  # [n], in units of the direction
    losses: jax.Array  # [n]


class Plane(NamedTuple):
    """What `plane` returns; `losses[j, i]` is at x[i], y[j], as plots want it."""

    x: jax.Array  # [n], in units of the first direction
    y: jax.Array  # [m], in units of the second
    losses: jax.Array  # [m, n]


def line(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    direction: optax.Params | None = None,
    to: optax.Params | None = None,
    positions: Any = None,
    normalize: str = "filter",
    filter_axis: int = -1,
    batch_size: int | None = 8,
    progress: bool = False,
    fast_convolutions: bool = True,
    key: jax.typing.ArrayLike | None = None,
) -> Line:
    r"""The loss along a line through the params.

    .. math::
        f(w + a d) \text{ for each } a \text{ in `positions`}

    The direction d is given, or leads to other params, or is random
    (`random_direction`). Only a random one is normalized, so a unit eigenvector
    of the Hessian gives f in units of the distance, and `to` is reached at a = 1.

    Cost:
      `len(positions)` forward passes over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: w, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other iterable of batches,
        over whose examples the loss is the mean. One pass over them is made.
      direction: d, a tree like `params`, or None.
      to: other params, for d = `to` - `params`; or None. With neither this nor
        `direction`, d is random.
      positions: the values of a, [n]; None is 51 points from -1 to 1, with `to` from
        -0.5 to 1.5, that is half the distance beyond either end.
      normalize: of a random direction: "filter" or "none".
      filter_axis: of a random direction's filters: -1 (Flax) or 0 (Equinox, PyTorch).
      batch_size: how many points are evaluated at a time; None is all of them.
      progress: whether to show a progress line (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.
      key: a typed or raw PRNG key, or an int, for a random direction.

    Returns:
      `Line`: the positions and the losses there, both [n].

    Raises:
      ValueError: an argument outside the range given above, `direction` and `to` both
        given, a tree unlike `params`, no `key`, or a loss with noise.
      TypeError: an argument of the wrong type.

    Example:
      Two minima and the barrier between them:

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import line
      >>> def loss_fn(x, batch):
      ...     return jnp.mean((x ** 2 - batch) ** 2)
      >>> found = line(
      ...     loss_fn, jnp.array(-1.0), jnp.ones(4), to=jnp.array(1.0),
      ...     positions=[0.0, 0.5, 1.0])
      >>> found.losses.tolist()
      [0.0, 1.0, 0.0]

    References:
      Goodfellow et al., `Qualitatively characterizing neural network optimization
      problems <https://arxiv.org/abs/1412.6544>`_, ICLR 2015 (the line between two).
    """
    if direction is not None and to is not None:
        raise ValueError(
            "give either `direction` or `to`, which is the direction `to` - `params`, "
            "got both."
        )
    checks.float_params(params)
    if to is not None:
        _check_like("to", to, params)
        d = optax.tree.sub(trees.accumulator(to), trees.accumulator(params))
    elif direction is not None:
        _check_like("direction", direction, params)
        d = direction
    else:
        d = _random(params, key, normalize, filter_axis, "direction")
    low, high = (-1.0, 1.0) if to is None else (-0.5, 1.5)
    a = _axis("positions", positions, low, high, 51)
    losses = _losses(
        loss_fn, params, batches, [d], a[:, None],
        batch_size=batch_size, progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    return Line(a, losses)


def plane(
    loss_fn: LossFn,
    params: optax.Params,
    batches: Any,
    *,
    directions: tuple[optax.Params, optax.Params] | None = None,
    x: Any = None,
    y: Any = None,
    normalize: str = "filter",
    filter_axis: int = -1,
    batch_size: int | None = 8,
    progress: bool = False,
    fast_convolutions: bool = True,
    key: jax.typing.ArrayLike | None = None,
) -> Plane:
    r"""The loss over a plane through the params.

    .. math::
        f(w + x_i d_1 + y_j d_2)

    The directions are given, and then used as they are, or random
    (`random_direction`), with a key for each from `key`; two random directions of many
    parameters are nearly orthogonal. Three solutions a, b, c lie in the plane at a with
    ``directions=(b - a, c - a)``.

    Cost:
      `len(x) * len(y)` forward passes over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, without noise.
      params: w, any tree of floating-point arrays; computed with in at least float32.
      batches: one batch (a pytree of arrays), or a list or other iterable of batches,
        over whose examples the loss is the mean. One pass over them is made.
      directions: two trees like `params`, or None for random ones.
      x: positions along the first direction, [n]; None is 25 points from -1 to 1.
      y: positions along the second, [m]; None is 25 points from -1 to 1.
      normalize: of random directions: "filter" or "none".
      filter_axis: of a random direction's filters: -1 (Flax) or 0 (Equinox, PyTorch).
      batch_size: how many points are evaluated at a time; None is all of them.
      progress: whether to show a progress line (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.
      key: a typed or raw PRNG key, or an int, for random directions.

    Returns:
      `Plane`: x [n], y [m] and the losses [m, n].

    Raises:
      ValueError: an argument outside the range given above, a tree unlike `params`, no
        `key`, or a loss with noise.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import plane
      >>> def loss_fn(w, batch):
      ...     return w[0] ** 2 + 10 * w[1] ** 2 + batch.mean()
      >>> d1, d2 = jnp.eye(2)
      >>> plane(loss_fn, jnp.zeros(2), jnp.zeros(3), directions=(d1, d2),
      ...       x=[0.0, 1.0, 2.0], y=[0.0, 1.0]).losses.tolist()
      [[0.0, 1.0, 4.0], [10.0, 11.0, 14.0]]

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018.
    """
    checks.float_params(params)
    if directions is None:
        keys = (None, None) if key is None else jax.random.split(checks.key(key))
        d1, d2 = (
            _random(params, key, normalize, filter_axis, "directions") for key in keys
        )
    elif isinstance(directions, tuple | list) and len(directions) == 2:
        d1, d2 = directions
        _check_like("directions", d1, params)
        _check_like("directions", d2, params)
    else:
        raise ValueError(
            "`directions` must be two trees like the params, (d1, d2), got "
            f"{jax.tree.structure(directions)}."
        )
    x, y = _axis("x", x, -1.0, 1.0, 25), _axis("y", y, -1.0, 1.0, 25)
    points = jnp.stack([p.ravel() for p in jnp.meshgrid(x, y)], axis=-1)
    losses = _losses(
        loss_fn, params, batches, [d1, d2], points,
        batch_size=batch_size, progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    return Plane(x, y, losses.reshape(y.size, x.size))


def _random(params, key, normalize, filter_axis, name):
    if key is None:
        raise ValueError(
            "`key` must be given for a random direction, got None. Give a key, or "
            f"`{name}`."
        )
    return random_direction(params, key, normalize=normalize, filter_axis=filter_axis)


def _axis(name, values, low, high, default):
    axis = jnp.linspace(low, high, default) if values is None else jnp.asarray(values)
    if axis.ndim != 1 or axis.size == 0 or not jnp.isrealobj(axis):
        raise ValueError(
            f"`{name}` must be a one-dimensional array of positions such as "
            f"jnp.linspace({low:g}, {high:g}, {default}), got shape {axis.shape}."
        )
    return axis.astype(jnp.promote_types(axis.dtype, jnp.float32))


def _check_like(name, tree, params):
    hint = "Give one number for each of the params."
    checks.same_structure(f"`{name}`", tree, params, hint=hint)


def _losses(
    loss_fn, params, batches, directions, points,
    *, batch_size, progress, fast_convolutions,
):  # fmt: skip
    """The loss at w + sum_k points[:, k] d_k, [P]."""
    batch_size = _points.check_batch_size(batch_size)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    batches, w = _points.prepare(loss_fn, params, batches, one_pass=True)
    directions = [trees.cast_like(d, w) for d in directions]
    # One program for all points, or, to show progress, one call for each few of them.
    blocks = math.ceil(len(points) / (batch_size or len(points))) if progress else 1
    blocks = jnp.array_split(points, blocks)
    at = functools.partial(
        _losses_at, loss_fn=loss_fn, batch_size=batch_size,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    with _progress.counter(progress, unit="point", desc="losses") as count:

        def one_batch(w, batch):
            losses = []
            for block in blocks:
                losses.append(at(w, directions, block, batch))
                count(len(block), losses[-1])
            return jnp.concatenate(losses)

        return mean_over(batches, one_batch, w)


@programs.jit("loss_fn", static_argnames=_points.LOOP_ARGUMENTS)
def _losses_at(w, directions, points, batch, *, loss_fn, **loop):
    def loss(position):
        point = w
        for amount, direction in zip(position, directions, strict=True):
            point = optax.tree.add_scale(point, amount, direction)
        return trees.accumulator(loss_fn(trees.cast_like(point, w), batch))

    return _points.mapped(loss, points, **loop)
