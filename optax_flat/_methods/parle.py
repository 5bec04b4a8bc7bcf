r"""Parle and elastic averaging: replicas of a model, pulled to their mean.

Every replica x_a takes its own way, on minibatches of its own; a spring to their center
c keeps them together. With d_a the gradient of replica a, or what a walk makes of L
gradients (x_a - mu_a in Parle), one update is

    x_a <- outer optimizer(d_a + coupling (x_a - c))
    c   <- c + center_step (mean_a x_a - c)

The center needs the replicas once per update, however many gradients a walk takes, so
devices speak to each other that seldom.

A replica is an ordinary model with an ordinary training step, and the replica axis a
*named axis* around it: `jax.vmap(step, axis_name="replica")` on one device, on many the
same with that axis sharded, or `jax.shard_map`. So params, gradients and minibatches
need no convention of their own, the first gradient is each replica's own, and the mean
is one `jax.lax.pmean`.

Papers: Chaudhari et al., arXiv 1707.00424 (Parle); Zhang et al., arXiv 1412.6651
(EASGD). Code: ucla-vision/parle. How we differ is at the end of the docstrings.
"""

from collections.abc import Hashable
from typing import Annotated, Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, modes, trees
from optax_flat._core.arguments import Argument, factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at
from optax_flat._methods import local_entropy as walks


class ElasticAveragingState(NamedTuple):
    """What lives between updates."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    # c - x_a, at least float32. The center itself would be the same for all replicas,
    # and would be kept n times on every device.
    offset: optax.Params
    outer_state: optax.OptState

    def eval_params(self, params: optax.Params) -> optax.Params:
        """The center, in the params' dtype."""
        return trees.map_selected(
            lambda o, p: (p + o).astype(p.dtype), self.offset, params
        )


class ParleArguments(walks.LocalEntropyArguments, total=False):
    """Those of `local_entropy`, with the defaults of Parle's authors."""

    num_steps: Annotated[int, Argument(25, "L, inner steps per outer update, >= 1.")]
    gamma: Annotated[
        optax.ScalarOrSchedule,
        Argument(
            0.01, "stiffness of the spring that holds a walk near its replica, >= 0."
        ),
    ]
    noise: Annotated[
        optax.ScalarOrSchedule,
        Argument(0.0, "inner noise, >= 0; each replica draws its own."),
    ]
    averaging: Annotated[
        optax.ScalarOrSchedule,
        Argument(0.25, "weight of the *new* iterate in the running mean, in (0, 1]."),
    ]
    mode: Annotated[
        str,
        Argument(
            "scanned",
            '"scanned" or "transparent", see `local_entropy`. Under `jax.vmap` '
            "transparent mode computes an outer update at every gradient, and uses one "
            "of `num_steps`.",
        ),
    ]


