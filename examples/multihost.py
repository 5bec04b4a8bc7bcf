"""Several processes, each with devices of its own, train one model.

Start the same command on every host, with its own number behind --process:

python examples/multihost.py --coordinator HOST:PORT --processes 2 --process 0 --out DIR

The minibatches are spread over all devices, the params are on all of them, and a
checkpoint follows every update. If a process dies, the others end with an error within
seconds; started again, on any number of processes and devices, they go on from the last
checkpoint and end where an undisturbed run ends, to rounding.
"""

import argparse
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_flat
from optax_flat.training import make_train_step

FEATURES, EXAMPLES, GRADIENTS = 8, 32, 5  # per minibatch; minibatches per update


def optimizers():
    """What is trained, each with the gradients of its update.

    The noise needs no care: the key is equal on all processes.
    """
    walk = optax_flat.entropy_sgd(
        0.5, momentum=0.9, num_steps=GRADIENTS, noise=0.02, key=0
    )
    return {
        "entropy_sgd": (walk, GRADIENTS),
        "sgld": (optax_flat.sgld(0.05, temperature=1e-3, key=0), 1),
        "psgld": (optax_flat.psgld(0.01, temperature=1e-4, key=0), 1),
    }


def init_params():
    """A network with one hidden layer; equal on all processes."""
    keys = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(keys[0], (FEATURES, 16)) / FEATURES**0.5,
        "b1": jnp.zeros(16),
        "w2": jax.random.normal(keys[1], (16,)) / 4,
    }


def loss_fn(params, batch):
    """Mean squared error on what a sine makes of the inputs."""
    hidden = jnp.tanh(batch @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - jnp.sin(batch.sum(-1))) ** 2)


def minibatches(update, sharding):
    """Inputs [GRADIENTS, EXAMPLES, FEATURES], of which a process makes its own part."""
    shape = (GRADIENTS, EXAMPLES, FEATURES)
    inputs = np.random.default_rng(update).normal(size=shape).astype("f4")
    return jax.make_array_from_callback(shape, sharding, lambda index: inputs[index])


def train(optimizers, folder, updates, die_after=None):
    """Goes on from the last checkpoint in the folder; gives the params of each run.

    Args:
      optimizers: what `optimizers` gives.
      folder: for the checkpoints, seen by all processes.
      updates: how many in all, those before the checkpoint included.
      die_after: a process that is to die does so after this update.
    """
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))

    runs, steps = {}, {}
    for name, (tx, _) in optimizers.items():
        # Compiled, so that counters and keys too are on the devices of all processes.
        params = jax.device_put(init_params(), everywhere)
        state = jax.jit(tx.init, out_shardings=everywhere)(params)
        runs[name] = {"params": params, "state": state}
        steps[name] = make_train_step(loss_fn, tx)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=1, enable_async_checkpointing=False
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step() or 0
        if done:  # onto the devices of today, whatever they were
            runs = manager.restore(done, args=ocp.args.StandardRestore(runs))
        for update in range(done, updates):
            batches = minibatches(update, spread)
            for name, (_, gradients) in optimizers.items():
                # A step of a walk takes several minibatches, others take one.
                batch = batches if gradients > 1 else batches[0]
                params, state = runs[name]["params"], runs[name]["state"]
                params, state, _ = steps[name](params, state, batch)
                runs[name] = {"params": params, "state": state}
            manager.save(update + 1, args=ocp.args.StandardSave(runs))
            if update + 1 == die_after:
                os.kill(os.getpid(), signal.SIGKILL)
    return {name: run["params"] for name, run in runs.items()}


def main(argv=None):
    """Trains, and writes the params of process 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    add = parser.add_argument
    add("--coordinator", required=True, metavar="HOST:PORT", help="of process 0")
    add("--processes", type=int, required=True, metavar="N", help="how many")
    add("--process", type=int, required=True, metavar="I", help="this one's number")
    add("--updates", type=int, default=10, metavar="N", help="in all (10)")
    add("--out", type=pathlib.Path, required=True, metavar="DIR", help="shared by all")
    add("--die-after", type=int, metavar="N", help="the last process dies then")
    args = parser.parse_args(argv)
    jax.distributed.initialize(
        args.coordinator,
        args.processes,
        args.process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=10,  # a process that is silent for so long is dead
    )
    dies = args.process == args.processes - 1
    out = args.out.resolve()
    params = train(
        optimizers(),
        out / "checkpoints",
        args.updates,
        args.die_after if dies else None,
    )
    if args.process == 0:
        flat = {
            f"{name}/{leaf}": np.asarray(value)
            for name, tree in params.items()
            for leaf, value in tree.items()
        }
        np.savez(out / "params.npz", **flat)
        print(f"{args.updates} updates on {jax.device_count()} devices")


if __name__ == "__main__":
    main()
