r"""The classic rules that no Optax expression gives exactly.

    adagrad    G <- G + g^2;                     x <- x - learning_rate g / (G^p + eps)
    adadelta   E <- d E + (1 - d) g^2;           s = sqrt((X + eps) / (E + eps)) g
               X <- d X + (1 - d) s^2;           x <- x - learning_rate s
    clip       g <- g min(1, max_norm / ||g||)   for each array on its own

Adagrad's eps may stand outside the root, its accumulator start anywhere and be raised
to any power; Adadelta's accumulator of updates, X, may start above zero. All else of
numpy-ml and of the article "Neural network optimization methods" (Habr) is an Optax
expression, listed in the documentation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat._core.arguments import factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at


class AdagradState(NamedTuple):
    """State of `adagrad`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    nu: optax.Updates  # G, sum of squared gradients, at least float32


class AdadeltaState(NamedTuple):
    """State of `adadelta`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    nu: optax.Updates  # E, mean of squared gradients, at least float32
    squared_updates: optax.Updates  # X, mean of squared steps, at least float32


class ClipByLeafNormState(NamedTuple):
    """State of `clip_by_leaf_norm`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made


@factory
def adagrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: optax.ScalarOrSchedule = 1e-7,
    eps_in_sqrt: bool = False,
    initial_accumulator_value: float = 0.0,
    power: optax.ScalarOrSchedule = 0.5,
) -> optax.GradientTransformationExtraArgs:
    r"""Adagrad, with eps outside or inside the root, and its family.

    .. math::
        \begin{align*}
        G &\leftarrow G + g^2 \\
        x &\leftarrow x - \eta\, g / (G^p + \varepsilon)
            \quad \text{or} \quad x - \eta\, g / (G + \varepsilon)^p
        \end{align*}

    with :math:`\eta` = `learning_rate`, p = `power`, :math:`\varepsilon` = `eps`, and
    G starting at `initial_accumulator_value`. The usual rule has p = 1/2. With p = 0,
    eps = 0 it is gradient descent; the larger p, the sooner steps shrink. A coordinate
    without any gradient yet does not move.

    Cost:
      1 gradient per update; state: 1 copy of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      eps: >= 0.
      eps_in_sqrt: whether eps is added to G, not to its root.
      initial_accumulator_value: G at the start, >= 0.
      power: p, >= 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      The first step does not depend on the size of the gradient:

      >>> import jax.numpy as jnp, optax_flat
      >>> tx = optax_flat.adagrad(0.1)
      >>> x = jnp.zeros(2)
      >>> updates, _ = tx.update(jnp.array([3.0, -400.0]), tx.init(x), x)
      >>> bool(jnp.allclose(updates, jnp.array([-0.1, 0.1])))
      True

    References:
      Duchi, Hazan and Singer, `Adaptive Subgradient Methods for Online Learning and
      Stochastic Optimization <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.

    Differs from the paper:
      The paper has p = 1/2 and the eps outside. numpy-ml's ``AdaGrad(lr, eps)`` is
      ``adagrad(lr, eps=eps)``. `optax.adagrad`, whose accumulator starts at 0.1, is
      ``adagrad(lr, eps=eps, eps_in_sqrt=True, initial_accumulator_value=0.1)``.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("eps", eps, 0.0)
    initial = checks.start_value(
        "initial_accumulator_value", initial_accumulator_value, 0.0
    )
    checks.number("power", power, 0.0)

    def init(x):
        return AdagradState(jnp.zeros([], jnp.int32), _filled(x, initial))

    def step(state, grads, x, **extra_args):
        del x, extra_args
        eps_t, p = at(eps, state.count), at(power, state.count)
        nu = jax.tree.map(lambda G, g: G + g * g, state.nu, grads)

        def scaled(g, G):
            root = (G + eps_t) ** p if eps_in_sqrt else G**p + eps_t
            # Without any gradient so far, and eps = 0, this would be 0 / 0.
            return jnp.where(root > 0, g / jnp.where(root > 0, root, 1.0), 0.0)

        rate = at(learning_rate, state.count)
        steps = jax.tree.map(lambda g, G: -rate * scaled(g, G), grads, nu)
        return steps, AdagradState(counted(state.count), nu)

    return by_gradient(init, step)


@factory
def adadelta(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    decay: optax.ScalarOrSchedule = 0.9,
    eps: optax.ScalarOrSchedule = 1e-6,
    initial_update: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adadelta whose accumulator of updates may start above zero.

    .. math::
        \begin{align*}
        E &\leftarrow \rho E + (1 - \rho) g^2, &
        s &= \sqrt{\frac{X + \varepsilon}{E + \varepsilon}}\, g \\
        X &\leftarrow \rho X + (1 - \rho) s^2, & x &\leftarrow x - \eta s
        \end{align*}

    with :math:`\eta` = `learning_rate`, :math:`\rho` = `decay`, :math:`\varepsilon` =
    `eps`, E starting at 0 and X at `initial_update`. From X = 0 the first steps have
    the size :math:`\varepsilon^{1/2}`, and a coordinate with rare gradients takes long
    to be trusted; a large X moves it strongly and early, as Adagrad does.

    Cost:
      1 gradient per update; state: 2 copies of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      decay: :math:`\rho`, in [0, 1).
      eps: > 0.
      initial_update: X at the start, >= 0, the square of a step.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      A big start makes the first step big:

      >>> import jax.numpy as jnp, optax_flat
      >>> x, g = jnp.zeros(1), jnp.ones(1)
      >>> def first(initial_update):
      ...     tx = optax_flat.adadelta(initial_update=initial_update)
      ...     return float(-tx.update(g, tx.init(x), x)[0][0])
      >>> first(0.0) < 0.01, first(50.0) > 10.0
      (True, True)

    References:
      Zeiler, `ADADELTA: An Adaptive Learning Rate Method
      <https://arxiv.org/abs/1212.5701>`_, 2012. "Neural network optimization methods",
      Habr (in Russian), for the big start.

    Differs from the paper:
      The paper's X starts at 0 and its learning rate is 1. The article's script calls
      the start of X `lr`.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("decay", decay, 0.0, 1.0, open_high=True)
    checks.number("eps", eps, 0.0, open_low=True)
    initial_update = checks.start_value("initial_update", initial_update, 0.0)

    def init(x):
        nu, squared_updates = _filled(x, 0.0), _filled(x, initial_update)
        return AdadeltaState(jnp.zeros([], jnp.int32), nu, squared_updates)

    def step(state, grads, x, **extra_args):
        del x, extra_args
        rho, eps_t = at(decay, state.count), at(eps, state.count)

        def average(old, new):
            mixed = jax.tree.map(lambda o, n: rho * o + (1 - rho) * n * n, old, new)
            return trees.cast_like(mixed, old)

        nu = average(state.nu, grads)

        def scaled(X, E, g):
            square = E + eps_t  # 0 where eps underflows and there was no gradient
            ratio = (X + eps_t) / jnp.where(square > 0, square, 1.0)
            return jnp.sqrt(jnp.where(square > 0, ratio, 0.0)) * g

        steps = jax.tree.map(scaled, state.squared_updates, nu, grads)
        squared = average(state.squared_updates, steps)
        steps = optax.tree.scale(-at(learning_rate, state.count), steps)
        return steps, AdadeltaState(counted(state.count), nu, squared)

    return by_gradient(init, step)


@factory
def clip_by_leaf_norm(
    max_norm: optax.ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Clips the gradient of each array to a Euclidean norm of its own.

    .. math::
        g \leftarrow g \min(1, c / \|g\|)

    with c = `max_norm`, for every leaf alone. `optax.clip_by_global_norm` takes the
    norm over the whole tree, `optax.clip_by_block_rms` the root mean square of a leaf.

    Cost:
      1 gradient per update; state: 0 copies of the params.

    Args:
      max_norm: c, >= 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: `max_norm` negative.
      TypeError: `max_norm` of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax_flat
      >>> tx = optax_flat.clip_by_leaf_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([0.5])}
      >>> clipped, _ = tx.update(grads, tx.init(grads))
      >>> bool(jnp.allclose(clipped["w"], jnp.array([0.6, 0.8])))
      True
      >>> float(clipped["b"][0])
      0.5

    References:
      Pascanu, Mikolov and Bengio, `On the difficulty of training Recurrent Neural
      Networks <https://arxiv.org/abs/1211.5063>`_, 2013.

    Differs from the paper:
      The paper clips the norm over all parameters. This is the `clip_norm` of numpy-ml.
    """
    checks.number("max_norm", max_norm, 0.0)

    def init(x):
        del x
        return ClipByLeafNormState(jnp.zeros([], jnp.int32))

    def step(state, grads, x, **extra_args):
        del x, extra_args
        bound = at(max_norm, state.count)

        def clip(g):
            peak = jnp.max(jnp.abs(g), initial=0.0)  # its square may overflow
            peak = jnp.where(peak > 0, peak, 1.0)
            norm = peak * trees.norm(g / peak)
            too_long = norm > bound  # so a norm of 0 never divides
            factor = jnp.where(too_long, bound / jnp.where(too_long, norm, 1.0), 1.0)
            return g * factor

        return jax.tree.map(clip, grads), ClipByLeafNormState(counted(state.count))

    return by_gradient(init, step)


def _filled(x, value):
    """A tree like the params, in the accumulators' dtype, full of one value."""
    zeros = optax.tree.zeros_like(x)
    return jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), zeros)
