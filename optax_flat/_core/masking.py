"""Frozen leaves for methods that evaluate gradients themselves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat._core.functions import FUNCTIONS, translated


def masked(
    inner: optax.GradientTransformation,
    mask: Any | Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """Applies a transformation to some leaves and keeps the others bit-equal.

    `optax.masked` replaces the other leaves by placeholders, which a method in scanned
    mode would hand on to the user's loss. Here the frozen leaves are merged back before
    `grad_fn` (or `value_fn`, `output_fn`) sees the params, and only the selected
    gradients return.

    Unlike `optax.masked`, which passes the gradients of the other leaves through as
    updates, this one returns zeros for them: they stay where they are. To train them
    with another optimizer, use `optax.partition` and transparent mode.

    Cost:
      `inner`'s gradients per update; state: 0 copies of the params beside `inner`'s.

    Args:
      inner: the transformation for the selected leaves.
      mask: a tree of bools, or a prefix of one, True for the leaves to train; or a
        function that makes it from the params.

    Returns:
      A transformation whose state is an `optax.MaskedState`.

    Example:
      >>> import jax, jax.numpy as jnp, optax_flat
      >>> params = {"frozen": jnp.array(2.0), "trained": jnp.array(1.0)}
      >>> grad_fn = jax.grad(lambda p, batch: p["frozen"] * p["trained"] ** 2)
      >>> tx = optax_flat.masked(
      ...     optax_flat.entropy_sgd(1.0, num_steps=5, key=0),
      ...     {"frozen": False, "trained": True})
      >>> updates, _ = tx.update(grad_fn(params, 0), tx.init(params), params,
      ...                        grad_fn=grad_fn)
      >>> float(updates["frozen"]), bool(updates["trained"] < 0)
      (0.0, True)
    """
    inner = checks.transformation("inner", inner)

    def select(tree, like):
        flags = trees.mask_for(mask, like)
        return jax.tree.map(
            lambda flag, leaf: leaf if flag else optax.MaskedNode(), flags, tree
        )

    def init(params):
        return optax.MaskedState(inner.init(select(params, params)))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "`params` must be passed to `update` of optax_flat.masked, got None: "
                "the frozen leaves come from there."
            )

        def whole(point):
            return trees.map_selected(lambda s, _: s, point, params)

        arguments = translated(extra_args, whole, lambda grads: select(grads, params))
        for name in FUNCTIONS:
            if arguments.get(name) is not None:
                # Scanned methods refuse placeholders else.
                arguments[name].merges_frozen = True
        # A method without gradients is given none.
        grads: Any = None if updates is None else select(updates, params)
        selected, inner_state = inner.update(
            grads, state.inner_state, select(params, params), **arguments
        )
        frozen = jax.tree.map(jnp.zeros_like, params)
        return (
            trees.map_selected(lambda s, _: s, selected, frozen),
            optax.MaskedState(inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)
