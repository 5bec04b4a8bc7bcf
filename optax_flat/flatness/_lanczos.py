"""Lanczos' method on Matfree's Arnoldi iteration, safe where it breaks down."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from optax_flat._core import extras


class Ritz(NamedTuple):
    """Eigenpairs of H in a Krylov space of dimension m."""

    values: jax.Array  # [m]
    coefficients: jax.Array  # [m, m], columns
    basis: jax.Array  # [m, n], orthonormal rows, zero after a breakdown
    live: jax.Array  # [m], false for what only fills up after a breakdown

    def ends(self) -> tuple[jax.Array, jax.Array]:
        """The smallest and the largest live value."""
        low = jnp.min(jnp.where(self.live, self.values, jnp.inf))
        return low, jnp.max(jnp.where(self.live, self.values, -jnp.inf))


def lanczos(matvec, start, num_matvecs) -> Ritz:
    """Lanczos' method, cut off where the Krylov space is exhausted.

    Matfree goes on there, dividing rounding errors (or zero) by their length. That does
    no harm as long as the result is orthogonal to the vectors before it: then it is one
    more direction. Where it is not, what follows is cut off. No length says as much,
    since one below the rounding of the largest eigenvalue may still lead to others.
    """
    decomp = extras.load("matfree.decomp", "flatness", "Lanczos' method")
    hessenberg = decomp.hessenberg(num_matvecs, reortho="full", custom_vjp=False)
    basis, matrix, *_ = hessenberg(matvec, start)
    diagonal, lengths = jnp.diagonal(matrix), jnp.diagonal(matrix, -1)
    scale = jnp.nanmax(jnp.abs(jnp.concatenate([diagonal, lengths])))
    before = jnp.abs(jnp.tril(basis @ basis.T, -1)).max(axis=1)
    orthogonal = before < jnp.finfo(matrix.dtype).eps ** 0.5  # false for NaN
    alive = jnp.cumprod(orthogonal.at[0].set(True)).astype(bool)
    # What fills up is apart from all Ritz values, so that eigh does not mix them.
    diagonal = jnp.where(alive, diagonal, -4.0 * scale)
    lengths = jnp.where(alive[1:], lengths, 0.0)
    tridiagonal = jnp.diag(diagonal) + jnp.diag(lengths, 1) + jnp.diag(lengths, -1)
    values, coefficients = jnp.linalg.eigh(tridiagonal)
    live = alive @ coefficients**2 > 0.5
    return Ritz(values, coefficients, jnp.where(alive[:, None], basis, 0.0), live)
