"""Random draws for trees of parameters, as cheap as the method allows.

On a CPU drawing N(0, 1) the usual way costs more than a gradient step, so both kinds
spend few random bits:

* `rademacher`: independent signs, one *bit* per parameter. A Langevin step with signs
  has the same weak order as with normal draws, because only the first three moments of
  the increment enter (Kloeden and Platen, Numerical Solution of Stochastic Differential
  Equations, section 14.1).
* `normal`: Box-Muller on two 16-bit uniforms, so that one 32-bit word gives two
  independent normals. The radius takes 65536 values, hence |z| <= 4.86; the first four
  moments agree with N(0, 1) to 1e-4.

Every leaf folds its path into the key. So leaves never share their draws, and a leaf
draws the same numbers whether its neighbours are masked away or not.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    def one(path, leaf):
        name = jax.tree_util.keystr(path).encode()
        leaf_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name)))
        return rule(leaf_key, leaf.size).astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(one, like)


def _rademacher(key, size):
    # Words run along the last axis, so that one shift serves a whole row of them.
    words = jax.random.bits(key, (math.ceil(size / 32),), jnp.uint32)
    bits = words >> jnp.arange(32, dtype=jnp.uint32)[:, None]
    one = jnp.float32(1.0).view(jnp.uint32)
    return ((bits << 31) | one).view(jnp.float32).ravel()[:size]


def _normal(key, size):
    words = jax.random.bits(key, (math.ceil(size / 2),), jnp.uint32)
    # Without the barrier XLA's CPU backend fuses the generator into the loop below and
    # runs it once for each of the two normals.
    words = jax.lax.optimization_barrier(words)
    uniform = ((words >> 16).astype(jnp.float32) + 0.5) / 2**16
    radius = jnp.sqrt(-2.0 * jnp.log(uniform))
    quarter_turn = jnp.array([[0], [2**14]], jnp.uint32)  # cosine, then sine
    return (radius * _cosine(words + quarter_turn)).ravel()[:size]


def _cosine(words):
    """cos(2 pi (a + 1/2) / 2^16) for a = the low 16 bits of each word, to 3e-7."""
    quadrant = (words >> 14) & 3
    turn = ((words & (2**14 - 1)).astype(jnp.float32) + 0.5) / 2**14
    s = jnp.where(quadrant & 1, turn, 1.0 - turn)  # |cos| = sin(s pi / 2), 0 < s < 1
    sine = s * jnp.polyval(_SINE, s * s)
    return jnp.where((quadrant == 1) | (quadrant == 2), -sine, sine)
