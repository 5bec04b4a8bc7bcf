r"""Local entropy: Entropy-SGD and Entropy-Adam.

Instead of the loss f, descend its local entropy, the log-volume of low loss around x:

    F(x, gamma) = log integral exp(-f(x') - gamma/2 ||x - x'||^2) dx'

Wide valleys have more of it than sharp ones. Its gradient needs only the mean <x'> of
the Gibbs distribution in the integral, -grad F = gamma (x - <x'>), and a short Langevin
walk estimates that mean. One outer update is

    gamma_t = gamma (1 + scoping)^t,   t = 0, 1, 2, ... counts outer updates
    x' = mu = x
    repeat num_steps times, each with a new minibatch:
        x' <- x' - step_size (g(x') + gamma_t (x' - x)) + sqrt(step_size) noise z
        mu <- (1 - averaging) mu + averaging x'
    d = x - mu   goes to the outer optimizer as its gradient

where z has mean 0 and variance 1. gamma is left out of d: gamma (x - mu) would grow
with scoping and fight the decay of the learning rate.

Paper: Chaudhari et al., arXiv 1611.01838 (ICLR 2017). Codes: ucla-vision/entropy-sgd
(the authors'), and the Keras package EntropySGD. How we differ from each is at the end
of `entropy_sgd`'s docstring.
"""

import functools
from typing import Annotated, Any, NamedTuple, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat import schedules
from optax_flat._core import checks, keys, modes, trees
from optax_flat._core.arguments import (
    Argument,
    LoopArguments,
    NoiseArguments,
    factory,
)
from optax_flat._core.hyperparams import at, is_zero, scheduled
from optax_flat._core.noise import KINDS, draw_from, first_seed, next_seed
from optax_flat._core.walk import Walk


class WalkArguments(TypedDict, total=False):
    """What every method with this walk takes."""

    num_steps: Annotated[int, Argument(20, "L, inner steps per outer update, >= 1.")]
    step_size: Annotated[
        optax.ScalarOrSchedule, Argument(0.1, "step of the walk, >= 0.")
    ]
    gamma: Annotated[
        optax.ScalarOrSchedule,
        Argument(0.03, "stiffness of the spring that holds the walk near x, >= 0."),
    ]
    scoping: Annotated[
        optax.ScalarOrSchedule,
        Argument(1e-3, "growth of gamma per outer update, > -1."),
    ]
    noise: Annotated[
        optax.ScalarOrSchedule,
        Argument(
            1e-4,
            "inner noise, >= 0; an inner step is displaced by "
            "``sqrt(step_size) * noise * z``, so the walk has the temperature "
            "noise^2 / 2.",
        ),
    ]
    averaging: Annotated[
        optax.ScalarOrSchedule,
        Argument(0.75, "weight of the *new* iterate in the running mean, in (0, 1]."),
    ]
    diagnostics: Annotated[
        bool,
        Argument(
            False,
            "whether the state reports what the authors' code prints in verbose mode: "
            "norms, cosine, distance and gamma, see the example of `local_entropy`.",
        ),
    ]


class LocalEntropyArguments(WalkArguments, LoopArguments, NoiseArguments):
    """All that `local_entropy` takes beside its outer optimizer."""


class Diagnostics(NamedTuple):
    """What the authors' code prints in verbose mode, for the last outer update."""

    metrics = (
        "gradient_norm",
        "local_entropy_gradient_norm",
        "cosine",
        "mean_distance",
        "gamma",
    )

    gradient_norm: jax.Array  # [], ||g||, the first gradient of the walk
    local_entropy_gradient_norm: jax.Array  # [], ||d||, d = x - mu
    cosine: jax.Array  # [], <g, d> / (||g|| ||d||), 0 if either is zero
    mean_distance: jax.Array  # [], mean over the walk of ||x' - x||
    gamma: jax.Array  # [], gamma_t of that update


class LocalEntropyState(NamedTuple):
    """What lives between outer updates."""

    metrics = ("count",)

    count: jax.Array  # int32, [], outer updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the counts
    outer_state: optax.OptState
    diagnostics: Diagnostics | None  # None unless asked for


class _Probe(NamedTuple):
    """What the diagnostics need from a walk."""

    taken: jax.Array  # int32, [], steps taken
    first_gradient: optax.Updates
    distance: jax.Array  # [], sum over the walk of ||x' - x||


class _Inner(NamedTuple):
    """A walk under way; the trees are in the accumulator dtype."""

    # Constant during the walk.
    anchor: optax.Params
    # Changing at every step.
    seed: jax.Array  # uint32, [2], of the next draw
    point: optax.Params
    mean: optax.Params
    probe: _Probe | None


