"""The two ways to run a walk: all of it in one update, or one gradient per update.

`scanned` evaluates the walk's further gradients itself, inside `jax.lax.scan`.
`transparent` takes one gradient per call and moves the params to the point where it
wants the next one, so that any training loop works unchanged. Both call the same
`Walk`, which is why they agree to rounding.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, convolutions, layout, trees
from optax_flat._core.arguments import LoopArguments
from optax_flat._core.functions import translated
from optax_flat._core.walk import Walk

MODES = ("scanned", "transparent")


@runtime_checkable
class Evaluable(Protocol):
    """An optimizer state that knows where to evaluate the model.

    One that takes the params it is handed for points to average says so by a class
    attribute ``averages = True``.
    """

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The params to evaluate and to save."""
        ...


@runtime_checkable
class _Named(Protocol):
    """A NamedTuple."""

    _fields: tuple[str, ...]


class AveragesBesideAWalkError(ValueError):
    """An average was handed points that are not the anchors."""


@runtime_checkable
class ForwardOnly(Protocol):
    """An optimizer state that takes outputs of the model in the place of gradients."""

    forward_passes: jax.Array


class ScannedState(NamedTuple):
    """State of a walk in scanned mode."""

    metrics = ("gradient_evaluations", "skipped")

    gradient_evaluations: jax.Array  # int32, [], gradients consumed so far
    skipped: jax.Array  # int32, [], outer updates skipped as non-finite
    memory: Any  # the walk's own state between outer updates

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The anchor: params, moved by the walk's offset where it has one."""
        return _anchor(self.memory, params)


class TransparentState(NamedTuple):
    """State of a walk in transparent mode.

    `step` is 0 exactly when an outer update was just made (or none yet): the moment to
    log, to save and to keep batch statistics.
    """

    metrics = ("gradient_evaluations", "skipped")

    gradient_evaluations: jax.Array  # int32, [], gradients consumed so far
    skipped: jax.Array  # int32, [], outer updates skipped as non-finite
    memory: Any  # the walk's own state between outer updates
    # All below belongs to the current walk.
    step: jax.Array  # int32, [], gradients consumed in this walk, in [0, length)
    first_point: optax.Params  # where the walk started, in the params' dtype
    # How far params in 16 bits are from the anchor when a walk starts, in float32: the
    # step there misses a place that has more digits than itself. [] for wider params.
    missed: optax.Params
    inner: Any  # the walk's state
    inner_transform_state: optax.OptState
    finite: jax.Array  # bool, [], nothing became non-finite (always with no guard)

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The anchor, whatever point of the walk the params stand on."""
        return _anchor(self.memory, _first_point(self, params))


class _Progress(NamedTuple):
    """A walk under way."""

    inner: Any  # the walk's state
    transform_state: optax.OptState  # of the inner transformation
    finite: jax.Array  # bool, [], nothing became non-finite (always with no guard)


class _Walker(NamedTuple):
    """A walk with its inner transformation: what both modes do with one gradient.

    Entries of the params that are not finite, as in a mask of -inf among them, stay as
    they are. Their gradients are zero; rules, optimizers and the end of a walk see
    zeros there, and the model what it had. `Walk.step` sees them as they are, which
    is right entry by entry.
    """

    walk: Walk
    inner_transform: optax.GradientTransformationExtraArgs
    skip_nonfinite: bool

    def init(self, params):
        memory = trees.arrays(self.walk.init(trees.finite(params)))
        if states(memory, ScannedState | TransparentState):
            raise ValueError(
                "`outer` is a walk of several gradients itself, and would be given one "
                "of them per update. Give the walk an optimizer of one gradient, such "
                "as optax.sgd(0.1), or chain what the two do into one method."
            )
        return memory

    def begin(self, memory, params):
        inner = trees.arrays(self.walk.start(memory, params))
        transform_state = trees.arrays(self.inner_transform.init(inner.point))
        return _Progress(inner, transform_state, jnp.array(True))

    def consume(self, memory, extra_args, progress, grads):
        """One gradient."""
        inner, transform_state, finite = progress
        # Gradients arrive in the params' dtype; the walk adds up in the accumulators'.
        grads = trees.where_finite(inner.point, trees.cast_like(grads, inner.point))
        grads, new_transform_state = self.inner_transform.update(
            grads, transform_state, trees.finite(inner.point), **extra_args
        )
        more = extra_args if _takes_extra_args(self.walk.step) else {}
        new = _with_mask(self.walk.step(memory, inner, grads, **more), inner)
        # Loops and conditionals need the same types before and after.
        new_transform_state = trees.cast_like(new_transform_state, transform_state)
        if self.skip_nonfinite:
            finite &= trees.all_finite(_cleaned(new, inner.point))
        return _Progress(new, new_transform_state, finite)

    def move(self, memory, progress):
        """To the next point, where another gradient follows."""
        if self.walk.move is None:
            return progress
        inner, _, finite = progress
        clean = inner._replace(point=trees.finite(inner.point))
        new = _with_mask(self.walk.move(memory, clean), inner)
        if self.skip_nonfinite:
            finite &= trees.all_finite(_cleaned(new, inner.point))
        return progress._replace(inner=new, finite=finite)

    def finish(self, memory, progress, first_point, extra_args):
        """Updates in the params' dtype, the new memory, and whether it was skipped."""
        finite, inner = progress.finite, _cleaned(progress.inner, first_point)
        more = extra_args if _takes_extra_args(self.walk.finish) else {}
        updates, new_memory = self.walk.finish(
            memory, inner, trees.finite(first_point), **more
        )
        updates = trees.cast_like(trees.where_finite(first_point, updates), first_point)
        new_memory = trees.cast_like(new_memory, memory)
        if not self.skip_nonfinite:
            return updates, new_memory, jnp.zeros([], jnp.int32)
        finite &= trees.all_finite(updates) & trees.all_finite(new_memory, memory)
        updates = trees.where(finite, updates, optax.tree.zeros_like(updates))
        new_memory = trees.where(finite, new_memory, memory)
        return updates, new_memory, jnp.where(finite, 0, 1).astype(jnp.int32)


