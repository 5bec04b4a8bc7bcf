"""Parle and elastic averaging on MNIST, at equal gradients per replica.

784-128-128-10 with ReLU, minibatches of 128. Parle and elastic averaging run three
replicas, SGD and Entropy-SGD one; every replica spends the same number of gradients, so
three replicas spend three times as many in all, at the same time if there are three
devices. All replicas of a seed start from the same params. An epoch of a replica is a
permutation of the images of its own, cut into whole walks of L = 25 minibatches: 18
walks for MNIST's 60,000 images.

SGD and elastic averaging (coupling 0.1) have Nesterov momentum 0.9, and their learning
rates are divided by 5 after 30 % and 60 % of the budget. A walk of Entropy-SGD and
Parle has Nesterov momentum 0.9, gamma 1e-4, scoping 1e-3 and no noise; the outer
learning rate is 1, and 0.1 after 40 %. Parle's coupling is 0.75, which is 0.01 L n.

One rate per method is free: the learning rate, or the step size of the walk. `--select`
trains with each of five rates, with one seed that is not used again, without the last
10,000 training images, and writes the rate with the smallest error on these to
DIR/selection.json. Later runs with the same DIR use it; without that file they use the
defaults in `METHODS`.

The error is the test error at the end of the budget, of the mean of the replicas;
replica_error_percent is that of the replicas by themselves, on average. `messages`
counts how often the replicas exchange their params. The seconds are those of all
replicas on one device.

    python -m benchmarks.training.mnist_parle --data mnist.npz --select
    python -m benchmarks.training.mnist_parle --data mnist.npz
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flat
from benchmarks import rates
from benchmarks.harness import Row, falling
from benchmarks.images import Images, load_or_random
from optax_flat.training import make_train_step

WALK = 25  # L
AXIS = "replica"
MEASURES = (
    "error_percent", "replica_error_percent", "test_loss", "train_loss", "messages"
)  # fmt: skip


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    epochs: int = 4
    batch: int = 128
    width: int = 128
    validation: int = 10_000


SMOKE = Sizes(2, 2, 4, 50)


class Method(NamedTuple):
    """An optimizer with one free rate."""

    make: Callable[[jax.Array, int], optax.GradientTransformation]
    num_steps: int  # gradients per update
    replicas: int
    rates: tuple[float, ...]  # the grid of --select
    rate: float


def sgd(rate: jax.Array, updates: int) -> optax.GradientTransformation:
    """Nesterov momentum 0.9."""
    return optax.sgd(falling(rate, updates, 0.2, 0.3, 0.6), 0.9, nesterov=True)


def elastic_averaging(rate: jax.Array, updates: int) -> optax.GradientTransformation:
    """The same SGD, pulled to the mean at every gradient."""
    return optax_flat.elastic_averaging(
        sgd(rate, updates), coupling=0.1, axis_name=AXIS
    )


def walk(rate: jax.Array, updates: int) -> dict[str, Any]:
    """What Entropy-SGD and Parle have in common."""
    return {
        "learning_rate": falling(1.0, updates, 0.1, 0.4),
        "num_steps": WALK,
        "step_size": rate,
        "gamma": 1e-4,
        "scoping": 1e-3,
        "noise": 0.0,
        "averaging": 0.75,
        "momentum": 0.0,
        "inner_transform": optax.trace(0.9, nesterov=True),
        "key": 0,  # not used without noise
    }


def entropy_sgd(rate: jax.Array, updates: int) -> optax.GradientTransformation:
    """The rate is that of the walk."""
    return optax_flat.entropy_sgd(**walk(rate, updates))


def parle(rate: jax.Array, updates: int) -> optax.GradientTransformation:
    """The rate is that of the walks."""
    return optax_flat.parle(**walk(rate, updates), coupling=0.75, axis_name=AXIS)


RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
METHODS = {
    "sgd": Method(sgd, 1, 1, RATES, 0.1),
    "elastic_averaging": Method(elastic_averaging, 1, 3, RATES, 0.1),
    "entropy_sgd": Method(entropy_sgd, WALK, 1, RATES, 0.1),
    "parle": Method(parle, WALK, 3, RATES, 0.1),
}


def init_params(key: jax.Array, width: int) -> list[dict[str, jax.Array]]:
    """Params of 784-width-width-10, with He's deviations."""
    sizes = [784, width, width, 10]
    keys = jax.random.split(key, 3)
    return [
        {
            "w": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5,
            "b": jnp.zeros(n),
        }
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def logits_of(params: Any, images: jax.Array) -> jax.Array:
    """Logits [B, 10] of uint8 images [B, 28, 28]."""
    x = images.reshape(len(images), -1) / 255.0
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    images, labels = batch
    logits = logits_of(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def evaluate(params: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Mean loss, and error in percent."""
    wrong = jnp.argmax(logits_of(params, images), axis=-1) != labels
    return loss_fn(params, (images, labels)), 100.0 * wrong.mean()


class Program(NamedTuple):
    """A method compiled for all rates and seeds."""

    evaluations: int  # gradients of each replica
    init: Callable[..., Any]  # (rate, key) -> state, the replica axis in front
    epoch: Callable[..., Any]  # (rate, state, key, images, labels) -> state, losses


@functools.cache
def program(
    method: Method, sizes: Sizes, images: jax.ShapeDtypeStruct, labels: Any
) -> Program:
    """The program for training images and labels of these shapes."""
    walks = images.shape[0] // (WALK * sizes.batch)
    if walks == 0:
        raise SystemExit(
            f"An epoch needs at least {WALK * sizes.batch} training images, a walk of "
            f"{WALK} minibatches of {sizes.batch}; the data has {images.shape[0]}."
        )
    evaluations = sizes.epochs * walks * WALK
    # An update of a replica takes a minibatch or, stacked, those of a walk.
    lead = () if method.num_steps == 1 else (method.num_steps,)
    shape = (method.replicas, -1, *lead, sizes.batch)

    def optimizer(rate):
        return method.make(rate, evaluations // method.num_steps)

    def replicate(leaf):
        return jnp.broadcast_to(leaf, (method.replicas, *leaf.shape))

    @jax.jit
    def init(rate, key):
        params = jax.tree.map(replicate, init_params(key, sizes.width))
        return params, jax.vmap(optimizer(rate).init, axis_name=AXIS)(params)

    def epoch(rate, state, key, images, labels):
        step = jax.vmap(make_train_step(loss_fn, optimizer(rate)), axis_name=AXIS)
        keys = jax.random.split(key, method.replicas)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(images)))(keys)
        orders = orders[:, : walks * WALK * sizes.batch].reshape(shape)

        def body(state, index):
            *state, loss = step(*state, (images[index], labels[index]))
            return tuple(state), loss.mean()

        return jax.lax.scan(body, state, orders.swapaxes(0, 1))

    rate, key = jnp.ones(()), jax.random.key(0)
    lowered = jax.jit(epoch, donate_argnums=1).lower(
        rate, jax.eval_shape(init, rate, key), key, images, labels
    )
    return Program(evaluations, init, lowered.compile())


def train(
    method: Method, rate: float, images: Images, sizes: Sizes, *, seed: int
) -> Row:
    """One run; the error is that on the test images of `images`."""
    init_key, *order_keys = jax.random.split(jax.random.key(seed), 1 + sizes.epochs)
    data = jax.device_put(images)
    training = data.train_images, data.train_labels
    test = data.test_images, data.test_labels
    run = program(method, sizes, *jax.eval_shape(lambda: training))
    scale = jnp.asarray(rate, float)

    def mean_of(state):
        params, opt_state = state
        means = jax.vmap(optax_flat.eval_params)(opt_state, params)
        return jax.tree.map(lambda x: x[0], means)

    state = run.init(scale, init_key)
    seconds, errors, test_loss = 0.0, [], jnp.inf
    for key in order_keys:
        began = time.perf_counter()
        state, losses = jax.block_until_ready(run.epoch(scale, state, key, *training))
        seconds += time.perf_counter() - began
        if not jnp.isfinite(losses).all():
            raise FloatingPointError(f"the loss is not finite at the rate {rate}")
        test_loss, error = evaluate(mean_of(state), *test)
        errors.append(float(error))
    replica_errors = [
        float(evaluate(jax.tree.map(lambda x, a=a: x[a], state[0]), *test)[1])
        for a in range(method.replicas)
    ]
    exchanges = run.evaluations // method.num_steps
    return {
        "gradient_evaluations": run.evaluations,  # of each replica
        "forward_passes": 0,
        "seconds": seconds,
        "error_percent": errors[-1],
        "replica_error_percent": sum(replica_errors) / method.replicas,
        "test_loss": float(test_loss),
        "train_loss": float(evaluate(mean_of(state), *training)[0]),
        "messages": exchanges if method.replicas > 1 else 0,
        "errors_percent": errors,  # at the end of every epoch
    }


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options = rates.options_of(__doc__, METHODS, "mnist_parle").parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    data, images = load_or_random(options, (28, 28), 150, 50)

    def run(name: str, rate: float, images: Images, seed: int, log: Path) -> Row:
        del log
        return train(METHODS[name], rate, images, sizes, seed=seed)

    settings = {**sizes._asdict(), "data": data}
    study = rates.Study("mnist_parle", METHODS, run, settings, MEASURES)
    rates.select_or_run(study, images, options)


if __name__ == "__main__":
    main()
