r"""Random draws for trees of parameters: one elementwise operation for each leaf.

An entry's draw depends on the key and on the entry's own number, and on nothing else:

    word = mix(seed, number),    draw = rule(word)

So every device makes the draws of its own shard, whatever the sharding, without
communication, and they are the same bits on any number of devices; XLA fuses the few
operations into the update, so there is no buffer of draws either. The seed is 64 bits
from the generator of the key. For each seed `mix` permutes the 32-bit numbers, of which
leaves take consecutive ones: no word repeats among 2^32; larger trees take a new block.

* `rademacher`: independent signs. A Langevin step with signs has the same weak order
  as with normal draws, because only the first three moments of the increment enter
  (Kloeden and Platen, Numerical Solution of Stochastic Differential Equations, section
  14.1).
* `normal`: from a uniform u by a closed form for the inverse of the normal distribution

      z = 1.3697 t / sqrt(1.8893 + sqrt(8.3270 + t^2)),    t = log(u / (1 - u))

  whose distribution function is right to 4e-5, whose variance is 1 and whose fourth
  moment is 3 - 2e-5; |z| < 5.4.
* `uniform`: the word's first 24 bits, a number in [0, 1). It rounds; it is no noise.
"""

import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("normal", "rademacher")

_MULTIPLIER = np.uint32(0xAC4C1B51)  # odd, of no pattern
_SHIFT = np.uint32(16)
_NUMBERS = 2**32  # that `mix` permutes

# 2^32 over the golden ratio, and over its square.
_WEYL = np.array([0x9E3779B9, 0x61C88647], np.uint32)

# The closed form with the least error of its distribution function among those of unit
# variance and fourth moment 3.
_SCALE, _A, _B = 1.3696791, 1.8892610, 8.3269999


def draw(key: jax.Array, like: Any, kind: str, scale: Any = 1.0) -> Any:
    """Independent draws with mean 0 and standard deviation `scale`.

    The uniform ones lie in [0, scale).

    Args:
      key: one typed PRNG key.
      like: a tree of floating-point arrays, for shapes, dtypes and explicit shardings.
      kind: "normal", "rademacher" or "uniform".
      scale: a scalar.

    Returns:
      A tree like `like`.

    Raises:
      ValueError: an axis is longer than 2^32.
    """
    return draw_from(first_seed(key, like), like, kind, scale)


def first_seed(key: jax.Array, like: Any) -> jax.Array:
    """The seed of the first draw in a loop: uint32, [2]."""
    # Groups of parameters (`optax.partition`) that were given one key share no draws.
    paths, _ = jax.tree_util.tree_flatten_with_path(like)
    names = "".join(jax.tree_util.keystr(path) for path, _ in paths)
    label = np.uint32(zlib.crc32(names.encode()))
    return jax.random.bits(jax.random.fold_in(key, label), (2,), jnp.uint32)


def next_seed(seed: jax.Array) -> jax.Array:
    """The seed of the next draw in a loop.

    A loop that carries its seed compiles much faster than one that makes a key in each
    of its steps, which is a loop of its own.
    """
    return _mix(seed + _WEYL, seed[::-1])


def draw_from(seed: jax.Array, like: Any, kind: str, scale: Any = 1.0) -> Any:
    """The draws of a seed, see `draw`."""
    leaves, structure = jax.tree.flatten(like)
    scale = scale * {"normal": _SCALE, "rademacher": 1.0, "uniform": 2.0**-24}[kind]
    draws = [
        _draw_leaf(
            seed + first, seed[1] + block, jnp.asarray(scale, leaf.dtype),
            leaf if _sharding(leaf) is not None else None,
            shape=leaf.shape, dtype=leaf.dtype, sharding=_sharding(leaf), kind=kind,
        )
        for leaf, (first, block) in zip(leaves, _numbers(leaves), strict=True)
    ]  # fmt: skip
    return jax.tree.unflatten(structure, draws)


def draw_around(mean: Any, deviations: Any, seed: jax.Array, kind: str) -> Any:
    """The draws of a seed, with the mean and the deviation of each entry."""
    z = draw_from(seed, mean, kind)
    return jax.tree.map(lambda m, d, z: m + d * z, mean, deviations, z)


def _numbers(leaves):
    """For each leaf its first number and the first block of 2^32 that it is in."""
    first, block = 0, 0
    for leaf in leaves:
        outer, inner = _split(leaf.shape)
        blocks, size = math.prod(outer), math.prod(inner)
        if blocks > 1 or first + size > _NUMBERS:
            first, block = 0, block + 1
        # An array of two: a number would be part of the program, and XLA compiles equal
        # programs only once, so one for each shape and not one for each leaf.
        yield np.array([first % _NUMBERS, 0], np.uint32), np.uint32(block)
        first, block = first + size, block + blocks - 1


def _split(shape):
    """A shape in two parts, the second one with at most 2^32 entries."""
    if max(shape, default=0) > _NUMBERS:
        raise ValueError(
            f"noise for an array of shape {shape}: no axis may be longer than 2^32. "
            "Reshape the array to have two axes there."
        )
    first = len(shape)
    while first and math.prod(shape[first - 1 :]) <= _NUMBERS:
        first -= 1
    return shape[:first], shape[first:]


def _sharding(leaf):
    """The sharding of a leaf on an explicit mesh, where types carry it."""
    sharding = jax.typeof(leaf).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return sharding if explicit else None


# Compiled for itself where an update is not jitted, and traced once for each shape.
# On an Explicit mesh an array of it says on which devices that is.
@functools.partial(
    jax.jit,
    static_argnames=("shape", "dtype", "sharding", "kind"),
    keep_unused=True,
)
def _draw_leaf(first, block, scale, there, *, shape, dtype, sharding, kind):
    del there
    outer, inner = _split(shape)
    axes = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis, out_sharding=sharding)
        for axis in range(len(shape))
    ]
    low = _add_number(first[0], axes[len(outer) :], inner)
    high = _add_number(block, axes[: len(outer)], outer)
    words = jax.lax.bitcast_convert_type(_mix(low, high), jnp.int32)
    if kind == "rademacher":
        return jnp.where(words < 0, -scale, scale)
    if kind == "uniform":
        first = jax.lax.shift_right_logical(words, jnp.full_like(words, 8))
        return first.astype(dtype) * scale
    return _normal(words).astype(dtype) * scale


def _add_number(first, axes, shape):
    """`first` plus the number of each entry, row by row: the last axis runs fastest."""
    stride = 1
    for axis, length in zip(reversed(axes), reversed(shape), strict=True):
        first = first + (axis if stride == 1 else axis * np.uint32(stride))
        stride *= length
    return first


def _mix(low, high):
    """For each `high` a permutation of the 32-bit numbers `low`."""
    multiplier = jnp.full_like(low, _MULTIPLIER)
    shift = jnp.full_like(low, _SHIFT)
    x = low * multiplier
    x = x ^ jax.lax.shift_right_logical(x, shift)
    x = (x + high) * multiplier
    x = x ^ jax.lax.shift_right_logical(x, shift)
    return x * multiplier


def _normal(words):
    # |x| <= 2^31 after rounding; the end is the next float32, so nothing is zero.
    x = words.astype(jnp.float32)
    end = jnp.full_like(x, 2**31 + 2**8)
    t = jnp.log((end + x) / (end - x))
    root = jnp.sqrt(t * t + np.float32(_B))
    # Not t / sqrt(...), which JAX 0.12 on a CPU rounds by the array's shape.
    return jnp.copysign(jnp.sqrt(t * t / (root + np.float32(_A))), t)
