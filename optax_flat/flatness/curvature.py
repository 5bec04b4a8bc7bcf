"""Hessian-vector products, the trace and the Frobenius norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, extras, trees
from optax_flat._core.batches import as_batches
from optax_flat.flatness import _batches, _hessian
from optax_flat.flatness._lanczos import norm, scaled


class Estimate(NamedTuple):
    """A random estimate and how far off it may be.

    Example:
      >>> from optax_flat.flatness import Estimate
      >>> value, standard_error = Estimate(3.0, 0.1)
      >>> value - 2 * standard_error  # two standard errors below
      2.8
    """

    value: Any  # [], the estimate
    standard_error: Any  # [], the standard deviation of `value` over keys, estimated


def estimate(samples: jax.Array) -> Estimate:
    """The mean of independent samples [S] and its standard error, 0 if S is 1."""
    samples, unit = scaled(samples)
    variance = jnp.var(samples, ddof=min(1, samples.size - 1))
    error = jnp.sqrt(variance / samples.size)
    return Estimate(unit * samples.mean(), unit * error)


def hvp(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    vector: optax.Params,
    *,
    fast_convolutions: bool = True,
) -> optax.Params:
    r"""The Hessian of the mean loss times a vector.

    .. math::
        H v = \nabla_x \big( \nabla f(x)^\top v \big),
        \qquad f(x) = \text{mean loss over all of `batches`},

    with :math:`x` = `params` and :math:`v` = `vector`. It is exact (forward over
    reverse differentiation), and costs about as much as two gradients.

    Cost:
      1 Hessian-vector product over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, a scalar.
      params: where the Hessian is taken, any tree of floating-point arrays.
      batches: one batch, or a list or an iterator of many; see the module's text.
      vector: a tree like `params`.
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      H v, a tree like `params`, in at least float32 (in which it is also computed).

    Raises:
      TypeError: a loss that is no scalar or no hashable function, params that are no
        floating-point arrays.
      ValueError: no batches, batches that cannot be weighed or are others in every
        pass, a vector of other shapes, a loss with two values for the same input, or
        with one that changed since it was compiled.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import hvp
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> hvp(loss_fn, jnp.ones(3), jnp.array([1.0, 2.0, 3.0]), jnp.ones(3))
      Array([1., 2., 3.], dtype=float32)

    References:
      Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
    """
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    checks.float_params(params)
    checks.same_structure(
        "`vector`", vector, params, hint="Give one number for each of the params."
    )
    params = trees.accumulator(params)
    given = as_batches(batches, one_pass=True)
    _batches.check_deterministic(loss_fn, params, given)
    vector = trees.cast_like(vector, params)

    one_batch = functools.partial(
        _hessian.product, loss_fn=loss_fn, fast_convolutions=fast_convolutions
    )
    return _batches.mean_over(given, one_batch, params, vector)


def trace(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_samples: int,
    key: Any,
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Estimate:
    r"""The trace of the Hessian, the sum of its eigenvalues, by random vectors.

    .. math::
        \operatorname{tr} H \approx \frac{1}{S} \sum_{s=1}^{S} v_s^\top H v_s,
        \qquad v_s \in \{-1, 1\}^n \text{ uniformly},

    with :math:`S` = `num_samples`. The variance of one term is
    :math:`2 \sum_{i \neq j} H_{ij}^2`: a diagonal Hessian needs one sample. One
    Hessian-vector product per sample, one after the other.

    Cost:
      `num_samples` Hessian-vector products over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, a scalar.
      params: where the Hessian is taken, any tree of floating-point arrays.
      batches: one batch, or a list or another re-iterable of many.
      num_samples: :math:`S`, >= 2.
      key: PRNG key, typed or raw, or an int seed.
      progress: whether many batches show a progress bar (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Estimate`, two scalars of at least float32.

    Raises:
      TypeError: `num_samples` not an int, a one-shot iterator, and as in `hvp`.
      ValueError: `num_samples` too small, and as in `hvp`.
      ImportError: the extra `flatness` is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import trace
      >>> def loss_fn(x, matrix):
      ...     return x @ matrix @ x / 2
      >>> matrix = jnp.array([[3.0, 1.0], [1.0, -1.0]])
      >>> found = trace(loss_fn, jnp.ones(2), matrix, num_samples=1000, key=0)
      >>> bool(abs(found.value - 2.0) < 4 * found.standard_error)
      True
      >>> bool(abs(found.standard_error - (2 * 2 / 1000) ** 0.5) < 0.01)
      True

    References:
      Hutchinson, A stochastic estimator of the trace of the influence matrix for
      Laplacian smoothing splines, Communications in Statistics 18, 1989.
    """
    num_samples = checks.integer("num_samples", num_samples, 2)
    samples = _hessian.run(
        _of_signs, loss_fn, params, batches,
        key=key, settings=(num_samples, "trace"), progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    return estimate(samples)


def frobenius_norm(
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    num_samples: int,
    key: Any,
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Estimate:
    r"""The Frobenius norm of the Hessian, by random vectors.

    .. math::
        \|H\|_F^2 = \sum_i \lambda_i^2
            \approx \frac{1}{S} \sum_{s=1}^{S} \|H v_s\|^2,
        \qquad v_s \in \{-1, 1\}^n \text{ uniformly},

    with :math:`S` = `num_samples` and :math:`\lambda_i` the eigenvalues. The square is
    unbiased. The norm is its root, and the standard error that of the square divided by
    :math:`2 \|H\|_F` (the delta method, good where the error is small). One
    Hessian-vector product per sample, one after the other.

    Cost:
      `num_samples` Hessian-vector products over `batches`.

    Args:
      loss_fn: ``(params, batch) -> mean loss of the batch``, a scalar.
      params: where the Hessian is taken, any tree of floating-point arrays.
      batches: one batch, or a list or another re-iterable of many.
      num_samples: :math:`S`, >= 2.
      key: PRNG key, typed or raw, or an int seed.
      progress: whether many batches show a progress bar (needs the extra `progress`).
      fast_convolutions: whether convolutions are given the layout that is fast on a
        CPU, see `optax_flat.training.fast_convolutions`.

    Returns:
      `Estimate`, two scalars of at least float32.

    Raises:
      TypeError: `num_samples` not an int, a one-shot iterator, and as in `hvp`.
      ValueError: `num_samples` too small, and as in `hvp`.
      ImportError: the extra `flatness` is not installed.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import frobenius_norm
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> eigenvalues = jnp.array([3.0, -4.0])
      >>> found = frobenius_norm(
      ...     loss_fn, jnp.ones(2), eigenvalues, num_samples=2, key=0)
      >>> [float(x) for x in found]  # exact for a diagonal Hessian
      [5.0, 0.0]
    """
    num_samples = checks.integer("num_samples", num_samples, 2)
    lengths = _hessian.run(
        _of_signs, loss_fn, params, batches,
        key=key, settings=(num_samples, "length"), progress=progress,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    lengths, unit = scaled(lengths)
    square = estimate(lengths**2)
    value = jnp.sqrt(square.value)
    slope = jnp.where(value == 0.0, 0.0, 0.5 / jnp.where(value == 0.0, 1.0, value))
    return Estimate(unit * value, unit * slope * square.standard_error)


def _of_signs(hessian, key, num_samples, kind):
    """For random signs v: v'Hv or ||Hv||, [num_samples]."""
    stochtrace = extras.load("matfree.stochtrace", "flatness", "the trace")
    draw = stochtrace.sampler_signs(jnp.zeros(hessian.size, hessian.dtype), num=1)

    def one_sample(key):  # one vector at a time in memory
        signs = draw(key)[0]
        image = hessian.matvec(signs)
        return signs @ image if kind == "trace" else norm(image)

    return jax.lax.map(one_sample, jax.random.split(key, num_samples))
