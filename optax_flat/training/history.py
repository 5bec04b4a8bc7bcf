"""The log of a run: losses per epoch and per effective epoch."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optax_flat._core import checks, extras, modes
from optax_flat.training.logs import CSVLog, TensorBoardLog

LOSSES = ("loss", "val_loss", "eff_loss", "eff_val_loss")


class History:
    r"""Training and validation losses, per epoch and per *effective* epoch.

    A method that spends L = `num_steps` gradients on an update makes in L epochs of
    single gradients as many updates as SGD in one: these L epochs are one effective
    epoch. `eff_loss` and `eff_val_loss` are the means of `loss` and `val_loss` over
    each. In scanned mode an epoch (one *update* per minibatch) spends L times the
    gradients and is an effective epoch by itself.

    With a `path` every epoch is on the disk when `record` returns, also if the program
    is killed or the power fails then. The file is a JSON object; while the run goes on,
    the epochs since it was written follow it, one a line, as `load` reads them, so that
    an epoch costs the same however long the run is. Use the log as a context manager:
    `close` makes one object of all and ends the progress line, whatever happens.

    Args:
      num_steps: gradients per update, L; 1 for SGD, Adam and the like.
      mode: "transparent" if an epoch visits every minibatch for one gradient,
        "scanned" if it makes one update, L gradients, per minibatch.
      path: JSON file to write after every epoch, or None. If it is a symbolic link, the
        file that it points to is written.
      csv: table for spreadsheets and pandas to write as well, a line per epoch, or
        None.
      tensorboard: folder for TensorBoard's event file, a step per epoch, or None (needs
        the extra `tensorboard`).
      total_epochs: length of the progress line, or None for an open end.
      progress: whether to show a progress line (needs the extra `progress`).
      label: name of the run in the progress line.
      stop: whether a training loss that is NaN or infinite raises FloatingPointError.

    Attributes:
      loss, val_loss: one float per recorded epoch; NaN where none was given.
      eff_loss, eff_val_loss: one float per completed effective epoch.
      metrics: one dictionary per recorded epoch; empty where none was given.

    Example:
      >>> from optax_flat.training import History
      >>> history = History(num_steps=2)
      >>> for loss in [4.0, 2.0, 1.0, 1.0, 0.5]:
      ...     history.record(loss, val_loss=loss + 1)
      >>> history.eff_loss  # epochs 1 and 2, 3 and 4; the fifth waits for the sixth
      [3.0, 1.0]
      >>> history.arrays()["effective_epoch"]
      array([2., 4.])

    Differs from the Keras package EntropySGD: its `loss` keeps only the minibatches at
    which a walk starts; here it is what you record.
    """

    def __init__(
        self,
        num_steps: int = 1,
        *,
        mode: str = "transparent",
        path: str | os.PathLike[str] | None = None,
        csv: str | os.PathLike[str] | None = None,
        tensorboard: str | os.PathLike[str] | None = None,
        total_epochs: int | None = None,
        progress: bool = False,
        label: str = "",
        stop: bool = True,
    ):
        self.num_steps = checks.integer("num_steps", num_steps, 1)
        self.mode = checks.choice("mode", mode, modes.MODES)
        self.path = None if path is None else Path(path)
        self.stop = stop
        self.loss: list[float] = []
        self.val_loss: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self._written = 0  # epochs in the files, 0 if this object has not written them
        self._names: set[str] = set()  # of the metrics there
        self._logs: list[CSVLog | TensorBoardLog] = []
        if csv is not None:
            self._logs.append(CSVLog(csv, LOSSES))
        if tensorboard is not None:
            self._logs.append(TensorBoardLog(tensorboard))
        self._bar = _progress_bar(total_epochs, label) if progress else None

    @property
    def epochs_per_effective_epoch(self) -> int:
        """L in transparent mode, 1 in scanned mode."""
        return self.num_steps if self.mode == "transparent" else 1

    @property
    def eff_loss(self) -> list[float]:
        """Mean training loss of each completed effective epoch."""
        return self._effective(self.loss)

    @property
    def eff_val_loss(self) -> list[float]:
        """Mean validation loss of each completed effective epoch."""
        return self._effective(self.val_loss)

    def record(
        self,
        loss: Any,
        val_loss: Any = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Adds one epoch.

        Args:
          loss: mean training loss of the epoch, a scalar.
          val_loss: validation loss at its end, a scalar, or None.
          metrics: more scalars by name, such as ``optax_flat.metrics(opt_state)``, or
            None.

        Raises:
          TypeError: something that is no scalar. It is not recorded.
          ValueError: a metric that has the name of a loss. It is not recorded.
          FloatingPointError: the training loss is NaN or infinite, and `stop` is on. It
            is recorded, and the file written, before.
        """
        new_loss = _scalar("loss", loss)
        new_val_loss = math.nan if val_loss is None else _scalar("val_loss", val_loss)
        new_metrics = _scalars(metrics or {})
        del self.metrics[len(self.loss) :]  # of epochs that were taken back
        self.loss.append(new_loss)
        self.val_loss.append(new_val_loss)
        self.metrics.append(new_metrics)
        self._write_epoch()
        if self._bar is not None:
            shown = {"loss": f"{self.loss[-1]:.4g}"}
            if val_loss is not None:
                shown["val_loss"] = f"{self.val_loss[-1]:.4g}"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        if self.stop and not math.isfinite(self.loss[-1]):
            kept = (
                "" if self.path is None else f" The losses so far are in {self.path}."
            )
            raise FloatingPointError(
                f"the training loss became {self.loss[-1]} in epoch {len(self.loss)}. "
                "Lower the learning rate or step size or clip the gradients; or skip "
                "such updates with skip_nonfinite=True and record them with "
                f"History(stop=False).{kept}"
            )

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays for plotting.

        Returns:
          `epoch` [E] counting from 1, `loss` [E], `val_loss` [E], `effective_epoch` [K]
          (the epoch at which each effective one ended), `eff_loss` [K], `eff_val_loss`
          [K].
        """
        per = self.epochs_per_effective_epoch
        return {
            "epoch": np.arange(1.0, len(self.loss) + 1),
            "loss": np.array(self.loss),
            "val_loss": np.array(self.val_loss),
            "effective_epoch": per * np.arange(1.0, len(self.eff_loss) + 1),
            "eff_loss": np.array(self.eff_loss),
            "eff_val_loss": np.array(self.eff_val_loss),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON; an interruption leaves the old file or the new one, whole."""
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        content = {
            "num_steps": self.num_steps,
            "mode": self.mode,
            "loss": _to_json(self.loss),
            "val_loss": _to_json(self.val_loss),
            "eff_loss": _to_json(self.eff_loss),
            "eff_val_loss": _to_json(self.eff_val_loss),
        }
        if any(self.metrics):
            content["metrics"] = [_to_json_by_name(row) for row in self.metrics]
        try:
            _write(temporary, "wb", json.dumps(content, indent=1, allow_nan=False))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _write_epoch(self) -> None:
        """The last epoch into all files; all epochs if they are not those before it."""
        before, self._written = self._written, 0  # if this fails, all is written anew
        new_names = not self.metrics[-1].keys() <= self._names
        anew = not before or before != len(self.loss) - 1 or new_names
        if anew:
            self._names = {name for row in self.metrics for name in row}
        if self.path is not None and (anew or not self.path.is_file()):
            self.save(self.path)
        elif self.path is not None:
            # A line behind the object, with metrics where there are any.
            more = [_to_json_by_name(row) for row in self.metrics[-1:] if row]
            line = [*_to_json([self.loss[-1], self.val_loss[-1]]), *more]
            _write(self.path, "ab", json.dumps(line))
        first = 1 if anew else len(self.loss)
        for log in self._logs:
            log.write([self._row(i) for i in range(first, len(self.loss) + 1)], first)
        self._written = len(self.loss)

    def _row(self, epoch: int) -> dict[str, float]:
        """All numbers of an epoch by name; those of an effective one at its end.

        A validation loss of NaN, as where none was given, is left out.
        """
        per = self.epochs_per_effective_epoch
        row = {
            "loss": self.loss[epoch - 1],
            "val_loss": self.val_loss[epoch - 1],
        }
        if epoch % per == 0:
            whole = slice(epoch - per, epoch)
            (row["eff_loss"],) = self._effective(self.loss[whole])
            (row["eff_val_loss"],) = self._effective(self.val_loss[whole])
        given = {k: v for k, v in row.items() if "val" not in k or not math.isnan(v)}
        return given | self.metrics[epoch - 1]

    @classmethod
    def load(cls, path: str | os.PathLike[str], /, **kwargs: Any) -> "History":
        """Reads the file of a run, ended or not; recording goes on where it stopped.

        Args:
          path: the JSON file.
          **kwargs: arguments of the new object. `path` is by default the file itself;
            None leaves it alone.

        Returns:
          A History with the losses of the file.

        Raises:
          ValueError: the file is not a History's.
        """
        source = Path(path)
        try:
            num_steps, mode, loss, val_loss, metrics = _read(source.read_text())
        except (OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{source} is not a History file: {error}") from error
        history = cls(num_steps, mode=mode, **{"path": source, **kwargs})
        history.loss, history.val_loss, history.metrics = loss, val_loss, metrics
        if history._bar is not None:
            history._bar.update(len(history.loss))
        return history

    def close(self) -> None:
        """Ends the progress line and the files, if there are any."""
        if self._bar is not None:
            self._bar.close()
        if self.path is not None and self.loss:
            self.save(self.path)
        for log in self._logs:
            log.close()
        self._written = 0

    def __enter__(self) -> "History":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _effective(self, values: list[float]) -> list[float]:
        per = self.epochs_per_effective_epoch
        whole = len(values) // per * per
        return [float(np.mean(values[i : i + per])) for i in range(0, whole, per)]


def _progress_bar(total, label):
    tqdm = extras.load("tqdm.auto", "progress", "History(progress=True)").tqdm
    return tqdm(total=total, desc=label or None, unit="epoch")


def _scalar(name, value):
    """A loss as a float; texts and booleans are none, though `float` takes them."""
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"`{name}` must be a scalar, the mean over the epoch, got {value!r} of "
            f"type {type(value).__name__}. Take the mean, and record outside of jit."
        ) from error


