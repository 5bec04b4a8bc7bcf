"""Does flatness tell who generalises? Minima of several methods, measured, on images.

Small networks on MNIST and Fashion-MNIST, as many times with clean training labels as
with 40 % wrong ones (uniform over the other classes, others for every seed), which must
be learned by heart. A cell is a data set, a kind of labels and a network:

* mlp: means of 2x2 pixels, then 196-64-64-10;
* cnn: 3x3 convolutions with stride 2 to 8 and 16 channels, then 576-32-10;

both with tanh, so that second derivatives say all, on the first 5,000 training images.
Every run spends the same number of gradients of minibatches of 64, in the same order
for all methods, each with its textbook rate (see `METHODS`; nothing is tuned) and with
three tenths of it, so that the minima differ. Rates fall to 0 by a cosine, but for
coolmomentum, whose momentum falls from 0.99 to 0 instead.

At the end of a run: accuracies and losses on the training images with the labels that
were trained and on the test images; the gaps, test minus training, of the loss and of
the error in percent; and with the first 1,000 training images every measure of
`optax_flat.flatness`, all so that larger means sharper (see `measure`).

Then Kendall's tau between each measure and each gap over the runs of a cell, and the
mean of it over cells ("pooled": only runs of one cell are compared), with a bootstrap
interval of 95 % over runs. The norm of the params and the training loss are there for
comparison: what they tell needs no measure of flatness.

    python benchmarks/flat_study.py --data mnist.npz,fashion_mnist.npz
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from harness import (
    COLOURS,
    Images,
    Row,
    Rows,
    load_images,
    parser,
    random_images,
    table,
    write_json,
)

import optax_flat
from optax_flat import flatness
from optax_flat.training import make_train_step

WALK = 20  # gradients per update of the entropy methods
CLASSES = 10
LABELS = {"clean": 0.0, "noisy": 0.4}  # the part of the training labels that is wrong
FACTORS = (1.0, 0.3)  # of the textbook rates
TEMPERATURE = 1e-5  # of sgld
SHARPNESS = (
    "lambda_max", "trace", "frobenius_norm", "worst", "worst_m", "worst_adaptive",
    "average", "local_energy", "local_entropy",
)  # fmt: skip
MEASURES = (*SHARPNESS, "param_norm", "train_loss")
GAPS = {"error_gap": "test minus training error, %", "loss_gap": "test minus training loss"}
COLUMNS = ("test_accuracy", "train_accuracy", "error_gap", "loss_gap", *SHARPNESS)
SHOWN = ("lambda_max", "trace", "worst_adaptive", "local_entropy")
RESAMPLES = 2000  # of the bootstrap


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    images: int = 5000
    batch: int = 64
    evaluations: int = 4020  # gradients; whole walks of 20 and of 3
    measured: int = 1000  # images for flatness
    samples: int = 32  # of every random measure
    matvecs: int = 30
    steps: int = 40  # of the local entropy's path


SMOKE = Sizes(100, 4, 60, 50, 2, 3, 2)


class Method(NamedTuple):
    """An optimizer with its textbook rate."""

    make: Callable[[optax.Schedule, int, jax.Array], optax.GradientTransformation]
    rate: float
    num_steps: int = 1  # gradients per update
    falls: bool = True  # by a cosine


def entropy(method: Callable[..., Any]):
    """Entropy-SGD or Entropy-Adam; the walk has Nesterov steps of 0.1."""

    def make(rate, updates, key):
        del updates
        return method(
            rate,
            num_steps=WALK,
            noise_kind="rademacher",
            inner_transform=optax.trace(0.9, nesterov=True),
            key=key,
        )

    return make


def coolmomentum(rate, updates, key):
    """The momentum is cooled to 0 over the whole run."""
    del key
    momentum = optax_flat.schedules.exponential_cooling(0.99, updates)
    return optax_flat.coolmomentum(rate, momentum)


METHODS = {
    "sgd": Method(lambda rate, *_: optax.sgd(rate, 0.9), 0.1),
    "adam": Method(lambda rate, *_: optax.adam(rate), 1e-3),
    "entropy_sgd": Method(entropy(optax_flat.entropy_sgd), 1.0, WALK),
    "entropy_adam": Method(entropy(optax_flat.entropy_adam), 1e-2, WALK),
    "coolmomentum": Method(coolmomentum, 0.01, falls=False),
    "sgld": Method(
        lambda rate, _, key: optax_flat.sgld(
            rate, TEMPERATURE, noise_kind="rademacher", key=key
        ),
        0.1,
    ),
    "nesterov_thirds": Method(
        lambda rate, *_: optax_flat.multipoint_nesterov(rate, 0.9, nodes="thirds"),
        0.1,
        3,
    ),
}

LAYERS = {  # shapes of the kernels
    "mlp": ((196, 64), (64, 64), (64, CLASSES)),
    "cnn": ((9, 8), (72, 16), (576, 32), (32, CLASSES)),
}


def initial(key: jax.Array, network: str) -> Any:
    """Normal kernels of variance 1 over the number of inputs; no biases."""
    keys = jax.random.split(key, len(LAYERS[network]))
    return [
        {
            "kernel": jax.random.normal(key, shape) / shape[0] ** 0.5,
            "bias": jnp.zeros(shape[1]),
        }
        for key, shape in zip(keys, LAYERS[network], strict=True)
    ]


def patches(x: jax.Array) -> jax.Array:
    """3x3 patches with stride 2, [B, H, W, C] -> [B, H', W', 9 C].

    Slices: a convolution is several times slower in a loop on a CPU.
    """
    height, width = (size - 2 for size in x.shape[1:3])
    corners = itertools.product(range(3), range(3))
    parts = [x[:, i : i + height : 2, j : j + width : 2] for i, j in corners]
    return jnp.concatenate(parts, axis=-1)


def logits_of(network: str, params: Any, images: jax.Array) -> jax.Array:
    """[B, 10] of images [B, 28, 28]."""
    convolutions = 2 if network == "cnn" else 0
    if convolutions:
        x = images[..., None]
    else:
        x = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
    for i, layer in enumerate(params):
        x = patches(x) if i < convolutions else x.reshape(len(x), -1)
        x = x @ layer["kernel"] + layer["bias"]
        x = jnp.tanh(x) if i < len(params) - 1 else x
    return x


def cross_entropy(network: str, params: Any, batch: Any) -> jax.Array:
    """Mean loss of a minibatch (images, labels)."""
    logits = logits_of(network, params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


# One function for each network, so that programs are compiled once.
LOSSES = {name: functools.partial(cross_entropy, name) for name in LAYERS}


@functools.partial(jax.jit, static_argnames=("network", "method"))
def train(params, data, order, factor, key, *, network: str, method: Method) -> Any:
    """The params to evaluate after one update for each entry of `order`.

    The factor of the rate is an argument, so one program serves all runs.
    """
    updates = len(order)
    decay = optax.cosine_decay_schedule(method.rate, updates)

    def rate(count):
        return factor * (decay(count) if method.falls else method.rate)

    tx = method.make(rate, updates, key)
    step = make_train_step(LOSSES[network], tx)

    def body(state, index):
        batch = jax.tree.map(lambda x: x[index], data)
        return step(*state, batch)[:2], None

    (params, opt_state), _ = jax.lax.scan(body, (params, tx.init(params)), order)
    return optax_flat.eval_params(opt_state, params)


@functools.partial(jax.jit, static_argnames="network")
def evaluate(params, data, *, network: str):
    """Mean loss, and accuracy in percent."""
    right = logits_of(network, params, data[0]).argmax(axis=-1) == data[1]
    return LOSSES[network](params, data), 100.0 * right.mean()


@functools.partial(jax.jit, static_argnames=("network", "sizes"))
def measure(params, data, key, *, network: str, sizes: Sizes) -> dict[str, Any]:
    """Name to `Estimate`; the local entropy as how far -F lies above the loss."""
    given = (LOSSES[network], params, data)
    keys = iter(jax.random.split(key, 6))

    def draws():
        return {"num_samples": sizes.samples, "key": next(keys)}

    top = flatness.top_eigenvalues(*given, num_matvecs=sizes.matvecs, key=next(keys))
    # Samples of the posterior of as many images, within 1 per parameter at most.
    entropy = flatness.local_entropy(
        *given,
        gamma=1.0,
        temperature=1.0 / sizes.measured,
        num_steps=sizes.steps,
        num_chains=8,
        key=next(keys),
    )
    return {
        "lambda_max": flatness.Estimate(top.values[0], top.residuals[0]),
        "trace": flatness.trace(*given, **draws()),
        "frobenius_norm": flatness.frobenius_norm(*given, **draws()),
        "worst": flatness.sharpness(*given, rho=0.05),
        "worst_m": flatness.sharpness(*given, rho=0.05, m=50),
        "worst_adaptive": flatness.sharpness(*given, rho=0.5, adaptive=True),
        "average": flatness.sharpness(*given, rho=1.0, kind="average", **draws()),
        "local_energy": flatness.local_energy(*given, sigma=0.1, **draws()),
        "local_entropy": entropy._replace(value=-entropy.value - given[0](*given[1:])),
    }


def wrong_labels(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Replaces a part of the labels by one of the other classes each."""
    random = np.random.default_rng(seed)
    count = round(part * len(labels))
    chosen = random.choice(len(labels), count, replace=False)
    labels = labels.astype(np.int32)
    labels[chosen] += random.integers(1, CLASSES, size=count, dtype=np.int32)
    return labels % CLASSES


