"""The losses of training runs, from their logs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from optax_flat._core import figures
from optax_flat.training.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = str | os.PathLike[str] | History


def history(runs: Log | Mapping[str, Log], *, log_scale: bool = False) -> "Figure":
    """Draws the losses of one or several runs, per epoch and per effective epoch.

    The training loss is the solid line, the validation loss (if recorded) the dashed
    one. An effective epoch is as many epochs as make one update per minibatch, see
    `optax_flat.training.History`: at equal places of the first panel runs in
    transparent mode have spent equally many gradients, of the second all have made
    equally many updates. Where no run has an effective epoch of several epochs the
    panels are the same, and only one is drawn.

    Args:
      runs: a `History`, or the path of the file it wrote, or several of them by name.
      log_scale: whether losses are on a logarithmic axis.

    Returns:
      A figure 8 inches wide, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: something that is neither a path nor a `History`.
      ValueError: an empty mapping, or a file that is not a History's.
      ImportError: matplotlib, the extra `plot`, is missing.

    Example:
      >>> from optax_flat.plotting import history
      >>> from optax_flat.training import History
      >>> sgd, walk = History(), History(num_steps=2)
      >>> for epoch in range(6):
      ...     sgd.record(2.0 / (epoch + 1))
      ...     walk.record(3.0 / (epoch + 1))
      >>> figure = history({"SGD": sgd, "Entropy-SGD": walk})
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['epoch', 'effective epoch']
    """
    if isinstance(runs, str | os.PathLike):
        runs = {Path(runs).stem: runs}
    elif isinstance(runs, History):
        runs = {"run": runs}
    figures.check_names("runs", runs, "History objects or paths of their files")
    logs = {name: _load(name, run) for name, run in runs.items()}

    panels = [("epoch", "")]
    if any(log.epochs_per_effective_epoch > 1 for log in logs.values()):
        panels.append(("effective epoch", "eff_"))
    figure = figures.new_figure(8.0, 3.8)
    from matplotlib.ticker import MaxNLocator

    handles = []
    for k, (label, prefix) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), k + 1)
        handles = []
        for i, (name, log) in enumerate(logs.items()):
            shared = {
                "color": figures.style(i)["color"], "marker": figures.marker(i),
                "markersize": 5, "markeredgecolor": "white", "linewidth": 1.6,
            }  # fmt: skip
            for losses, line, suffix in (
                ("loss", "solid", ""),
                ("val_loss", "dashed", ", validation"),
            ):
                values = np.array(getattr(log, prefix + losses))
                if losses == "val_loss" and np.isnan(values).all():
                    continue
                epochs = np.arange(1, len(values) + 1)
                every = max(1, len(values) // 10)
                handles += axes.plot(
                    epochs, values, linestyle=line, markevery=every,
                    label=name + suffix, **shared,
                )  # fmt: skip
        figures.plain(axes)
        axes.set_xlabel(label)
        axes.set_ylabel("loss" if k == 0 else "mean loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_scale:
            axes.set_yscale("log")
    figures.legend_above(figure, handles)
    return figure


def _load(name, run):
    if isinstance(run, History):
        return run
    if isinstance(run, str | os.PathLike):
        return History.load(run, path=None)
    raise TypeError(
        f"`runs[{name!r}]` must be an optax_flat.training.History or the path of its "
        f"file, got {run!r} of type {type(run).__name__}."
    )
