"""Random draws for trees of parameters, as cheap as the method allows.

On a CPU, drawing N(0, 1) the usual way costs more than a gradient step. Both kinds here
spend few random bits:

* `rademacher`: independent signs, one *bit* per parameter. A Langevin step with signs
  has the same weak order as with normal draws, because only the first three moments of
  the increment enter (Kloeden and Platen, Numerical Solution of Stochastic Differential
  Equations, section 14.1).
* `normal`: Box-Muller on two 16-bit uniforms, so that one 32-bit word gives two
  independent normals. The radius takes 65536 values, hence |z| <= 4.86; the first four
  moments agree with those of N(0, 1) to 1e-4.

Every leaf folds its path into the key. So leaves never share their draws, and a leaf
draws the same numbers whether its neighbours are masked away or not.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

KINDS = ("normal", "rademacher")

# sin(pi s / 2) / s in powers of s^2, highest first: Taylor's, but for the first one
# here, which makes the sum 1 at s = 1.
_SINE = np.array([1.569e-4, -4.681754e-3, 7.969262e-2, -0.6459641, 1.5707963], "f4")


def draw(key: jax.Array, like: Any, kind: str) -> Any:
    """Independent draws with mean 0 and variance 1 in the shapes and dtypes of `like`.

    Args:
      key: one typed PRNG key.
      like: a tree of floating-point arrays.
      kind: "normal" or "rademacher".

    Returns:
      A tree like `like`.
    """
    rule = {"normal": _normal, "rademacher": _rademacher}[kind]
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    if not paths:
        return like
    names = [jax.tree_util.keystr(path).encode() for path, _ in paths]
    labels = np.array([zlib.crc32(name) for name in names], np.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, labels)
    draws = [
        rule(keys[i], leaf.shape).astype(leaf.dtype)
        for i, (_, leaf) in enumerate(paths)
    ]
    return jax.tree.unflatten(structure, draws)


def _rademacher(key, shape):
    rows, columns = _words_shape(shape, 32)
    words = jax.random.bits(key, (rows, 1, columns), jnp.uint32)
    bits = _computed_once(words) >> jnp.arange(32, dtype=jnp.uint32)[:, None]
    one = jnp.float32(1.0).view(jnp.uint32)
    return _cut(((bits << 31) | one).view(jnp.float32), shape)


def _normal(key, shape):
    rows, columns = _words_shape(shape, 2)
    count = rows * columns
    # jax.random.bits keeps 32 of the 64 bits that one evaluation of threefry makes.
    seed = jax.random.bits(key, (2,), jnp.uint32)
    counter = jnp.arange(count + count % 2, dtype=jnp.uint32)
    words = _computed_once(threefry_2x32((seed[0], seed[1]), counter))
    words = words[:count].reshape(rows, 1, columns)
    uniform = ((words >> 16).astype(jnp.float32) + 0.5) / 2**16
    radius = jnp.sqrt(-2.0 * jnp.log(uniform))
    quarter_turn = jnp.array([[0], [2**14]], jnp.uint32)  # cosine, then sine
    return _cut(radius * _cosine(words + quarter_turn), shape)


def _cosine(words):
    """cos(2 pi (a + 1/2) / 2^16) for a = the low 16 bits of each word, to 3e-7."""
    quadrant = (words >> 14) & 3
    turn = ((words & (2**14 - 1)).astype(jnp.float32) + 0.5) / 2**14
    s = jnp.where(quadrant & 1, turn, 1.0 - turn)  # |cos| = sin(s pi / 2), 0 < s < 1
    sine = s * jnp.polyval(_SINE, s * s)
    return jnp.where((quadrant == 1) | (quadrant == 2), -sine, sine)


# A word serves `per_word` entries of one *column*. Neighbours along the last axis then
# come from neighbouring words by the same operation, which is what vector units do best.


def _words_shape(shape, per_word):
    size = math.prod(shape)
    columns = shape[-1] if len(shape) > 1 else math.ceil(size / per_word)
    return math.ceil(size / max(columns * per_word, 1)), columns


def _cut(draws, shape):
    return draws.ravel()[: math.prod(shape)].reshape(shape)


def _computed_once(words):
    # Without the barrier XLA's CPU backend fuses the generator into the loops that read
    # the words and runs it again for every reader.
    return jax.lax.optimization_barrier(words)
