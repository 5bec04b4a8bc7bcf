"""Random draws for trees of parameters, as cheap as the method allows.

On a CPU, drawing N(0, 1) the usual way costs more than a gradient step. Both kinds here
spend few random bits:

* `rademacher`: independent signs, one *bit* per parameter. A Langevin step with signs
  has the same weak order as with normal draws, because only the first three moments of
  the increment enter (Kloeden and Platen, Numerical Solution of Stochastic Differential
  Equations, section 14.1).
* `normal`: Box-Muller on two 16-bit uniforms, so that one 32-bit word gives two
  independent normals. The radius takes 65536 values, hence |z| <= 4.86; the variance
  is 1 - 5e-6 and the fourth moment 3 - 2e-4.

One call of the generator serves the whole tree: leaves take consecutive words. The
paths of the leaves are folded into the key, so two groups of parameters
(`optax.partition`) that were given one key do not share their draws.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

KINDS = ("normal", "rademacher")

# Words at which leaves may start: XLA's CPU backend reads others several times slower.
_ALIGN = 256

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
    per_word, rule = {"normal": (2, _normal), "rademacher": (32, _rademacher)}[kind]
    paths, structure = jax.tree_util.tree_flatten_with_path(like)
    shapes = [_words_shape(leaf.shape, per_word) for _, leaf in paths]
    sizes = [math.ceil(rows * columns / _ALIGN) * _ALIGN for rows, columns in shapes]
    offsets = np.cumsum([0, *sizes])
    names = "".join(jax.tree_util.keystr(path) for path, _ in paths)
    words = _words(key, np.uint32(zlib.crc32(names.encode())), int(offsets[-1]))
    draws = []
    for (_, leaf), shape, offset in zip(paths, shapes, offsets[:-1], strict=True):
        own = words[offset : offset + math.prod(shape)]
        z = rule(own.reshape(shape[0], 1, shape[1])).ravel()[: leaf.size]
        draws.append(z.astype(leaf.dtype).reshape(leaf.shape))
    return jax.tree.unflatten(structure, draws)


def _words_shape(shape, per_word):
    """Rows and columns of the words for one leaf.

    A word serves `per_word` entries of one *column*: neighbours along the last axis
    come from neighbouring words by one operation, which is what vector units do best.
    """
    size = math.prod(shape)
    columns = shape[-1] if len(shape) > 1 else math.ceil(size / per_word)
    return math.ceil(size / max(columns * per_word, 1)), columns


def _words(key, label, count):
    # jax.random.bits would keep 32 of the 64 bits that threefry makes at a time.
    seed = jax.random.bits(jax.random.fold_in(key, label), (2,), jnp.uint32)
    counter = jnp.arange(count, dtype=jnp.uint32)
    # Without the barrier XLA's CPU backend fuses the generator into the loops that read
    # the words and runs it again for every reader.
    return jax.lax.optimization_barrier(threefry_2x32((seed[0], seed[1]), counter))


def _rademacher(words):
    bits = words >> jnp.arange(32, dtype=jnp.uint32)[:, None]
    one = jnp.float32(1.0).view(jnp.uint32)
    return ((bits << 31) | one).view(jnp.float32)


def _normal(words):
    uniform = ((words >> 16).astype(jnp.float32) + 0.5) / 2**16
    radius = jnp.sqrt(-2.0 * jnp.log(uniform))
    quarter_turn = jnp.array([[0], [2**14]], jnp.uint32)  # cosine, then sine
    return radius * _cosine(words + quarter_turn)


def _cosine(words):
    """cos(2 pi (a + 1/2) / 2^16) for a = the low 16 bits of each word, to 3e-7."""
    quadrant = (words >> 14) & 3
    turn = ((words & (2**14 - 1)).astype(jnp.float32) + 0.5) / 2**14
    s = jnp.where(quadrant & 1, turn, 1.0 - turn)  # |cos| = sin(s pi / 2), 0 < s < 1
    sine = s * jnp.polyval(_SINE, s * s)
    return jnp.where((quadrant == 1) | (quadrant == 2), -sine, sine)
