r"""Sharpness-aware minimization: the gradient at a worse point nearby.

    g   = grad f(w)
    g_r = grad f(w + rho a),     a: what the rule `ascent` makes of g
    w   <- outer optimizer(d),   d: what the rule `descent` makes of g and g_r

both on the same minibatch. A minimum whose neighborhood is bad is not one that this
finds. The rules are data: see `optax_flat.ascent` and `optax_flat.descent`, and
`sam_variants.py` for the named methods, each of which is a pair of them.

Paper: Foret et al., arXiv 2010.01412 (ICLR 2021).
"""

from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat import ascent as rules
from optax_flat import descent as descents
from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import Argument, LoopArguments, factory
from optax_flat._core.hyperparams import at
from optax_flat._core.walk import Walk


class _OwnArguments(TypedDict, total=False):
    mask: Annotated[
        Any,
        Argument(
            None,
            "which leaves are perturbed, and make up the norm: a tree of bools like "
            "the params, or a prefix of one, or a function that makes it from the "
            "params. None is all. With the normalization parameters only this is "
            "SAM-ON.",
        ),
    ]
    num_groups: Annotated[
        int,
        Argument(
            1,
            "m-SAM, scanned mode only: into how many groups every minibatch is split, "
            "each with a perturbation of its own; see `optax_flat.scanned` and "
            "``make_train_step(..., num_groups=...)``. Smaller groups generalize "
            "better, say the papers. Nothing may stand in front of this method in a "
            "chain then, for it would see the groups' gradients stacked: use "
            "`inner_transform` and `outer`.",
        ),
    ]


class SAMArguments(_OwnArguments, LoopArguments):
    """What every method of the family takes."""


class SAMState(NamedTuple):
    """What lives between outer updates."""

    metrics = ("count",)
    one_minibatch = True  # both gradients belong to it; `make_train_step` reads this

    count: jax.Array  # int32, [], outer updates made
    outer_state: optax.OptState
    ascent_state: Any
    descent_state: Any


class _Inner(NamedTuple):
    """One update under way; the trees are in the accumulator dtype."""

    taken: jax.Array  # int32, [], gradients consumed
    point: optax.Params
    first: Any  # that at the params, once there is another; None where not needed
    latest: optax.Updates
    ascent_state: Any


