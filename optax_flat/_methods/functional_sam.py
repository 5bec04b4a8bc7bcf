r"""Functional SAM: the perturbation moves the model, not what the loss asks of it.

    u = grad of the loss at the outputs of w
    w <- outer optimizer(J(w + rho a(g))' u),    g = J(w)' u the gradient

with J the Jacobian of the outputs. SAM takes the loss' gradient at the perturbed
outputs instead, and so in part just learns to lower the logits.

Paper: Singh et al., arXiv 2502.02407.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat import ascent as rules
from optax_flat._core import checks, ensembles, layout, trees
from optax_flat._core.arguments import factory
from optax_flat._core.hyperparams import at


class FunctionalSAMState(NamedTuple):
    """State of `functional_sam`."""

    metrics = ("count", "gradient_evaluations", "forward_passes")

    count: jax.Array  # int32, [], updates made
    gradient_evaluations: jax.Array  # int32, [], passes backward so far
    forward_passes: jax.Array  # int32, [], evaluations of the outputs so far
    outer_state: optax.OptState
    ascent_state: Any


@factory
def functional_sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    ascent: optax.GradientTransformation | None = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Functional SAM: SAM with the loss' derivative of the clean outputs.

    .. math::
        u = \nabla \Phi(G(w)), \qquad
        w \leftarrow \mathrm{Outer}\left(J_G\!\left(w + \rho \frac{g}{\|g\|}\right)^\top
        u\right), \qquad g = J_G(w)^\top u

    with G the outputs of the model and :math:`\Phi` the loss of the outputs. It needs
    the model in these two parts, and computes both gradients itself::

        update(None, state, params, *, output_fn, loss_fn)

    `make_train_step` with `output_fn` does so. Gradients that are passed in are
    ignored.

    Cost:
      2 gradients per update; state: 0 copies of the params beside `outer`'s.

    Args:
      outer: an Optax optimizer.
      rho: the radius, >= 0; 0 is `outer`.
      ascent: see `sam`; None is `ascent.unit()`.
      accumulator_dtype: dtype of what is kept and added up; None is at least float32.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or, in `update`, no
        `output_fn` or `loss_fn`.
      TypeError: an argument of the wrong type.

    Example:
      For outputs that are linear in the params it is the outer optimizer:

      >>> import jax.numpy as jnp, optax, optax_flat
      >>> A, y = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> parts = {"output_fn": lambda x: A @ x,
      ...          "loss_fn": lambda z: jnp.sum((z - y) ** 2) / 2}
      >>> tx, x = optax_flat.functional_sam(optax.sgd(1.0), rho=9.0), jnp.ones(2)
      >>> updates, _ = tx.update(None, tx.init(x), x, **parts)
      >>> bool(jnp.allclose(updates, -A.T @ (A @ x - y)))
      True

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, 2025.

    Differs from the paper:
      Nothing known.
    """
    outer = checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    checks.float_dtype("accumulator_dtype", accumulator_dtype)
    ascent = checks.transformation("ascent", rules.unit() if ascent is None else ascent)

    def init(params):
        checks.float_params(params)
        params = trees.concrete(params)
        w = trees.accumulator(trees.finite(params), accumulator_dtype)
        zero = jnp.zeros([], jnp.int32)
        state = FunctionalSAMState(zero, zero, zero, outer.init(w), ascent.init(w))
        return trees.copy(state, params)

    def update(
        updates,
        state,
        params: Any = None,
        *,
        output_fn: Any = None,
        loss_fn: Any = None,
        **extra_args,
    ):
        del updates
        checks.float_params(params)
        ensembles.check_functions(params, output_fn=output_fn, loss_fn=loss_fn)
        layout.check(init, state, params)
        w = trees.accumulator(trees.finite(params), accumulator_dtype)
        outputs, transpose = jax.vjp(output_fn, params)
        wanted = trees.cast_like(jax.grad(loss_fn)(outputs), outputs)
        grads = trees.where_finite(params, trees.cast_like(transpose(wanted)[0], w))
        a, ascent_state = ascent.update(grads, state.ascent_state, w)
        radius = at(rho, state.count)
        there = jax.tree.map(lambda w, a: w + radius * a, w, a)
        there = trees.where_finite(params, trees.cast_like(there, params), params)
        _, transpose = jax.vjp(output_fn, there)
        grads = trees.where_finite(params, trees.cast_like(transpose(wanted)[0], w))
        steps, outer_state = outer.update(grads, state.outer_state, w, **extra_args)
        after = FunctionalSAMState(
            jnp.asarray(optax.safe_increment(state.count)),
            trees.saturating_add(state.gradient_evaluations, 2),
            trees.saturating_add(state.forward_passes, 2),
            outer_state,
            ascent_state,
        )
        steps = trees.where_finite(params, steps)
        return trees.cast_like(steps, params), trees.cast_like(after, state)

    return optax.GradientTransformationExtraArgs(init, update)
