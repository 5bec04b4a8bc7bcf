r"""Gradients estimated by perturbing the params: forward passes only.

    dW_k = spread z_k,  k = 1 .. K,        z_k fresh, of mean 0 and variance 1
    c_k  = < G(W + dW_k) - G(W), grad Phi(G(W)) >
    g    = (1 / K) sum_k c_k dW_k / spread^2

G gives the outputs of the model and Phi is the loss of the outputs, which alone is
differentiated: c_k is the directional derivative of the loss to first order, and E[g]
its gradient where G is linear over the size of the perturbations.

This is what the thesis "Ensemble Kalman filter for neural networks" calls a simplified
iterative ensemble Kalman filter. Code: diepi/Ensemble-Kalman-for-Neural-Network.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, ensembles, keys, layout, trees
from optax_flat._core.arguments import factory
from optax_flat._core.noise import KINDS, draw


class PerturbationGradientState(NamedTuple):
    """State of `perturbation_gradient`."""

    metrics = ("count", "forward_passes", "replaced")

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    forward_passes: jax.Array  # int32, [], evaluations of the outputs so far
    replaced: jax.Array  # int32, [], perturbations that gave NaN or infinity so far
    outer_state: optax.OptState


def perturbed_sum(
    output_fn: Callable[[optax.Params], Any],
    loss_fn: Callable[[Any], jax.Array],
    params: optax.Params,
    perturbations: optax.Params,
    *,
    antithetic: bool = False,
) -> tuple[optax.Params, jax.Array]:
    r"""The sum of given perturbations, each times its directional derivative.

    .. math::
        s = \sum_k c_k \, \Delta_k, \qquad
        c_k = \langle G(x + \Delta_k) - G(x), \nabla \Phi(G(x)) \rangle

    Args:
      output_fn: G, ``params -> outputs``.
      loss_fn: :math:`\Phi`, ``outputs -> loss``.
      params: x.
      perturbations: :math:`\Delta_k`, every leaf with a leading axis K.
      antithetic: whether c_k is half the difference between x + and x - the
        perturbation, in which terms of second order cancel.

    Returns:
      The sum, like the params, and the coefficients c [K].

    Example:
      On a linear model the coefficients are the directional derivatives:

      >>> import jax, jax.numpy as jnp
      >>> from optax_flat import perturbed_sum
      >>> A, y = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.array([1.0, -1.0])
      >>> output_fn = lambda x: A @ x
      >>> loss_fn = lambda z: jnp.sum((z - y) ** 2) / 2
      >>> x, directions = jnp.array([0.5, 0.5]), jnp.eye(2)
      >>> gradient, coefficients = perturbed_sum(output_fn, loss_fn, x, directions)
      >>> bool(jnp.allclose(gradient, A.T @ (A @ x - y)))
      True
    """
    outputs, output_grads = _outputs(output_fn, loss_fn, params)

    def coefficient(perturbation):
        difference = _difference(output_fn, params, perturbation, outputs, antithetic)
        return trees.vdot(difference, output_grads)

    c = jax.vmap(coefficient)(perturbations)
    total = jax.tree.map(lambda d: jnp.tensordot(c, d, axes=1), perturbations)
    return total, c


@factory
def perturbation_gradient(
    outer: optax.GradientTransformation,
    *,
    ensemble_size: int,
    spread: Any,
    noise_kind: str = "rademacher",
    antithetic: bool = False,
    batch_size: int | None = None,
    fast_convolutions: bool = True,
    key: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds a gradient estimated from forward passes to any Optax optimizer.

    .. math::
        g = \frac{1}{K} \sum_{k=1}^K c_k \frac{z_k}{s}, \qquad
        c_k = \langle G(x + s z_k) - G(x), \nabla \Phi(G(x)) \rangle

    with K = `ensemble_size`, s = `spread` and fresh draws z_k at every update. The
    model is only run forward, so it need not be differentiable, and not even
    continuous: what is followed is the derivative of G smoothed over the size of the
    perturbations, times :math:`\nabla \Phi` at its unperturbed outputs::

        update(None, state, params, *, output_fn, loss_fn)

    `output_fn(params)` gives the outputs on the current minibatch, `loss_fn(outputs)`
    the loss. Gradients that are passed in are ignored. No gradient evaluations, K + 1
    forward passes per update (2 K + 1 if antithetic), which the state counts.

    The variance of the estimate is that of a random projection: of P parameters it sees
    K directions, so its relative error is about (P / K)^(1/2), whatever the spread and
    the size of the minibatch.

    Cost:
      `ensemble_size + 1` forward passes per update; state: 0 copies of the params
      beside `outer`'s.

    Args:
      outer: an Optax optimizer, e.g. ``optax.adam(1e-3)``.
      ensemble_size: K, perturbations per update, >= 1.
      spread: s, the standard deviation of the perturbations: a float > 0, or a tree of
        floats like the params (or a prefix of it). With bfloat16 params it must be well
        above their spacing, 1/128 of a weight or less, or rounding eats it.
      noise_kind: "rademacher" (independent signs) or "normal".
      antithetic: whether each perturbation is evaluated in both directions, in which
        terms of second order cancel.
      batch_size: how many perturbed models are evaluated at a time; None is all of
        them. It must divide `ensemble_size` and bounds the memory.
      fast_convolutions: whether convolutions of the model are given the layout that is
        fast on a CPU, see `optax_flat.training.fast_convolutions`. Other platforms are
        never affected.
      key: a typed or raw PRNG key, or an int.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or, in `update`, no
        `output_fn` or `loss_fn`.
      TypeError: an argument of the wrong type, or a loss that is no number.

    Example:
      A model that cannot be differentiated, because it has signs inside:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> y = jnp.sign(x @ jnp.array([1.0, -2.0, 0.5]))
      >>> def output_fn(params):
      ...     return jnp.sign(x @ params["w"]) @ params["v"]
      >>> def loss_fn(outputs):
      ...     return jnp.mean((outputs - y) ** 2)
      >>> params = {"w": jax.random.normal(jax.random.key(1), (3, 16)),
      ...           "v": jnp.zeros(16)}
      >>> tx = optax_flat.perturbation_gradient(
      ...     optax.adam(0.03), ensemble_size=64, spread=0.2, key=0)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(
      ...         None, state, params, output_fn=output_fn, loss_fn=loss_fn)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(200):
      ...     params, state = step(params, state)
      >>> bool(jnp.mean(jnp.sign(output_fn(params)) == y) > 0.9)
      True

    References:
      The code `diepi/Ensemble-Kalman-for-Neural-Network
      <https://github.com/diepi/Ensemble-Kalman-for-Neural-Network>`_. Spall,
      Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient
      Approximation, IEEE Transactions on Automatic Control 37, 1992.

    Differs from the paper:
      The thesis' code takes one training sample at a time, steps by lr times the plain
      sum of c_k s z_k, and draws normal perturbations with
      :math:`s^2 = 2 / (\text{fan}_{in} + \text{fan}_{out})`: our SGD with the learning
      rate :math:`lr\,K s^2`, leaf by leaf, see `perturbed_sum`. A perturbation whose
      outputs are not finite is left out and counted; if none is left nothing moves.
    """
    outer = checks.transformation("outer", outer)
    ensemble_size = checks.integer("ensemble_size", ensemble_size, 1)
    batch_size = checks.chunk("batch_size", batch_size, ensemble_size)
    checks.choice("noise_kind", noise_kind, KINDS)
    antithetic = checks.flag("antithetic", antithetic)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    ensembles.check_spread(spread)
    key = checks.key(key)

    def init(params):
        checks.float_params(params)
        params = trees.concrete(params)
        ensembles.deviations_like(spread, params)
        zero = jnp.zeros([], jnp.int32)
        outer_state = outer.init(trees.accumulator(trees.finite(params)))
        data = keys.data(key)
        state = PerturbationGradientState(zero, data, zero, zero, outer_state)
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
        x = trees.accumulator(trees.finite(params))
        s = ensembles.deviations_like(spread, x)
        update_key = keys.fold_in(state.key, state.count, key)
        evaluated = ensembles.in_dtype_of(output_fn, params, fast_convolutions)
        outputs, output_grads = _outputs(evaluated, loss_fn, x)

        def term(member):
            z = draw(jax.random.fold_in(update_key, member), x, noise_kind)
            perturbation = jax.tree.map(jnp.multiply, s, z)
            difference = _difference(evaluated, x, perturbation, outputs, antithetic)
            c = trees.vdot(difference, output_grads)
            finite = jnp.isfinite(c)
            return jnp.where(finite, c, 0.0), finite, z

        def chunk(carry, members):
            total, healthy = carry
            c, finite, z = jax.vmap(term)(members)
            total = jax.tree.map(
                lambda t, z: (t + jnp.tensordot(c, z, axes=1)).astype(t.dtype), total, z
            )
            return (total, healthy + jnp.sum(finite, dtype=jnp.int32)), None

        members = jnp.arange(ensemble_size).reshape(-1, batch_size)
        start = (optax.tree.zeros_like(x), jnp.zeros([], jnp.int32))
        (total, healthy), _ = jax.lax.scan(chunk, start, members)
        count = jnp.maximum(healthy, 1)
        g = jax.tree.map(lambda t, s: t / (s * count.astype(t.dtype)), total, s)
        g = trees.cast_like(g, x)

        def move(g, outer_state, x):
            steps, outer_state = outer.update(g, outer_state, x, **extra_args)
            return trees.cast_like((steps, outer_state), (x, state.outer_state))

        def stay(g, outer_state, x):
            return optax.tree.zeros_like(x), outer_state

        # Without any estimate an outer momentum would go on by itself.
        steps, outer_state = jax.lax.cond(
            healthy > 0, move, stay, g, state.outer_state, x
        )
        passes = ensemble_size * (1 + antithetic) + 1
        steps = trees.where_finite(params, steps)
        return trees.cast_like(steps, params), PerturbationGradientState(
            jnp.asarray(optax.safe_increment(state.count)),
            state.key,
            trees.saturating_add(state.forward_passes, passes),
            trees.saturating_add(state.replaced, ensemble_size - healthy),
            outer_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _outputs(output_fn, loss_fn, params):
    outputs = ensembles.wide(output_fn(params))
    return outputs, ensembles.slopes(loss_fn, outputs)


def _difference(output_fn, params, perturbation, outputs, antithetic):
    """What a perturbation changes in the outputs."""
    ahead = ensembles.wide(output_fn(optax.tree.add(params, perturbation)))
    if not antithetic:
        return optax.tree.sub(ahead, outputs)
    behind = ensembles.wide(output_fn(optax.tree.sub(params, perturbation)))
    return optax.tree.scale(0.5, optax.tree.sub(ahead, behind))
