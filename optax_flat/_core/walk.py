"""A walk: a method that asks for several gradients per update, written as data.

Entropy-SGD, the sharpness-aware family and multi-point Nesterov all visit a few points
around the params, ask for a gradient at each, and then make one update. What differs is
where they go and what they keep. A `Walk` says just that, once; `scanned` and
`transparent` (see `optax_flat._core.modes`) turn it into gradient transformations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax


class Walk(NamedTuple):
    """A method that consumes several gradients per outer update.

    The calls of one outer update are::

        inner = walk.start(memory, params)
        repeat walk.length times:
            inner = walk.step(memory, inner, gradient at inner.point)
            inner = walk.move(memory, inner), but for the last gradient
        updates, memory = walk.finish(memory, inner, params)

    Attributes:
      length: gradients per outer update; a static int >= 1.
      init: `params -> memory`. The memory lives between outer updates: a count, a PRNG
        key, the state of the outer optimizer. It is constant during a walk.
      start: `(memory, params) -> inner`. The state within one outer update, a
        NamedTuple with a field `point`: where the next gradient is wanted. The first
        point must be `params`.
      step: `(memory, inner, grads) -> inner`. Consumes one gradient, and may move the
        point.
      finish: `(memory, inner, params) -> (updates, memory)`. Updates are added to
        `params`, which then stand on the first point of the next walk.
      ends: `(memory, inner) -> bool []`, asked after each gradient but the last:
        whether the walk needs no more of them this time. None is never. What is not
        needed is not computed in scanned mode, and not asked for in transparent mode.
      move: `(memory, inner) -> inner`. Moves the point where another gradient follows:
        the place for what only that one needs. None is nothing: `step` has done it.

    `step` and `finish` may take ``**extra_args`` as well: what the caller gave to
    `update` beside our own arguments (`value`, `grad`, `value_fn`, ...), for an
    optimizer inside that wants it.

    A method whose first point is not its *anchor* (the params to evaluate and to save)
    gives its memory a field `offset`, a tree like the params: anchor minus first point
    of the next walk. `eval_params` reads it. One whose gradients all belong to one
    minibatch gives it a class attribute ``one_minibatch = True``, which
    `make_train_step` reads. What is for logs stands in another, see `metrics`.

    Example:
      Gradient descent with the mean of three gradients, each taken one small step
      further than the last:

      >>> import jax, jax.numpy as jnp, optax
      >>> from typing import NamedTuple
      >>> from optax_flat import Walk, scanned
      >>> class Inner(NamedTuple):
      ...     point: optax.Params
      ...     total: optax.Updates
      >>> walk = Walk(
      ...     length=3,
      ...     init=lambda params: (),
      ...     start=lambda memory, params: Inner(params, optax.tree.zeros_like(params)),
      ...     step=lambda memory, inner, grads: Inner(
      ...         inner.point - 0.1 * grads, inner.total + grads),
      ...     finish=lambda memory, inner, params: (-0.1 * inner.total / 3, memory),
      ... )
      >>> tx = scanned(walk)
      >>> params = jnp.array([3.0, -1.0])
      >>> grad_fn = jax.grad(lambda p, batch: jnp.sum((p - 1.0) ** 2) / 2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(
      ...     grad_fn(params, 0), state, params, grad_fn=grad_fn)
      >>> bool(jnp.allclose(updates, -0.1 * (params - 1) * (1 + 0.9 + 0.81) / 3))
      True
    """

    length: int
    init: Callable[[optax.Params], Any]
    start: Callable[[Any, optax.Params], Any]
    step: Callable[[Any, Any, optax.Updates], Any]
    finish: Callable[[Any, Any, optax.Params], tuple[optax.Updates, Any]]
    ends: Callable[[Any, Any], jax.Array] | None = None
    move: Callable[[Any, Any], Any] | None = None
