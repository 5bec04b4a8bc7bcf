r"""Nesterov's momentum with several look-ahead points.

    v     <- m v + learning_rate sum_i a_i grad f(theta - c_i m v)
    theta <- theta - v

The nodes c_i are fractions of the coming momentum step, the weights a_i average the
gradients found there: a quadrature of the gradient along the step. One node at 1 is
Nesterov's rule, and one at 0 would be the heavy ball.

Source: the article "Neural network optimization methods" (Habr), whose formulas are
kept; what its script does besides is at the end of `multipoint_nesterov`'s docstring.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.walk import Walk

# The article's rules by name: nodes and weights.
RULES = {
    "thirds": ((1 / 3, 2 / 3, 1.0), (1 / 3, 1 / 3, 1 / 3)),
    "geometric": ((1 / 2, 3 / 4, 1.0), (1 / 7, 2 / 7, 4 / 7)),
    "four": ((1 / 4, 1 / 2, 3 / 4, 1.0), (1 / 4, 1 / 4, 1 / 4, 1 / 4)),
}


class MultipointNesterovState(NamedTuple):
    """What lives between outer updates."""

    metrics = ("count",)

    count: jax.Array  # int32, [], outer updates made
    mu: optax.Updates  # v, the last step downhill, at least float32
    offset: optax.Updates  # theta minus the first node of the next update


class _Inner(NamedTuple):
    """The nodes of one update; the trees are in the accumulator dtype."""

    anchor: optax.Params  # theta
    taken: jax.Array  # int32, [], gradients consumed
    point: optax.Params
    total: optax.Updates  # sum of a_i g_i so far


@factory
def multipoint_nesterov(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule = 0.9,
    *,
    nodes: Sequence[float] | str = (1.0,),
    weights: Sequence[float] | None = None,
    **loop: Unpack[LoopArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum and gradients at several points of the coming step.

    .. math::
        \begin{align*}
        v &\leftarrow m_t v + \eta_t \sum_i a_i \nabla f(\theta - c_i m_t v) \\
        \theta &\leftarrow \theta - v
        \end{align*}

    with :math:`\eta_t` = `learning_rate`, :math:`m_t` = `momentum`, each a float or a
    schedule of the update count, :math:`c_i` = `nodes` and :math:`a_i` = `weights`.
    One update costs as many gradients as there are nodes.

    The params stand on the first node, as the gradient that is passed in is taken
    there, so read :math:`\theta` by `eval_params`, in both modes. The rule means one
    minibatch at all nodes: pass the same one for each, or in scanned mode a `grad_fn`
    that closes over it and ignores its second argument. On a quadratic
    only the mean node :math:`\sum_i a_i c_i` matters.

    Nothing may alter the updates behind this method, in either mode: :math:`\theta` is
    kept as a distance from where they lead. Scale by the schedule `learning_rate`, and
    clip in `inner_transform` or in front. Give a moving `momentum` as a schedule: the
    first node reads it one update ahead, which `optax.inject_hyperparams` cannot.

    Cost:
      `len(nodes)` gradients per update; state: 2 copies of the params (transparent: 6).

    Args:
      learning_rate: :math:`\eta`, >= 0. It is inside the buffer v.
      momentum: m, in [0, 1].
      nodes: :math:`c_i` in (0, 1], in the order in which they are visited; or a rule
        of the article by name: "thirds" (1/3, 2/3, 1 with equal weights), "geometric"
        (1/2, 3/4, 1 with weights 1/7, 2/7, 4/7), "four" (1/4, 1/2, 3/4, 1, equal).
      weights: :math:`a_i`, finite, of sum 1, one for each node; None gives equal ones.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      With one node at 1 the params follow ``optax.sgd(nesterov=True)``, which holds
      the look-ahead point; `eval_params` gives the point behind it:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad = jax.grad(lambda x: jnp.sum(jnp.cosh(x - 0.5)))
      >>> ours = optax_flat.multipoint_nesterov(0.1, 0.9)
      >>> theirs = optax.sgd(0.1, 0.9, nesterov=True)
      >>> x = y = jnp.array([1.0, -1.0, 2.0])
      >>> our_state, their_state = ours.init(x), theirs.init(y)
      >>> for _ in range(5):
      ...     updates, our_state = ours.update(grad(x), our_state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     updates, their_state = theirs.update(grad(y), their_state)
      ...     y = optax.apply_updates(y, updates)
      >>> bool(jnp.allclose(x, y, atol=1e-6))
      True
      >>> theta = optax_flat.eval_params(our_state, x)
      >>> bool(jnp.allclose(theta - 0.9 * our_state.memory.mu, x, atol=1e-6))
      True

    References:
      "Neural network optimization methods", Habr (in Russian). Nesterov, A method of
      solving a convex programming problem with convergence rate O(1/k^2), 1983.
      Sutskever et al., On the importance of initialization and momentum in deep
      learning, 2013.

    Differs from the paper:
      Nothing in the formula. The article's text has the rules "thirds" and "geometric",
      its script "four". The script looks ahead in time on a recorded sequence of
      gradients, not in the params, and its interpolation X[i] + fraction X[i + 1]
      should read X[i] + fraction (X[i + 1] - X[i]).
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("momentum", momentum, 0.0, 1.0)
    nodes, weights = _check_rule(nodes, weights)
    accumulator_dtype = loop["accumulator_dtype"]

    def init(params):
        zeros = optax.tree.zeros_like(trees.accumulator(params, accumulator_dtype))
        return MultipointNesterovState(jnp.zeros([], jnp.int32), zeros, zeros)

    def start(memory, params):
        point = trees.accumulator(params, accumulator_dtype)
        anchor = optax.tree.add(point, memory.offset)
        zeros = optax.tree.zeros_like(point)
        return _Inner(anchor, jnp.zeros([], jnp.int32), point, zeros)

    def step(memory, inner, grads):
        m, taken = at(momentum, memory.count), inner.taken + 1
        weight = jnp.asarray(weights, float)[inner.taken]
        # Behind the last node the point is not used.
        ahead = jnp.asarray(nodes, float)[jnp.minimum(taken, len(nodes) - 1)]
        total = jax.tree.map(lambda t, g: t + weight * g, inner.total, grads)
        point = jax.tree.map(lambda x, v: x - ahead * m * v, inner.anchor, memory.mu)
        return inner._replace(taken=taken, point=point, total=total)

    def finish(memory, inner, params):
        rate, m = (at(x, memory.count) for x in (learning_rate, momentum))
        v = jax.tree.map(lambda v, t: m * v + rate * t, memory.mu, inner.total)
        count = jnp.asarray(optax.safe_increment(memory.count))
        theta = optax.tree.sub(inner.anchor, v)
        ahead = nodes[0] * at(momentum, count)
        point = jax.tree.map(lambda x, v: x - ahead * v, theta, v)
        updates, there = trees.steps_to(point, params)
        offset = optax.tree.sub(theta, there)
        return updates, MultipointNesterovState(count, v, offset)

    return modes.build(Walk(len(nodes), init, start, step, finish), loop)


def _check_rule(nodes, weights):
    """Nodes and weights as tuples of floats."""
    if isinstance(nodes, str):
        checks.choice("nodes", nodes, tuple(RULES))
        if weights is not None:
            raise ValueError(
                f"`weights` belong to the rule nodes={nodes!r} already, got "
                f"{weights!r}. Leave them out, or give the nodes as numbers."
            )
        return RULES[nodes]
    nodes = _floats("nodes", nodes)
    if not nodes or not all(0 < node <= 1 for node in nodes):
        raise ValueError(
            f"`nodes` must be one or more numbers in (0, 1], got {nodes}. 1 is the end "
            "of the momentum step."
        )
    weights = (1 / len(nodes),) * len(nodes) if weights is None else weights
    weights = _floats("weights", weights)
    if len(weights) != len(nodes):
        raise ValueError(
            f"`weights` must be one number for each of the {len(nodes)} nodes, got "
            f"{len(weights)}: {weights}."
        )
    total = sum(weights)
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(
            f"`weights` must be finite and sum to 1, got {weights} with sum {total:g}. "
            "The size of the steps is the learning rate's."
        )
    return nodes, weights


def _floats(name, values):
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"`{name}` must be a sequence of floats, got {values!r}.")
    return tuple(checks.constant(f"{name}[{i}]", x) for i, x in enumerate(values))
