"""Small networks as pure functions, each a `Model`: params from a key, and logits.

Convolutions are matrix products of patches, which are several times faster than a
convolution in a loop on a CPU. There are no batch statistics: the residual networks
normalize over the channels, as the Transformers do.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

HEAD = 16  # width of a head of attention


class Model(NamedTuple):
    """`init` makes params of a key; `apply` logits [B, ..., K] of inputs [B, ...]."""

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]


def dense(key: jax.Array, inputs: int, outputs: int, gain: float = 1.0) -> Any:
    """A kernel of variance gain / inputs, and no bias yet."""
    kernel = jax.random.normal(key, (inputs, outputs)) * (gain / inputs) ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def linear(layer: Any, x: jax.Array) -> jax.Array:
    """What a dense layer does."""
    return x @ layer["kernel"] + layer["bias"]


def normalized(scale: jax.Array, x: jax.Array) -> jax.Array:
    """Root mean square 1 over the channels, times a scale."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


def patches(
    x: jax.Array, stride: int = 1, padding: int = 1, side: int = 3
) -> jax.Array:
    """Square patches of an image, [B, H, W, C] -> [B, H / stride, W / stride, 9 C].

    The size is rounded up; without padding it is that of H - 2 and W - 2.
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (size - side + 1 for size in x.shape[1:3])
    corners = itertools.product(range(side), range(side))
    parts = [x[:, i : i + height : stride, j : j + width : stride] for i, j in corners]
    return jnp.concatenate(parts, axis=-1)


def feed_forward(
    layers: Sequence[Any],
    x: jax.Array,
    convolutions: int,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Logits of dense layers, the first ones on 3x3 patches with stride 2."""
    for i, layer in enumerate(layers):
        x = patches(x, 2, padding=0) if i < convolutions else x.reshape(len(x), -1)
        x = linear(layer, x)
        x = x if layer is layers[-1] else activation(x)
    return x


def mlp(shape: Sequence[int], widths: Sequence[int], classes: int) -> Model:
    """Dense layers with ReLU, for inputs of a shape."""
    size = functools.reduce(int.__mul__, shape)
    sizes = [size, *widths, classes]

    def init(key):
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = itertools.pairwise(sizes)
        return [dense(k, *pair, 2.0) for k, pair in zip(keys, pairs, strict=True)]

    def apply(params, x):
        x = x.reshape(len(x), -1)
        for layer in params[:-1]:
            x = jax.nn.relu(linear(layer, x))
        return linear(params[-1], x)

    return Model(init, apply)


