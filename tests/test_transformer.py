"""A model with as many leaves as real ones have, compiled as users compile it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_flat
from benchmarks import hlo

LAYERS, WIDTH, HEADS, WORDS, LENGTH = 12, 16, 2, 11, 5


def init(seed=0):
    """150 leaves: layers are not stacked, as in most codes."""
    rng = np.random.default_rng(seed)

    def matrix(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), "f4")

    def norm():
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def layer():
        heads = (WIDTH, HEADS, WIDTH // HEADS)
        return {
            "norm": norm(),
            "attention": {name: matrix(*heads) for name in "qkv"}
            | {"out": matrix(WIDTH, WIDTH)},
            "second_norm": norm(),
            "mlp": {
                "up": matrix(WIDTH, 4 * WIDTH),
                "up_bias": jnp.zeros(4 * WIDTH),
                "down": matrix(4 * WIDTH, WIDTH),
                "down_bias": jnp.zeros(WIDTH),
            },
        }

    return {
        "words": matrix(WORDS, WIDTH),
        "places": matrix(LENGTH, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": norm(),
        "head": matrix(WIDTH, WORDS),
        "head_bias": jnp.zeros(WORDS),
    }


def normalized(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return (
        x * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * norm["scale"]
        + norm["bias"]
    )


def apply(params, words):
    """[B, LENGTH] words to [B, LENGTH, WORDS] logits."""
    x = params["words"][words] + params["places"]
    for layer in params["layers"]:
        attention, mlp = layer["attention"], layer["mlp"]
        h = normalized(x, layer["norm"])
        q, k, v = (jnp.einsum("btd,dhe->bthe", h, attention[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed.reshape(x.shape) @ attention["out"]
        h = normalized(x, layer["second_norm"])
        h = jax.nn.gelu(h @ mlp["up"] + mlp["up_bias"])
        x = x + h @ mlp["down"] + mlp["down_bias"]
    return normalized(x, params["norm"]) @ params["head"] + params["head_bias"]


def loss(params, words):
    logits = apply(params, words[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:]).mean()


@pytest.mark.slow
def test_an_update_of_a_transformer():
    tx = optax_flat.entropy_sgd(1.0, num_steps=4, noise=1e-3, key=0)
    params = init()
    assert len(jax.tree.leaves(params)) == 150
    grad_fn = jax.grad(loss)

    def update(params, opt_state, batches):
        value, grads = jax.value_and_grad(loss)(params, batches[0])
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, batches=batches[1:]
        )
        return optax.apply_updates(params, updates), opt_state, value

    words = np.random.default_rng(0).integers(0, 3, (4, 2, LENGTH + 1))
    state = jax.jit(tx.init)(params)
    step = hlo.compiled(jax.jit(update), params, state, words)
    losses = []
    for _ in range(6):
        params, state, value = step(params, state, words)
        losses.append(value)
    assert losses[-1] < losses[0]
