r"""Ensemble Kalman inversion: training without gradients of the model.

J members u_j = params + e_j stand around the params, which are their mean. The outputs
z_j = G(u_j) tell how outputs covary with params, and that replaces the derivative:

    D_jk = (1 / J) < z_k - mean z, grad Phi(z_j) >
    h    = step_size / (||D|| + eps)
    u_j <- u_j - h sum_k D_jk e_k

Only Phi, the loss of the outputs, is differentiated. For least squares with noise
covariance C there is also the Kalman filter itself, implicit in the step:

    u_j <- u_j + C_uz (C_zz + C / step_size)^-1 (y + xi_j - z_j)

Either way the members move by combinations of the e_k, u_j <- u_j + sum_k A_jk e_k, so
they never leave the affine hull of the ensemble: that is what `resample` is for.

Papers: Kovachki and Stuart, arXiv 1808.03620; Iglesias, Law and Stuart, arXiv
1209.2736.
Code: CliMA/EnsembleKalmanProcesses.jl.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import checks, ensembles, keys, layout, trees
from optax_flat._core.arguments import factory
from optax_flat._core.hyperparams import at, is_zero
from optax_flat._core.noise import draw

# What draws are for: folded into the key of an update; the first into the method's own,
# with a number that no count of updates reaches.
_REPLACE, _NOISE, _FRESH, _FIRST = 0, 1, 2, 2**32 - 1


class EnsembleKalmanState(NamedTuple):
    """State of `ensemble_kalman`. The members are the params plus the deviations."""

    metrics = ("count", "forward_passes", "replaced", "skipped")

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    forward_passes: jax.Array  # int32, [], evaluations of the outputs so far
    replaced: jax.Array  # int32, [], members that failed so far
    skipped: jax.Array  # int32, [], updates that did nothing so far
    deviations: optax.Params  # every leaf [J, ...], of mean 0, at least float32
    # Where params and deviations were one update before; None without momentum.
    previous: Any


class _Members(NamedTuple):
    """The members of the ensemble, on one device or spread over a mesh axis."""

    size: int
    axis: str | None
    shards: int

    def indices(self):
        """Numbers of the members that are here."""
        here = jnp.arange(self.size // self.shards)
        if self.axis is None:
            return here
        return here + jax.lax.axis_index(self.axis) * (self.size // self.shards)

    def all(self, rows):
        """The rows of all members, from those of the members that are here."""
        if self.axis is None:
            return rows
        return jax.lax.all_gather(rows, self.axis, tiled=True)

    def sum(self, tree):
        """The sum over all members of trees with a leading axis of those here."""
        total = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), tree)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def largest(self, value):
        """The largest of one number from each device."""
        return value if self.axis is None else jax.lax.pmax(value, self.axis)

    def center(self, tree):
        """The mean over all members, and what is left without it."""
        mean = jax.tree.map(lambda x: x / self.size, self.sum(tree))
        return mean, jax.tree.map(lambda x, m: x - m[None], tree, mean)

    def weighted_sum(self, weights, tree):
        """sum_k weights[k] member k, for weights [all members]."""
        own = weights
        if self.axis is not None:
            own = weights[self.indices()]
        total = jax.tree.map(lambda x: jnp.tensordot(own, x, axes=1), tree)
        return total if self.axis is None else jax.lax.psum(total, self.axis)

    def combine(self, weights, tree):
        """sum_k weights[:, k] member k, for weights [members here, all members]."""
        if self.axis is None:
            return jax.tree.map(lambda x: jnp.tensordot(weights, x, axes=1), tree)
        # The shards pass by, one at a time: no device ever holds them all.
        count = self.size // self.shards
        me = jax.lax.axis_index(self.axis)
        ring = [(i, (i + 1) % self.shards) for i in range(self.shards)]

        def body(i, carry):
            total, shard = carry
            first = (me - i) % self.shards * count
            own = jax.lax.dynamic_slice_in_dim(weights, first, count, axis=1)
            total = jax.tree.map(
                lambda t, x: t + jnp.tensordot(own, x, axes=1), total, shard
            )
            return total, jax.lax.ppermute(shard, self.axis, ring)

        zeros = jax.tree.map(jnp.zeros_like, tree)
        return jax.lax.fori_loop(0, self.shards, body, (zeros, tree))[0]


@factory
def ensemble_kalman(
    step_size: optax.ScalarOrSchedule = 1.0,
    *,
    ensemble_size: int,
    spread: Any,
    eps: optax.ScalarOrSchedule = 1e-8,
    momentum: optax.ScalarOrSchedule = 0.0,
    output_noise: optax.ScalarOrSchedule = 0.0,
    resample: int | None = None,
    noise_covariance: Any = None,
    batch_size: int | None = None,
    fast_convolutions: bool = True,
    output_axis_name: str | None = None,
    sharding: jax.sharding.NamedSharding | None = None,
    key: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Ensemble Kalman inversion: training by forward passes of an ensemble.

    The params x are the mean of J = `ensemble_size` members :math:`u_j = x + e_j`; the
    deviations :math:`e_j` are in the state. With the outputs :math:`z_j = G(u_j)`:

    .. math::
        \begin{align*}
        D_{jk} &= \tfrac{1}{J} \langle z_k - \bar z, \nabla \Phi(z_j) \rangle \\
        u_j &\leftarrow u_j - \frac{\eta}{\|D\|_F + \varepsilon}
            \sum_k D_{jk} e_k
        \end{align*}

    with :math:`\eta` = `step_size` and :math:`\varepsilon` = `eps`. To first order
    this is descent preconditioned with the covariance of the ensemble. The model is
    only run forward, J passes per update, counted in the state::

        update(None, state, params, *, output_fn, loss_fn)

    `output_fn(params)` gives the outputs on the current minibatch, any tree;
    `loss_fn(outputs)` is :math:`\Phi`, any loss that is differentiable in them.
    Gradients that are passed in are ignored.

    *The span.* An update adds combinations of deviations to each member, so members and
    mean never leave the affine hull of the first ensemble, of J - 1 dimensions: with
    far fewer members than parameters this bounds the accuracy. `resample` draws fresh
    deviations around the mean every so many updates. With ``resample=1`` the update of
    the mean is :math:`-h\,\bar D e`, a projected gradient in new directions each time.

    *The implicit form.* With `noise_covariance` :math:`\Gamma` the loss is the misfit
    :math:`\frac12 \|\Gamma^{-1/2} (z - y)\|^2`, ``target=y`` is passed to `update`
    in the place of `loss_fn`, and the update is that of the ensemble Kalman filter,

    .. math::
        u_j \leftarrow u_j + C_{uz} (C_{zz} + \Gamma / \eta)^{-1}
            (y + \xi_j - z_j)

    with covariances over the members (divided by J). It solves inverse problems in few
    updates.

    *Members that fail.* A member whose outputs or loss gradient are not finite, or so
    large that their squares overflow (1e19 in float32), takes no part in the update; it
    is drawn anew with the mean and the covariance of the others, and counted in the
    state's `replaced`. With fewer than two left, or if the weights of the combinations
    overflow, the update does nothing, which is counted in `skipped`.

    Cost:
      `ensemble_size` forward passes per update; state: `ensemble_size` copies of the
      params.

    Args:
      step_size: :math:`\eta`, >= 0. A member moves by at most :math:`\eta (\sum_k
        \|e_k\|^2)^{1/2}` in an update.
      ensemble_size: J, >= 2.
      spread: standard deviation of the first members around the params: a float > 0, a
        tree of floats like the params (or a prefix of it), or a function ``key ->
        params`` that draws one member, such as a network's initializer; its draws are
        moved to have the params as mean.
      eps: added to the norm of D, >= 0. It has the dimension of the loss.
      momentum: :math:`\beta` of Nesterov's extrapolation :math:`v = u + \beta (u -
        u_{old})`, at which outputs are taken and from which the step starts; in [0, 1].
        ``schedules.nesterov_momentum(total_steps)`` and ``lambda k: k / (k + 3)`` are
        the usual ones. It doubles the state.
      output_noise: standard deviation of normal noise on the outputs where the loss is
        differentiated ("perturbed observations"), >= 0; in the implicit form a factor
        of :math:`\xi_j \sim N(0, \Gamma / \eta)`, for which 1 is the textbook's.
      resample: draw fresh deviations after every so many updates, >= 1; None never.
      noise_covariance: :math:`\Gamma` for the implicit form: a float > 0, variances
        [M], or a matrix [M, M], for M outputs in the order of their leaves.
      batch_size: how many members are evaluated at a time, which bounds the memory;
        None is all of them. It must divide the ensemble (of one device).
      fast_convolutions: whether convolutions of the model are given the layout that is
        fast on a CPU, see `optax_flat.training.fast_convolutions`. Other platforms are
        never affected.
      output_axis_name: inside `jax.shard_map`, the axis over which the examples are
        spread, with `loss_fn` the mean over those of one device.
      sharding: a `NamedSharding` with one axis name, over which the members are spread.
        No device ever holds the full ensemble.
      key: a typed or raw PRNG key, or an int.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above; or, in `update`, no
        `output_fn`, or no `loss_fn` (`target` in the implicit form), a `target` unlike
        the outputs, a covariance of another number of them.
      TypeError: an argument of the wrong type, or a loss that is no number.

    Example:
      Least squares with more members than parameters, from outputs alone:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> A = jnp.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
      >>> y = A @ jnp.array([1.0, -2.0])
      >>> tx = optax_flat.ensemble_kalman(
      ...     ensemble_size=8, spread=1.0, noise_covariance=0.01, key=0)
      >>> x = jnp.zeros(2)
      >>> state = tx.init(x)
      >>> for _ in range(20):
      ...     updates, state = tx.update(
      ...         None, state, x, output_fn=lambda x: A @ x, target=y)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.allclose(x, jnp.array([1.0, -2.0]), atol=0.05))
      True

    References:
      Kovachki and Stuart, `Ensemble Kalman Inversion: A Derivative-Free Technique For
      Machine Learning Tasks <https://arxiv.org/abs/1808.03620>`_, 2019. Iglesias, Law
      and Stuart, `Ensemble Kalman methods for inverse problems
      <https://arxiv.org/abs/1209.2736>`_, 2013.

    Differs from the paper:
      The params are the mean, and what is predicted with. Deviations stand for
      members, which changes nothing in exact arithmetic, since the rows of D sum to
      zero. EnsembleKalmanProcesses.jl has :math:`\eta` = 1 and the machine's epsilon;
      ParameterEstimocean.jl leaves out the 1 / J of D and divides the step by J.
      Replacing failed members is ours.
    """
    checks.number("step_size", step_size, 0.0)
    ensemble_size = checks.integer("ensemble_size", ensemble_size, 2)
    if not callable(spread):
        ensembles.check_spread(spread)
    checks.number("eps", eps, 0.0)
    checks.number("momentum", momentum, 0.0, 1.0)
    checks.number("output_noise", output_noise, 0.0)
    if resample is not None:
        resample = checks.integer("resample", resample, 1)
    members = _members(ensemble_size, sharding)
    batch_size = checks.chunk("batch_size", batch_size, ensemble_size // members.shards)
    fast_convolutions = checks.flag("fast_convolutions", fast_convolutions)
    _check_covariance(noise_covariance, output_axis_name)
    _check_axes(output_axis_name, sharding)
    numbers = {"step_size": step_size, "output_noise": output_noise}

    def weights_of(loss_fn, target):
        if noise_covariance is not None:
            return _kalman(target, noise_covariance=noise_covariance, **numbers)
        if loss_fn is None and target is not None:
            raise ValueError(
                "`target` was passed to `update`, but only the implicit form takes it. "
                "Give ensemble_kalman its `noise_covariance`, or pass `loss_fn`, the "
                "loss of the outputs, in the place of `target`."
            )
        return _descent(loss_fn, eps=eps, output_axis_name=output_axis_name, **numbers)

    return _transformation(
        members,
        weights_of,
        functools.partial(_fresh, members, spread),
        momentum=momentum,
        resample=resample,
        batch_size=batch_size,
        fast_convolutions=fast_convolutions,
        sharding=sharding,
        key=checks.key(key),
    )


def _transformation(
    members,
    weights_of,
    fresh,
    *,
    momentum,
    resample,
    batch_size,
    fast_convolutions,
    sharding,
    key,
):
    extrapolates = not is_zero(momentum)
    shards: Any = jax.P(members.axis)
    everywhere: Any = jax.P()
    specs: Any = EnsembleKalmanState(
        everywhere, everywhere, everywhere, everywhere, everywhere, shards,
        (everywhere, shards) if extrapolates else None,
    )  # fmt: skip

    def init(params):
        checks.float_params(params)
        x = trees.accumulator(trees.finite(trees.concrete(params)))
        first = _on_devices(fresh, sharding, (everywhere, everywhere), shards)
        e = first(jax.random.fold_in(key, _FIRST), x)
        zero = jnp.zeros([], jnp.int32)
        previous = (x, e) if extrapolates else None
        data = keys.data(key)
        state = EnsembleKalmanState(zero, data, zero, zero, zero, e, previous)
        return trees.copy(state, x)

    def update(
        updates,
        state,
        params: Any = None,
        *,
        output_fn: Any = None,
        loss_fn=None,
        target=None,
        **extra_args,
    ):
        del updates, extra_args
        checks.float_params(params)
        ensembles.check_functions(params, output_fn=output_fn)
        evaluated = ensembles.in_dtype_of(output_fn, params, fast_convolutions)
        layout.check(init, state, params)
        weigh = weights_of(loss_fn, target)

        def step(x, state):
            update_key = keys.fold_in(state.key, state.count, key)
            start = before = (x, state.deviations)
            if extrapolates:
                beta = at(momentum, state.count)
                start = jax.tree.map(
                    lambda u, old: u + beta * (u - old), start, state.previous
                )
                start = trees.cast_like(start, before)
            v, e = start
            outputs = _evaluate(
                lambda deviation: evaluated(optax.tree.add(v, deviation)),
                e, members.size // members.shards, batch_size,
            )  # fmt: skip
            weights, healthy = weigh(members, update_key, state.count, outputs)
            after, failed, unusable = _move(
                members, update_key, start, before, weights=weights, healthy=healthy
            )
            if resample is not None:
                due = (state.count + 1) % resample == 0
                fresh_key = jax.random.fold_in(update_key, _FRESH)
                after, before = _redrawn(fresh, fresh_key, due, after, before)
            if extrapolates:  # a member that was replaced has no velocity
                before = trees.where(failed > 0, after, before)
            x, e = after
            return x, EnsembleKalmanState(
                jnp.asarray(optax.safe_increment(state.count)),
                state.key,
                trees.saturating_add(state.forward_passes, members.size),
                trees.saturating_add(state.replaced, failed),
                trees.saturating_add(state.skipped, unusable.astype(jnp.int32)),
                e,
                before if extrapolates else None,
            )

        x = trees.accumulator(trees.finite(params))
        both = (everywhere, specs)
        after, state = _on_devices(step, sharding, both, both)(x, state)
        updates = trees.where_finite(params, optax.tree.sub(after, x))
        return trees.cast_like(updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _fresh(members, spread, key, x):
    """Deviations of the members that are here, of mean 0 over all."""
    if ensembles.is_empty(x):
        return x

    def member(index):
        member_key = jax.random.fold_in(key, index)
        if callable(spread):
            return trees.select_like(spread(member_key), x)
        s = ensembles.deviations_like(spread, x)
        drawn = jax.tree.map(jnp.multiply, s, draw(member_key, x, "normal"))
        return trees.cast_like(drawn, x)

    e = members.center(jax.vmap(member)(members.indices()))[1]
    return jax.vmap(lambda one: trees.sharded_like(one, x))(e)


def _evaluate(output_fn, deviations, size, batch_size):
    """Outputs of the members that are here, some at a time."""
    if batch_size == size:
        return jax.vmap(output_fn, axis_size=size)(deviations)
    return jax.lax.map(output_fn, deviations, batch_size=batch_size)


def _redrawn(fresh, key, due, after, before):
    """Fresh deviations if they are due."""
    (x, e), (x_before, e_before) = after, before
    e = jax.lax.cond(due, lambda x, e: fresh(key, x), lambda x, e: e, x, e)
    # Old deviations say nothing about where new ones are going.
    return (x, e), (x_before, trees.where(due, e, e_before))


def _on_devices(fn, sharding, in_specs, out_specs):
    """`fn` with the members of each device, if they are spread over several."""
    if sharding is None:
        return fn
    return jax.shard_map(
        fn,
        mesh=sharding.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # members.all and members.sum give all devices the same
    )


# Both forms are functions `(members, key, count, outputs) -> weights, healthy`: member
# j moves by sum_k weights[j, k] deviation k, and healthy [members here] says which
# members gave finite numbers.


def _place(output_axis_name):
    try:
        return jax.lax.axis_index(output_axis_name)
    except NameError as error:
        raise ValueError(
            f"`output_axis_name` is {output_axis_name!r}, but no axis has that name "
            "here. Call `update` inside jax.shard_map over a mesh axis of that name, "
            "or make the optimizer without it."
        ) from error


def _descent(loss_fn, *, step_size, eps, output_noise, output_axis_name):
    """The explicit form."""
    ensembles.check_functions((), loss_fn=loss_fn)

    def weigh(members, key, count, outputs):
        outputs = ensembles.wide(outputs)
        z = ensembles.flat(outputs, leading=1)
        noise_key = key
        if output_axis_name is not None:  # other examples, other noise
            noise_key = jax.random.fold_in(key, _place(output_axis_name))
        scale = at(output_noise, count)
        noise = _output_noise(members, noise_key, outputs, scale)
        observed = optax.tree.add(outputs, noise)
        slopes = jax.vmap(functools.partial(ensembles.slopes, loss_fn))(observed)
        slopes = ensembles.flat(slopes, leading=1)
        healthy = _usable(z) & _usable(slopes)
        if output_axis_name is not None:
            healthy = jax.lax.pmin(healthy.astype(jnp.int32), output_axis_name) > 0
        centred, alive = _centred(members, z, healthy)
        d = jnp.where(healthy[:, None], slopes, 0.0) @ members.all(centred).T / alive
        if output_axis_name is not None:
            d = jax.lax.pmean(d, output_axis_name)
        # The squares of large entries would overflow.
        largest = members.largest(jnp.max(jnp.abs(d)))
        scaled = d / jnp.where(largest > 0, largest, 1.0)
        norm = largest * jnp.sqrt(members.sum(jnp.sum(scaled**2, axis=1)))
        size = norm + at(eps, count)
        return -at(step_size, count) * d / jnp.where(size > 0, size, 1.0), healthy

    return weigh


def _kalman(target, *, step_size, noise_covariance, output_noise):
    """The implicit form."""
    if target is None:
        raise ValueError(
            "`target` must be passed to `update` of the implicit form "
            "(`noise_covariance` was given), got None: the observations, like the "
            "outputs. Call tx.update(None, opt_state, params, output_fn=..., "
            "target=...)."
        )

    def weigh(members, key, count, outputs):
        outputs = ensembles.wide(outputs)
        ensembles.check_target(target, outputs)
        z = ensembles.flat(outputs, leading=1)
        noise = _output_noise(members, key, outputs, at(output_noise, count))
        root = _root(noise_covariance, z)
        misfit = _whitened(root, ensembles.flat(target)[None] - z)
        healthy = _usable(_whitened(root, z)) & _usable(misfit)
        centred, alive = _centred(members, z, healthy)
        everyone = members.all(centred)
        # In whitened outputs the noise has the covariance 1, and with the singular
        # values s of C_uz the gain is s / (1 + step_size s^2): small noise loses no
        # digits, and a step of 0 is no division by 0.
        left, s, right = jnp.linalg.svd(
            _whitened(root, everyone) / jnp.sqrt(alive), full_matrices=False
        )
        # What is below the rounding of the largest has directions of no meaning.
        rounding = max(everyone.shape) * jnp.finfo(s.dtype).eps
        s = jnp.where(s > rounding * s[0], s, 0.0)
        eta = at(step_size, count)
        misfit = eta * misfit + jnp.sqrt(eta) * ensembles.flat(noise, leading=1)
        misfit = jnp.where(healthy[:, None], misfit, 0.0)
        gain = s / (1.0 + eta * s**2) / jnp.sqrt(alive)
        return (misfit @ right.T * gain[None]) @ left.T, healthy

    return weigh


def _root(covariance, z):
    """The Cholesky factor of the covariance; its diagonal if it is given as one."""
    covariance = jnp.asarray(covariance, z.dtype)
    number = z.shape[1]
    if covariance.shape not in ((), (number,), (number, number)):
        raise ValueError(
            "`noise_covariance` must be a float, variances [M] or a matrix [M, M] for "
            f"the M outputs, got shape {covariance.shape} for {number} outputs."
        )
    if covariance.ndim == 2:
        return jnp.linalg.cholesky(covariance)
    return jnp.sqrt(jnp.broadcast_to(covariance, number))


def _whitened(root, rows):
    """Rows of outputs, in units of the noise."""
    if root.ndim == 1:
        return rows / root[None]
    return jax.scipy.linalg.solve_triangular(root, rows.T, lower=True).T


def _move(members, key, start, before, *, weights, healthy):
    """Mean and deviations after every member took its combination of deviations."""
    indices = members.indices()
    step = jax.nn.one_hot(indices, members.size, dtype=weights.dtype) + weights
    everyone_healthy = members.all(healthy)
    alive = jnp.maximum(jnp.sum(everyone_healthy, dtype=step.dtype), 1.0)

    def move(step, start):
        # The mean of all combinations moves the params, the rest is new deviations.
        v, e = start
        mean = members.sum(step) / members.size
        moved = optax.tree.add(v, members.weighted_sum(mean, e))
        new = (moved, members.combine(step - mean[None], e))
        return trees.cast_like(new, before)

    def move_some(step, start):
        # Failed members are drawn anew, with mean and covariance of the others.
        share = everyone_healthy.astype(step.dtype) / alive
        others = jnp.where(everyone_healthy[:, None], members.all(step), 0.0)
        center = share @ others

        def mixture(index):
            member_key = jax.random.fold_in(jax.random.fold_in(key, _REPLACE), index)
            z = jax.random.normal(member_key, (members.size,), step.dtype)
            z = jnp.where(everyone_healthy, z, 0.0) / jnp.sqrt(alive)
            return center + z @ others - jnp.sum(z) * center

        step = jnp.where(healthy[:, None], step, jax.vmap(mixture)(indices))

        def zero_failed(leaf):  # a weight of 0 does not stop NaN
            return jnp.where(healthy.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0.0)

        v, e = start
        return move(step, (v, jax.tree.map(zero_failed, e)))

    failed = members.sum(jnp.logical_not(healthy).astype(jnp.int32))
    overflown = members.sum((healthy & ~_finite(step)).astype(jnp.int32))
    unusable = (overflown > 0) | (members.size - failed < 2)
    # Branches, not selections: a pass over all members costs as much as a product.
    case = jnp.where(unusable, 2, jnp.where(failed > 0, 1, 0))
    branches = [move, move_some, lambda step, start: before]
    return jax.lax.switch(case, branches, step, start), failed, unusable


def _finite(rows):
    """Which rows hold finite numbers only."""
    return jnp.all(jnp.isfinite(rows), axis=1)


def _usable(rows):
    """Which rows are finite, and so are products of them and of their differences."""
    return jnp.isfinite(4.0 * jnp.sum(rows**2, axis=1))


def _centred(members, z, healthy):
    """Outputs minus the mean of the healthy members, 0 for others; their number."""
    alive = jnp.maximum(members.sum(healthy.astype(z.dtype)), 1.0)
    z = jnp.where(healthy[:, None], z, 0.0)
    return jnp.where(healthy[:, None], z - members.sum(z)[None] / alive, 0.0), alive


def _output_noise(members, key, outputs, scale):
    """Normal noise like the outputs."""
    if is_zero(scale):
        return optax.tree.zeros_like(outputs)
    noise_key = jax.random.fold_in(key, _NOISE)

    def one(index, row):
        return draw(jax.random.fold_in(noise_key, index), row, "normal")

    noise = jax.vmap(one)(members.indices(), outputs)
    return jax.tree.map(lambda z: scale * z, noise)


def _members(size, sharding):
    if sharding is None:
        return _Members(size, None, 1)
    named = isinstance(sharding, jax.sharding.NamedSharding)
    if not named or len(sharding.spec) != 1 or not isinstance(sharding.spec[0], str):
        raise TypeError(
            "`sharding` must be a NamedSharding with one axis name for the members, "
            f"such as NamedSharding(mesh, PartitionSpec('members')), got {sharding!r}."
        )
    axis = sharding.spec[0]
    shards = sharding.mesh.shape[axis]
    if size % shards:
        raise ValueError(
            f"`ensemble_size` must be a multiple of the {shards} devices of the axis "
            f"{axis!r}, got {size}."
        )
    return _Members(size, axis, shards)


def _check_axes(output_axis_name, sharding):
    if output_axis_name is not None and not isinstance(output_axis_name, str):
        raise TypeError(
            "`output_axis_name` must be the name of an axis of jax.shard_map, or None, "
            f"got {output_axis_name!r} of type {type(output_axis_name).__name__}."
        )
    if output_axis_name is not None and sharding is not None:
        raise ValueError(
            "`sharding` spreads the members in a shard_map of its own, so it cannot be "
            f"used inside another one, over `output_axis_name`={output_axis_name!r}. "
            "Leave one of the two out."
        )


def _check_covariance(covariance, output_axis_name):
    if covariance is None:
        return
    if output_axis_name is not None:
        raise ValueError(
            "`noise_covariance` couples all outputs, so they cannot be spread over "
            f"`output_axis_name`={output_axis_name!r}. Leave one of the two out."
        )
    variances = np.asarray(covariance, float)
    if variances.ndim == 2 and len(set(variances.shape)) == 1:
        variances = np.linalg.eigvalsh(variances)
    if variances.ndim > 1 or not np.all(variances > 0):
        raise ValueError(
            "`noise_covariance` must be a float > 0, variances [M] > 0 or a positive "
            f"definite matrix [M, M], got {covariance!r}."
        )
