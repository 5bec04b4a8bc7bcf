r"""What the sharpness-aware methods make of their two gradients.

With g the gradient at the params and g_r the one at the perturbed point, a rule gives
what the outer optimizer takes for a gradient:

    tx = optax_flat.sam(optax.adam(1e-3), descent=optax_flat.descent.surrogate_gap(0.4))

Any rule goes with any rule of `optax_flat.ascent`. A rule may also say that an update
can do without g_r (`reuse`, `when_large`): then neither it nor the perturbation is
computed, and a rule of ascent with a state does not see that update's g.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, trees
from optax_flat._core.hyperparams import at


class Gradients(NamedTuple):
    """What a rule is given; trees in at least float32."""

    first: Any  # g; None for a rule that has no use for it
    second: optax.Updates  # g_r


class Combined(NamedTuple):
    """What a rule returns."""

    gradient: optax.Updates  # for the outer optimizer
    shift: Any  # added to the outer optimizer's updates; None is nothing
    state: Any


class Descent(NamedTuple):
    """A rule.

    Attributes:
      init: `params -> state`, of the rule; params are in at least float32.
      combine: `(state, Gradients, count) -> Combined`; count is that of outer updates.
      keeps_first: whether it needs g, which takes a buffer.
      wants_second: `(state, g, count) -> bool []`, whether this update needs g_r; None
        is always.
      alone: `(state, g, count) -> Combined`, what stands in the place of `combine`
        where an update does without g_r; None if none does.
    """

    init: Callable[[optax.Params], Any]
    combine: Callable[[Any, Gradients, jax.Array], Combined]
    keeps_first: bool = True
    wants_second: Callable[[Any, optax.Updates, jax.Array], jax.Array] | None = None
    alone: Callable[[Any, optax.Updates, jax.Array], Combined] | None = None


class ReuseState(NamedTuple):
    """State of `reuse`."""

    direction: optax.Updates  # g_v, the part of g_r orthogonal to g, when last computed
    size: jax.Array  # [], its norm; 0 if it is nothing but rounding


class WhenLargeState(NamedTuple):
    """State of `when_large`."""

    mean: jax.Array  # [], running mean of ||g||^2
    variance: jax.Array  # [], running mean of its squared deviation


def perturbed() -> Descent:
    r"""The gradient at the perturbed point, as it is: SAM.

    .. math::
        d = g_r

    Returns:
      A `Descent`.

    Example:
      >>> import optax, optax_flat
      >>> rule = optax_flat.descent.perturbed()
      >>> tx = optax_flat.sam(optax.sgd(0.1), descent=rule)  # the default
    """
    return Descent(
        _no_state,
        lambda state, grads, count: Combined(grads.second, None, state),
        keeps_first=False,
    )


def surrogate_gap(
    alpha: optax.ScalarOrSchedule, *, minimize_perturbed: bool = True
) -> Descent:
    r"""Descends the gap between perturbed and plain loss too, as in GSAM.

    .. math::
        d = g_r - \alpha \left(g - \frac{\langle g, g_r\rangle}{\|g_r\|^2} g_r\right)

    The part of g that is orthogonal to g_r raises the plain loss without changing the
    perturbed one, to first order, so that their gap falls.

    Args:
      alpha: :math:`\alpha`, >= 0; 0 is SAM.
      minimize_perturbed: False minimizes the plain loss and the gap: g plus
        :math:`\alpha` times the part of g_r that is orthogonal to g.

    Returns:
      A `Descent`.

    Raises:
      ValueError: a negative alpha.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.descent import Gradients, surrogate_gap
      >>> grads = Gradients(jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]))
      >>> surrogate_gap(0.5).combine((), grads, 0).gradient.tolist()
      [-0.5, 2.0]
    """
    checks.number("alpha", alpha, 0.0)
    checks.flag("minimize_perturbed", minimize_perturbed)

    def combine(state, grads, count):
        g, g_r = grads
        a = at(alpha, count)
        if minimize_perturbed:
            across = _orthogonal(g, g_r)
            return Combined(_plus(g_r, -a, across), None, state)
        return Combined(_plus(g, a, _orthogonal(g_r, g)), None, state)

    return Descent(_no_state, combine)


def interpolated(alpha: optax.ScalarOrSchedule) -> Descent:
    r"""Between the two gradients, or beyond: a penalty on the gradient's norm.

    .. math::
        d = (1 - \alpha) g + \alpha g_r

    which for small perturbations of the radius r is the gradient of
    :math:`f + \alpha r \|\nabla f\|`.

    Args:
      alpha: :math:`\alpha`, >= 0; 0 is the outer optimizer, 1 SAM.

    Returns:
      A `Descent`.

    Raises:
      ValueError: a negative alpha.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.descent import Gradients, interpolated
      >>> grads = Gradients(jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]))
      >>> interpolated(0.5).combine((), grads, 0).gradient.tolist()
      [0.5, 1.5]
    """
    checks.number("alpha", alpha, 0.0)

    def combine(state, grads, count):
        g, g_r = grads
        difference = optax.tree.sub(g_r, g)
        return Combined(_plus(g, at(alpha, count), difference), None, state)

    return Descent(_no_state, combine)


def weighted(
    gamma: optax.ScalarOrSchedule,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
) -> Descent:
    r"""Sharpness as a weighted regularizer, as in WSAM.

    .. math::
        d = g + \frac{\gamma}{1 - \gamma} (g_r - g)

    or, with `learning_rate`, decoupled: the outer optimizer takes g, and the params
    move by :math:`-\eta \frac{\gamma}{1 - \gamma} (g_r - g)` besides, past its
    momentum and its preconditioner.

    Args:
      gamma: :math:`\gamma`, in [0, 1); 1/2 is SAM if coupled.
      learning_rate: :math:`\eta`, that of the outer optimizer, >= 0; None couples.

    Returns:
      A `Descent`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.descent import Gradients, weighted
      >>> grads = Gradients(jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0]))
      >>> weighted(0.75).combine((), grads, 0).gradient.tolist()
      [-2.0, 4.0]
    """
    checks.number("gamma", gamma, 0.0, 1.0, open_high=True)
    if learning_rate is not None:
        checks.number("learning_rate", learning_rate, 0.0)

    def combine(state, grads, count):
        g, g_r = grads
        weight = at(gamma, count)
        weight = weight / (1 - weight)
        sharpness = optax.tree.sub(g_r, g)
        if learning_rate is None:
            return Combined(_plus(g, weight, sharpness), None, state)
        rate = -weight * at(learning_rate, count)
        return Combined(g, jax.tree.map(lambda s: rate * s, sharpness), state)

    return Descent(_no_state, combine)


def renormalized() -> Descent:
    r"""The direction of the second gradient, the length of the first: Stable SAM.

    .. math::
        d = \frac{\|g\|}{\|g_r\|} g_r

    Returns:
      A `Descent`. The factor is 1 where g_r is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.descent import Gradients, renormalized
      >>> grads = Gradients(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))
      >>> renormalized().combine((), grads, 0).gradient.tolist()
      [0.0, 5.0]
    """

    def combine(state, grads, count):
        del count
        g, g_r = grads
        size, length = trees.norm(g_r), trees.norm(g)
        sane = (size > 0) & jnp.isfinite(size) & jnp.isfinite(length)
        factor = jnp.where(sane, length / jnp.where(sane, size, 1.0), 1.0)
        return Combined(jax.tree.map(lambda x: factor * x, g_r), None, state)

    return Descent(_no_state, combine)


def reuse(period: int, alpha: optax.ScalarOrSchedule) -> Descent:
    r"""The second gradient every few updates, and in between what is known of it.

    .. math::
        d = \begin{cases}
          g_r, \quad g_v = g_r - \frac{\langle g_r, g\rangle}{\|g\|^2} g
            & \text{every } k\text{-th update} \\
          g + \alpha \frac{\|g\|}{\|g_v\|} g_v & \text{else}
        \end{cases}

    From LookSAM: g_v, the direction into flatter regions, changes slowly. It costs
    1 + 1/k gradients per update.

    Args:
      period: k, >= 1; the first update computes g_r.
      alpha: :math:`\alpha`, how much of g_v is added in between, >= 0.

    Returns:
      A `Descent`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> rule = optax_flat.descent.reuse(period=5, alpha=0.7)
      >>> tx = optax_flat.sam(optax.sgd(0.1), descent=rule)
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x)))
      >>> x = jnp.array([1.0, -2.0])
      >>> state = tx.init(x)
      >>> for _ in range(10):
      ...     updates, state = tx.update(grad_fn(x, 0), state, x, grad_fn=grad_fn)
      ...     x = optax.apply_updates(x, updates)
      >>> int(state.gradient_evaluations)
      12
    """
    checks.integer("period", period, 1)
    checks.number("alpha", alpha, 0.0)

    def init(params):
        return ReuseState(optax.tree.zeros_like(params), jnp.zeros([]))

    def wants_second(state, g, count):
        del state, g
        return count % period == 0

    def combine(state, grads, count):
        del state, count
        g, g_r = grads
        across = _orthogonal(g_r, g)
        # What is left of parallel gradients is rounding, not a direction.
        size = trees.norm(across)
        rounding = 100 * float(jnp.finfo(jnp.float32).eps) * trees.norm(g_r)
        state = ReuseState(across, jnp.where(size > rounding, size, 0.0))
        return Combined(g_r, None, state)

    def alone(state, g, count):
        size = state.size
        factor = jnp.where(size > 0, trees.norm(g) / jnp.where(size > 0, size, 1.0), 0)
        factor = at(alpha, count) * jnp.where(jnp.isfinite(factor), factor, 0.0)
        return Combined(_plus(g, factor, state.direction), None, state)

    return Descent(init, combine, wants_second=wants_second, alone=alone)


def when_large(
    decay: optax.ScalarOrSchedule, threshold: optax.ScalarOrSchedule
) -> Descent:
    r"""The second gradient only where the first is unusually large, as in AE-SAM.

    .. math::
        \begin{align*}
        \mu &\leftarrow \delta \mu + (1 - \delta) \|g\|^2 \\
        v &\leftarrow \delta v + (1 - \delta) (\|g\|^2 - \mu)^2 \\
        d &= g_r \text{ if } \|g\|^2 \ge \mu + c \sqrt v, \text{ else } g
        \end{align*}

    Args:
      decay: :math:`\delta`, in [0, 1).
      threshold: c, in standard deviations. A schedule that falls makes SAM steps more
        frequent as the training goes on.

    Returns:
      A `Descent`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> never = optax_flat.descent.when_large(0.9, threshold=1e6)
      >>> tx = optax_flat.sam(optax.sgd(0.1), descent=never)
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x)))
      >>> x = jnp.array([1.0, -2.0])
      >>> _, state = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
      >>> int(state.gradient_evaluations)
      1
    """
    checks.number("decay", decay, 0.0, 1.0, open_high=True)
    checks.number("threshold", threshold)

    def init(params):
        del params
        return WhenLargeState(jnp.zeros([]), jnp.zeros([]))

    def moved(state, g, count):
        keep, square = at(decay, count), trees.vdot(g, g)
        mean = keep * state.mean + (1 - keep) * square
        variance = keep * state.variance + (1 - keep) * (square - mean) ** 2
        after = trees.cast_like(WhenLargeState(mean, variance), state)
        # One gradient whose square overflows is not to blind it for ever.
        return square, trees.where(trees.all_finite(after), after, state)

    def wants_second(state, g, count):
        square, after = moved(state, g, count)
        return square >= after.mean + at(threshold, count) * jnp.sqrt(after.variance)

    def combine(state, grads, count):
        _, after = moved(state, grads.first, count)
        return Combined(grads.second, None, after)

    def alone(state, g, count):
        _, after = moved(state, g, count)
        return Combined(g, None, after)

    return Descent(init, combine, wants_second=wants_second, alone=alone)


def _no_state(params):
    del params
    return ()


def _plus(tree, factor, other):
    return jax.tree.map(lambda x, y: x + factor * y, tree, other)


def _orthogonal(tree, to):
    """The part of a tree that is orthogonal to another; all of it if that is zero."""
    square = trees.vdot(to, to)
    sane = (square > 0) & jnp.isfinite(square)
    # The division comes last: XLA puts cheaper ends of a sum over all leaves into every
    # leaf's loop.
    shared = jnp.where(sane, trees.vdot(tree, to), 0.0)
    weight = shared / jnp.where(sane, square, 1.0)
    weight = jnp.where(jnp.isfinite(weight), weight, 0.0)
    return _plus(tree, -weight, to)
