"""A loss at many points of parameter space: draws of points, maps and loops over them.

A measure of a loss on one batch is one jitted program, compiled once for the same
`loss_fn`. On many batches, which are not all in memory, the evaluations are jitted and
the loop around them is Python's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, convolutions, noise, programs, trees
from optax_flat._core.batches import Batches, as_batches
from optax_flat.flatness._batches import (
    LossFn,
    check_deterministic,
    is_traced,
    mean_over,
)
from optax_flat.flatness.curvature import Estimate, estimate

LOOP_ARGUMENTS = ("batch_size", "fast_convolutions")  # those of `mapped`


def prepare(
    loss_fn: LossFn, params: optax.Params, batches: Any, *, one_pass: bool = False
) -> tuple[Batches, optax.Params]:
    """The batches, and the params in at least float32, both checked with the loss."""
    checks.float_params(params)
    found = as_batches(batches, one_pass=one_pass)
    w = trees.accumulator(params)
    check_deterministic(loss_fn, w, found)
    return found, w


def check_batch_size(value: Any) -> int | None:
    """How many points are evaluated at a time; None is all of them."""
    return None if value is None else checks.integer("batch_size", value, 1)


# On an Explicit mesh `like` tells the devices, so it is kept although nothing reads it.
@functools.partial(jax.jit, static_argnames="law", keep_unused=True)
def draw(key: jax.Array, like: Any, law: str) -> Any:
    """One random direction like a tree.

    Args:
      key: a typed key.
      like: a tree of floating-point arrays.
      law: "normal", N(0, I); "sphere", uniform on the unit sphere; or "box", uniform on
        [-1, 1] in every coordinate.

    Returns:
      A tree like `like`.
    """
    z = noise.draw(key, like, "normal")
    if law == "sphere":
        return optax.tree.scale(1.0 / trees.norm(z), z)
    if law == "box":
        return jax.tree.map(lambda z: 2.0 * jax.scipy.stats.norm.cdf(z) - 1.0, z)
    return z


def mapped(
    fn: Callable[[Any], Any],
    xs: Any,
    *,
    batch_size: int | None,
    fast_convolutions: bool,
) -> Any:
    """`fn` of each entry of the leading axis, `batch_size` at a time; None is all."""
    fn = convolutions.fast_if(fast_convolutions, fn)
    if batch_size is None:
        return jax.vmap(fn)(xs)
    return jax.lax.map(fn, xs, batch_size=batch_size)


@programs.jit("loss_fn")
def value(w: optax.Params, batch: Any, *, loss_fn: LossFn) -> Any:
    """The loss of a batch, in at least float32."""
    return trees.accumulator(loss_fn(w, batch))


@programs.jit("loss_fn")
def value_and_grad(
    w: optax.Params, batch: Any, *, loss_fn: LossFn
) -> tuple[jax.Array, optax.Params]:
    """The loss of a batch, in at least float32, and its gradient."""
    return jax.value_and_grad(lambda w: trees.accumulator(loss_fn(w, batch)))(w)


def in_one_program(
    fn: Callable[..., Any],
    w: optax.Params,
    batches: Batches,
    *args: Any,
    loss_fn: LossFn,
    **settings: Any,
) -> Any:
    """``fn(w, batches, *args, ...)``, jitted as a whole if there is one batch.

    `fn` must be a module's own function and the settings static, so that the program
    is found again.
    """
    if batches.many:
        return fn(w, batches, *args, loss_fn=loss_fn, **settings)
    return _jitted(
        w, batches.first, *args, loss_fn=loss_fn, fn=fn,
        settings=tuple(settings.items()),
    )  # fmt: skip


@programs.jit("loss_fn", static_argnames=("fn", "settings"))
def _jitted(w, batch, *args, loss_fn, fn, settings):
    # Not as_batches: the batch may be a list that was one of many.
    batches = Batches(False, batch, (batch,))
    return fn(w, batches, *args, loss_fn=loss_fn, **dict(settings))


def repeat(
    body: Callable[[Any, Any], Any],
    carry: Any,
    xs: Any,
    batches: Batches,
    *,
    fast_convolutions: bool,
) -> Any:
    """``carry = body(carry, x)`` for each x, which may be none.

    It is a `lax.scan` if there is one batch or the program is traced anyway.
    """
    length = len(jax.tree.leaves(xs)[0])
    if length and (not batches.many or is_traced(carry, batches.all)):
        body = convolutions.fast_if(fast_convolutions, body)
        return jax.lax.scan(lambda carry, x: (body(carry, x), None), carry, xs)[0]
    for i in range(length):
        carry = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry


def scale(w: optax.Params, adaptive: bool) -> optax.Params:
    """The unit of length of each weight: itself or 1."""
    return jax.tree.map(jnp.abs if adaptive else jnp.ones_like, w)


def average_rise(
    w: optax.Params,
    batches: Batches,
    size: float,
    key: Any,
    *,
    loss_fn: LossFn,
    num_samples: int,
    law: str,
    adaptive: bool,
    batch_size: int | None,
    fast_convolutions: bool,
) -> Estimate:
    """The mean of f(w + e) - f(w) over e of a law, times `size` and the scale.

    The rounding of f(w) is in every sample, so their spread does not show it; it is
    added to the standard error, as eps f(w).
    """
    num_samples = checks.integer("num_samples", num_samples, 2)
    keys = jax.random.split(checks.key(key), num_samples)
    rises = functools.partial(
        _rises, loss_fn=loss_fn, law=law, adaptive=adaptive, batch_size=batch_size,
        fast_convolutions=fast_convolutions,
    )  # fmt: skip
    samples, loss = mean_over(batches, rises, w, size, keys)
    found = estimate(samples)
    rounding = jnp.finfo(loss.dtype).eps * jnp.abs(loss)
    return found._replace(standard_error=jnp.hypot(found.standard_error, rounding))


@programs.jit("loss_fn", static_argnames=("law", "adaptive", *LOOP_ARGUMENTS))
def _rises(w, size, keys, batch, *, loss_fn, law, adaptive, **loop):
    """For each key the mean rise at w + e and w - e, [S]; and f(w), []."""
    unit = scale(w, adaptive)

    def loss(point) -> Any:
        return trees.accumulator(loss_fn(trees.cast_like(point, w), batch))

    def rise(key):
        e = jax.tree.map(lambda t, z: size * t * z, unit, draw(key, w, law))
        up, down = loss(optax.tree.add(w, e)), loss(optax.tree.sub(w, e))
        return ((up - loss_at_w) + (down - loss_at_w)) / 2

    loss_at_w = loss(w)
    return mapped(rise, keys, **loop), loss_at_w
