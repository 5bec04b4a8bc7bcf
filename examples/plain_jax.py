"""Entropy-Adam without a framework: a progress line, a log and an interrupted run.

The run is stopped in the middle of a walk and saved with Orbax. Restored from the
files, it ends bit for bit where the uninterrupted run ends.

python examples/plain_jax.py [--smoke] [--out DIR]
"""

import argparse
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat
from optax_flat.training import History, make_train_step

NUM_STEPS = 5  # gradients per update


def init_params(key):
    """Weights and biases of a network with one hidden layer."""
    keys = jax.random.split(key)
    return {
        "w1": jax.random.normal(keys[0], (64, 64)) * (2 / 64) ** 0.5,
        "b1": jnp.zeros(64),
        "w2": jax.random.normal(keys[1], (64, 10)) * (1 / 64) ** 0.5,
        "b2": jnp.zeros(10),
    }


def predict(params, images):
    """Logits [batch, 10]."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params, batch):
    """Mean cross-entropy."""
    images, labels = batch
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Transparent mode: one minibatch per step, and an update at every fifth step.
tx = optax_flat.entropy_adam(0.02, num_steps=NUM_STEPS, mode="transparent", key=1)
step = make_train_step(loss_fn, tx)


def train(params, opt_state, history, epochs, data):
    """Trains until the history has `epochs` epochs."""
    x, test_x, y, test_y = data
    for epoch in range(len(history.loss), epochs):
        # The order depends on the epoch only, so a resumed run sees the same batches.
        rows = np.random.default_rng(epoch).permutation(len(y))[: len(y) // 64 * 64]
        losses = []
        for batch in rows.reshape(-1, 64):
            params, opt_state, loss = step(params, opt_state, (x[batch], y[batch]))
            losses.append(loss)
        # In the middle of a walk the params are not those to evaluate.
        anchor = optax_flat.eval_params(opt_state, params)
        history.record(np.mean(losses), val_loss=loss_fn(anchor, (test_x, test_y)))
    return params, opt_state


def main(argv=None):
    """Trains in one go and with an interruption, and compares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="train for few epochs")
    parser.add_argument("--out", help="folder for the logs and the checkpoint")
    args = parser.parse_args(argv)
    epochs = 10 if args.smoke else 50
    out = pathlib.Path(args.out or tempfile.mkdtemp()).resolve()
    images, labels = load_digits(return_X_y=True)
    data = train_test_split((images / 16).astype("f4"), labels, random_state=0)

    # An effective epoch is NUM_STEPS epochs: that many gradients make one update.
    log = {"num_steps": NUM_STEPS, "total_epochs": epochs, "progress": True}
    params = init_params(jax.random.key(0))
    start = params, tx.init(params)
    with History(path=out / "straight.json", label="straight", **log) as history:
        straight = train(*start, history, epochs, data)
    with History(path=out / "resumed.json", label="interrupted", **log) as history:
        stopped = train(*start, history, epochs - 3, data)  # in the middle of a walk

    # The optimizer's state holds the anchor, the walk so far and the random key. A new
    # state as target gives what is read its types: named tuples.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out / "checkpoint", stopped, force=True)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "checkpoint", start)
    history = History.load(out / "resumed.json")  # goes on writing there
    resumed = train(*restored, history, epochs, data)

    equal = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), straight, resumed)
    assert jax.tree.all(equal), f"the resumed run differs: {equal}"
    predicted = predict(optax_flat.eval_params(*resumed[::-1]), data[1]).argmax(axis=1)
    accuracy = float(jnp.mean(predicted == data[3]))
    stopped_at = int(optax.tree.get(stopped, "TransparentState").step)
    print(f"stopped after {stopped_at} of {NUM_STEPS} gradients, resumed bit for bit")
    print(f"test accuracy {accuracy:.3f}; {len(history.eff_loss)} effective epochs")
    return {"accuracy": accuracy, "stopped_at": stopped_at, "out": str(out)}


if __name__ == "__main__":
    main()
