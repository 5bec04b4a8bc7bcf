"""How flat are the minima of Adam and Entropy-Adam? One report of each.

Trains a small Flax network on scikit-learn's 8x8 digits with both methods, from the
same params and with the same number of minibatch gradients, and measures the training
loss around the ends: curvature, sharpness, local energy, local entropy, and slices.

    python examples/flatness_report.py [--smoke] [--out DIR]

Written to --out: flatness_report.png, landscape.png (the plane through both minima) and
a JSON file of each report, which `optax_flat.flatness.Report.from_json` reads.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat
from optax_flat import flatness, plotting
from optax_flat.training import make_train_step

WALK = 20  # gradients per update of Entropy-Adam
BATCH = 32
# Fewer samples and steps, for a first look.
QUICK = {
    "measures": ("loss", "top_eigenvalues", "trace", "sharpness_worst", "random_line"),
    "k": 1,
    "num_matvecs": 10,
}


class Net(nn.Module):
    """A small classifier; smooth, so that the Hessian says all."""

    @nn.compact
    def __call__(self, x):
        """Returns logits [batch, 10]."""
        x = nn.tanh(nn.Dense(32)(x))
        x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(10)(x)


def loss_fn(params, batch):
    """Mean cross-entropy of a batch (images, labels)."""
    logits = Net().apply({"params": params}, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


def train(tx, length, params, data, passes):
    """The params to evaluate after so many passes over the data.

    Args:
      tx: the optimizer.
      length: minibatches that one of its updates takes, or None for one without a
        leading axis.
      params: where to start.
      data: images and labels.
      passes: as many go into whole updates of WALK minibatches.
    """
    step = make_train_step(loss_fn, tx)

    def update(carry, rows):
        return step(*carry, jax.tree.map(lambda x: x[rows], data))[:2], None

    @jax.jit
    def run(params):
        keys = jax.random.split(jax.random.key(1), passes)
        order = jax.vmap(lambda key: jax.random.permutation(key, len(data[1])))(keys)
        order = order[:, : order.shape[1] // (WALK * BATCH) * WALK * BATCH]
        rows = order.reshape(-1, *([] if length is None else [length]), BATCH)
        (params, opt_state), _ = jax.lax.scan(update, (params, tx.init(params)), rows)
        return optax_flat.eval_params(opt_state, params)

    return run(params)


def main(argv=None):
    """Trains, prints both tables, writes the files; returns the reports by name."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--smoke", action="store_true", help="few passes and measures")
    add("--out", type=Path, metavar="DIR", default=Path("out/flatness_report"))
    args = parser.parse_args(argv)
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype("f4")
    x, test_x, y, test_y = map(
        jnp.asarray, train_test_split(images, labels, random_state=0)
    )
    start = Net().init(jax.random.key(0), x[:1])["params"]
    walk = optax_flat.entropy_adam(
        1e-2, num_steps=WALK, inner_transform=optax.trace(0.9, nesterov=True), key=0
    )
    methods = {"Adam": (optax.adam(1e-3), None), "Entropy-Adam": (walk, WALK)}

    solutions, reports = {}, {}
    for name, (tx, length) in methods.items():
        params = train(tx, length, start, (x, y), 10 if args.smoke else 60)
        logits = Net().apply({"params": params}, test_x)
        accuracy = 100 * jnp.mean(logits.argmax(axis=1) == test_y)
        # The training loss: it is its minima that are called flat or sharp.
        found = flatness.report(
            loss_fn, params, (x, y), key=0, progress=True, **QUICK if args.smoke else {}
        )
        print(f"\n{name}: {accuracy:.1f} % of the test images\n\n{found}", flush=True)
        found.to_json(args.out / f"{name}.json")
        solutions[name], reports[name] = params, found

    plotting.report(reports).savefig(args.out / "flatness_report.png")
    # From Adam's minimum at 0 to the other at 1, and a random direction across.
    across = flatness.random_direction(solutions["Adam"], key=0)
    toward = optax.tree.sub(solutions["Entropy-Adam"], solutions["Adam"])
    size = 7 if args.smoke else 31
    plane = flatness.plane(
        loss_fn, solutions["Adam"], (x, y), directions=(toward, across),
        x=jnp.linspace(-0.5, 1.5, size), y=jnp.linspace(-1.0, 1.0, size),
    )  # fmt: skip
    points = dict(zip(solutions, [(0.0, 0.0), (1.0, 0.0)], strict=True))
    plotting.landscape(plane, points=points).savefig(args.out / "landscape.png")
    print(f"\nPictures and reports: {args.out}")
    return reports


if __name__ == "__main__":
    main()
