"""Checkpoints of a run that takes minutes, so that it can be cut off at any moment.

def train(name, seed, checkpoint):
    state, log = checkpoint.restore(state, {"epoch": 0, "losses": []})
    while log["epoch"] < epochs:
        ...
        checkpoint.save(log["epoch"], state, log)
    return row

rows = run_checkpointed(train, options, settings)
"""

import argparse
import hashlib
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.harness import Row, Rows


class Checkpoint:
    """The latest states of one run, kept by Orbax in a folder of its own.

    Arrays (params, optimizer state, batch statistics) and the log of what was measured
    so far are saved together: both or neither are there after an interruption. The last
    two checkpoints are kept, each with the digest of its arrays: one that cannot be
    read, or reads as something else, gives way to the one before.
    """

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            cleanup_tmp_directories=True,  # what a killed process was writing
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def restore(self, state: Any, log: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What was saved last and is whole, or what is given if nothing was saved.

        Checkpoints newer than the one that is restored are damaged: they are deleted,
        with a warning.

        Args:
          state: a tree of arrays, which tells structure, dtypes and devices.
          log: anything that JSON can hold.

        Returns:
          State and log.

        Raises:
          ValueError: there are checkpoints, but none that can be restored.
        """
        failures: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, state)
            # Half a file makes Orbax raise anything, from KeyError to Exception itself.
            except Exception as error:
                failures[step] = error
                continue
            for damaged in failures:
                self._manager.delete(damaged)
            if failures:
                warnings.warn(
                    f"going on from checkpoint {step} in {self._folder}; later ones "
                    f"are damaged and were deleted: {_reasons(failures)}.",
                    stacklevel=2,
                )
            return found
        if failures:
            raise ValueError(
                f"no checkpoint in {self._folder} can be restored: they are damaged, "
                "or were saved from a state of another structure. Delete the folder "
                f"to start again. {_reasons(failures)}."
            )
        return state, log

    def save(self, step: int, state: Any, log: dict[str, Any]) -> None:
        """Saves both and deletes all but the last two; `step` must grow.

        Raises:
          OSError: the disk is full, or cannot be written for another reason. What was
            saved before is whole.
        """
        log = {"digest": digest(state), "log": log}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)
                ),
            )
        except (OSError, ValueError) as error:  # TensorStore raises the latter
            raise OSError(
                f"checkpoint {step} could not be written to {self._folder}: "
                f"{_first_line(error)}. Make room, and start again: the run goes on "
                "from the checkpoint before, which is whole."
            ) from error

    def delete(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, step: int, state: Any) -> tuple[Any, dict[str, Any]]:
        saved = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), log=ocp.args.JsonRestore()
            ),
        )
        found, log = saved["state"], saved["log"]
        if digest(found) != log["digest"]:
            raise ValueError("the arrays are not those that were saved")
        return found, log["log"]


def digest(state: Any) -> str:
    """SHA-256 of a tree of arrays: equal if names, dtypes, shapes and bits are."""
    result = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)  # noqa: PLW2901
        name = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape};"
        result.update(name.encode() + np.asarray(leaf).tobytes())
    return result.hexdigest()


def run_checkpointed(
    train: Callable[[str, int, Checkpoint], Row],
    options: argparse.Namespace,
    settings: Mapping[str, Any],
) -> Rows:
    """Runs what is missing; a (method, seed) has a checkpoint until its row is there.

    What was begun with other settings is not gone on with.
    """
    rows = Rows(options.out, settings)
    version = f"{zlib.crc32(repr(settings).encode()):08x}"
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        folder = options.out / "runs" / f"{name}-{seed}-{version}"
        with Checkpoint(folder) as checkpoint:
            rows.record(name, seed, train(name, seed, checkpoint))
        checkpoint.delete()
    return rows


def _reasons(failures: dict[int, Exception]) -> str:
    return "; ".join(
        f"{step}: {type(error).__name__}, {_first_line(error)}"
        for step, error in failures.items()
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