def _cleaned(inner, point):
    """A walk's state, its trees like a point with zeros where that is not finite.

    Made where it is needed: kept in the state these would be copies of the params.
    """
    structure = jax.tree.structure(point)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(point)]

    def is_like_point(part):
        return jax.tree.structure(part) == structure

    def clean(part):
        leaves = jax.tree.leaves(part)
        floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
        same = is_like_point(part) and [jnp.shape(leaf) for leaf in leaves] == shapes
        return trees.where_finite(point, part) if same and floats else part

    return jax.tree.map(clean, inner, is_leaf=is_like_point)


def _with_mask(new, inner):
    """The state after a change; its point stays where it was not finite."""
    new = trees.cast_like(new, inner)

    def moved(n, was):
        return n if n is was else jnp.where(jnp.isfinite(was), n, was)

    return new._replace(point=jax.tree.map(moved, new.point, inner.point))


def scanned(
    walk: Walk,
    *,
    inner_transform: optax.GradientTransformation | None = None,
    unroll: int | bool = 1,
    fast_convolutions: bool = True,
    has_aux: bool = False,
    skip_nonfinite: bool = False,
    num_groups: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Runs a walk of L gradients inside one call of `update`.

    The gradient given to `update` is the first one of the walk, so nothing is thrown
    away; the other L - 1 come from `grad_fn`, inside `jax.lax.scan`::

        update(grads, state, params, *, grad_fn, batches=None, aux=None, **extra_args)

    `grad_fn(point, batch)` returns the gradient at a point of the walk, which has the
    params' structure and dtype. `batches` is a pytree whose leaves have the leading
    axis L - 1; without it `grad_fn` gets the index 0, ..., L - 2. A caller that passes
    only `value_fn(params)` has it differentiated. Make `grad_fn` inside the jitted
    training step: it is not a valid argument of a jitted function. A walk whose
    gradients all belong to one minibatch takes a stack of that one. All other extra
    arguments (`value`, `grad`, `value_fn`, ...) go on to the optimizers inside, as they
    belong to the first gradient.

    Inside `optax.MultiSteps` the gradient is that of k micro-batches, but `grad_fn`
    must be that of all of them as well, or the walk goes on with the last alone:
    `make_train_step` refuses it. Transparent mode needs nothing more there.

    Args:
      walk: the method.
      inner_transform: a transformation applied to *every* gradient of the walk, the
        first included: clipping, weight decay, inner momentum, `pmean`. It sees the
        point as params, in the walk's accumulator dtype. Its state starts afresh at
        every outer update, and so do its schedules and its noise. (A transformation
        chained in front reaches only the gradient given to `update`.)
      unroll: as in `jax.lax.scan`.
      fast_convolutions: whether convolutions in the loop are given the layout that is
        fast on a CPU, see `optax_flat.training.fast_convolutions`. Other platforms are
        never affected.
      has_aux: whether `grad_fn` is `(point, batch, aux) -> (grads, aux)` even where
        `update` is given no `aux`; it always is where there is one. `aux` (batch
        statistics, dropout keys) is threaded through the scan and dropped at its end,
        so the statistics that move are those of the first, clean pass, which the caller
        made.
      skip_nonfinite: whether an outer update in which anything became NaN or infinite
        ends with zero updates and unchanged memory, and is counted in `skipped`.
      num_groups: m, into how many groups of samples every minibatch is split, >= 1.
        Each walks on its own, all in one `jax.vmap`, and the walks are averaged before
        the outer update. Then the gradient given to `update` stacks those of the groups
        along a leading axis m, and so do the leaves of `batches`, behind L - 1, the
        groups' samples. With that axis spread over m devices each walks without the
        others; only the mean is a collective.

    Returns:
      A transformation whose one `update` is one outer update.

    Raises:
      TypeError: an argument of the wrong type, or params that are not floating point.
      ValueError: `walk.length` below 1; or, when `update` is traced, no params, no
        `grad_fn`, gradients of another structure, batches of another length.

    Example:
      A walk of three gradients of which the update is the mean; every gradient is
      clipped on its own:

      >>> import jax.numpy as jnp, optax
      >>> from typing import NamedTuple
      >>> from optax_flat import Walk, scanned
      >>> class Inner(NamedTuple):
      ...     point: optax.Params
      ...     total: optax.Updates
      >>> walk = Walk(
      ...     length=3,
      ...     init=lambda params: (),
      ...     start=lambda memory, params: Inner(params, 0.0 * params),
      ...     step=lambda memory, inner, grads: Inner(inner.point, inner.total + grads),
      ...     finish=lambda memory, inner, params: (-inner.total / 3, memory))
      >>> tx = scanned(walk, inner_transform=optax.clip(1.0))
      >>> x = jnp.array(0.0)
      >>> updates, _ = tx.update(
      ...     jnp.array(9.0), tx.init(x), x,
      ...     grad_fn=lambda x, batch: batch, batches=jnp.array([0.5, -3.0]))
      >>> round(float(updates), 4)  # of 1, 0.5 and -1
      -0.1667
    """
    walker = _walker(walk, inner_transform, skip_nonfinite)
    unroll = checks.unrolling(unroll)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    num_groups = checks.integer("num_groups", num_groups, 1)

    def grouped(function, *axes):
        return function if num_groups == 1 else jax.vmap(function, axes)

    def of_groups(tree, grads):
        """What each group has of its own, on the devices of its gradient."""
        if num_groups == 1:
            return tree
        return trees.spread_like(tree, jax.tree.leaves(grads)[0])

    def init(params):
        checks.float_params(params)
        zero = jnp.zeros([], jnp.int32)
        params = trees.concrete(params)
        return trees.copy(ScannedState(zero, zero, walker.init(params)), params)

    def update(
        updates,
        state,
        params=None,
        *,
        grad_fn=None,
        batches=None,
        aux=None,
        **extra_args,
    ):
        checks.float_params(params)
        checks.same_structure(
            "The gradient given to `update`", updates, params, num_groups=num_groups
        )
        layout.check(init, state, params)
        params, memory = trees.concrete(params), state.memory
        value_fn = extra_args.get("value_fn")
        extra_args = _for_walk(extra_args, params, num_groups)
        consume = functools.partial(walker.consume, memory, extra_args)
        progress = grouped(consume, None, 0)(walker.begin(memory, params), updates)
        progress = of_groups(progress, updates)
        taken: Any = 1
        batches = _check_batches(memory, batches, walk.length, num_groups)
        if walk.length > 1:
            _check_placeholders(params, grad_fn or value_fn)
            threads_aux = has_aux or aux is not None
            gradient = _gradient_function(
                grad_fn, value_fn, threads_aux, walk.length, numbered=batches is None
            )

            def gradient_and_step(progress, aux, batch):
                progress = walker.move(memory, progress)
                point = trees.cast_like(progress.inner.point, params)
                grads, aux = gradient(point, batch, aux)
                checks.same_structure("The gradient `grad_fn` returns", grads, params)
                return consume(progress, grads), aux

            every = grouped(gradient_and_step, 0, None, 0)

            def go_on(progress, aux, batch):
                progress, aux = every(progress, aux, batch)
                progress = of_groups(progress, updates)
                return progress, trees.mean_of_groups(aux) if num_groups > 1 else aux

            if batches is None:
                batches = jnp.arange(walk.length - 1)
            progress, _, taken = _loop(
                _more_of(walk, memory, go_on, num_groups),
                (progress, aux, jnp.ones([], jnp.int32)),
                batches,
                length=walk.length - 1,
                unroll=unroll,
                fast_convolutions=fast_convolutions,
            )
        if num_groups > 1:
            inner, finite = trees.mean_of_groups(progress.inner), progress.finite
            progress = progress._replace(inner=inner, finite=jnp.all(finite))
        updates, memory, skipped = walker.finish(memory, progress, params, extra_args)
        return updates, ScannedState(
            trees.saturating_add(state.gradient_evaluations, taken),
            trees.saturating_add(state.skipped, skipped),
            memory,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def transparent(
    walk: Walk,
    *,
    inner_transform: optax.GradientTransformation | None = None,
    skip_nonfinite: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Runs a walk with one call of `update` per gradient.

    Between calls the params stand on the point where the next gradient is wanted; every
    `walk.length` calls they make the outer update. Any training loop works unchanged,
    but whatever looks at the params in between sees a point of the walk:
    `eval_params(opt_state, params)` gives the anchor back. The anchor is restored by
    difference, so updates must be applied as they are: transformations that scale or
    clip belong into `inner_transform` or in front, not behind. Extra arguments go on to
    the optimizers inside; the outer one gets those of the last gradient.

    The params go no farther from the anchor than there is a way back from: eight times
    the entry, or eight where that is more, in float32. A walk that wants to go farther,
    after a gradient of 1e9 say, takes its next gradient at that distance.

    A walk that is resumed with fewer gradients than were taken already begins anew,
    from its anchor.

    Args:
      walk: the method.
      inner_transform: a transformation applied to every gradient; its state starts
        afresh at every outer update, see `scanned`.
      skip_nonfinite: whether an outer update in which anything became NaN or infinite
        ends at its first point with unchanged memory and is counted in `skipped`. The
        params themselves never become non-finite then. Entries of the params that are
        not finite to begin with, as in a mask of -inf among them, stay in either mode.

    Returns:
      A transformation with `update(grads, state, params, **extra_args)`.

    Raises:
      TypeError: an argument of the wrong type, or params that are not floating point.
      ValueError: `walk.length` below 1; or, when `update` is traced, no params,
        gradients of another structure, or a `grad_fn` or `batches`, which only scanned
        mode takes.

    Example:
      The same walk in both modes ends at the same params:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad = jax.grad(lambda p, t: jnp.sum((p - t) ** 2))
      >>> targets = jnp.array([1.0, 2.0, 4.0])
      >>> start = jnp.zeros(2)
      >>> def make(mode):
      ...     return optax_flat.entropy_sgd(0.5, num_steps=3, mode=mode, key=0)
      >>> tx = make("transparent")
      >>> params, state = start, tx.init(start)
      >>> for t in targets:
      ...     updates, state = tx.update(grad(params, t), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> tx = make("scanned")
      >>> updates, _ = tx.update(grad(start, targets[0]), tx.init(start), start,
      ...                        grad_fn=grad, batches=targets[1:])
      >>> bool(jnp.allclose(params, optax.apply_updates(start, updates)))
      True
    """
    walker = _walker(walk, inner_transform, skip_nonfinite)

    def fresh(params):
        checks.float_params(params)
        params = trees.concrete(params)
        memory = walker.init(params)
        zero = jnp.zeros([], jnp.int32)
        missed = jax.tree.map(_missed, optax.tree.zeros_like(params), params)
        return TransparentState(
            zero, zero, memory, zero, params, missed, *walker.begin(memory, params)
        )

    def init(params):
        # A walk starts with several names for the params; donation needs a buffer each.
        params = trees.concrete(params)
        return trees.copy(fresh(params), params)

    def update(
        updates, state, params=None, *, grad_fn=None, batches=None, **extra_args
    ):
        _check_no_walk(grad_fn=grad_fn, batches=batches)
        checks.float_params(params)
        checks.same_structure("The gradient given to `update`", updates, params)
        layout.check(fresh, state, params)
        params, memory = trees.concrete(params), state.memory
        first_point = _first_point(state, params)
        extra_args = _for_walk(extra_args, first_point)
        kept = _Progress(state.inner, state.inner_transform_state, state.finite)
        begun = trees.cast_like(walker.begin(memory, first_point), kept)
        progress = trees.where(state.step == 0, begun, kept)
        progress = walker.consume(memory, extra_args, progress, updates)
        # A longer walk was under way when this state was saved. Its gradients are not
        # for this one, which begins anew.
        strayed = state.step >= walk.length
        last = state.step == walk.length - 1
        if walk.ends is not None:
            last |= walk.ends(memory, progress.inner) & jnp.logical_not(strayed)
        if walk.move is not None:
            # Selected, not branched: a branch copies all that goes through it.
            moved = walker.move(memory, progress)
            progress = trees.where(last, progress, moved)

        def go_on(memory, progress, first_point, params):
            here, first = (trees.accumulator(x) for x in (params, first_point))
            point = _within_reach(trees.cast_like(progress.inner.point, first), first)
            target = trees.where(progress.finite, point, here)
            target = trees.where(strayed, first, target)
            return target, memory, jnp.zeros([], jnp.int32)

        def outer_update(memory, progress, first_point, params):
            del params
            updates, memory, skipped = walker.finish(
                memory, progress, first_point, extra_args
            )
            target = trees.accumulator(trees.applied(first_point, updates))
            return target, memory, skipped

        target, memory, skipped = either(
            last, outer_update, go_on, memory, progress, first_point, params
        )
        updates, there = trees.steps_to(target, params)
        updates = trees.where_finite(first_point, updates)
        ended = last | strayed
        missed = trees.finite(optax.tree.sub(target, there))
        missed = jax.tree.map(_missed, missed, params)
        return trees.cast_like(updates, params), TransparentState(
            trees.saturating_add(state.gradient_evaluations, 1),
            trees.saturating_add(state.skipped, skipped),
            memory,
            jnp.where(ended, 0, state.step + 1).astype(jnp.int32),
            first_point,
            trees.where(ended, missed, state.missed),
            *progress,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The params to evaluate, to log and to save.

    In transparent mode the params wander between outer updates; this gives the anchor
    of the walk back, at any moment. With an average (`swa`, `ema_weights`, `lawa`) it
    gives that. It finds the states inside `optax.chain`, `masked`, `partition`,
    `inject_hyperparams`, `MultiSteps` and `apply_if_finite`, and those of
    `optax.contrib.schedule_free`, of which it gives the average. For an optimizer whose
    params never leave their anchor it returns them as they are, so code that calls it
    serves every optimizer.

    Args:
      opt_state: the state of an optimizer that contains any number of our methods, such
        as the `opt_state` of an `nnx.Optimizer`.
      params: the current params, such as ``nnx.state(model, nnx.Param)``. They may hold
        more than the optimizer's, as an Equinox model does whose arrays were filtered
        out (None) for `init`: the rest is returned as it is.

    Returns:
      Params of the same structure and dtype.

    Raises:
      ValueError: the two arguments were swapped; or the state has lost the classes that
        say what it is, as it does when it is restored from a file without a target; or
        it belongs to params of another structure; or an average (`swa`) stands in a
        chain beside a method whose params leave their anchor, not around it.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flat
      >>> tx = optax.chain(
      ...     optax.clip(1.0),
      ...     optax_flat.entropy_sgd(0.5, num_steps=4, mode="transparent", key=0))
      >>> start = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(2 * start, tx.init(start), start)
      >>> params = optax.apply_updates(start, updates)
      >>> bool(jnp.any(params != start))
      True
      >>> bool(jnp.all(optax_flat.eval_params(state, params) == start))
      True
    """
    if states(params, Evaluable):
        raise ValueError(
            "`eval_params` takes the optimizer's state first: eval_params(opt_state, "
            "params). The second argument holds an optimizer state: swap the two."
        )
    check_classes("eval_params", opt_state)
    arrays = trees.plain(params)
    try:
        there = evaluated(trees.plain(opt_state), arrays)
    except AveragesBesideAWalkError:
        raise
    except ValueError as error:
        raise ValueError(
            f"the optimizer's state belongs to other params: {error}.\n"
            f"  params: {jax.tree.structure(params)}\n"
            "Pass the params and the state that one `update` led to. If both are "
            "stacked, one for each replica or member: "
            "jax.vmap(optax_flat.eval_params)(opt_state, params)."
        ) from error
    if there is arrays:
        return params
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(there))


def check_classes(user: str, opt_state: optax.OptState) -> None:
    """Raises where a state has lost the class that says what it is.

    A stranger's state in a chain may be of any kind. But whoever gives dictionaries and
    lists in the place of classes does so with all of them.
    """
    is_bare = isinstance(opt_state, Mapping) and any(
        jax.tree_util.all_leaves([child]) for child in opt_state.values()
    )
    if not is_bare and any(map(jax.tree.leaves, states(opt_state, _Named))):
        return
    for place, node in _without_class(opt_state):
        raise ValueError(
            f"`{user}` needs the optimizer's state with its classes, for they tell "
            f"what its numbers are, got {type(node).__name__} at {place}. "
            "Pass the state that `init` and `update` return; restore it from a file "
            "with a new one, tx.init(params), as target; pass an nnx.Optimizer's "
            "`opt_state` itself. A state of your own should be a NamedTuple."
        )


def _without_class(node: Any, place: str = "opt_state") -> Iterator[tuple[str, Any]]:
    """What stands in the place of a state and has no class that says what it is.

    Optax nests states in tuples (`chain`) and dictionaries (`named_chain`); states
    themselves are NamedTuples, or tuples that hold arrays.
    """
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        for index, child in enumerate(node):
            if not jax.tree_util.all_leaves([child]):
                yield from _without_class(child, f"{place}[{index}]")
    elif isinstance(node, dict) and node:
        for name, child in node.items():
            yield from _without_class(child, f"{place}[{name!r}]")
    elif isinstance(node, Mapping | list | None) or jax.tree_util.all_leaves([node]):
        yield place, node


def states(opt_state: optax.OptState, kind: Any) -> list[Any]:
    """All outermost states of a kind (a type or a union) in an optimizer's state."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, kind))
    return [leaf for leaf in leaves if isinstance(leaf, kind)]


def evaluated(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """What `eval_params` gives, for a state and params that need no checks.

    Raises:
      AveragesBesideAWalkError: an average stands beside a state that leads the same
        leaves elsewhere, so that it was handed something else than the anchor.
    """
    by_averages, by_others = set(), set()
    for state in states(opt_state, Evaluable | optax.contrib.ScheduleFreeState):
        read = getattr(state, "eval_params", functools.partial(_averaged, state))
        before, params = params, read(params)
        leaves = zip(jax.tree.leaves(before), jax.tree.leaves(params), strict=True)
        # What a state does not move it returns as it is.
        led = {i for i, (old, new) in enumerate(leaves) if new is not old}
        averages = getattr(state, "averages", False)
        (by_averages if averages else by_others).update(led)
    if by_averages & by_others:
        raise AveragesBesideAWalkError(
            "an average stands in a chain beside an optimizer whose params leave their "
            "anchor (in transparent mode, behind a look-ahead point, around a center), "
            "so what it has averaged are not the anchors. Wrap the optimizer: "
            "optax_flat.swa(optax.chain(...), start=...) in the place of "
            "optax.chain(..., optax_flat.swa(start=...))."
        )
    return params


def _averaged(state, params):
    """The average x of Optax's `schedule_free`, whose params are b1 x + (1 - b1) z."""

    def read(z, y):
        b1 = jnp.asarray(state.b1, trees.accumulator(y).dtype)
        x = (y - (1.0 - b1) * z) / jnp.where(b1 > 0, b1, 1.0)
        return jnp.where(b1 > 0, x, y).astype(y.dtype)

    return trees.map_selected(read, state.z, params)


def one_minibatch(memory: Any) -> bool:
    """Whether all gradients of a walk belong to one minibatch."""
    return getattr(memory, "one_minibatch", False)


def build(
    walk: Walk, arguments: LoopArguments, num_groups: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The walk in the mode that a method's user asked for."""
    loop: dict[str, Any] = dict(arguments)
    checks.float_dtype("accumulator_dtype", loop["accumulator_dtype"])
    in_both = {name: loop[name] for name in ("inner_transform", "skip_nonfinite")}
    if checks.choice("mode", loop["mode"], MODES) == "scanned":
        names = ("unroll", "fast_convolutions", "has_aux")
        in_scanned = {name: loop[name] for name in names}
        return scanned(walk, num_groups=num_groups, **in_scanned, **in_both)
    if checks.integer("num_groups", num_groups, 1) > 1:
        raise ValueError(
            f"`num_groups` must be 1 in transparent mode, got {num_groups}: the params "
            "stand on one point between two calls, and each group has its own. Build "
            'the optimizer with mode="scanned".'
        )
    return transparent(walk, **in_both)


def difference(target: optax.Params, params: optax.Params) -> optax.Updates:
    """What to add to params to stand on the target, in the params' dtype."""
    return jax.tree.map(
        lambda t, p: (t - p.astype(t.dtype)).astype(p.dtype), target, params
    )


def _more_of(walk, memory, go_on, num_groups):
    """The body of the loop over a walk's further gradients, while it wants any."""

    def body(carry, batch):
        progress, aux, taken = carry
        if walk.ends is None:
            return (*go_on(progress, aux, batch), taken + 1), None
        inner = progress.inner
        if num_groups > 1:
            inner = trees.mean_of_groups(inner)
        ended = walk.ends(memory, inner)  # of all groups together
        progress, aux = either(ended, _stay, go_on, progress, aux, batch)
        return (progress, aux, jnp.where(ended, taken, taken + 1)), None

    return body


def _stay(progress, aux, batch):
    del batch
    return progress, aux


def _loop(body, carry, xs, *, length, unroll, fast_convolutions):
    """`jax.lax.scan` without outputs; Python's loop for one step, or untraced.

    Where nothing is traced a scan would be compiled anew at every call, because `body`
    is a new function. A single step needs no loop.
    """
    if length > 1 and trees.is_traced((carry, xs)):
        body = convolutions.fast_if(fast_convolutions, body)
        return jax.lax.scan(body, carry, xs, length=length, unroll=unroll)[0]
    for i in range(length):
        carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry


def either(condition, on_true, on_false, *operands):
    """`jax.lax.cond`; Python's choice where nothing is traced, see `_loop`."""
    if trees.is_traced((condition, operands)):
        return jax.lax.cond(condition, on_true, on_false, *operands)
    return (on_true if condition else on_false)(*operands)


def _check_batches(memory, batches, length, num_groups):
    """The minibatches of all gradients but the first."""
    if batches is None and (num_groups == 1 or length == 1):
        return None
    if batches is None:
        raise ValueError(
            f"`batches` must be passed to `update` with num_groups={num_groups}: every "
            "group evaluates its own samples. Give those of all gradients but the "
            f"first, with leading axes [L - 1, {num_groups}]; make_train_step(..., "
            f"num_groups={num_groups}) does so itself."
        )
    if one_minibatch(memory):
        batches = jax.tree.map(functools.partial(_repeated, length - 1), batches)
    checks.leading_axis(batches, length - 1)
    for leaf in jax.tree.leaves(batches):
        if num_groups > 1 and jnp.shape(leaf)[1:2] != (num_groups,):
            raise ValueError(
                f"`batches` must have the leading axes [L - 1, {num_groups}] with "
                f"num_groups={num_groups}, got shape {jnp.shape(leaf)}. Split every "
                "minibatch into groups along a new axis."
            )
    return batches


def _repeated(length, leaf):
    """A stack of one minibatch serves all gradients of a walk on one minibatch."""
    shape = jnp.shape(leaf)
    return leaf if shape[:1] != (1,) else jnp.broadcast_to(leaf, (length, *shape[1:]))


def _walker(walk, inner_transform, skip_nonfinite):
    checks.integer("walk.length", walk.length, 1)
    if inner_transform is None:
        inner_transform = optax.identity()
    inner_transform = checks.transformation("inner_transform", inner_transform)
    return _Walker(walk, inner_transform, skip_nonfinite)


def _gradient_function(
    grad_fn, value_fn, threads_aux, length, *, numbered
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """`(point, batch, aux) -> (grads, aux)` from what the caller passed."""
    if grad_fn is not None and numbered:
        grad_fn = functools.partial(_with_number, grad_fn)
    if grad_fn is not None and threads_aux:
        return functools.partial(_with_aux, grad_fn)
    if grad_fn is not None:
        return lambda point, batch, aux: (grad_fn(point, batch), aux)
    if value_fn is not None:
        return lambda point, batch, aux: (jax.grad(value_fn)(point), aux)
    raise ValueError(
        f"`grad_fn` must be passed to `update` in scanned mode: this method needs "
        f"{length} gradients per update and was given one. Call tx.update(grads, "
        "opt_state, params, grad_fn=lambda params, batch: jax.grad(loss)(params, "
        "batch), batches=...), use optax_flat.training.make_train_step, or build the "
        'optimizer with mode="transparent". (Flax\'s TrainState drops the argument: '
        "use optax_flat.training.TrainState.)"
    )


def _with_aux(grad_fn, point, batch, aux):
    out = grad_fn(point, batch, aux)
    if not isinstance(out, tuple) or len(out) != 2:
        raise ValueError(
            "`grad_fn` must return (grads, aux) where `update` is given `aux` or the "
            f"optimizer was made with has_aux=True, got {jax.tree.structure(out)}. "
            "Return both (give has_aux=True to make_train_step as well), or leave "
            "`aux` and has_aux out in both places."
        )
    return out


def _with_number(grad_fn, point, number, *aux):
    """`grad_fn` with the number of the gradient, where there are no `batches`."""
    try:
        return grad_fn(point, number, *aux)
    except (AttributeError, LookupError, TypeError) as error:
        # What comes of using a number as a minibatch. All others are the user's own.
        raise TypeError(
            "`update` was given `grad_fn` without `batches`, so `grad_fn(params, i)` "
            "got the number of the gradient, a traced int, as its batch, and raised "
            f"{type(error).__name__}. Give `batches=`, the minibatches of all "
            "gradients but the first, stacked along a leading axis, or a `grad_fn` "
            "that looks its minibatch up by number."
        ) from error


def _takes_extra_args(function) -> bool:
    """Whether it has a parameter such as ``**extra_args``."""
    kinds = (p.kind for p in inspect.signature(function).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _for_walk(extra_args, params, num_groups=1):
    """Extra arguments for optimizers that see the params as a walk does."""

    def to_caller(point):
        return trees.where_finite(params, trees.cast_like(point, params), params)

    arguments = translated(extra_args, to_caller, trees.accumulator)
    if arguments.get("grad") is not None:
        grads = arguments["grad"]
        grads = trees.mean_of_groups(grads) if num_groups > 1 else grads
        arguments["grad"] = trees.accumulator(trees.where_finite(params, grads))
    return arguments


def _first_point(state, params):
    """Where the walk of a `TransparentState` started, in the params' dtype."""

    def place(first, p, missed):
        here = (p.astype(missed.dtype) + missed).astype(p.dtype)
        return jnp.where(state.step == 0, here, first)

    return trees.map_selected(place, state.first_point, params, state.missed)


def _missed(missed, param):
    """What a state keeps of it, see `TransparentState`."""
    is_narrow = jnp.finfo(param.dtype).bits < 32
    return missed.astype(jnp.float32) if is_narrow else jnp.zeros([], param.dtype)


def _within_reach(point, first_point):
    """The point, no farther from the first one than there is a way back from.

    x + (first - x) is off by the spacing of numbers as large as x: here by less than
    2^-20 of the entry, or of 1 where that is more.
    """

    def clip(x, first):
        farthest = max(8.0, 2.0**-20 / float(jnp.finfo(x.dtype).eps))
        reach = farthest * jnp.maximum(jnp.abs(first), 1.0)
        return jnp.clip(x, first - reach, first + reach)

    return jax.tree.map(clip, point, first_point)


def _check_no_walk(**arguments):
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f"`{name}` was passed to `update` in transparent mode, which takes one "
                "gradient per call and asks for no other. Leave it out and call "
                "`update` once per gradient, or build the optimizer with "
                'mode="scanned".'
            )


def _check_placeholders(params, function):
    """`optax.masked` hides leaves that the user's function needs; ours merges them."""
    if states(params, optax.MaskedNode) and not hasattr(function, "merges_frozen"):
        raise ValueError(
            "the params hold optax.MaskedNode placeholders that `grad_fn` cannot use: "
            'optax.masked and optax.partition work with mode="transparent" only. In '
            "scanned mode use optax_flat.masked."
        )


def _anchor(memory, first_point):
    anchor, offset = first_point, getattr(memory, "offset", None)
    if offset is not None:
        anchor = trees.map_selected(
            lambda o, p: (p.astype(o.dtype) + o).astype(p.dtype), offset, first_point
        )
    return evaluated(memory, anchor)  # the walk's outer optimizer may know better
