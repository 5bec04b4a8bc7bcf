r"""Averages of the weights along a run, which leave the run itself alone.

    swa           m <- m + (w - m) / n                 the n-th point
    ema_weights   m <- m + (1 - d) / c (w - m)         c <- d c + 1 - d
    lawa          m  = mean of the k latest points

The points w are where each outer update of an optimizer leads: its *anchors*. Inside a
walk the params stand elsewhere, so an average goes around the optimizer, asks it for
the anchor and takes it after outer updates only. Updates pass through unchanged.

Papers: Izmailov et al., arXiv 1803.05407 (SWA); Kaddour, arXiv 2209.14981 (LAWA). How
we differ is at the end of the docstrings.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, layout, modes, trees
from optax_flat._core.arguments import factory
from optax_flat._core.hyperparams import at


class RunningAverageState(NamedTuple):
    """What the states of `swa` and `ema_weights` have in common."""

    metrics = ("count", "weight")

    count: jax.Array  # int32, [], outer updates made
    weight: jax.Array  # [], of all points averaged so far; 0 before the first
    average: optax.Params  # at least float32; not finite: none so far
    inner_state: optax.OptState

    averages = True  # see `modes.Evaluable`

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The average, or before its first point what `inner` evaluates."""
        return _read(self.weight > 0, self.average, self.inner_state, params)


class SWAState(RunningAverageState):
    """State of `swa`; its weights count points, so no other average goes on with it."""


class EMAState(RunningAverageState):
    """State of `ema_weights`."""


class LawaState(NamedTuple):
    """State of `lawa`."""

    metrics = ("count", "taken")

    count: jax.Array  # int32, [], outer updates made
    taken: jax.Array  # int32, [], checkpoints taken
    checkpoints: optax.Params  # [k, ...], a ring, at least float32; infinite: none
    inner_state: optax.OptState

    averages = True  # see `modes.Evaluable`

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The mean of the checkpoints, or before the first what `inner` evaluates."""

        def mean(ring):
            place = jax.lax.broadcasted_iota(jnp.int32, ring.shape, 0)
            there = (place < self.taken) & jnp.isfinite(ring)
            number = jnp.sum(there, axis=0, dtype=ring.dtype)
            mean = jnp.sum(jnp.where(there, ring, 0), axis=0) / jnp.maximum(number, 1)
            return jnp.where(number > 0, mean, jnp.inf)

        average = jax.tree.map(mean, self.checkpoints)
        return _read(self.taken > 0, average, self.inner_state, params)


@factory
def swa(
    inner: optax.GradientTransformation | None = None,
    *,
    start: int,
    period: int = 1,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging: the mean of all points from an update on.

    .. math::
        \bar w \leftarrow \bar w + (w - \bar w) / n

    with w where the update `start`, `start` + `period`, ... leads and n its number
    among them, from 1. Updates count from 0: ``start=11 * epoch - 1, period=epoch`` is
    once at the end of each epoch of `epoch` updates from the 11th on.

    It trains as `inner` does, to the bit; `eval_params` gives the average, and before
    its first point what it gives for `inner`. Give it the *whole* optimizer. Then the
    points are the anchors, also of a walk in transparent mode, and only outer updates
    count. Without `inner` it stands last in an `optax.chain`, takes params + updates
    for the point and counts every call; `eval_params` refuses it there beside a method
    whose params leave their anchor.

    The average of an average is what its name says: the outermost one wins, and its
    points are what `eval_params` gives for the one inside. Of several in one chain,
    which all average the params, the last wins. `optax.MultiSteps` goes around.

    An update that was skipped as non-finite counts, with the anchor where it was.
    Entries that are NaN or infinite do not enter: the average keeps what it has there,
    so it outlives a run that is lost; before it has anything there, the first finite
    one is it. Batch statistics are not averaged, see
    `optax_flat.training.update_batch_stats`.

    Cost:
      `inner`'s gradients per update; state: 1 copy of the params beside `inner`'s.

    Args:
      inner: the optimizer whose points are averaged; None for the last place of a
        chain.
      start: the first update whose point enters, >= 0; the first one is 0.
      period: updates per point, >= 1.
      accumulator_dtype: dtype of the average; None is at least float32.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      SGD that jumps to and fro over the minimum at 1; the mean is there:

      >>> import jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.swa(optax.sgd(2.0), start=0)
      >>> x = jnp.array([5.0])
      >>> state = tx.init(x)
      >>> for _ in range(4):
      ...     updates, state = tx.update(x - 1.0, state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> float(x[0]), float(optax_flat.eval_params(state, x)[0])
      (5.0, 1.0)

    References:
      Izmailov, Podoprikhin, Garipov, Vetrov and Wilson, `Averaging Weights Leads to
      Wider Optima and Better Generalization <https://arxiv.org/abs/1803.05407>`_, 2018.

    Differs from the paper:
      Nothing in the formula. The paper's learning rate, constant or cyclical while it
      averages, is the schedule of `inner`. `AveragedModel` of torch.optim.swa_utils
      averages when its `update_parameters` is called, and starts as a copy of the
      model; the documentation has it argument by argument.
    """
    start = checks.integer("start", start, 0)
    period = checks.integer("period", period, 1)

    def absorb(state, point, made):
        since = state.count - start
        due = made & (since >= 0) & (since % period == 0)
        one = jnp.ones_like(state.weight)
        return _moved(state, point, due, keep=one, add=one)

    return _averaging(inner, accumulator_dtype, _running(SWAState), absorb)


