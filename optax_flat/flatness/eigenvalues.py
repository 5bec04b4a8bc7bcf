"""The largest and the smallest eigenvalues of the Hessian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks
from optax_flat.flatness import _batches, _hessian
from optax_flat.flatness._lanczos import eigh, lanczos, norm


class Eigenvalues(NamedTuple):
    """What `top_eigenvalues` returns.

    Example:
      A small residual proves an eigenvalue: one lies within it.

      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import top_eigenvalues
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> exact = jnp.array([1.0, 2.0, 5.0])
      >>> found = top_eigenvalues(loss_fn, jnp.ones(3), exact, k=2, key=0)
      >>> bool((abs(found.values - exact[:0:-1]) <= found.residuals + 1e-6).all())
      True
    """

    values: jax.Array  # [k]
    residuals: jax.Array  # [k], ||H v - lambda v||
    vectors: Any  # tree like params, every leaf with a leading axis k; orthonormal


def top_eigenvalues(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    k: int = 1,
    which: str = "largest",
    num_matvecs: int | None = None,
    key: Any,
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Eigenvalues:
    r"""The largest or smallest eigenvalues of the Hessian, and their eigenvectors.

    .. math::
        H v_i = \lambda_i v_i, \qquad
        \lambda_1 \geq \lambda_2 \geq \dots \geq \lambda_k,

    with :math:`H` the Hessian of the mean loss over all of `batches`. Each of the `k`
    pairs has a Lanczos run of its own, fully reorthogonalized and kept orthogonal to
    the pairs before it, so that an eigenvalue which occurs several times is found
    several times. A last step diagonalizes :math:`H` in the span of all of them.

    It takes `k` (`num_matvecs` + 1) Hessian-vector products and holds `num_matvecs` + 2
    `k` vectors like the params, beside a few in the step. Eigenvalues that stand apart
    from the rest, as the top ones of a network do, converge within few products. The
    residuals tell the accuracy: *some* eigenvalue lies within the residual r of the
    value found, and if the gap to all others is g, it lies within about
    :math:`r^2 / g`. That there is none beyond, which Lanczos' method has not seen yet,
    no residual proves.

    Cost:
      `k * (num_matvecs + 1)` Hessian-vector products over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, a scalar.
      params: where the Hessian is taken, any tree of floating-point arrays; n is their
        number.
      batches: one batch, or a list or another re-iterable of many.
      k: how many pairs, in [1, n].
      which: "largest" (algebraically, in falling order), "smallest" (in rising order)
        or "both": the k largest and then the k smallest, 2k in all.
      num_matvecs: Hessian-vector products per pair, >= 1; no more than n are made. None
        is 100.
      key: PRNG key, typed or raw, or an int seed, for the starting vectors.
      progress: whether many batches show a progress bar (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Eigenvalues`, in at least float32, the precision of the computation.

    Raises:
      TypeError: `k` or `num_matvecs` not an int, a one-shot iterator, and as in `hvp`.
      ValueError: `k`, `which` or `num_matvecs` not as above, and as in `hvp`.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import top_eigenvalues
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> exact = jnp.array([-2.0, 1.0, 7.0, 7.0])
      >>> found = top_eigenvalues(loss_fn, jnp.ones(4), exact, k=3, key=0)
      >>> [round(float(value), 4) for value in found.values]
      [7.0, 7.0, 1.0]

    References:
      Lanczos, An iteration method for the solution of the eigenvalue problem of linear
      differential and integral operators, Journal of Research of the National Bureau of
      Standards 45, 1950. Parlett, The symmetric eigenvalue problem, SIAM, 1998.
    """
    k = checks.integer("k", k, 1)
    checks.choice("which", which, ("largest", "smallest", "both"))
    if num_matvecs is None:
        num_matvecs = 100
    num_matvecs = checks.integer("num_matvecs", num_matvecs, 1)
    checks.float_params(params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    if k > size:
        raise ValueError(
            f"`k` must be at most the number of parameters, {size}, got {k}."
        )
    signs = {"largest": (1.0,), "smallest": (-1.0,), "both": (1.0, -1.0)}[which]
    settings = (k, min(num_matvecs, size), signs)
    return _hessian.run(
        _eigenvalues, loss_fn, params, batches,
        key=key, settings=settings, progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip


def _eigenvalues(hessian, key, k, num_matvecs, signs) -> Eigenvalues:
    """The k largest of H, of -H, or both, one after the other."""
    keys = jax.random.split(key, len(signs))
    ends = [
        _one_end(hessian, key, k, num_matvecs, sign)
        for key, sign in zip(keys, signs, strict=True)
    ]
    values, residuals, vectors = (jnp.concatenate(x) for x in zip(*ends, strict=True))
    return Eigenvalues(values, residuals, jax.vmap(hessian.unravel)(vectors))


def _one_end(hessian, key, k, num_matvecs, sign):
    def matvec(vector):
        return sign * hessian.matvec(vector)

    def one_pair(i, carry):
        found, shift = carry  # [k, n], zero from row i on; []

        def inside(vector):
            return (found @ vector) @ found

        def outside(vector):  # twice, as rounding needs it
            vector = vector - inside(vector)
            return vector - inside(vector)

        def deflated(vector):
            """H without the pairs found, which get an eigenvalue below all others."""
            here = inside(vector)
            rest = matvec(vector - here)
            return rest - inside(rest) + shift * here

        start = jax.random.normal(keys[i], (hessian.size,), hessian.dtype)
        ritz = lanczos(deflated, outside(start), num_matvecs)
        top = jnp.argmax(jnp.where(ritz.live, ritz.values, -jnp.inf))
        vector = outside(ritz.coefficients[:, top] @ ritz.basis)
        found = found.at[i].set(vector / norm(vector))
        low, high = ritz.ends()
        below = low - (high - low) - jnp.abs(high)
        return found, jnp.where(i == 0, below, shift)

    keys = jax.random.split(key, k)
    nothing = jnp.zeros((k, hessian.size), hessian.dtype)
    start = (nothing, jnp.zeros([], hessian.dtype))
    vectors, _ = jax.lax.fori_loop(0, k, one_pair, start)
    images = jax.lax.map(matvec, vectors)
    values, rotation = eigh(vectors @ images.T)  # symmetrizes
    values, rotation = values[::-1], rotation.T[::-1]
    vectors, images = rotation @ vectors, rotation @ images
    residuals = norm(images - values[:, None] * vectors)
    return sign * values, residuals, vectors
