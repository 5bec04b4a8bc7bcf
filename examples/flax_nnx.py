"""Entropy-SGD with Flax NNX: `nnx.Optimizer`, BatchNorm and dropout, in both modes.

Scanned mode makes one update per step from a stack of minibatches. Transparent mode
takes one minibatch per step, as SGD does, and makes an update every NUM_STEPS steps.

python examples/flax_nnx.py [--smoke]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat

NUM_STEPS = 5  # gradients per update


class Net(nnx.Module):
    """A small classifier with batch statistics and random numbers."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, rngs=None):
        """Returns logits [batch, 10]."""
        x = nnx.relu(self.norm(self.hidden(x)))
        return self.out(self.dropout(x, rngs=rngs))


def make_model(mode):
    """A fresh model, and Entropy-SGD with every gradient clipped."""
    clip = optax.clip_by_global_norm(1.0)
    tx = optax_flat.entropy_sgd(
        1.0, num_steps=NUM_STEPS, inner_transform=clip, mode=mode, key=1
    )
    model = Net(nnx.Rngs(0))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss_fn(model, batch):
    """The loss; BatchNorm updates its statistics in the model on the way."""
    logits = model(batch["image"], nnx.Rngs(jax.random.key(batch["seed"])))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean()


@nnx.jit
def scanned_step(model, optimizer, batches):
    """One update from NUM_STEPS minibatches, stacked along the first axis."""
    first = jax.tree.map(lambda x: x[0], batches)
    others = jax.tree.map(lambda x: x[1:], batches)
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    @jax.grad
    def grad_fn(params, batch):
        # A copy: the live model's statistics must not move at the points of the walk.
        return loss_fn(nnx.merge(graphdef, params, rest, copy=True), batch)

    grads = nnx.grad(loss_fn)(model, first)  # moves the statistics, once per update
    optimizer.update(model, grads, grad_fn=grad_fn, batches=others)


@nnx.jit
def transparent_step(model, optimizer, batch):
    """One gradient from one minibatch, as in any training loop."""
    old = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    grads = nnx.grad(loss_fn)(model, batch)
    new = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    # In the middle of a walk the params are not those to evaluate: keep no statistics.
    state = optax.tree.get(nnx.as_pure(optimizer.opt_state), "TransparentState")
    kept = jax.tree.map(lambda n, o: jnp.where(state.step == 0, n, o), new, old)
    nnx.update(model, kept)
    optimizer.update(model, grads)


def eval_model(model, optimizer):
    """A copy to evaluate, at any moment and in either mode."""
    params = nnx.state(model, nnx.Param)
    params = optax_flat.eval_params(optimizer.opt_state, params)
    copy = nnx.view(nnx.clone(model), deterministic=True, use_running_average=True)
    nnx.update(copy, params)
    return copy


def main(argv=None):
    """Trains in both modes and returns the test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="make few updates")
    updates = 40 if parser.parse_args(argv).smoke else 400
    images, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(images / 16, labels, random_state=0)
    rows = np.random.default_rng(0).integers(len(y), size=(updates, NUM_STEPS, 64))
    seeds = np.arange(updates * NUM_STEPS).reshape(updates, NUM_STEPS)  # of dropout

    accuracy = {}
    for mode, step in (("scanned", scanned_step), ("transparent", transparent_step)):
        model, optimizer = make_model(mode)
        if mode == "transparent":  # the same minibatches, one at a time
            rows, seeds = rows.reshape(-1, 64), seeds.reshape(-1)
        for r, seed in zip(rows, seeds, strict=True):
            step(model, optimizer, {"image": x[r], "label": y[r], "seed": seed})
        logits = eval_model(model, optimizer)(test_x)
        accuracy[mode] = float(jnp.mean(logits.argmax(axis=1) == test_y))
        print(f"{mode}: test accuracy {accuracy[mode]:.3f} after {updates} updates")
    return accuracy


if __name__ == "__main__":
    main()