@factory
def sam(
    outer: optax.GradientTransformation,
    *,
    rho: optax.ScalarOrSchedule = 0.05,
    ascent: optax.GradientTransformation | None = None,
    descent: descents.Descent | None = None,
    **arguments: Unpack[SAMArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""SAM, and with other rules any method of its family.

    .. math::
        g_r = \nabla f\!\left(w + \rho \frac{g}{\|g\|}\right), \qquad
        w \leftarrow \mathrm{Outer}(g_r)

    with :math:`\rho` = `rho`. One update costs two gradients, *both on the same
    minibatch*: `make_train_step` takes one minibatch, not a stack of two, and sees to
    it. By hand, in scanned mode::

        grad_fn = lambda params, _: jax.grad(loss)(params, batch)
        tx.update(grads, state, params, grad_fn=grad_fn)

    and in transparent mode call `update` twice with it.

    Cost:
      2 gradients per update; state: 0 copies of the params (transparent: 3) beside
      `outer`'s.

    Args:
      outer: an Optax optimizer. Its weight decay acts at w; an L2 penalty that is to
        enter the perturbation too belongs into the loss or into `inner_transform`.
      rho: the radius, >= 0, in units of the params; 0 is `outer`.
      ascent: a rule of `optax_flat.ascent`, or any Optax transformation, that makes the
        perturbation of the gradient; None is `ascent.unit()`.
      descent: a rule of `optax_flat.descent`; None is `descent.perturbed()`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or a rule of `descent` with
        only one of `wants_second` and `alone`.
      TypeError: an argument of the wrong type.

    Example:
      On f = h x^2 / 2 the gradient comes from h (x + rho sign(x)):

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: 3.0 * x ** 2 / 2)
      >>> tx = optax_flat.sam(optax.sgd(1.0), rho=0.5)
      >>> x = jnp.array(-2.0)
      >>> updates, _ = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
      >>> float(updates)
      7.5

    References:
      Foret, Kleiner, Mobahi and Neyshabur, `Sharpness-Aware Minimization for
      Efficiently Improving Generalization <https://arxiv.org/abs/2010.01412>`_, 2021.

    Differs from the paper:
      Nothing, with `num_groups` 1. Without a gradient there is no perturbation, where
      google-research/sam divides 0 by 0; that code also clips the averaged gradient to
      norm 5. `optax.contrib.sam` alternates two optimizers on two minibatches in its
      transparent mode, and lets NaN through; docs/methods/sam.md has a table.
    """
    outer = checks.transformation("outer", outer)
    checks.number("rho", rho, 0.0)
    ascent = checks.transformation("ascent", rules.unit() if ascent is None else ascent)
    descent = descents.perturbed() if descent is None else descent
    if not isinstance(descent, descents.Descent):
        raise TypeError(
            "`descent` must be a rule of optax_flat.descent such as "
            f"descent.surrogate_gap(0.4), got {descent!r}."
        )
    if (descent.wants_second is None) != (descent.alone is None):
        raise ValueError(
            "a rule of `descent` needs both `wants_second` and `alone`, what it makes "
            "of g where no g_r is wanted, or neither: got "
            f"wants_second={descent.wants_second!r} and alone={descent.alone!r}."
        )
    walk = _walk(
        outer,
        ascent,
        descent,
        rho=rho,
        mask=arguments["mask"],
        accumulator_dtype=arguments["accumulator_dtype"],
    )
    return modes.build(walk, arguments, arguments["num_groups"])


def _walk(outer, ascent, descent, *, rho, mask, accumulator_dtype):
    def init(params):
        w = trees.accumulator(params, accumulator_dtype)
        _selected(w, mask, w)  # raises where the mask does not fit
        count = jnp.zeros([], jnp.int32)
        return SAMState(count, outer.init(w), ascent.init(w), descent.init(w))

    def start(memory, params):
        w = trees.accumulator(params, accumulator_dtype)
        zeros = optax.tree.zeros_like(w)
        first = zeros if descent.keeps_first else None
        return _Inner(jnp.zeros([], jnp.int32), w, first, zeros, memory.ascent_state)

    def step(memory, inner, grads):
        del memory
        # Chosen before the program runs; in `jax.shard_map` the types vary over devices
        # as the gradient's from here on, whether there is a second one or not.
        point, first = trees.where(True, inner.point, grads), inner.first
        if descent.keeps_first:
            first = trees.where(True, first, grads)
        return inner._replace(
            taken=inner.taken + 1, point=point, first=first, latest=grads
        )

    def move(memory, inner):
        grads = inner.latest
        a, ascent_state = ascent.update(
            _selected(grads, mask, inner.point), inner.ascent_state, inner.point
        )
        radius = at(rho, memory.count)
        return _Inner(
            inner.taken,
            jax.tree.map(lambda w, a: w + radius * a, inner.point, a),
            grads if descent.keeps_first else None,
            grads,
            ascent_state,
        )

    def combined(memory, inner):
        grads = descents.Gradients(inner.first, inner.latest)
        state = memory.descent_state
        made = descent.combine(state, grads, memory.count)
        return _typed(made, inner.latest, state)

    def alone(memory, inner):
        state, g = memory.descent_state, inner.latest
        return _typed(descent.alone(state, g, memory.count), g, state)

    def finish(memory, inner, params, **extra_args):
        if descent.wants_second is None:
            gradient, shift, state = combined(memory, inner)
        else:
            gradient, shift, state = modes.either(
                inner.taken > 1, combined, alone, memory, inner
            )
        w = trees.accumulator(params, accumulator_dtype)
        updates, outer_state = outer.update(
            gradient, memory.outer_state, w, **extra_args
        )
        if shift is not None:
            updates = optax.tree.add(updates, shift)
        count = jnp.asarray(optax.safe_increment(memory.count))
        return updates, SAMState(count, outer_state, inner.ascent_state, state)

    def ends(memory, inner):
        wanted = descent.wants_second(memory.descent_state, inner.latest, memory.count)
        return jnp.logical_not(wanted)

    if descent.wants_second is None:
        return Walk(2, init, start, step, finish, move=move)
    return Walk(2, init, start, step, finish, ends, move)


def _typed(made, grads, state):
    """What a rule made, in the types of the gradients and of its state."""
    shift = made.shift if made.shift is None else trees.cast_like(made.shift, grads)
    return descents.Combined(
        trees.cast_like(made.gradient, grads), shift, trees.cast_like(made.state, state)
    )


def _selected(grads, mask, params):
    """Zeros where nothing is to be perturbed."""
    if mask is None:
        return grads
    return jax.tree.map(
        lambda flag, g: g if flag else jnp.zeros_like(g),
        rules.selection(mask, params), grads,
    )  # fmt: skip
