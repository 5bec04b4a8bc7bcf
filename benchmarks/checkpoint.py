"""Checkpoints of a run that takes minutes, so that it can be cut off at any moment.

for name, seed, checkpoint in checkpointed(rows.pending(...), DIR, settings):
    state, log = checkpoint.restore(state, {"epoch": 0, "losses": []})
    while log["epoch"] < epochs:
        ...
        checkpoint.save(log["epoch"], state, log)
    rows.record(name, seed, row)
"""

import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp


class Checkpoint:
    """The latest state of one run, kept by Orbax in a folder of its own.

    Arrays (params, optimizer state, batch statistics) and the log of what was measured
    so far are saved together: both or neither are there after an interruption.
    """

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, enable_async_checkpointing=False
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
        """What was saved last, or what is given if nothing was.

        Args:
          state: a tree of arrays, which tells structure, dtypes and devices.
          log: anything that JSON can hold.

        Returns:
          State and log.
        """
        if self._manager.latest_step() is None:
            return state, log
        saved = self._manager.restore(
            self._manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(state), log=ocp.args.JsonRestore()
            ),
        )
        return saved["state"], saved["log"]

    def save(self, step: int, state: Any, log: dict[str, Any]) -> None:
        """Replaces what was saved before; `step` must grow."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)
            ),
        )

    def delete(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


def checkpointed(
    pending: Iterable[tuple[str, int]], folder: Path, settings: dict[str, Any]
) -> Iterator[tuple[str, int, Checkpoint]]:
    """Each pair (method, seed) with its checkpoint, deleted when the next is asked for.

    What was begun with other settings is not gone on with.
    """
    version = f"{zlib.crc32(repr(settings).encode()):08x}"
    for name, seed in pending:
        with Checkpoint(folder / "runs" / f"{name}-{seed}-{version}") as checkpoint:
            yield name, seed, checkpoint
        checkpoint.delete()