@factory
def ema_weights(
    inner: optax.GradientTransformation | None = None,
    *,
    decay: optax.ScalarOrSchedule = 0.999,
    debias: bool = True,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exponential moving average of the weights.

    .. math::
        \bar w \leftarrow d \bar w + (1 - d) w

    with d = `decay` and w where each outer update leads. With `debias` it starts at
    zero and is read divided by :math:`1 - \prod d`, the sum of the points' weights;
    without, it starts as the first point, which then weighs :math:`d / (1 - d)` times
    as much as the second.

    It trains as `inner` does, to the bit. What `eval_params` gives, which points are
    taken, without `inner` too, averages of averages, and NaN are as with `swa`.

    Cost:
      `inner`'s gradients per update; state: 1 copy of the params beside `inner`'s.

    Args:
      inner: the optimizer whose points are averaged; None for the last place of a
        chain.
      decay: d, in [0, 1). It reaches back over about 1 / (1 - d) updates.
      debias: whether the start leaves no trace.
      accumulator_dtype: dtype of the average; None is at least float32.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      Around Entropy-SGD in transparent mode it averages anchors, not the points of the
      walk on which the params stand:

      >>> import jax.numpy as jnp, optax, optax_flat
      >>> walk = optax_flat.entropy_sgd(
      ...     0.5, num_steps=2, noise=0.0, mode="transparent", key=0)
      >>> tx = optax_flat.ema_weights(walk, decay=0.5)
      >>> x = jnp.array([4.0])
      >>> state = tx.init(x)
      >>> visited = []
      >>> for _ in range(5):
      ...     updates, state = tx.update(x, state, x)
      ...     x = optax.apply_updates(x, updates)
      ...     visited.append(x)
      >>> expected = (visited[1] + 2 * visited[3]) / 3  # behind the outer updates
      >>> bool(jnp.allclose(optax_flat.eval_params(state, x), expected))
      True

    References:
      Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992,
      for the plain mean; Morales-Brotons, Vogels and Hendrikx, `Exponential Moving
      Average of Weights in Deep Learning <https://arxiv.org/abs/2411.18704>`_, 2024.

    Differs from the paper:
      `get_ema_multi_avg_fn` of torch.optim.swa_utils is ``debias=False``. `optax.ema`
      averages updates, not weights; its `debias` is ours for a constant decay. Kept is
      the average that is read, moved by (1 - d) / c where c is the sum of the weights,
      which is the same.
    """
    checks.number("decay", decay, 0.0, 1.0, open_high=True)
    debias = checks.flag("debias", debias)

    def absorb(state, point, made):
        d = at(decay, state.count)
        keep, add = (jnp.asarray(x, state.weight.dtype) for x in (d, 1 - d))
        if not debias:
            add = jnp.where(state.weight > 0, add, 1)
        return _moved(state, point, made, keep=keep, add=add)

    return _averaging(inner, accumulator_dtype, _running(EMAState), absorb)


@factory
def lawa(
    inner: optax.GradientTransformation | None = None,
    *,
    k: int = 10,
    period: int = 1,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Latest weight averaging: the mean of the k latest checkpoints.

    .. math::
        \bar w = \frac{1}{k} \sum_{i=0}^{k-1} w_{n-i}

    with a checkpoint w where every `period`-th outer update leads; before there are
    `k`, the mean of those there are. Unlike `swa` it forgets, so it needs no start, and
    may be read all along. It keeps `k` copies of the params.

    It trains as `inner` does, to the bit. What `eval_params` gives, which points are
    taken, without `inner` too, averages of averages, and NaN are as with `swa`.

    Cost:
      `inner`'s gradients per update; state: `k` copies of the params beside `inner`'s.

    Args:
      inner: the optimizer whose points are averaged; None for the last place of a
        chain.
      k: checkpoints kept, >= 1.
      period: updates per checkpoint, >= 1; an epoch, for instance.
      accumulator_dtype: dtype of the checkpoints; None is at least float32.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.lawa(k=3, period=2)
      >>> x = jnp.zeros(1)
      >>> state = tx.init(x)
      >>> for _ in range(9):  # 1, 2, ..., 9
      ...     updates, state = tx.update(jnp.ones(1), state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> float(optax_flat.eval_params(state, x)[0])  # of 4, 6 and 8
      6.0

    References:
      Kaddour, `Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
      Latest Weight Averaging <https://arxiv.org/abs/2209.14981>`_, 2022.

    Differs from the paper:
      Nothing in the formula. The authors' code writes a checkpoint per epoch, or every
      1000 updates, to disk and averages them afterwards, buffers such as batch
      statistics included; its other lawa.py keeps them in a `deque()` that is the
      default of a dataclass field, an error since Python 3.11.
    """
    k = checks.integer("k", k, 1)
    period = checks.integer("period", period, 1)

    def begin(count, x, inner_state):
        def ring(leaf):
            return jnp.broadcast_to(leaf, (k, *leaf.shape))

        # Sharded like the params, behind its own axis; what NNX's variables say of
        # theirs is not true of it.
        shard = jax.vmap(trees.sharded_like, (0, None))
        checkpoints = jax.tree.map(lambda leaf: shard(ring(leaf), leaf), trees.plain(x))
        return LawaState(count, count, checkpoints, inner_state)

    def absorb(state, point, made):
        due = made & ((state.count + 1) % period == 0)
        place = state.taken % k

        def stored(ring, w):
            old = jax.lax.dynamic_index_in_dim(ring, place, keepdims=False)
            kept = jnp.where(state.taken < k, jnp.inf, old)
            new = jnp.where(due, jnp.where(jnp.isfinite(w), w, kept), old)
            return jax.lax.dynamic_update_index_in_dim(ring, new, place, 0)

        checkpoints = jax.tree.map(stored, state.checkpoints, trees.plain(point))
        taken = trees.saturating_add(state.taken, due.astype(jnp.int32))
        return state._replace(taken=taken, checkpoints=checkpoints)

    return _averaging(inner, accumulator_dtype, begin, absorb)


def _averaging(inner, accumulator_dtype, begin, absorb):
    """`inner`, whose anchors a rule absorbs.

    The rule is two functions: ``begin(count, params, inner_state)`` makes the state,
    ``absorb(state, point, made)`` puts the point into it where an outer update was made
    and the rule wants that one; `state.count` is still its index.
    """
    inner = optax.identity() if inner is None else inner
    optimizer = checks.transformation("inner", inner)
    checks.float_dtype("accumulator_dtype", accumulator_dtype)

    def init(params):
        checks.float_params(params)
        params = trees.concrete(params)
        x = trees.accumulator(params, accumulator_dtype)
        count = jnp.zeros([], jnp.int32)
        return trees.copy(begin(count, x, optimizer.init(params)), params)

    def update(updates, state, params: Any = None, **extra_args):
        checks.float_params(params)
        params = trees.concrete(params)
        layout.check(init, state, params)
        updates, inner_state = optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        checks.same_structure("The update to average", updates, params)
        there = trees.applied(params, updates)
        anchor = modes.evaluated(inner_state, there)
        made = _outer_update_was_made(state.inner_state, inner_state)
        state = absorb(state, trees.accumulator(anchor, accumulator_dtype), made)
        count = trees.saturating_add(state.count, made.astype(jnp.int32))
        return updates, state._replace(count=count, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _outer_update_was_made(before, after):
    """Whether no walk and no accumulation of gradients is under way."""
    accumulated = [
        new.gradient_step != old.gradient_step
        for old, new in zip(
            *(modes.states(s, optax.MultiStepsState) for s in (before, after)),
            strict=True,
        )
    ]
    walks = modes.states(after, modes.TransparentState)
    return jnp.all(jnp.array([*accumulated, *(w.step == 0 for w in walks)], bool))


def _running(kind):
    def begin(count, x, inner_state):
        return kind(count, jnp.zeros([], float), x, inner_state)

    return begin


def _moved(state, point, due, *, keep, add):
    """The average moved to a point of the weight `add`; the others keep `keep`."""
    weight = keep * state.weight + add
    step = add / weight

    def move(mean, w):
        # The first one is it, and stays so where there is none yet.
        begun = (state.weight > 0) & jnp.isfinite(mean)
        moved = jnp.where(begun, mean + step.astype(mean.dtype) * (w - mean), w)
        enters = jnp.isfinite(w) | (state.weight == 0)
        return jnp.where(due & enters, moved, mean)

    average = jax.tree.map(move, state.average, point)
    weight = jnp.where(due, weight, state.weight)
    return state._replace(weight=weight, average=average)


def _read(is_there, average, inner_state, params):
    """The average in the params' dtype, where there is one."""
    anchor = modes.evaluated(inner_state, params)

    def read(a, p):
        return jnp.where(is_there & jnp.isfinite(a), a.astype(p.dtype), p)

    return trees.map_selected(read, average, anchor)
