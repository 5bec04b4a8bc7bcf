"""Entropy-SGD with Flax Linen: BatchNorm, dropout and clipping, in both modes.

Scanned mode makes one update per step from a stack of minibatches. Transparent mode
takes one minibatch per step, as SGD does, and makes an update every NUM_STEPS steps.

python examples/flax_linen.py [--smoke]
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat
from optax_flat.training import TrainState

NUM_STEPS = 5  # gradients per update


class Net(nn.Module):
    """A small classifier with batch statistics and random numbers."""

    @nn.compact
    def __call__(self, x, train):
        """Returns logits [batch, 10]."""
        x = nn.BatchNorm(not train, momentum=0.9)(nn.Dense(64)(x))
        x = nn.Dropout(0.2, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


class State(TrainState):
    """Params, optimizer state and step; here also the statistics of BatchNorm."""

    batch_stats: Any


def make_state(mode):
    """A fresh model, and Entropy-SGD with clipped gradients."""
    # Clipping in front of the method reaches the gradient that `update` is given. In
    # transparent mode that is every gradient; in scanned mode it is the first of the
    # walk only, the others are made inside, where `inner_transform` clips them all.
    clip = optax.clip_by_global_norm(1.0)
    method = optax_flat.entropy_sgd(
        1.0, num_steps=NUM_STEPS, inner_transform=clip, has_aux=True, mode=mode, key=1
    )
    variables = Net().init(jax.random.key(0), jnp.zeros((1, 64)), train=False)
    return State.create(apply_fn=None, tx=optax.chain(clip, method), **variables)


def loss_fn(params, batch, aux):
    """The loss, and `aux` as this pass leaves it for the next one."""
    batch_stats, key = aux
    key, dropout_key = jax.random.split(key)
    apply = functools.partial(Net().apply, mutable=["batch_stats"], train=True)
    variables = {"params": params, "batch_stats": batch_stats}
    logits, moved = apply(variables, batch["image"], rngs={"dropout": dropout_key})
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), (moved["batch_stats"], key)


grad_fn = jax.grad(loss_fn, has_aux=True)  # (params, batch, aux) -> (grads, aux)


@jax.jit
def scanned_step(state, batches):
    """One update from NUM_STEPS minibatches, stacked along the first axis."""
    first = jax.tree.map(lambda x: x[0], batches)
    others = jax.tree.map(lambda x: x[1:], batches)
    key = jax.random.fold_in(jax.random.key(2), state.step)
    grads, aux = grad_fn(state.params, first, (state.batch_stats, key))
    # `aux` is carried through the other passes and dropped at their end. The statistics
    # to keep are those of this first pass: it was made at the params themselves.
    loop = {"grad_fn": grad_fn, "batches": others, "aux": aux}
    return state.apply_gradients(grads=grads, batch_stats=aux[0], **loop)


@jax.jit
def transparent_step(state, batch):
    """One gradient from one minibatch, as in any training loop."""
    old = state.batch_stats
    key = jax.random.fold_in(jax.random.key(2), state.step)
    grads, (new, _) = grad_fn(state.params, batch, (old, key))
    # In the middle of a walk the params are not those to evaluate: keep no statistics.
    at_start = optax.tree.get(state.opt_state, "TransparentState").step == 0
    kept = jax.tree.map(lambda new, old: jnp.where(at_start, new, old), new, old)
    return state.apply_gradients(grads=grads, batch_stats=kept)


def main(argv=None):
    """Trains in both modes and returns the test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="make few updates")
    updates = 40 if parser.parse_args(argv).smoke else 400
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images / 16, labels, random_state=0)
    rows = np.random.default_rng(0).integers(len(y), size=(updates, NUM_STEPS, 64))

    accuracy = {}
    for mode, step in (("scanned", scanned_step), ("transparent", transparent_step)):
        state = make_state(mode)
        for batch in rows if mode == "scanned" else rows.reshape(-1, 64):
            state = step(state, {"image": x[batch], "label": y[batch]})
        # `eval_params` gives the params to evaluate, at any moment and in either mode.
        variables = {"params": state.eval_params(), "batch_stats": state.batch_stats}
        logits = Net().apply(variables, test_x, train=False)
        accuracy[mode] = float(jnp.mean(logits.argmax(axis=1) == test_y))
        print(f"{mode}: test accuracy {accuracy[mode]:.3f} after {updates} updates")
    return accuracy


if __name__ == "__main__":
    main()
