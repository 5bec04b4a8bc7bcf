"""The fully connected network of the Entropy-SGD paper on MNIST, at equal gradients.

784-1024-1024-10 with ReLU, batch norm and dropout 0.5, minibatches of 128 (the paper's
mnistfc). Every method sees the same minibatches from the same start and spends the same
number of gradients. An epoch is a permutation of the images, cut into whole walks of
L = 20 minibatches: 23 walks for MNIST's 60,000 images; the few images left over are
others in every epoch. Entropy-SGD and Entropy-Adam make one update of a walk, SGD and
Adam twenty.

Schedules are those of the authors' code, scaled to the budget. The learning rates of
SGD and Adam are divided by 5 after 30 % and 60 % of it; the outer ones of Entropy-SGD,
which starts at 1, and of Entropy-Adam are divided by 10 after 40 %. A walk has Nesterov
momentum 0.9, gamma 1e-4, scoping 1e-3 and noise 1e-4 (random signs, which are cheaper
than normal draws and of the same weak order).

One rate per method is free: the learning rate, but for Entropy-SGD the inner step size,
which is what multiplies a gradient there. `--select` trains with each of four rates,
with one seed that is not used again, without the last 10,000 training images, and
writes the rate with the smallest error on these to DIR/selection.json. Later runs with
the same DIR use it; without that file they use the defaults in `METHODS`.

Evaluation uses the running averages of the batch statistics, which move in the first
pass of each update. The error is the test error at the end of the budget, not at its
best moment; train_loss is the loss on all training images then, without dropout.

    python -m benchmarks.training.mnist_mlp --data mnist.npz --select
    python -m benchmarks.training.mnist_mlp --data mnist.npz
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import optax_flat
from benchmarks import rates
from benchmarks.harness import Row, falling
from benchmarks.images import Images, load_or_random
from optax_flat.training import History, make_train_step

WALK = 20  # L
MEASURES = ("error_percent", "test_loss", "train_loss")


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    epochs: int = 10
    batch: int = 128
    width: int = 1024
    validation: int = 10_000


SMOKE = Sizes(2, 2, 4, 50)


class Method(NamedTuple):
    """An optimizer with one free rate."""

    make: Callable[[float, int, jax.Array], optax.GradientTransformation]
    num_steps: int  # gradients per update
    rates: tuple[float, ...]  # the grid of --select
    rate: float


def sgd(rate: float, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Nesterov momentum 0.9."""
    del key
    return optax.sgd(falling(rate, updates, 0.2, 0.3, 0.6), 0.9, nesterov=True)


