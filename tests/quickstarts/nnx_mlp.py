"""An MLP in Flax NNX, trained as its quick start does."""

import jax.numpy as jnp
import optax
from flax import nnx


class MLP(nnx.Module):
    def __init__(self, features, rngs):
        self.linear1 = nnx.Linear(features, 32, rngs=rngs)
        self.linear2 = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


def loss_fn(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    grads = nnx.grad(loss_fn)(model, images, labels)
    optimizer.update(model, grads)


@nnx.jit
def eval_step(model, images, labels):
    accuracy = jnp.mean(model(images).argmax(-1) == labels)
    return loss_fn(model, images, labels), accuracy


def main(train_batches, test_batch):
    model = MLP(test_batch[0][0].size, rngs=nnx.Rngs(0))
    tx = optax.adamw(learning_rate=0.005)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for images, labels in train_batches:
        train_step(model, optimizer, images, labels)
    return eval_step(model, *test_batch)
