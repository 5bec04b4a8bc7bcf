"""The Hessian of a mean loss as a matrix-vector product, and how programs run on it.

One batch: the whole program is compiled, products and all. Many batches: its loops run
in Python, and each product goes through the batches, each by a compiled function.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree

from optax_flat._core import checks, extras, trees
from optax_flat.flatness import _batches


class Hessian(NamedTuple):
    """The Hessian as programs see it; n is the number of parameters."""

    matvec: Callable[[jax.Array], jax.Array]  # [n] -> [n]
    size: int  # n
    dtype: Any  # at least float32
    unravel: Callable[[jax.Array], Any]  # [n] -> tree like params


@functools.partial(jax.jit, static_argnames="loss_fn")
def product(loss_fn, params, vector, batch):
    """The Hessian on one batch times a vector: forward over reverse."""
    grad = jax.grad(loss_fn)
    return jax.jvp(lambda p: grad(p, batch), (params,), (vector,))[1]


def run(
    program: Callable[..., Any],
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    key: Any,
    settings: tuple[Any, ...],
    progress: bool = False,
) -> Any:
    """``program(hessian, key, *settings)``, with checked arguments.

    The program is a function of the module, for the sake of the cache of `jit`, and
    uses loops of `jax.lax` only. Its settings are hashable.
    """
    checks.float_params(params)
    key = checks.key(key)
    params = trees.accumulator(params)
    batches = _batches.as_batches(batches)
    _batches.check_deterministic(loss_fn, params, batches)
    if not batches.many:
        return _compiled(
            program, loss_fn, settings, params=params, batch=batches.first, key=key
        )
    hessian = _hessian(loss_fn, params, batches)
    if _batches.is_traced(params, batches.first, key):
        return _call(program, hessian, key, settings)  # in the caller's program
    with _counter(progress) as count, jax.disable_jit():
        return _call(program, _in_python(hessian, count), key, settings)


def _hessian(loss_fn, params, batches) -> Hessian:
    flat, unravel = ravel_pytree(params)
    users = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]

    def matvec(vector):
        one_batch = functools.partial(product, loss_fn, params, unravel(vector))
        with jax.default_matmul_precision(users):
            return ravel_pytree(_batches.mean_over(batches, one_batch))[0]

    return Hessian(matvec, flat.size, flat.dtype, unravel)


@functools.partial(jax.jit, static_argnames=("program", "loss_fn", "settings"))
def _compiled(program, loss_fn, settings, *, params, batch, key):
    hessian = _hessian(loss_fn, params, _batches.Batches(False, batch, (batch,)))
    return _call(program, hessian, key, settings)


def _call(program, hessian, key, settings):
    # A GPU may round products of float32 matrices to ten bits, too few to keep
    # vectors orthogonal. The loss keeps the user's setting.
    with jax.default_matmul_precision("highest"):
        return program(hessian, key, *settings)


# Matfree traces the product before its loop starts. As a primitive the product stays
# one opaque step there, and runs only when the loop, in Python, comes to it.
_step = Primitive("hessian_vector_product")
_step.def_impl(lambda vector, *, call: call(vector))
_step.def_abstract_eval(lambda vector, *, call: vector)


def _in_python(hessian: Hessian, count: Callable[[], Any]) -> Hessian:
    def call(vector):
        with jax.disable_jit(False):
            result = hessian.matvec(vector)
        count()
        return result

    return hessian._replace(matvec=lambda vector: _step.bind(vector, call=call))


@contextlib.contextmanager
def _counter(progress: bool):
    """Counts products on a progress bar, or nowhere."""
    if not progress:
        yield lambda: None
        return
    tqdm = extras.load("tqdm.auto", "progress", "progress=True").tqdm
    with tqdm(unit="product", desc="Hessian") as bar:
        yield bar.update
