"""The tools that people save with: each writes a tree and reads it, given a target."""

import pickle

import equinox as eqx
import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp


def with_orbax(tree, target, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "orbax", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "orbax", target)


def with_flax(tree, target, folder):
    (folder / "flax").write_bytes(flax.serialization.to_bytes(tree))
    return flax.serialization.from_bytes(target, (folder / "flax").read_bytes())


def with_equinox(tree, target, folder):
    eqx.tree_serialise_leaves(folder / "equinox", tree)
    return eqx.tree_deserialise_leaves(folder / "equinox", target)


def with_numpy(tree, target, folder):
    np.savez(folder / "numpy.npz", *jax.tree.leaves(tree))
    with np.load(folder / "numpy.npz", allow_pickle=False) as file:
        leaves = [file[name] for name in file.files]
    return jax.tree.unflatten(jax.tree.structure(target), leaves)


def with_pickle(tree, target, folder):
    (folder / "pickle").write_bytes(pickle.dumps(tree))
    return pickle.loads((folder / "pickle").read_bytes())


SAVERS = [with_orbax, with_flax, with_equinox, with_numpy, with_pickle]
