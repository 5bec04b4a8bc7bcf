"""Draws from the normal distribution of the params that a method has learned."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, modes, trees
from optax_flat._core.noise import draw


class Posterior(abc.ABC):
    """A state with a normal distribution of the params, around `eval_params`."""

    @abc.abstractmethod
    def deviations(self) -> Any:
        """The standard deviations, a tree like the params."""

    @classmethod
    def __subclasshook__(cls, other):
        # A field of that name, as `ensemble_kalman` has one, makes no posterior.
        return callable(getattr(other, "deviations", None))


def sample_params(
    opt_state: optax.OptState, params: optax.Params, key: jax.typing.ArrayLike
) -> optax.Params:
    r"""Draws params from the posterior that `ivon` or `bsam` has learned.

    .. math::
        w = m + z / \sqrt{N (h + \delta)} \quad (\text{ivon}), \qquad
        w = m + z / \sqrt{N s} \quad (\text{bsam}), \qquad z \sim N(0, 1)

    around the mean m that `eval_params` gives, at any moment of a walk. The states are
    found where `eval_params` finds them; params that belong to another optimizer, or to
    none, stay at what it gives for them.

    For many draws use ``jax.vmap`` over keys; `optax_flat.training.predict` averages
    predictions over them, one at a time.

    Args:
      opt_state: the state of an optimizer that contains `ivon` or `bsam`.
      params: the current params.
      key: a typed or raw PRNG key, or an int: one for each draw.

    Returns:
      Params of the same structure and dtype.

    Raises:
      ValueError: the state holds no posterior, or one of params of other shapes; a
        `key` that is none; or what `eval_params` refuses.

    Example:
      Before any training the deviations are those of the first h:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> tx = optax.chain(
      ...     optax.clip(1.0), optax_flat.ivon(0.1, ess=100.0, hess_init=0.25, key=0))
      >>> params = jnp.full(1000, 3.0)
      >>> def sample(key):
      ...     return optax_flat.sample_params(tx.init(params), params, key)
      >>> draws = jax.vmap(sample)(jax.random.split(jax.random.key(1), 10))
      >>> draws.shape
      (10, 1000)
      >>> bool(abs(jnp.std(draws) - 1 / jnp.sqrt(100 * 0.25)) < 0.01)
      True
    """
    posteriors = modes.states(trees.plain(opt_state), Posterior)
    learned = [posterior.deviations() for posterior in posteriors]
    for deviations in learned:
        _check_shapes(deviations, trees.plain(params))
    mean = modes.eval_params(opt_state, params)
    if not learned:
        raise ValueError(
            "`sample_params` needs the state of an optimizer that learns a posterior, "
            f"optax_flat.ivon or optax_flat.bsam, got {type(opt_state).__name__} "
            "without one. (Samplers such as sgld have no posterior in their state: "
            "their params are the samples, see optax_flat.training.collect_samples. "
            "The members of ensemble_kalman are the params plus its state's "
            "`deviations`.)"
        )
    key = checks.key(key)
    sampled = trees.plain(mean)
    for deviations in learned:
        z = draw(key, deviations, "normal")
        sampled = trees.map_selected(
            lambda step, p: (p + step).astype(p.dtype),
            jax.tree.map(lambda d, z: d * z, deviations, z),
            sampled,
        )
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(sampled))


def _check_shapes(deviations, params):
    """Others might broadcast, and what comes out would be no draw of these params."""

    def check(deviation, leaf):
        shape = jnp.shape(leaf) if jax.tree_util.all_leaves([leaf]) else "a tree"
        if shape != deviation.shape:
            raise ValueError(
                "`params` must have the shapes of those that the optimizer's state was "
                f"made for, got {shape} where the posterior has {deviation.shape}. "
                "Pass the params and the state that one `update` led to."
            )
        return leaf

    trees.map_selected(check, deviations, params)