def cnn(shape: Sequence[int], channels: Sequence[int], width: int, classes: int):
    """3x3 convolutions with stride 2, then one hidden layer; ReLU."""
    height, breadth, depth = shape
    for _ in channels:
        height, breadth = -(-height // 2), -(-breadth // 2)
    head = mlp((height * breadth * channels[-1],), (width,), classes)

    def init(key):
        *keys, last = jax.random.split(key, len(channels) + 1)
        pairs = itertools.pairwise((depth, *channels))
        layers = [
            dense(k, 9 * pair[0], pair[1], 2.0)
            for k, pair in zip(keys, pairs, strict=True)
        ]
        return {"convolutions": layers, "head": head.init(last)}

    def apply(params, x):
        for layer in params["convolutions"]:
            x = jax.nn.relu(linear(layer, patches(x, 2)))
        return head.apply(params["head"], x)

    return Model(init, apply)


def resnet(shape: Sequence[int], channels: Sequence[int], blocks: int, classes: int):
    """Residual blocks of two 3x3 convolutions; each group begins with stride 2.

    The input of a block is normalized; its second convolution starts at zero, so that
    the block starts as the identity.
    """

    def block(key, width):
        first = dense(key, 9 * width, width, 2.0)
        second = {
            "kernel": jnp.zeros((9 * width, width)),
            "bias": jnp.zeros(width),
        }
        return {"scale": jnp.ones(width), "first": first, "second": second}

    def group(key, inputs, width):
        key, *keys = jax.random.split(key, blocks + 1)
        return {
            "down": dense(key, 9 * inputs, width, 2.0),
            "blocks": [block(k, width) for k in keys],
        }

    def init(key):
        *keys, last = jax.random.split(key, len(channels) + 1)
        pairs = itertools.pairwise((shape[-1], *channels))
        return {
            "groups": [group(k, *pair) for k, pair in zip(keys, pairs, strict=True)],
            "scale": jnp.ones(channels[-1]),
            "head": dense(last, channels[-1], classes),
        }

    def apply(params, x):
        for group in params["groups"]:
            x = linear(group["down"], patches(x, 2))
            for layer in group["blocks"]:
                y = jax.nn.relu(normalized(layer["scale"], x))
                y = jax.nn.relu(linear(layer["first"], patches(y)))
                x = x + linear(layer["second"], patches(y))
        x = jax.nn.relu(normalized(params["scale"], x)).mean(axis=(1, 2))
        return linear(params["head"], x)

    return Model(init, apply)


def _layers(key: jax.Array, width: int, depth: int) -> list[Any]:
    """Params of Transformer layers; branches end in small kernels."""

    def layer(key):
        keys = jax.random.split(key, 4)
        return {
            "scales": [jnp.ones(width), jnp.ones(width)],
            "qkv": dense(keys[0], width, 3 * width),
            "mixed": dense(keys[1], width, width, 1 / depth),
            "up": dense(keys[2], width, 2 * width, 2.0),
            "down": dense(keys[3], 2 * width, width, 1 / depth),
        }

    return [layer(k) for k in jax.random.split(key, depth)]


def _transformed(layers: Any, x: jax.Array, *, causal: bool) -> jax.Array:
    """[B, T, D] through Transformer layers, normalized before each branch."""
    for layer in layers:
        y = linear(layer["qkv"], normalized(layer["scales"][0], x))
        q, k, v = jnp.split(y, 3, axis=-1)
        q, k, v = (z.reshape(*z.shape[:2], -1, HEAD) for z in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
        x = x + linear(layer["mixed"], y.reshape(x.shape))
        y = jax.nn.gelu(linear(layer["up"], normalized(layer["scales"][1], x)))
        x = x + linear(layer["down"], y)
    return x


def vit(
    shape: Sequence[int], patch: int, width: int, depth: int, classes: int
) -> Model:
    """A Transformer on patches, heads of 16, with the mean over patches at the end.

    Images whose sides are no multiple of the patch are padded with zeros.
    """
    rows, columns = (-(-side // patch) for side in shape[:2])
    pixels = patch * patch * shape[2]

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "patches": dense(keys[0], pixels, width),
            "places": 0.1 * jax.random.normal(keys[1], (rows * columns, width)),
            "layers": _layers(keys[2], width, depth),
            "scale": jnp.ones(width),
            "head": dense(keys[3], width, classes),
        }

    def apply(params, x):
        missing = (rows * patch - shape[0], columns * patch - shape[1])
        x = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
        x = x.reshape(len(x), rows, patch, columns, patch, -1).swapaxes(2, 3)
        x = linear(params["patches"], x.reshape(len(x), rows * columns, pixels))
        x = _transformed(params["layers"], x + params["places"], causal=False)
        return linear(params["head"], normalized(params["scale"], x).mean(axis=1))

    return Model(init, apply)


def transformer(vocabulary: int, length: int, width: int, depth: int) -> Model:
    """A causal language model with heads of 16: tokens [B, T] to logits [B, T, K]."""

    def init(key):
        keys = jax.random.split(key, 4)
        return {
            "tokens": jax.random.normal(keys[0], (vocabulary, width)),
            "places": 0.1 * jax.random.normal(keys[1], (length, width)),
            "layers": _layers(keys[2], width, depth),
            "scale": jnp.ones(width),
            "head": dense(keys[3], width, vocabulary),
        }

    def apply(params, tokens):
        x = params["tokens"][tokens] + params["places"][: tokens.shape[1]]
        x = _transformed(params["layers"], x, causal=True)
        return linear(params["head"], normalized(params["scale"], x))

    return Model(init, apply)