def _scalars(metrics):
    """Metrics as floats, under names that are not those of the losses."""
    taken = {"epoch", *LOSSES} & set(metrics)
    if taken:
        raise ValueError(
            f"`metrics` has {', '.join(sorted(taken))}, the name of a loss or of the "
            "epoch, in which History keeps its own. Give it another."
        )
    return {k: _scalar(f"metrics[{k!r}]", value) for k, value in metrics.items()}


def _write(path, how, text):
    """A line of text, on the disk before this returns."""
    with open(path, how) as file:
        file.write(text.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read(text):
    """The object that `save` writes, then the lines that `record` adds."""
    content, end = json.JSONDecoder().raw_decode(text)
    needed = {"num_steps", "mode", "loss", "val_loss"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise ValueError(
            "expected a JSON object with `num_steps`, `mode`, `loss` and `val_loss`, "
            f"got {str(content)[:80]}."
        )
    # A kill may have cut the last line short; one that is whole ends in a line feed.
    lines = [json.loads(line) for line in text[end:].split("\n")[1:-1]]
    if not all(isinstance(line, list) and len(line) in (2, 3) for line in lines):
        raise ValueError(
            "behind the object, every line must be [loss, val_loss], with metrics or "
            "without."
        )
    loss = _from_json("loss", content["loss"], [line[0] for line in lines])
    val_loss = _from_json("val_loss", content["val_loss"], [line[1] for line in lines])
    rows = content.get("metrics", [{}] * (len(loss) - len(lines)))
    metrics = _rows_from_json(rows, [(*line, {})[2] for line in lines])
    if not len(loss) == len(val_loss) == len(metrics):
        raise ValueError(
            f"`loss`, `val_loss` and `metrics` must be of one length, got {len(loss)}, "
            f"{len(val_loss)} and {len(metrics)}."
        )
    num_steps = checks.integer("num_steps", content["num_steps"], 1)
    mode = checks.choice("mode", content["mode"], modes.MODES)
    return num_steps, mode, loss, val_loss, metrics


_NOT_FINITE = ("nan", "inf", "-inf")


def _to_json(values):
    # JSON has no NaN or infinity; strings survive every reader, and float() reads them.
    return [v if math.isfinite(v) else str(v) for v in values]


def _to_json_by_name(row):
    return dict(zip(row, _to_json(row.values()), strict=True))


def _rows_from_json(rows, more):
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows + more):
        raise ValueError(
            f"`metrics` must be a list of objects, one per epoch, got {str(rows)[:80]}."
        )
    return [
        dict(zip(row, _from_json("metrics", list(row.values()), []), strict=True))
        for row in rows + more
    ]


def _from_json(name, values, more):
    def is_number(value):
        is_text = isinstance(value, str)
        return value in _NOT_FINITE if is_text else type(value) in (int, float)

    if not isinstance(values, list) or not all(map(is_number, values + more)):
        raise ValueError(
            f"`{name}` must be a list of numbers or of {', '.join(_NOT_FINITE)}, got "
            f"{str(values)[:80]}."
        )
    return [float(value) for value in values + more]