def run(images: Images, cell: str, name: str, factor: float, sizes: Sizes, seed: int):
    """Trains once and measures; the images are floats."""
    _, labels, network = cell.split("-")
    method = METHODS[name]
    wrong = wrong_labels(images.train_labels, LABELS[labels], seed)
    training = jax.device_put((images.train_images, wrong))
    test = jax.device_put((images.test_images, images.test_labels.astype(np.int32)))
    shuffle = np.random.default_rng(seed).permutation
    epochs = -(-sizes.evaluations * sizes.batch // len(wrong))
    order = np.concatenate([shuffle(len(wrong)) for _ in range(epochs)])
    order = order[: sizes.evaluations * sizes.batch].reshape(-1, sizes.batch)
    updates = sizes.evaluations // method.num_steps
    if name == "nesterov_thirds":  # one minibatch at all points
        order = order[:updates, None].repeat(method.num_steps, axis=1)
    elif method.num_steps > 1:
        order = order.reshape(updates, method.num_steps, sizes.batch)

    init_key, noise_key, measure_key = jax.random.split(jax.random.key(seed), 3)
    params = initial(init_key, network)
    given = (params, training, order, factor, noise_key)
    program = compiled(network, name, train.lower(*given, network=network, method=method))
    start = time.perf_counter()
    params = jax.block_until_ready(program(*given))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    part = jax.tree.map(lambda x: x[: sizes.measured], training)
    found = measure(params, part, measure_key, network=network, sizes=sizes)
    jax.block_until_ready(found)
    measuring = time.perf_counter() - start
