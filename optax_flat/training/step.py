"""A training step from a loss and an optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, convolutions, modes, trees


def make_train_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation | optax.MultiSteps,
    *,
    has_aux: bool = False,
    output_fn: Callable[[Any, Any], Any] | None = None,
    mode: str | None = None,
    num_groups: int = 1,
    fast_convolutions: bool = True,
    donate: bool = False,
) -> Callable[..., Any]:
    """A jitted training step for any optimizer, in either mode.

    ::

        step(params, opt_state, batches) -> params, opt_state, loss
        step(params, opt_state, batches, aux) -> params, opt_state, loss, aux

    In scanned mode `batches` stacks the walk's minibatches: every leaf has the leading
    axis L, the optimizer's number of gradients per update. The first one gives the loss
    and the first gradient, the others are scanned over. A method whose gradients all
    belong to one minibatch (`sam` and its family) takes that one, unstacked; in
    transparent mode call the step twice with it. In transparent mode, and for
    every optimizer that wants one gradient per update, `batches` is one minibatch; a
    stack given there is a minibatch with one more axis, which many losses take without
    an error. With `mode` the step insists on what you mean.

    The optimizer also gets `value`, `grad` and `value_fn` of the first gradient, as
    `optax.contrib.reduce_on_plateau` or `optax.lbfgs` want them.

    A method without gradients (`ensemble_kalman`, `perturbation_gradient`) needs the
    model in two parts: with `output_fn` the loss is ``loss_fn(outputs, batch)``. Such
    a method is handed both, and the gradient is not computed; any other optimizer gets
    the gradient of the two together.

    Args:
      loss_fn: ``(params, batch) -> loss``, or with `has_aux` ``(params, batch, aux) ->
        (loss, aux)``, where `aux` is anything that moves along: batch statistics,
        dropout keys.
      tx: the optimizer. It need not be told of `has_aux`.
      has_aux: whether the loss threads auxiliary state. In either mode it is the first,
        clean pass of a walk that moves it: batch statistics move once per outer update.
        The passes inside the walk start from what that one left, and what they return
        is dropped. Typed PRNG keys (not raw ones, which look like any array) are forked
        for them, so that no two passes share one. An `aux` that became non-finite is
        dropped as well. Inside `optax.MultiSteps` every mini-step counts as an update.
      output_fn: ``(params, batch) -> outputs``, any tree; `loss_fn` is then ``(outputs,
        batch) -> loss``. Not together with `has_aux`.
      mode: "scanned" or "transparent" to insist on one; None reads it off the
        optimizer's state.
      num_groups: that of the optimizer (m-SAM): every minibatch is split into as many
        groups along its leading axis, which must be a multiple; the loss is the mean
        over the groups. With that axis spread over as many devices each has its own
        group.
      fast_convolutions: whether the step's convolutions are given the layout that is
        fast on a CPU wherever the step stands, such as in a `jax.lax.scan` over many;
        see `optax_flat.training.fast_convolutions`. The optimizer has the same argument
        for a loop of its own.
      donate: whether the buffers of params and optimizer state are given to the step
        (the ones passed in cannot be used afterwards).

    Returns:
      The step. The loss is a scalar, at the params that the step was given.

    Raises:
      ValueError: a `mode` that is unknown or not the optimizer's, batches whose leading
        axis is not the number of gradients per update, a loss that is no scalar, `aux`
        without `has_aux` or the reverse, `output_fn` missing where it is needed or
        given beside `has_aux`.
      TypeError: in scanned mode, a list of minibatches that are not stacked.

    Example:
      >>> import jax.numpy as jnp, optax_flat
      >>> from optax_flat.training import make_train_step
      >>> loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
      >>> tx = optax_flat.entropy_sgd(1.0, num_steps=4, key=0)
      >>> step = make_train_step(loss_fn, tx)
      >>> params = jnp.zeros(3)
      >>> opt_state = tx.init(params)
      >>> batches = jnp.ones((4, 8, 3))  # 4 minibatches of 8
      >>> for _ in range(20):
      ...     params, opt_state, loss = step(params, opt_state, batches)
      >>> bool(loss < 0.01)
      True
    """
    if mode is not None:
        checks.choice("mode", mode, modes.MODES)
    if has_aux and output_fn is not None:
        raise ValueError(
            "`output_fn` and `has_aux` were both given, but outputs carry no auxiliary "
            "state. Leave one of the two out."
        )
    fast = checks.flag("fast_convolutions", fast_convolutions)
    optimizer = checks.transformation("tx", tx)

    def loss_and_aux(params, batch, aux):
        if has_aux:
            return _check_loss(loss_fn(params, batch, aux), has_aux)
        inputs = params if output_fn is None else output_fn(params, batch)
        return _check_loss(loss_fn(inputs, batch), has_aux), aux

    value_and_grad = jax.value_and_grad(loss_and_aux, has_aux=True)
    first_gradient = _of_groups(value_and_grad, num_groups)

    def grad_fn(point, batch, aux=None):
        if num_groups > 1:
            batch, group = batch
            aux = _fork_keys(aux, group)
        (_, aux), grads = value_and_grad(point, batch, aux)
        return (grads, aux) if has_aux else grads

    def forward(params, opt_state, batch):
        model = output_fn
        if model is None:
            raise ValueError(
                "this optimizer has no gradients: it needs the outputs of the model. "
                "Give make_train_step `output_fn=`, (params, batch) -> outputs, and a "
                "`loss_fn` of (outputs, batch)."
            )
        loss, _ = loss_and_aux(params, batch, None)
        updates, opt_state = optimizer.update(
            # Zeros, not None: wrappers such as apply_if_finite look at gradients.
            optax.tree.zeros_like(params), opt_state, params,
            output_fn=lambda p: model(p, batch),
            loss_fn=lambda outputs: loss_fn(outputs, batch),
            value=loss,
        )  # fmt: skip
        return optax.apply_updates(params, updates), opt_state, loss

    def step(params, opt_state, batches, aux=None):
        _check_aux_given(has_aux, aux)
        walks = modes.states(opt_state, modes.ScannedState | modes.TransparentState)
        is_scanned = bool(modes.states(opt_state, modes.ScannedState))
        _check_mode(mode, is_scanned)
        if modes.states(opt_state, modes.ForwardOnly):
            _check_forward(tx, num_groups)
            return forward(params, opt_state, batches)
        batch, others = (
            _first_and_others(batches, opt_state, walks[0].memory)
            if is_scanned
            else (batches, None)
        )
        # In transparent mode a pass may be inside a walk: it is given keys of its own,
        # and what it makes of aux is dropped.
        inside = jnp.array(False)
        given = aux
        if walks and not is_scanned:
            inside = walks[0].step > 0
            forked = _fork_keys(aux, walks[0].gradient_evaluations)
            given = trees.where(inside, forked, aux)
        (loss, new_aux), grads = first_gradient(params, batch, given)
        _check_aux(new_aux, aux)
        clean = jnp.logical_not(inside) & trees.all_finite(new_aux, aux)
        new_aux = trees.where(clean, new_aux, aux)
        extra_args = {
            "value": loss,
            "grad": grads,
            "value_fn": lambda p: loss_and_aux(p, batch, given)[0],
        }
        if is_scanned:
            extra_args["grad_fn"] = grad_fn
            extra_args["batches"] = _of_all_groups(others, num_groups)
            count = walks[0].gradient_evaluations + 1
            extra_args["aux"] = _fork_keys(new_aux, count)
        updates, opt_state = optimizer.update(grads, opt_state, params, **extra_args)
        _check_updates(updates, params, num_groups)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, loss) + ((new_aux,) if has_aux else ())

    return jax.jit(
        convolutions.fast_if(fast, step), donate_argnums=(0, 1) if donate else ()
    )


def _of_groups(value_and_grad, num_groups):
    """Mean losses and a gradient for each group of samples, stacked."""
    if checks.integer("num_groups", num_groups, 1) == 1:
        return value_and_grad

    def of_groups(params, batch, aux):
        groups = _in_groups(batch, num_groups, axis=0)

        def of_one(batch, group):
            return value_and_grad(params, batch, _fork_keys(aux, group))

        means, grads = jax.vmap(of_one)(groups, _numbers(groups, num_groups))
        return trees.mean_of_groups(means), grads

    return of_groups


def _of_all_groups(batches, num_groups):
    """Stacked minibatches in groups, each with its number, by which its keys differ."""
    if num_groups == 1:
        return batches
    groups = _in_groups(batches, num_groups, axis=1)
    length = len(jax.tree.leaves(groups)[0])
    numbers = _numbers(jax.tree.map(lambda x: x[0], groups), num_groups)
    return groups, jnp.stack([numbers] * length)


def _numbers(groups, num_groups):
    """The number of each group, on its devices."""
    return trees.spread_like(jnp.arange(num_groups), jax.tree.leaves(groups)[0])


def _in_groups(batches, num_groups, axis):
    """The samples along an axis as [groups, samples of a group]."""

    def split(leaf):
        shape = jnp.shape(leaf)
        samples = shape[axis] if len(shape) > axis else 0
        if not samples or samples % num_groups:
            raise ValueError(
                f"every minibatch must be a multiple of num_groups={num_groups} long, "
                f"got {samples} samples in an array of shape {shape}. Choose another "
                "size of the minibatch, or another `num_groups`."
            )
        groups = (num_groups, samples // num_groups)
        return jnp.reshape(leaf, (*shape[:axis], *groups, *shape[axis + 1 :]))

    return jax.tree.map(split, batches)


def _check_forward(tx, num_groups):
    """What a method that evaluates the model itself cannot do."""
    if isinstance(tx, optax.MultiSteps):
        raise ValueError(
            "optax.MultiSteps accumulates gradients, but this optimizer takes the "
            "outputs of the model, and would see those of the last minibatch only. "
            "Give it larger minibatches, or a loss that runs over several."
        )
    if num_groups > 1:
        raise ValueError(
            f"`num_groups` is {num_groups}, but this optimizer takes the outputs of "
            "the model and makes no groups. Leave `num_groups` out."
        )


def _check_accumulation(opt_state):
    """A scanned walk in `optax.MultiSteps` evaluates the last micro-batch alone."""
    for state in modes.states(opt_state, optax.MultiStepsState):
        if modes.states(state.inner_opt_state, modes.ScannedState):
            raise ValueError(
                "optax.MultiSteps accumulates the first gradient of a walk, but its "
                "others would be those of the last micro-batch alone. Build the "
                'optimizer inside with mode="transparent", or accumulate in the loss: '
                "a mean over micro-batches by jax.lax.map."
            )


def _check_updates(updates, params, num_groups):
    """An optimizer without groups makes an update of every group's gradient."""
    shapes, wanted = (
        [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        for tree in (updates, params)
    )
    if num_groups > 1 and shapes != wanted:
        raise ValueError(
            f"`num_groups` is {num_groups}, but this optimizer does not merge groups: "
            "its updates have not the shapes of the params. Build it with "
            f"num_groups={num_groups} (optax_flat.sam and its family), or leave "
            "`num_groups` out."
        )


def _check_mode(mode, is_scanned):
    found = "scanned" if is_scanned else "transparent"
    if mode is not None and mode != found:
        takes = "a walk of gradients" if is_scanned else "one gradient"
        raise ValueError(
            f"`mode` is {mode!r}, but this optimizer takes {takes} per update. Build "
            f"it with mode={mode!r}, or leave `mode` out."
        )


def _first_and_others(batches, opt_state, memory):
    """The minibatch of the first gradient, and the stack of the others'."""
    _check_accumulation(opt_state)
    if modes.one_minibatch(memory):
        return batches, jax.tree.map(lambda x: jnp.asarray(x)[None], batches)
    _check_stack(batches)
    return tuple(
        jax.tree.map(lambda x, part=part: x[part], batches)
        for part in (0, slice(1, None))
    )


def _check_stack(batches):
    """A list means many minibatches, as in `optax_flat.flatness`."""
    if isinstance(batches, list):
        raise TypeError(
            "`batches` must stack the minibatches of a walk, every leaf with the "
            "leading axis L, the optimizer's gradients per update; got a list of "
            f"{len(batches)}. Stack it: jax.tree.map(lambda *x: jnp.stack(x), "
            "*batches). If its entries are stacked inputs and targets, give a tuple."
        )
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(batches)}
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "every leaf of `batches` must have the same leading axis L, one minibatch "
            "for each of the optimizer's gradients per update, got shapes "
            f"{sorted(shapes)}. Stack minibatches: jax.tree.map(lambda *x: "
            "jnp.stack(x), *minibatches); or build the optimizer with "
            'mode="transparent".'
        )


