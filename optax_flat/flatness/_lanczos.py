"""Lanczos' method, safe where it breaks down and at every size of the eigenvalues."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Ritz(NamedTuple):
    """Eigenpairs of H in a Krylov space of dimension m."""

    values: jax.Array  # [m]
    coefficients: jax.Array  # [m, m], columns; 0 for rows after a breakdown
    live: jax.Array  # [m], false for what only fills up after a breakdown
    basis: jax.Array  # [m, n], rows, orthonormal before a breakdown

    def ends(self) -> tuple[jax.Array, jax.Array]:
        """The smallest and the largest live value."""
        low = jnp.min(jnp.where(self.live, self.values, jnp.inf))
        return low, jnp.max(jnp.where(self.live, self.values, -jnp.inf))


def lanczos(matvec, start, num_matvecs) -> Ritz:
    """Lanczos' method, cut off where the Krylov space is exhausted.

    The loop goes on there, dividing rounding errors by their length. That does no harm
    as long as the result is orthogonal to the vectors before it: then it is one more
    direction. Where it is not, or is nothing, what follows is cut off. No length says
    as much, since one below the rounding of the largest eigenvalue may still lead to
    others.
    """

    def step(i, carry):
        basis, diagonal, lengths, vector = carry
        basis = _stored(basis, vector, i)
        image, unit = scaled(matvec(vector))
        along = basis @ image
        image = image - along @ basis
        image = image - (basis @ image) @ basis  # as rounding needs it
        vector, length = _normalized(image)
        diagonal = diagonal.at[i].set(unit * along[i])
        return basis, diagonal, lengths.at[i].set(unit * length), vector

    numbers = jnp.zeros(num_matvecs, start.dtype)
    basis = jnp.zeros((num_matvecs, start.size), start.dtype)
    carry = (basis, numbers, numbers, _normalized(start)[0])
    basis, diagonal, lengths, _ = jax.lax.fori_loop(0, num_matvecs, step, carry)
    with jax.disable_jit(False):
        return Ritz(*_pairs(basis, diagonal, lengths[:-1]), basis)


@jax.jit
def _pairs(basis, diagonal, lengths):
    """Values and coefficients, and which of them are live."""
    products = jnp.tensordot(basis, basis, axes=(1, 1))
    before = jnp.abs(jnp.tril(products, -1)).max(axis=1)
    orthogonal = before < jnp.finfo(basis.dtype).eps ** 0.5  # false for NaN
    orthogonal &= jnp.diagonal(products) > 0.5
    alive = jnp.cumprod(orthogonal.at[0].set(True)).astype(bool)
    scale = jnp.nanmax(jnp.abs(jnp.concatenate([diagonal, lengths])))
    # What fills up is apart from all Ritz values, so that eigh does not mix them.
    diagonal = jnp.where(alive, diagonal, -4.0 * scale)
    lengths = jnp.where(alive[1:], lengths, 0.0)
    tridiagonal = jnp.diag(diagonal) + jnp.diag(lengths, 1) + jnp.diag(lengths, -1)
    values, coefficients = eigh(tridiagonal)
    live = alive @ coefficients**2 > 0.5
    return values, jnp.where(alive[:, None], coefficients, 0.0), live


def scaled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An array of largest entry in [1, 2), and the power of two that it is less by.

    Squares of the entries neither underflow nor overflow then. What is zero or not
    finite stays as it is.
    """
    largest = jnp.max(jnp.abs(x))
    usual = jnp.isfinite(largest) & (largest > 0)
    exponent = jnp.frexp(jnp.where(usual, largest, 1.0))[1] - 1
    unit = jnp.ldexp(jnp.ones_like(largest), exponent)
    return x / unit, unit


def norm(x: jax.Array) -> jax.Array:
    """Euclidean norms along the last axis, whatever the size of the entries."""
    x, unit = scaled(x)
    return unit * jnp.linalg.norm(x, axis=-1)


def eigh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues and eigenvectors, whatever the size of the entries."""
    matrix, unit = scaled(matrix)
    values, vectors = jnp.linalg.eigh(matrix)
    return unit * values, vectors


def _normalized(x):
    """A vector of length 1, and the length; zero stays zero."""
    x, unit = scaled(x)
    length = jnp.linalg.norm(x)
    return x / jnp.where(length == 0.0, 1.0, length), unit * length


def _stored(basis, vector, i):
    """The basis with one more row, in its own memory."""
    with jax.disable_jit(False):  # where a loop runs in Python, this is what donates
        return _set_row(basis, vector, i)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(basis, vector, i):
    return basis.at[i].set(vector)
