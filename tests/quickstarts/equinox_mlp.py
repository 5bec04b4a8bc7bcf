"""An MLP in Equinox, trained as its examples do."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax


def loss_fn(model, images, labels):
    logits = jax.vmap(model)(images.reshape(images.shape[0], -1))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@eqx.filter_jit
def evaluate(model, images, labels):
    logits = jax.vmap(model)(images.reshape(images.shape[0], -1))
    accuracy = jnp.mean(logits.argmax(-1) == labels)
    return loss_fn(model, images, labels), accuracy


def main(train_batches, test_batch):
    features = test_batch[0][0].size
    model = eqx.nn.MLP(features, 2, 32, 1, key=jax.random.key(0))
    optim = optax.adamw(learning_rate=0.005)
    opt_state = optim.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def make_step(model, opt_state, images, labels):
        grads = eqx.filter_grad(loss_fn)(model, images, labels)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = optim.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state

    for images, labels in train_batches:
        model, opt_state = make_step(model, opt_state, images, labels)
    return evaluate(model, *test_batch)