def adam(rate: float, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Adam with its usual moments."""
    del key
    return optax.adam(falling(rate, updates, 0.2, 0.3, 0.6))


def walk(key: jax.Array) -> dict[str, Any]:
    """What Entropy-SGD and Entropy-Adam have in common."""
    return {
        "num_steps": WALK,
        "gamma": 1e-4,
        "scoping": 1e-3,
        "noise": 1e-4,
        "noise_kind": "rademacher",
        "inner_transform": optax.trace(0.9, nesterov=True),
        "has_aux": True,
        "key": key,
    }


def entropy_sgd(
    rate: float, updates: int, key: jax.Array
) -> optax.GradientTransformation:
    """The rate is that of the walk; the outer one starts at 1."""
    outer = falling(1.0, updates, 0.1, 0.4)
    return optax_flat.entropy_sgd(outer, step_size=rate, **walk(key))


def entropy_adam(
    rate: float, updates: int, key: jax.Array
) -> optax.GradientTransformation:
    """The rate is that of Adam; the walk has the paper's step 0.1."""
    outer = falling(rate, updates, 0.1, 0.4)
    return optax_flat.entropy_adam(outer, step_size=0.1, **walk(key))


METHODS = {
    "sgd": Method(sgd, 1, (0.01, 0.03, 0.1, 0.3), 0.1),
    "adam": Method(adam, 1, (3e-4, 1e-3, 3e-3, 1e-2), 1e-3),
    "entropy_sgd": Method(entropy_sgd, WALK, (0.01, 0.03, 0.1, 0.3), 0.1),
    "entropy_adam": Method(entropy_adam, WALK, (1e-3, 3e-3, 1e-2, 3e-2), 1e-2),
}


class Network(nn.Module):
    """Two hidden layers, each with batch norm, ReLU and dropout."""

    width: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits [B, 10] of uint8 images [B, ...]."""
        x = images.reshape(images.shape[0], -1) / 255.0
        for _ in range(2):
            x = nn.Dense(self.width)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(10)(x)


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@functools.partial(jax.jit, static_argnums=0)
def evaluate(network, params, batch_stats, images, labels):
    """Mean loss, and error in percent."""

    def one(example):
        image, label = example
        variables = {"params": params, "batch_stats": batch_stats}
        logits = network.apply(variables, image[None], train=False)[0]
        return cross_entropy(logits, label), jnp.argmax(logits) != label

    losses, wrong = jax.lax.map(one, (images, labels), batch_size=1000)
    return losses.mean(), 100.0 * wrong.mean()


def train(
    method: Method, rate: float, images: Images, sizes: Sizes, *, seed: int, log: Path
) -> Row:
    """One run; the error is that on the test images of `images`."""
    walks, left_over = divmod(len(images.train_images), WALK * sizes.batch)
    if walks == 0:
        raise SystemExit(
            f"An epoch needs at least {WALK * sizes.batch} training images, a walk of "
            f"{WALK} minibatches of {sizes.batch}; the data has {left_over}."
        )
    init_key, noise_key, dropout_key, *order_keys = jax.random.split(
        jax.random.key(seed), 3 + sizes.epochs
    )
    data = jax.device_put(images)
    network = Network(sizes.width)
    variables = network.init(init_key, data.train_images[:1], train=False)
    evaluations = sizes.epochs * walks * WALK
    tx = method.make(rate, evaluations // method.num_steps, noise_key)

    def loss_fn(params, batch, aux):
        key, dropout_key = jax.random.split(aux["key"])
        logits, moved = network.apply(
            {"params": params, "batch_stats": aux["batch_stats"]},
            batch[0],
            train=True,
            mutable="batch_stats",
            rngs={"dropout": dropout_key},
        )
        loss = cross_entropy(logits, batch[1]).mean()
        return loss, {"key": key, "batch_stats": moved["batch_stats"]}

    step = make_train_step(loss_fn, tx, has_aux=True)

    # An update takes a minibatch or, with a leading axis, those of a walk.
    lead = () if method.num_steps == 1 else (method.num_steps,)

    def epoch(state, key, images, labels):
        order = jax.random.permutation(key, len(images))[: walks * WALK * sizes.batch]

        def body(state, index):
            params, opt_state, aux = state
            batches = (images[index], labels[index])
            params, opt_state, loss, aux = step(params, opt_state, batches, aux)
            return (params, opt_state, aux), loss

        state, losses = jax.lax.scan(body, state, order.reshape(-1, *lead, sizes.batch))
        return state, losses.mean()

    aux = {"key": dropout_key, "batch_stats": variables["batch_stats"]}
    state = (variables["params"], tx.init(variables["params"]), aux)
    training = (data.train_images, data.train_labels)
    lowered = jax.jit(epoch, donate_argnums=0).lower(state, order_keys[0], *training)
    run_epoch = lowered.compile()

    def score(state, images, labels):
        params, opt_state, aux = state
        params = optax_flat.eval_params(opt_state, params)
        return evaluate(network, params, aux["batch_stats"], images, labels)

    seconds, errors = 0.0, []
    with History(method.num_steps, path=log) as history:
        for key in order_keys:
            start = time.perf_counter()
            state, loss = jax.block_until_ready(run_epoch(state, key, *training))
            seconds += time.perf_counter() - start
            test_loss, error = score(state, data.test_images, data.test_labels)
            errors.append(float(error))
            history.record(loss, test_loss)
    return {
        "gradient_evaluations": evaluations,
        "forward_passes": 0,
        "seconds": seconds,
        "error_percent": errors[-1],
        "test_loss": history.val_loss[-1],
        "train_loss": float(score(state, *training)[0]),
        "errors_percent": errors,  # at the end of every epoch
    }


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = rates.options_of(__doc__, METHODS, "mnist_mlp")
    options_of.add_argument("--epochs", type=int, metavar="N", help="(10)")
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    if options.epochs is not None:
        sizes = sizes._replace(epochs=options.epochs)
    data, images = load_or_random(options, (28, 28), 150, 50)

    def run(name: str, rate: float, images: Images, seed: int, log: Path) -> Row:
        return train(METHODS[name], rate, images, sizes, seed=seed, log=log)

    settings = {**sizes._asdict(), "data": data}
    study = rates.Study("mnist_mlp", METHODS, run, settings, MEASURES)
    rates.select_or_run(study, images, options)


if __name__ == "__main__":
    main()
