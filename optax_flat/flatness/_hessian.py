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
from jax.flatten_util import ravel_pytree

from optax_flat._core import checks, convolutions, programs, trees
from optax_flat._core.batches import Batches, as_batches
from optax_flat.flatness import _batches, _progress


class Hessian(NamedTuple):
    """The Hessian as programs see it; n is the number of parameters."""

    matvec: Callable[[jax.Array], jax.Array]  # [n] -> [n]
    size: int  # n
    dtype: Any  # at least float32
    unravel: Callable[[jax.Array], Any]  # [n] -> tree like params


@programs.jit("loss_fn", static_argnames=("fast_convolutions",))
def product(params, vector, batch, *, loss_fn, fast_convolutions):
    """The Hessian on one batch times a vector: forward over reverse."""
    grad = jax.grad(loss_fn)

    def times(params, vector, batch):
        return jax.jvp(lambda p: grad(p, batch), (params,), (vector,))[1]

    return convolutions.fast_if(fast_convolutions, times)(params, vector, batch)


def run(
    program: Callable[..., Any],
    loss_fn: _batches.LossFn,
    params: optax.Params,
    batches: Any,
    *,
    key: Any,
    settings: tuple[Any, ...],
    progress: bool = False,
    fast_convolutions: bool = True,
) -> Any:
    """``program(hessian, key, *settings)``, with checked arguments.

    The program is a function of the module, for the sake of the cache of `jit`, and
    uses loops of `jax.lax` only. Its settings are hashable.
    """
    checks.float_params(params)
    key = checks.key(key)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    params = trees.accumulator(params)
    batches = as_batches(batches)
    _batches.check_deterministic(loss_fn, params, batches)
    if not batches.many:
        return _compiled(
            params, batches.first, key, loss_fn=loss_fn, program=program,
            settings=settings, fast_convolutions=fast_convolutions,
        )  # fmt: skip
    hessian = _hessian(loss_fn, fast_convolutions, params, batches)
    if _batches.is_traced(params, batches.first, batches.all, key):
        return _call(program, hessian, key, settings)  # in the caller's program
    with _progress.counter(progress, unit="product", desc="Hessian") as count:

        def matvec(vector):
            with jax.disable_jit(False):
                result = hessian.matvec(vector)
            count(1, result)
            return result

        with _mesh_of(params, batches.first), jax.disable_jit():
            return _call(program, hessian._replace(matvec=matvec), key, settings)


def _hessian(loss_fn, fast_convolutions, params, batches) -> Hessian:
    # On an Explicit mesh a vector of all parameters is whole on every device.
    flat, unraveled = ravel_pytree(trees.replicated(params))
    users = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]

    def unravel(vector):
        return jax.tree.map(_placed_like, unraveled(vector), params)

    def matvec(vector):
        one_batch = functools.partial(
            product, loss_fn=loss_fn, fast_convolutions=fast_convolutions
        )
        with jax.default_matmul_precision(users):
            mean = _batches.mean_over(batches, one_batch, params, unravel(vector))
            return ravel_pytree(trees.replicated(mean))[0]

    return Hessian(matvec, flat.size, flat.dtype, unravel)


def _mesh_of(*trees_of_arrays):
    """A context of the Explicit mesh that arrays lie on; operations alone want one."""
    for leaf in jax.tree.leaves(trees_of_arrays):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types:
            return jax.set_mesh(mesh)
    return contextlib.nullcontext()


def _placed_like(leaf, partner):
    there = jax.typeof(partner).sharding
    return jax.sharding.reshard(leaf, there) if any(there.spec) else leaf


@programs.jit("loss_fn", static_argnames=("program", "settings", "fast_convolutions"))
def _compiled(params, batch, key, *, loss_fn, program, settings, fast_convolutions):
    batches = Batches(False, batch, (batch,))
    hessian = _hessian(loss_fn, fast_convolutions, params, batches)
    return _call(program, hessian, key, settings)


def _call(program, hessian, key, settings):
    # A GPU may round products of float32 matrices to ten bits, too few to keep
    # vectors orthogonal. The loss keeps the user's setting.
    with jax.default_matmul_precision("highest"):
        return program(hessian, key, *settings)
