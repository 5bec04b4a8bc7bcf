"""Random directions in parameter space, comparable between networks.

Networks with ReLUs compute the same after one layer is multiplied and the next divided
by a number, but a fixed step then means something else. So each filter of a random
direction is given the length of that filter of the params.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat.flatness import _points


def random_direction(
    params: optax.Params,
    key: jax.typing.ArrayLike,
    *,
    normalize: str = "filter",
    filter_axis: int = -1,
) -> optax.Params:
    r"""A random direction, each filter as long as the same filter of the params.

    .. math::
        d_{ij} \leftarrow \frac{d_{ij}}{\|d_{ij}\|} \|w_{ij}\|, \qquad d \sim N(0, I)

    where (i, j) is filter j of layer i. A filter is what feeds one output unit: a leaf
    with two or more axes has one for each index of the axis `filter_axis`; biases and
    normalization parameters (at most one axis) get d = 0.

    Only the shapes are known here. A leaf with two or more axes counts as a kernel even
    if it is a bias, such as those of attention, (heads, head_dim); and where layers are
    stacked along a leading axis, a filter of the last axis goes through all layers, and
    one of the first is a whole layer. For these, or a network with both layouts, make
    the direction by hand and give it to `line` or `plane`.

    Args:
      params: w, any tree of floating-point arrays.
      key: a typed or raw PRNG key, or an int.
      normalize: "filter", or "none" for N(0, 1) in every coordinate of every leaf.
      filter_axis: the axis of the output units: -1, the last, as in Flax; or 0, the
        first, as in Equinox and PyTorch.

    Returns:
      A tree like `params`, in at least float32.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: params that are not floating-point arrays, `filter_axis` not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import random_direction
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
      >>> d = random_direction(params, key=0)
      >>> jnp.linalg.norm(d["kernel"], axis=0).round(4).tolist(), d["bias"].tolist()
      ([5.0, 2.0], [0.0, 0.0])

    References:
      Li et al., `Visualizing the loss landscape of neural nets
      <https://arxiv.org/abs/1712.09913>`_, NeurIPS 2018;
      `code <https://github.com/tomgoldstein/loss-landscape>`_.

    Differs from the paper:
      The code has PyTorch's layout, ``filter_axis=0``, and leaves the choice for biases
      to an argument.
    """
    checks.float_params(params)
    checks.choice("normalize", normalize, ("filter", "none"))
    filter_axis = check_filter_axis(filter_axis)
    w = trees.accumulator(params)
    direction = _points.draw(checks.key(key), w, "normal")
    if normalize == "none":
        return direction
    return _normalized(direction, w, filter_axis)


@functools.partial(jax.jit, static_argnames="filter_axis")
def _normalized(direction, params, filter_axis):
    """Each filter with the norm of its partner, and biases 0."""

    def scaled(d, w):
        if w.ndim < 2:
            return jnp.zeros_like(w)
        axes = tuple(range(1, w.ndim) if filter_axis == 0 else range(w.ndim - 1))
        length, wanted = (
            jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True)) for v in (d, w)
        )
        return d * (wanted / jnp.where(length > 0, length, 1.0))

    return jax.tree.map(scaled, direction, params)


def check_filter_axis(value: int) -> int:
    """The first axis or the last."""
    if checks.integer("filter_axis", value, -1) > 0:
        raise ValueError(
            "`filter_axis` must be -1 (output units last, as in Flax) or 0 (first, as "
            f"in Equinox and PyTorch), got {value}."
        )
    return value