class _Hyperparams(NamedTuple):
    """The numbers of a walk, each a float or a schedule of outer updates."""

    step_size: optax.ScalarOrSchedule
    gamma: optax.ScalarOrSchedule
    scoping: optax.ScalarOrSchedule
    noise: optax.ScalarOrSchedule
    averaging: optax.ScalarOrSchedule

    def gamma_at(self, count: jax.Array) -> Any:
        """gamma_t."""
        return schedules.scoping(at(self.gamma, count), at(self.scoping, count))(count)


def _walk(
    outer: optax.GradientTransformation,
    hyperparams: _Hyperparams,
    *,
    num_steps: int,
    noise_kind: str,
    accumulator_dtype: Any,
    diagnostics: bool,
    key: jax.Array,
) -> Walk:
    noiseless = is_zero(hyperparams.noise)

    def init(params):
        empty = Diagnostics(*jnp.zeros([5])) if diagnostics else None
        outer_state = outer.init(trees.accumulator(params, accumulator_dtype))
        count = jnp.zeros([], jnp.int32)
        return LocalEntropyState(count, keys.data(key), outer_state, empty)

    def start(memory, params):
        x = trees.accumulator(params, accumulator_dtype)
        probe = None
        if diagnostics:
            taken = jnp.zeros([], jnp.int32)
            probe = _Probe(taken, optax.tree.zeros_like(x), jnp.zeros([]))
        seed = first_seed(keys.fold_in(memory.key, memory.count, key), x)
        return _Inner(x, seed, x, x, probe)

    def averaged(memory, inner):
        """The mean with the point where the walk stands."""
        weight = at(hyperparams.averaging, memory.count)
        return jax.tree.map(lambda m, p: m + weight * (p - m), inner.mean, inner.point)

    def step(memory, inner, grads):
        t = memory.count
        # The mean takes each point in when the walk leaves it: XLA would draw the noise
        # twice, for the new point and for its mean. It starts at the first point.
        mean = averaged(memory, inner)
        eta = at(hyperparams.step_size, t)
        # The published step overshoots the anchor when step_size * gamma_t > 1 and
        # diverges above 2, which scoping reaches sooner or later; 1 puts x' back on it.
        spring = jnp.minimum(eta * hyperparams.gamma_at(t), 1.0)
        point = jax.tree.map(
            lambda p, g, x: p - eta * g - spring * (p - x),
            inner.point, grads, inner.anchor,
        )  # fmt: skip
        if not noiseless:
            scale = eta**0.5 * at(hyperparams.noise, t)
            z = draw_from(inner.seed, point, noise_kind, scale)
            point = optax.tree.add(point, z)
        probe = inner.probe
        if probe is not None:
            distance = trees.norm(optax.tree.sub(point, inner.anchor))
            probe = _Probe(
                probe.taken + 1,
                trees.where(probe.taken == 0, grads, probe.first_gradient),
                probe.distance + distance,
            )
        seed = next_seed(inner.seed)
        return _Inner(inner.anchor, seed, point, mean, probe)

    def finish(memory, inner, params, **extra_args):
        d = optax.tree.sub(inner.anchor, averaged(memory, inner))
        updates, outer_state = outer.update(
            d, memory.outer_state, inner.anchor, **extra_args
        )
        report = memory.diagnostics
        if inner.probe is not None:
            g = inner.probe.first_gradient
            report = Diagnostics(
                trees.norm(g),
                trees.norm(d),
                trees.cosine(g, d),
                inner.probe.distance / num_steps,
                hyperparams.gamma_at(memory.count),
            )
        count = jnp.asarray(optax.safe_increment(memory.count))
        return updates, LocalEntropyState(count, memory.key, outer_state, report)

    return Walk(num_steps, init, start, step, finish)