@factory
def elastic_averaging(
    outer: optax.GradientTransformation,
    *,
    coupling: optax.ScalarOrSchedule,
    center_step: optax.ScalarOrSchedule = 1.0,
    accumulator_dtype: Any = None,
    axis_name: Hashable | None,
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer, run by several replicas that are pulled to their center.

    .. math::
        \begin{align*}
        x_a &\leftarrow \mathrm{Outer}(g_a + \kappa (x_a - c)) \\
        c &\leftarrow c + \beta\, (\mathrm{mean}_a\, x_a - c)
        \end{align*}

    with :math:`\kappa` = `coupling` and :math:`\beta` = `center_step`. Each replica
    spends one gradient per update. `init` and `update` are one replica's, and must be
    called where the replica axis has a name: inside ``jax.vmap(..., axis_name=...)``,
    or inside `jax.shard_map` over a mesh axis of that name. `eval_params`, under
    `jax.vmap` like them but without need of the name, gives the center.

    As the outer optimizer of a walk it couples replicas of that walk, which then speak
    to each other once per walk: `parle` is
    ``local_entropy(elastic_averaging(optax.sgd(...), ...), ...)``.

    Cost:
      1 gradient per update; state: 1 copy of the params beside `outer`'s.

    Args:
      outer: an Optax optimizer of one gradient per update. All its state is in the
        accumulator dtype.
      coupling: stiffness of the spring to the center, >= 0. SGD of the learning rate r
        puts a replica onto the center where ``r * coupling`` is 1, and diverges from 2
        on.
      center_step: how far the center goes to the replicas' mean, in (0, 1]; 1 makes it
        that mean, less remembers former ones.
      accumulator_dtype: dtype of center and `outer`; None is at least float32.
      axis_name: the name of the replica axis, or a tuple of several; None for a single
        replica, which is its own mean.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; in `init`, an axis that has
        no such name there, or an `outer` that is itself a walk.
      TypeError: an argument of the wrong type.

    Example:
      Three replicas of a scalar. Their mean goes down the mean gradient; coupling takes
      1 - r (h + coupling) of what tells them apart:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.elastic_averaging(
      ...     optax.sgd(0.1), coupling=4.0, axis_name="replica")
      >>> def step(x, state):
      ...     updates, state = tx.update(2.0 * x, state, x)  # h = 2
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([-1.0, 1.0, 3.0])
      >>> state = jax.vmap(tx.init, axis_name="replica")(x)
      >>> x, state = jax.vmap(step, axis_name="replica")(x, state)
      >>> bool(jnp.allclose(x, 0.8 + 0.4 * jnp.array([-2.0, 0.0, 2.0])))
      True
      >>> bool(jnp.allclose(jax.vmap(optax_flat.eval_params)(state, x), 0.8))
      True

    References:
      Zhang, Choromanska and LeCun, `Deep learning with Elastic Averaging SGD
      <https://arxiv.org/abs/1412.6651>`_, 2015.

    Differs from the paper:
      There :math:`\beta = n \eta \kappa` and the center moves with the replicas' old
      places; here it moves with their new ones, so that with :math:`\beta = 1` it is
      their mean and not the mean before. The paper communicates every tau steps of
      SGD: that is `parle` with ``num_steps=tau``, learning rate and `averaging` 1,
      `gamma` 0, and the coupling times the step size.
    """
    outer = checks.transformation("outer", outer)
    checks.number("coupling", coupling, 0.0)
    checks.number("center_step", center_step, 0.0, 1.0, open_low=True)
    checks.float_dtype("accumulator_dtype", accumulator_dtype)

    def init(x):
        outer_state = outer.init(x)
        if modes.states(outer_state, modes.ScannedState | modes.TransparentState):
            raise ValueError(
                "`outer` is a walk of several gradients, and the spring would act on "
                "the first of them only. Give elastic_averaging to the walk instead: "
                "optax_flat.local_entropy(elastic_averaging(optax.sgd(...), ...), ...)."
            )
        offset = optax.tree.sub(_replica_mean(x, axis_name), x)
        return ElasticAveragingState(jnp.zeros([], jnp.int32), offset, outer_state)

    def step(state, grads, x, **extra_args):
        checks.float_params(x)
        spring = at(coupling, state.count)
        pulled = jax.tree.map(lambda g, o: g - spring * o, grads, state.offset)
        steps, outer_state = outer.update(
            trees.cast_like(pulled, x), state.outer_state, x, **extra_args
        )
        moved = optax.tree.add(x, steps)
        center = optax.incremental_update(
            _replica_mean(moved, axis_name),
            optax.tree.add(x, state.offset),
            at(center_step, state.count),
        )
        offset = optax.tree.sub(center, moved)
        return steps, ElasticAveragingState(counted(state.count), offset, outer_state)

    return by_gradient(init, step, accumulator_dtype=accumulator_dtype)


@factory
def parle(
    learning_rate: optax.ScalarOrSchedule,
    *,
    coupling: optax.ScalarOrSchedule = 0.75,
    center_step: optax.ScalarOrSchedule = 1.0,
    momentum: optax.ScalarOrSchedule = 0.9,
    nesterov: bool = False,
    axis_name: Hashable | None,
    **walk: Unpack[ParleArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Parle: replicas of Entropy-SGD, pulled to their mean once per walk.

    .. math::
        \begin{align*}
        x_a &\leftarrow x_a - \eta\, \mathrm{momentum}(x_a - \mu_a + \kappa (x_a - c))\\
        c &\leftarrow c + \beta\, (\mathrm{mean}_a\, x_a - c)
        \end{align*}

    with :math:`\eta` = `learning_rate`, :math:`\mu_a` the mean of replica a's own walk
    of `local_entropy`, :math:`\kappa` = `coupling` and :math:`\beta` = `center_step`,
    as in `elastic_averaging`. Each replica spends `num_steps` gradients per update, and
    the replicas exchange one model per update, in one all-reduce.

    `init` and `update` are one replica's, and must be called where the replica axis has
    a name: inside ``jax.vmap(..., axis_name=...)``, or inside `jax.shard_map` over a
    mesh axis of that name. The key is the same for all replicas: each folds its index
    in. Everything else is as with `entropy_sgd`.
    ``jax.vmap(eval_params)`` gives the mean of the replicas, once for each of them;
    batch statistics must be re-estimated there. With `skip_nonfinite` all replicas skip
    the update in which one of them became non-finite.

    Cost:
      `num_steps` gradients per update; state: 2 copies of the params (transparent: 6).

    Args:
      learning_rate: step of the outer update, >= 0.
      coupling: stiffness of the spring to the mean, >= 0; see `elastic_averaging`.
      center_step: how far the center goes to the replicas' mean, in (0, 1].
      momentum: decay of the outer momentum, in [0, 1]; 0 keeps no buffer.
      nesterov: whether the outer momentum is Nesterov's.
      axis_name: the name of the replica axis, or a tuple of several; None for a single
        replica.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range, or a `key` that is none; in `init`, an
        axis that has no such name there.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      Three replicas, each with four minibatches of its own per update:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> from optax_flat.training import make_train_step
      >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
      >>> tx = optax_flat.parle(0.5, num_steps=4, axis_name="replica", key=0)
      >>> step = jax.vmap(make_train_step(loss_fn, tx), axis_name="replica")
      >>> params = jnp.broadcast_to(jnp.array([1.0, -1.0]), (3, 2))
      >>> opt_state = jax.vmap(tx.init, axis_name="replica")(params)
      >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 8, 2)) + 5.0
      >>> for _ in range(40):
      ...     params, opt_state, loss = step(params, opt_state, batches)
      >>> means = jax.vmap(optax_flat.eval_params)(opt_state, params)  # three equal
      >>> bool(jnp.allclose(means, jnp.mean(params, axis=0), atol=1e-5))
      True

    References:
      Chaudhari, Baldassi, Zecchina, Soatto, Talwalkar and Oberman, `Parle:
      parallelizing stochastic gradient descent <https://arxiv.org/abs/1707.00424>`_,
      2017.

    Differs from the paper:
      The paper divides by its gamma and rho; as in the authors' code, `gamma` and
      `coupling` multiply. That code scales both with the updates t, for n replicas and
      nb minibatches per epoch: with ``growth = 1 + 0.5 / nb``,
      ``gamma=optax.exponential_decay(0.01, 1, growth, end_value=1.0)`` with `scoping` 0
      and ``coupling=optax.exponential_decay(0.01 * num_steps * n, 1, growth,
      end_value=10.0)``. The default coupling is its first value for three replicas.
      Neither paper nor code has noise.

      Faults of parle_mpi.py that we do not have: its momentum adds the gradient with
      the weight 1 to a buffer that already has it, so that the first step is twice too
      long; the outer step starts from the end of the walk, not from x_a; the mean of
      the walk is never set back to x_a; the coupling uses the mean of the walks' means,
      where its README says that of the x_a; t advances once per array of parameters.
    """
    key = checks.key(walk["key"])
    outer = elastic_averaging(
        walks.momentum_sgd(learning_rate, momentum, nesterov),
        coupling=coupling,
        center_step=center_step,
        accumulator_dtype=walk["accumulator_dtype"],
        axis_name=axis_name,
    )

    def with_key(key):
        return walks.local_entropy(outer, **{**walk, "key": key})

    def init(params):
        own = key
        if axis_name is not None:
            own = jax.random.fold_in(key, _replica_index(axis_name))
        return with_key(own).init(params)

    return optax.GradientTransformationExtraArgs(init, with_key(key).update)


def _replica_mean(tree: Any, axis_name: Hashable | None) -> Any:
    if axis_name is None:
        return tree
    _replica_index(axis_name)  # raises where the name is unknown
    return jax.lax.pmean(tree, axis_name)


def _replica_index(axis_name: Hashable) -> jax.Array:
    try:
        return jax.lax.axis_index(axis_name)
    except NameError as error:
        raise ValueError(
            f"`axis_name` is {axis_name!r}, but no axis has that name here. Call "
            f"`init` and `update` inside jax.vmap(..., axis_name={axis_name!r}) or in "
            "jax.shard_map over a mesh axis of that name; or make the optimizer with "
            "axis_name=None for a single replica."
        ) from error
