"""A CNN with BatchNorm in Flax Linen, trained as its guides write it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(features=8, kernel_size=(3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        return nn.Dense(features=2)(x.reshape((x.shape[0], -1)))


class TrainState(train_state.TrainState):
    batch_stats: Any


def create_train_state(images):
    cnn = CNN()
    variables = cnn.init(jax.random.key(0), images, train=False)
    tx = optax.sgd(learning_rate=0.1, momentum=0.9)
    return TrainState.create(apply_fn=cnn.apply, tx=tx, **variables)


@jax.jit
def train_step(state, images, labels):
    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updates

    grads, updates = jax.grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    return state.replace(batch_stats=updates["batch_stats"])


@jax.jit
def eval_step(state, images, labels):
    params = state.params
    variables = {"params": params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(logits.argmax(-1) == labels)


def main(train_batches, test_batch):
    state = create_train_state(test_batch[0])
    for images, labels in train_batches:
        state = train_step(state, images, labels)
    return eval_step(state, *test_batch)