def _check_loss(returned, has_aux):
    """What `loss_fn` returned, a scalar or with `has_aux` a pair."""
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    loss: Any = returned[0] if has_aux and is_pair else returned
    if has_aux != is_pair or not jax.tree_util.all_leaves([loss]):
        wanted = "(loss, aux)" if has_aux else "the loss alone"
        raise ValueError(
            f"`loss_fn` must return {wanted} for make_train_step(has_aux={has_aux}), "
            f"got {jax.tree.structure(returned)}. Return that, or change has_aux."
        )
    if jnp.shape(loss):
        raise ValueError(
            f"`loss_fn` must return a scalar, got shape {jnp.shape(loss)}. Take the "
            "mean over the minibatch. (In transparent mode, and for an optimizer of "
            "one gradient per update, give one minibatch and not a stack.)"
        )
    return returned


def _check_aux_given(has_aux, aux):
    if has_aux and aux is None:
        raise ValueError(
            "`aux` moves along with the params for make_train_step(has_aux=True), got "
            "None. Pass a first `aux` to the step: step(params, opt_state, batches, "
            "aux)."
        )
    if not has_aux and aux is not None:
        raise ValueError(
            "`aux` was given to the step, but it was made with has_aux=False. Use "
            "make_train_step(loss_fn, tx, has_aux=True), or leave `aux` out."
        )


def _check_aux(returned, given):
    if jax.tree.structure(returned) != jax.tree.structure(given):
        raise ValueError(
            "`aux` moves along with the params, so `loss_fn` must return it with the "
            f"structure it was given.\n  got:      {jax.tree.structure(returned)}\n"
            f"  expected: {jax.tree.structure(given)}\nPass a first `aux` to the step."
        )


def _fork_keys(aux, count):
    """Keys for passes inside a walk; `count` differs for all walks and passes."""

    def fork(leaf):
        if not trees.is_key(leaf):
            return leaf
        forked = jax.vmap(jax.random.fold_in, (0, None))(leaf.ravel(), count)
        return forked.reshape(leaf.shape)

    return jax.tree.map(fork, aux)
