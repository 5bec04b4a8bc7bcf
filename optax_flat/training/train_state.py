"""Flax's train state, with extra arguments for the optimizer."""

from typing import Any, Self

import optax

from optax_flat._core import checks, extras
from optax_flat._core.modes import eval_params

extras.load("flax", "flax", "optax_flat.training.TrainState")
from flax.training import train_state  # noqa: E402 - first the advice, if it is missing


class TrainState(train_state.TrainState):
    """A Flax `TrainState` whose `apply_gradients` passes extra arguments on.

    Flax's own takes every keyword for a field to replace, and `grad_fn` never reaches
    the optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, optax_flat
      >>> from optax_flat.training import TrainState
      >>> tx = optax_flat.entropy_sgd(1.0, num_steps=5, key=0)
      >>> params = {"w": jnp.ones(3)}
      >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> @jax.jit
      ... def train_step(state, batches):
      ...     grad_fn = jax.grad(lambda p, batch: jnp.mean((p["w"] - batch) ** 2))
      ...     grads = grad_fn(state.params, batches[0])
      ...     return state.apply_gradients(
      ...         grads=grads, grad_fn=grad_fn, batches=batches[1:])
      >>> state = train_step(state, jnp.zeros((5, 8, 3)))
      >>> int(state.step), bool(jnp.all(state.params["w"] < 1))
      (1, True)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> Self:
        """One call of the optimizer's `update`.

        Args:
          grads: the gradient, like `params`.
          **kwargs: names of fields replace these fields (`batch_stats=...`); all others
            go to the optimizer (`grad_fn=...`, `batches=...`, `value=...`).

        Returns:
          The next state, its `step` one higher.
        """
        fields = {
            name: kwargs.pop(name)
            for name in list(kwargs)
            if name in self.__dataclass_fields__
        }
        tx = checks.transformation("tx", self.tx)

        def update(updates, state, params=None):
            return tx.update(updates, state, params, **kwargs)

        # Flax's own method does the work, on an optimizer that knows the arguments.
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        after: Any = super(TrainState, bound).apply_gradients(grads=grads, **fields)
        return after.replace(tx=self.tx)

    def eval_params(self) -> optax.Params:
        """The params to evaluate and to save, see `optax_flat.eval_params`."""
        return eval_params(self.opt_state, self.params)
