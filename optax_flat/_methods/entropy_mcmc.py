r"""Entropy-MCMC: a Langevin chain tied to a second one that sees no gradient.

The second chain, the anchor, feels only a spring to the first. Together they sample

    exp(-(f(x) + gamma / 2 ||x - anchor||^2) / T)

in which the anchor alone has the density of the local entropy: it is drawn to wide
valleys, and takes the first one along. Both move from the old pair:

    x      <- x - learning_rate (g + weight_decay x + gamma (x - anchor)) + noise
    anchor <- anchor - learning_rate (weight_decay anchor + gamma (anchor - x)) + noise

with noise sqrt(2 learning_rate T) z, fresh for each of the two.

Paper: Li and Zhang, arXiv 2310.05401 (ICLR 2024). Code: lblaoke/EMCMC.
"""

from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from optax_flat._core import checks, keys
from optax_flat._core.arguments import NoiseArguments, factory
from optax_flat._core.gradient import by_gradient, counted
from optax_flat._core.hyperparams import at, is_zero
from optax_flat._core.noise import KINDS, draw_from, first_seed, next_seed


class EntropyMCMCState(NamedTuple):
    """State of `entropy_mcmc`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    anchor: optax.Params  # the second chain, at least float32


@factory
def entropy_mcmc(
    learning_rate: optax.ScalarOrSchedule,
    temperature: optax.ScalarOrSchedule,
    *,
    gamma: optax.ScalarOrSchedule = 0.05,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    **draws: Unpack[NoiseArguments],
) -> optax.GradientTransformationExtraArgs:
    r"""Langevin dynamics guided to wide valleys by an anchor.

    .. math::
        \begin{align*}
        x &\leftarrow x - \eta_t (g + \lambda x + \gamma (x - x_a))
            + \sqrt{2 \eta_t T_t}\, z_1 \\
        x_a &\leftarrow x_a - \eta_t (\lambda x_a + \gamma (x_a - x))
            + \sqrt{2 \eta_t T_t}\, z_2
        \end{align*}

    both from the old pair, with :math:`\lambda` = `weight_decay`. x are the params, the
    anchor :math:`x_a` starts there and is the state's field ``anchor`` (in a chain
    ``optax.tree.get(opt_state, "anchor")``). One gradient evaluation per update.

    Of the pair's density x alone has that of the posterior (the anchor's own weight
    decay narrows it a little) and the anchor that of the local entropy: it is a biased
    sample, and the smoothed point. `optax_flat.training.collect_samples` gathers
    samples of x. Keep the params in float32, as for `sgld`. A batch norm has to see the
    anchor's activations before the anchor is evaluated.

    Cost:
      1 gradient per update; state: 1 copy of the params.

    Args:
      learning_rate: :math:`\eta`, >= 0.
      temperature: T, >= 0; 1 / N samples the posterior if the loss is a mean over N
        examples. 0 draws nothing.
      gamma: :math:`\gamma`, >= 0, the stiffness of the spring; 1 / (eta N) with the
        paper's variance eta. 0 cuts it: then x follows `sgld`.
      weight_decay: :math:`\lambda`, >= 0, the prior of both.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside the range given above, or a `key` that is none.
      TypeError: an argument of the wrong type, or no `key`.

    Example:
      100,000 chains in one array, on f = 2 x^2 with T = 1 and a spring of 1. A prior of
      1 holds both: the pair's precision is [[4 + 1 + 1, -1], [-1, 1 + 1]], of which x
      has the variance 2/11 and the anchor 6/11:

      >>> import jax, jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.entropy_mcmc(
      ...     0.01, 1.0, gamma=1.0, weight_decay=1.0, noise_kind="rademacher", key=0)
      >>> def step(carry, _):
      ...     x, state = carry
      ...     updates, state = tx.update(4 * x, state, x)
      ...     return (optax.apply_updates(x, updates), state), None
      >>> x = jnp.zeros(100_000)
      >>> (x, state), _ = jax.lax.scan(step, (x, tx.init(x)), length=200)
      >>> bool(abs(jnp.var(x) - 2 / 11) < 0.01)
      True
      >>> bool(abs(jnp.var(state.anchor) - 6 / 11) < 0.02)
      True

    References:
      Li and Zhang, `Entropy-MCMC: Sampling from Flat Basins with Ease
      <https://arxiv.org/abs/2310.05401>`_, 2024.

    Differs from the paper:
      Nothing in the formula; gamma is 1 / (eta N), since the loss is a mean. The
      authors' code adds noise and spring to the *loss*, so any momentum would act on
      them too, and its temperature is N times ours.
    """
    checks.number("learning_rate", learning_rate, 0.0)
    checks.number("temperature", temperature, 0.0)
    checks.number("gamma", gamma, 0.0)
    checks.number("weight_decay", weight_decay, 0.0)
    noise_kind = checks.choice("noise_kind", draws["noise_kind"], KINDS)
    key = checks.key(draws["key"])
    noiseless = is_zero(temperature)

    def init(x):
        return EntropyMCMCState(jnp.zeros([], jnp.int32), keys.data(key), x)

    def step(state, grads, x, **extra_args):
        del extra_args
        checks.float_params(x)
        t = state.count
        rate, spring, decay = (at(x, t) for x in (learning_rate, gamma, weight_decay))

        def drift(x, other):
            return -rate * (decay * x + spring * (x - other))

        steps = jax.tree.map(
            lambda g, x, a: drift(x, a) - rate * g, grads, x, state.anchor
        )
        anchor_steps = jax.tree.map(drift, state.anchor, x)
        if not noiseless:
            scale = jnp.sqrt(2.0 * rate * at(temperature, t))
            seed = first_seed(keys.fold_in(state.key, t, key), x)
            for_x = draw_from(seed, x, noise_kind)
            for_anchor = draw_from(next_seed(seed), x, noise_kind)
            steps, anchor_steps = (
                jax.tree.map(lambda s, z: s + scale * z, tree, z)
                for tree, z in ((steps, for_x), (anchor_steps, for_anchor))
            )
        anchor = optax.tree.add(state.anchor, anchor_steps)
        return steps, EntropyMCMCState(counted(t), state.key, anchor)

    return by_gradient(init, step)
