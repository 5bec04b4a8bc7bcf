"""Named scalars from the state of any optimizer, for logs."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import modes, trees

# What Optax's own states that wrap or scale others have to tell. Ours name it
# themselves, in a class attribute ``metrics``.
OF_OPTAX: dict[type, tuple[str, ...]] = {
    optax.ApplyIfFiniteState: ("total_notfinite",),
    optax.InjectHyperparamsState: ("hyperparams",),
    optax.InjectStatefulHyperparamsState: ("hyperparams",),
    optax.MonitorState: ("measurements",),
    optax.MultiStepsState: ("gradient_step",),
    optax.contrib.ReduceLROnPlateauState: ("scale",),
}


def metrics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What an optimizer's state has to tell, as named scalars for a log.

    Every method counts its outer updates in `count`; a walk also gives its
    `gradient_evaluations` and how many updates it `skipped` as non-finite. To these
    come a method's own, such as the `temperature` of `coolmomentum`, the members that
    `ensemble_kalman` has `replaced`, the checkpoints that `lawa` has `taken`, and, with
    ``diagnostics=True``, `gamma`, `cosine` and the norms of `local_entropy`. It finds
    the states inside `optax.chain`, `masked`, `partition`, `MultiSteps` (whose
    `gradient_step` it gives, too), `apply_if_finite` (`total_notfinite`) and
    `inject_hyperparams` (one like ``hyperparams/learning_rate`` for each).

    The names depend on the optimizer alone, so they are the same at every update. Where
    several states give one name, the first has it, and the others in the order of the
    chain ``name/2``, ``name/3``: the outer state comes before what is in it.

    A state of your own, the memory of a `Walk` included, is a NamedTuple with a class
    attribute such as ``metrics = ("radius",)``, the names of fields or properties that
    are scalars or dictionaries of scalars.

    Args:
      opt_state: the state of an optimizer, such as the `opt_state` of an
        `nnx.Optimizer`. For one made by `jax.vmap`, as a population or the replicas of
        `parle`, use ``jax.vmap(optax_flat.metrics)(opt_state)``.

    Returns:
      A dictionary of arrays of shape []. It may be made inside `jax.jit`;
      ``jax.device_get`` brings all to the host at once.

    Raises:
      ValueError: the state has lost the classes that say what it is, as it does when it
        is restored from a file without a target; or what is to be a scalar is none.

    Example:
      >>> import jax.numpy as jnp, optax, optax_flat
      >>> tx = optax.chain(
      ...     optax.clip(1.0), optax_flat.coolmomentum(0.1), optax_flat.swa(start=1))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(x, tx.init(x), x)
      >>> report = optax_flat.metrics(state)
      >>> sorted(report)
      ['count', 'count/2', 'temperature', 'weight']
      >>> bool(jnp.allclose(report["temperature"], jnp.mean(updates**2)))
      True
    """
    modes.check_classes("metrics", opt_state)
    found: dict[str, jax.Array] = {}
    for name, value in _named(trees.plain(opt_state)):
        if jnp.ndim(value) > 0:
            raise ValueError(
                f"`metrics` takes the state of one optimizer, got {name} of shape "
                f"{jnp.shape(value)}. If a vmap made several: "
                "jax.vmap(optax_flat.metrics)(opt_state)."
            )
        places = (name, *(f"{name}/{i}" for i in range(2, len(found) + 2)))
        found[next(place for place in places if place not in found)] = value
    return found


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of all states that have any, the outer before the inner."""
    for state in jax.tree.leaves(tree, is_leaf=lambda x: bool(_names(x))):
        for name in _names(state):
            value = getattr(state, name)
            if isinstance(value, Mapping):  # of anything: only its numbers are for logs
                for key, entry in value.items():
                    if _is_number(entry):
                        yield f"{name}/{key}", entry
            else:
                yield name, value
        if _names(state):
            yield from _named(tuple(state))


def _names(node: Any) -> tuple[str, ...]:
    # Of the class: a state of others may have a field of that name.
    named = getattr(type(node), "metrics", ()) if isinstance(node, tuple) else ()
    ours = named if isinstance(named, tuple) else ()
    return ours or OF_OPTAX.get(type(node), ())


def _is_number(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | float | int) and (
        jnp.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), np.number)
    )
