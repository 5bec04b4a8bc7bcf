"""Training a network that backpropagation cannot train: its activations are signs.

The derivative of a sign is zero, so jax.grad says that the first layer has no effect on
the loss, and Adam leaves it as it was drawn. Methods that only run the model forward
train it: `perturbation_gradient` in front of Adam, and `ensemble_kalman`, which stays
in the span of its first members unless it may draw new ones.

python examples/no_gradients.py [--smoke] [--seeds N]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat
from optax_flat.training import make_train_step

HIDDEN = 16  # so few that the first layer cannot be left random
BATCH = 128  # examples per minibatch: one forward pass


class Net(nn.Module):
    """A classifier whose hidden layer is binary."""

    @nn.compact
    def __call__(self, x):
        """Returns logits [batch, 10]."""
        hidden = jnp.sign(nn.Dense(HIDDEN, name="first")(x))
        return nn.Dense(10, name="last")(hidden)


def output_fn(params, batch):
    """The outputs: this part is only run forward by methods without gradients."""
    return Net().apply({"params": params}, batch["image"])


def loss_fn(logits, batch):
    """The loss of the outputs: this part is differentiated by every method."""
    labels = batch["label"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def methods(shrink):
    """Optimizer and number of updates by name, all with cosine decay.

    The methods without gradients have the same number of forward passes.
    """
    many, few = 2000 // shrink, 1000 // shrink

    def kalman(step_size, **settings):
        schedule = optax.cosine_decay_schedule(step_size, few)
        return optax_flat.ensemble_kalman(
            schedule, ensemble_size=128, key=1, **settings
        )

    adam = optax.adam(optax.cosine_decay_schedule(0.01, many))
    perturbed = optax_flat.perturbation_gradient(
        adam, ensemble_size=64, spread=0.3, key=1
    )
    return {
        "Adam, backpropagation": (adam, many),
        "Adam, perturbation gradient": (perturbed, many),
        "ensemble Kalman": (kalman(0.3, spread=0.5), few),
        "ensemble Kalman, resampled": (kalman(1.0, spread=0.2, resample=1), few),
    }


def make_run(tx, data):
    """A whole run, jitted, from first params and the rows of the minibatches."""
    # With `output_fn` the same step serves every optimizer: methods without gradients
    # are handed the two parts, all others the gradient of both together.
    step = make_train_step(loss_fn, tx, output_fn=output_fn)
    train_data, test_data = data

    def update(carry, rows):
        batch = jax.tree.map(lambda x: x[rows], train_data)
        return step(*carry, batch)[:2], None

    def run(start, rows):
        params, opt_state = jax.lax.scan(update, (start, tx.init(start)), rows)[0]
        predicted = output_fn(params, test_data).argmax(axis=1)
        moved = params["first"]["kernel"] - start["first"]["kernel"]
        # Methods without gradients count their passes; others make one per update.
        passes = optax.tree.get(opt_state, "forward_passes", len(rows))
        return {
            "accuracy": jnp.mean(predicted == test_data["label"]),
            "moved": jnp.sqrt(jnp.mean(moved**2)),
            "forward_passes": passes,
        }

    return jax.jit(run)


def train(tx, updates, starts, data):
    """Runs from several first params, each with its own order of the examples."""
    size = (len(starts), updates, BATCH)
    rows = np.random.default_rng(0).integers(len(data[0]["label"]), size=size)
    run = make_run(tx, data).lower(starts[0], rows[0]).compile()
    results = []
    for start, order in zip(starts, rows, strict=True):
        clock = time.perf_counter()
        result = jax.device_get(run(start, order))
        results.append(result | {"seconds": time.perf_counter() - clock})
    return [{name: float(x) for name, x in result.items()} for result in results]


def main(argv=None):
    """Trains with every method and returns what the runs came to, by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="make few updates")
    parser.add_argument("--seeds", type=int, help="runs per method (3; smoke: 1)")
    args = parser.parse_args(argv)
    seeds = args.seeds or (1 if args.smoke else 3)
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype("f4")
    x, test_x, y, test_y = train_test_split(images, labels, random_state=0)
    data = jax.tree.map(
        jnp.asarray,
        ({"image": x, "label": y}, {"image": test_x, "label": test_y}),
    )

    init = jax.jit(Net().init)
    starts = [init(jax.random.key(seed), x[:1])["params"] for seed in range(seeds)]

    print(f"Means over {seeds} seed(s); a forward pass is one minibatch of {BATCH};")
    print("moved is the root of the mean squared change of the first layer's weights.")
    print(f"{'method':28} {'test accuracy':>14} {'moved':>6} {'passes':>8} {'s':>5}")
    results = {}
    for name, (tx, updates) in methods(10 if args.smoke else 1).items():
        runs = train(tx, updates, starts, data)
        mean = {key: np.mean([run[key] for run in runs]) for key in runs[0]}
        accuracy = [run["accuracy"] for run in runs]
        shown = f"{mean['accuracy']:.3f}"
        if seeds > 1:  # the error of the mean over seeds
            shown += f" ± {np.std(accuracy, ddof=1) / seeds**0.5:.3f}"
        counts = f"{mean['forward_passes']:8.0f} {mean['seconds']:5.1f}"
        print(f"{name:28} {shown:>14} {mean['moved']:6.3f} {counts}", flush=True)
        results[name] = runs
    return results


if __name__ == "__main__":
    main()
