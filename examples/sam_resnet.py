"""SAM for a small ResNet in Flax NNX: BatchNorm, augmentation, checkpoints.

Both gradients of an update belong to one minibatch, so an image is augmented once, in
front of the step. The batch statistics that are kept are of the first, clean pass.
SGD is trained beside it with as many gradients: twice as many updates.

A run that was cut off goes on from its last epoch, bit for bit; run it again.

python examples/sam_resnet.py [--smoke] [--data images.npz] [--epochs N] [--out DIR]
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_flat
from optax_flat.training import make_train_step

BATCH = 64
METHODS = {"sgd": 1, "sam": 2}  # gradients per update


class Block(nnx.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels, rngs):
        conv = [nnx.Conv(channels, channels, (3, 3), rngs=rngs) for _ in range(2)]
        self.layers = nnx.List(conv)
        norm = [nnx.BatchNorm(channels, momentum=0.9, rngs=rngs) for _ in range(2)]
        self.norms = nnx.List(norm)

    def __call__(self, x):
        """Returns [batch, height, width, channels], as it was given."""
        y = nnx.relu(self.norms[0](self.layers[0](x)))
        return nnx.relu(x + self.norms[1](self.layers[1](y)))


class ResNet(nnx.Module):
    """Three blocks at one resolution, then the mean over the image."""

    def __init__(self, channels, rngs):
        self.stem = nnx.Conv(channels, 16, (3, 3), strides=2, rngs=rngs)
        self.blocks = nnx.List([Block(16, rngs) for _ in range(3)])
        self.out = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        """Returns logits [batch, 10]."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(axis=(1, 2)))


def augment(images, rng):
    """Every image moved by up to one pixel, the same for all gradients of an update."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = images.shape[1:3]
    corners = rng.integers(3, size=(len(images), 2))
    return np.stack(
        [p[i : i + height, j : j + width]
         for p, (i, j) in zip(padded, corners, strict=True)]
    )  # fmt: skip


def load(path):
    """Images [N, H, W, C] in [0, 1] and labels; scikit-learn's digits by default."""
    if path is None:
        images, labels = load_digits(return_X_y=True)
        images = np.float32(images.reshape(-1, 8, 8, 1) / 16)
        return train_test_split(images, labels, random_state=0)
    with np.load(path) as file:
        x, test_x = (np.float32(file[f"{p}_images"] / 255) for p in ("train", "test"))
        return x, test_x, file["train_labels"], file["test_labels"]


def train(method, data, epochs, folder):
    """Trains from the last checkpoint in `folder` on; returns the test accuracy."""
    x, test_x, y, test_y = data
    model = ResNet(x.shape[-1], nnx.Rngs(0))
    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    params, stats = nnx.as_pure(params), nnx.as_pure(stats)
    updates = len(x) // BATCH // METHODS[method]  # per epoch
    rate = optax.cosine_decay_schedule(0.1, updates * epochs)
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    if method == "sam":
        tx = optax_flat.sam(tx, rho=0.05)

    def loss_fn(params, batch, stats):
        net = nnx.merge(graph, params, stats)
        logits = nnx.view(net, use_running_average=False)(batch["image"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return loss.mean(), nnx.as_pure(nnx.state(net, nnx.BatchStat))

    step = make_train_step(loss_fn, tx, has_aux=True, donate=True)
    state = params, tx.init(params), stats
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, cleanup_tmp_directories=True, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            state = manager.restore(done, args=ocp.args.StandardRestore(state))
        progress = tqdm(range(done, epochs), method, epochs, initial=done, unit="epoch")
        for epoch in progress:
            # Of its own for every epoch, so that a resumed run sees the same images.
            rng = np.random.default_rng(epoch)
            order = rng.permutation(len(x))[: updates * BATCH].reshape(updates, BATCH)
            for rows in order:
                batch = {"image": augment(x[rows], rng), "label": y[rows]}
                *state, loss, stats = step(*state[:2], batch, state[2])
                state = (*state, stats)
            progress.set_postfix(loss=float(loss))
            manager.save(epoch + 1, args=ocp.args.StandardSave(state))
    params, opt_state, stats = state
    net = nnx.merge(graph, optax_flat.eval_params(opt_state, params), stats)
    logits = nnx.view(net, use_running_average=True)(test_x)
    return float(jnp.mean(logits.argmax(axis=1) == test_y))


def main(argv=None):
    """Trains with both methods and returns their test accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="make few updates")
    parser.add_argument("--data", type=Path, help="an .npz of images and labels")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out/sam_resnet"))
    options = parser.parse_args(argv)
    epochs = 2 if options.smoke else options.epochs
    accuracy = {}
    for method in METHODS:
        folder = options.out / f"{method}-{epochs}"
        accuracy[method] = train(method, load(options.data), epochs, folder)
        print(f"{method}: test accuracy {accuracy[method]:.3f} after {epochs} epochs")
    return accuracy


if __name__ == "__main__":
    main()