@factory
def local_entropy(
    outer: optax.GradientTransformation,
    **arguments: Unpack[LocalEntropyArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Feeds the local-entropy gradient to any outer optimizer.

    One outer update from the params :math:`x` is

    .. math::
        \begin{align*}
        x' &\leftarrow x' - \eta' (g(x') + \gamma_t (x' - x))
            + \sqrt{\eta'}\,\epsilon z \qquad (L \text{ times, from } x' = \mu = x) \\
        \mu &\leftarrow (1 - \alpha) \mu + \alpha x' \\
        d &= x - \mu
        \end{align*}

    with L = `num_steps`, :math:`\eta'` = `step_size`, :math:`\epsilon` = `noise`,
    :math:`\alpha` = `averaging` and :math:`\gamma_t` = `gamma` (1 + `scoping`)^t; t
    counts outer updates. `outer` is given d in the place of a gradient. Every float may
    be a schedule of t.

    The first gradient is the one given to `update`; scanned mode gets the other L - 1
    from `grad_fn` and `batches` (see `optax_flat.scanned`), transparent mode takes one
    per call (see `optax_flat.transparent`). An outer update spends L gradient
    evaluations, which the state counts in `gradient_evaluations`.

    Cost:
      `num_steps` gradients per update; state: 0 copies of the params (transparent: 4)
      beside `outer`'s.

    Args:
      outer: an Optax optimizer that takes d, e.g. ``optax.sgd(1.0)``. It sees the
        anchor x as params, and all its state is in the accumulator dtype.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      On a quadratic the walk's mean tends to the mean of the Gibbs distribution,
      (H + gamma)^-1 (H c + gamma x), so d tends to a shrunken, preconditioned gradient:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> h, c = jnp.array([4.0, 1.0]), jnp.array([1.0, -2.0])
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(h * (x - c) ** 2) / 2)
      >>> tx = optax_flat.local_entropy(
      ...     optax.sgd(1.0), num_steps=200, gamma=2.0, noise=0.0, diagnostics=True,
      ...     key=0)
      >>> x = jnp.zeros(2)
      >>> updates, state = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
      >>> bool(jnp.allclose(updates, h * c / (h + 2.0), atol=1e-5))
      True
      >>> report = optax.tree.get(state, "diagnostics")
      >>> bool(report.cosine > 0.9)
      True

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent Into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, 2017.

    Differs from the paper:
      The spring's step is cut at the anchor: ``min(step_size * gamma_t, 1)``. Below 1
      that is the paper's formula; above, the paper's walk overshoots and, from 2 on,
      diverges, which the default scoping reaches after 6,500 outer updates.
    """
    outer = checks.transformation("outer", outer)
    numbers = _Hyperparams(*(arguments[name] for name in _Hyperparams._fields))
    checks.number("step_size", numbers.step_size, 0.0)
    checks.number("gamma", numbers.gamma, 0.0)
    checks.number("scoping", numbers.scoping, -1.0, open_low=True)
    checks.number("noise", numbers.noise, 0.0)
    checks.number("averaging", numbers.averaging, 0.0, 1.0, open_low=True)
    dtype = arguments["accumulator_dtype"]
    walk = _walk(
        outer,
        numbers,
        num_steps=checks.integer("num_steps", arguments["num_steps"], 1),
        noise_kind=checks.choice("noise_kind", arguments["noise_kind"], KINDS),
        accumulator_dtype=checks.float_dtype("accumulator_dtype", dtype),
        diagnostics=checks.flag("diagnostics", arguments["diagnostics"]),
        key=checks.key(arguments["key"]),
    )
    return modes.build(walk, arguments)


@factory
def entropy_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: optax.ScalarOrSchedule = 0.0,
    nesterov: bool = False,
    **walk: Unpack[LocalEntropyArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-SGD: gradient descent on the local entropy of the loss.

    .. math::
        x \leftarrow x - \eta\, \mathrm{momentum}(x - \mu)

    with :math:`\eta` = `learning_rate` and :math:`\mu` the mean of the Langevin walk of
    `local_entropy`, which spends `num_steps` gradients per update. Since x - mu is a
    displacement, a learning rate of 1 moves x onto the mean; the authors use 1, then
    0.1.

    Cost:
      `num_steps` gradients per update; state: 0 copies of the params (transparent: 4).

    Args:
      learning_rate: step of the outer update, >= 0.
      momentum: decay of the outer momentum, in [0, 1]; 0 keeps no buffer.
      nesterov: whether the outer momentum is Nesterov's.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      Without noise and spring, and with the last iterate as mean, this is Lookahead
      around SGD; with one step it is SGD:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: jnp.sum(jnp.cosh(x - 0.5)))
      >>> tx = optax_flat.entropy_sgd(
      ...     0.5, num_steps=1, step_size=0.2, gamma=0.0, noise=0.0, averaging=1.0,
      ...     key=0)
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> updates, _ = tx.update(grad_fn(x, 0), tx.init(x), x)
      >>> bool(jnp.allclose(updates, -0.5 * 0.2 * grad_fn(x, 0), atol=1e-6))
      True

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent Into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, 2017.

    Coming from the Keras package EntropySGD (class ``EntropySgd``):

      ============== ========================================================
      its argument   ours
      ============== ========================================================
      lr             learning_rate
      sgld_step      step_size
      L              num_steps
      gamma          gamma
      sgld_noise     noise
      alpha          averaging
      scoping        scoping
      momentum       momentum
      nesterov       nesterov
      decay          ``learning_rate=lambda t: lr / (1 + decay * t)``
      ============== ========================================================

      The defaults of the walk are the same. Faults of that package that we do not have:
      gamma grows once per outer update here, not once per inner minibatch and tensor;
      `decay` counts outer updates, not minibatches; an outer update costs `num_steps`
      gradients, not about `num_steps` + 2; iterate and mean are updated in a fixed
      order.

    Coming from ucla-vision/entropy-sgd:

      ================== ====================================================
      its option         ours
      ================== ====================================================
      lr                 learning_rate
      L                  num_steps
      gamma, g0          gamma
      scoping, g1        scoping
      noise, eps         ``noise = sqrt(2) * eps``
      langevin lr (0.1)  step_size
      beta1 (0.75)       ``averaging = 1 - beta1``; beta1 weights the *old* mean
      L2, weight_decay   ``inner_transform=optax.add_decayed_weights(L2)``, and in
                         the Python code also in front of the outer step:
                         ``local_entropy(optax.chain(
                         optax.add_decayed_weights(L2), optax.sgd(...)), ...)``
      inner Nesterov     ``inner_transform=optax.trace(0.9, nesterov=True)``, in an
                         `optax.chain` behind the weight decay (Python code) or in
                         front of it (Lua code)
      outer Nesterov     ``momentum=0.9, nesterov=True`` (Python code only)
      ================== ====================================================

      Faults of those codes that we do not have: the Python code never advances t, so
      scoping does nothing there, and starts the outer momentum at a raw loss gradient,
      which lives on another scale than x - mu (ours starts at zero); both compute a
      gradient at x and discard it, so that L reported evaluations cost L + 1; without
      Nesterov both add spring and noise into the inner momentum buffer, and the Lua
      code without momentum drops the loss gradient altogether.

    Differs from the paper:
      As `local_entropy`. The weight of the new iterate, 0.75, is the paper's; the
      authors' code uses 0.25.
    """
    return local_entropy(
        momentum_sgd(learning_rate, momentum, nesterov),
        **walk,
    )


@factory
def entropy_adam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    amsgrad: bool = False,
    **walk: Unpack[LocalEntropyArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Entropy-Adam: Adam on the local entropy of the loss.

    .. math::
        x \leftarrow x - \eta\, \mathrm{Adam}(x - \mu)

    with :math:`\eta` = `learning_rate` and :math:`\mu` the mean of the Langevin walk of
    `local_entropy`, which spends `num_steps` gradients per update. The bias correction
    counts outer updates.

    A parameter without a gradient (the embedding of a word that no minibatch has, a
    dead unit) has only the walk's noise in x - mu, and Adam makes full steps of it: it
    walks at random, by about the learning rate per update, however small the noise is.
    With ``noise=0`` it stays; so it nearly does with an `eps` far above
    ``sqrt(step_size * num_steps) * noise``, which damps small gradients as well.

    Cost:
      `num_steps` gradients per update; state: 2 copies of the params (transparent: 6).

    Args:
      learning_rate: step of the outer update, >= 0.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, > 0.
      amsgrad: whether the largest second moment so far is used (`optax.amsgrad`).

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      The first update of Adam has the size of the learning rate, whatever the scale:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> grad_fn = jax.grad(lambda x, batch: 7.0 * jnp.sum(jnp.cosh(x - 0.5)))
      >>> tx = optax_flat.entropy_adam(0.01, num_steps=5, key=0)
      >>> x = jnp.array([1.0, -1.0, 2.0])
      >>> updates, _ = tx.update(grad_fn(x, 0), tx.init(x), x, grad_fn=grad_fn)
      >>> bool(jnp.allclose(updates, -0.01 * jnp.sign(x - 0.5), rtol=1e-4))
      True

    References:
      Chaudhari et al., `Entropy-SGD: Biasing Gradient Descent Into Wide Valleys
      <https://arxiv.org/abs/1611.01838>`_, 2017.

    Coming from the Keras package EntropySGD (class ``EntropyAdam``):
      beta_1 is b1, beta_2 is b2, amsgrad is amsgrad, the rest as in `entropy_sgd`.
      There the bias correction counts minibatches and so fades about `num_steps` times
      too early; here it counts outer updates.
      Keras' amsgrad keeps the largest raw second moment, `optax.amsgrad` the largest
      bias-corrected one.

    Differs from the paper:
      As `local_entropy`. The paper gives Entropy-Adam in words only.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("b1", b1, 0.0, 1.0, open_high=True)
    checks.number("b2", b2, 0.0, 1.0, open_high=True)
    checks.number("eps", eps, 0.0, open_low=True)
    outer = scheduled(
        optax.amsgrad if amsgrad else optax.adam,
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
    )
    return local_entropy(
        outer,
        **walk,
    )


def momentum_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: optax.ScalarOrSchedule,
    nesterov: bool,
) -> optax.GradientTransformation:
    """The outer optimizer of Entropy-SGD and of Parle."""
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("momentum", momentum, 0.0, 1.0)
    return scheduled(
        functools.partial(optax.sgd, nesterov=checks.flag("nesterov", nesterov)),
        learning_rate=learning_rate,
        momentum=None if is_zero(momentum) else momentum,
    )
