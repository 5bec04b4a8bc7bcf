"""The rows of a `History` for other tools: CSV and TensorBoard's event files.

A row has the numbers of an epoch by name. Rows from epoch 1 on start the log anew,
later ones are added to it, so that an epoch costs the same however long the run is.
"""

import csv
import os
import time
from pathlib import Path
from typing import Any

from optax_flat._core import extras


class CSVLog:
    """A table with a line per epoch; what an epoch does not have is empty."""

    def __init__(self, path: str | os.PathLike[str], columns: tuple[str, ...]):
        self.path = Path(path)
        self.columns = ("epoch", *columns)  # and whatever else the first rows have
        self._written: list[str] = []

    def write(self, rows: list[dict[str, float]], first: int) -> None:
        """Adds rows, of which the first is of the epoch `first`."""
        anew = first == 1
        if anew:
            names = (name for row in rows for name in row)
            self._written = list(dict.fromkeys((*self.columns, *names)))
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w" if anew else "a", newline="") as file:
            table = csv.DictWriter(file, self._written)
            if anew:
                table.writeheader()
            table.writerows({"epoch": i, **row} for i, row in enumerate(rows, first))

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardLog:
    """A folder of event files; a step is an epoch."""

    def __init__(self, folder: str | os.PathLike[str]):
        user = "History(tensorboard=...)"
        self._package = extras.load("tensorboardX", "tensorboard", user)
        self.folder = Path(folder)
        self._events: Any = None

    def write(self, rows: list[dict[str, float]], first: int) -> None:
        """Adds rows, of which the first is of the epoch `first`."""
        if first == 1:
            self.close()
            # Readers drop what files before this one, in the order of their names, have
            # from step 1 on. Without the suffix two of one second have one name.
            self._events = self._package.SummaryWriter(
                str(self.folder),
                purge_step=1,
                flush_secs=1,
                filename_suffix=f".{time.time_ns()}",
            )
        for epoch, row in enumerate(rows, first):
            for name, value in row.items():
                self._events.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Ends the file."""
        if self._events is not None:
            self._events.close()
            self._events = None
