"""What a report holds, and how it is shown and kept."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optax_flat.flatness._measures import MEASURES, Cost, as_kind
from optax_flat.flatness._pictures import draw_reports
from optax_flat.flatness.curvature import Estimate
from optax_flat.flatness.density import Density
from optax_flat.flatness.eigenvalues import Eigenvalues
from optax_flat.flatness.landscape import Line

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_COLUMNS = ["measure", "value", "std. error", "residual", "gradients", "seconds"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Report:
    """What `report` returns; ``str(report)`` is a table.

    Numbers are Python floats and arrays those of numpy. A measure that was not asked
    for is None.

    Attributes:
      num_parameters: n.
      settings: those of the call, by name.
      costs: a `Cost` for each measure. What a measure shares with one before (the
        gradient, the eigenvectors) counts for the first.
      loss, gradient_norm, parameter_norm: f, and Euclidean norms.
      top_eigenvalues, smallest_eigenvalue: values and residuals, without the vectors.
      trace, frobenius_norm, spectral_density: of the Hessian.
      sharpness_one_step: rise of the loss at SAM's point, with the radius `rho`.
      sharpness_worst: by `ascent_steps` steps of ascent in the same ball.
      sharpness_adaptive: likewise, in the adaptive ball with `adaptive_rho`.
      sharpness_average: over the sphere of the radius `sigma` times the root of n.
      m_sharpness: one step for each shard of `m` examples; None without `m`.
      local_energy, local_entropy: with `sigma`; with `gamma` and `temperature`.
      eigenvector_line, random_line: the loss along the first eigenvector, in units of
        the distance, and along a filter-normalized random direction.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat.flatness import Report, report
      >>> def loss_fn(x, batch):  # the Hessian is diag(batch)
      ...     return jnp.sum(batch * x ** 2) / 2
      >>> found = report(loss_fn, jnp.ones(3), jnp.array([1.0, 2.0, 5.0]), key=0,
      ...                measures=("loss", "trace"))
      >>> found.trace.value, found.costs["trace"].hvps
      (8.0, 32)
      >>> print(found)
      measure  value  std. error  residual  gradients  seconds
      loss         4                                1  ...
      trace        8           0                   64  ...
      >>> Report.from_json(found.to_json()).loss
      4.0
    """

    num_parameters: int
    settings: Mapping[str, Any]
    costs: Mapping[str, Cost]
    loss: float | None = None
    gradient_norm: float | None = None
    parameter_norm: float | None = None
    top_eigenvalues: Eigenvalues | None = None
    smallest_eigenvalue: Eigenvalues | None = None
    trace: Estimate | None = None
    frobenius_norm: Estimate | None = None
    spectral_density: Density | None = None
    sharpness_one_step: Estimate | None = None
    sharpness_worst: Estimate | None = None
    sharpness_adaptive: Estimate | None = None
    sharpness_average: Estimate | None = None
    m_sharpness: Estimate | None = None
    local_energy: Estimate | None = None
    local_entropy: Estimate | None = None
    eigenvector_line: Line | None = None
    random_line: Line | None = None

    def numbers(self) -> dict[str, Estimate]:
        """Every measure that is a number, with its standard error.

        Returns:
          `Estimate` by name. Eigenvalues after the first are "top_eigenvalues_2" and so
          on. The standard error is NaN where there is none; the residuals of the
          eigenvalues, which bound their errors, are in the attributes.
        """
        found = {}
        for name in self.costs:
            found |= _numbers(name, getattr(self, name))
        return found

    def __str__(self) -> str:
        """Measures, their errors, gradients of the same price, and seconds.

        Eigenvalues have a residual, which bounds their error. Of the density the ends
        of the grid are shown, of a line the lowest and the highest loss.
        """
        rows = [_COLUMNS]
        for name, cost in self.costs.items():
            price = [f"{cost.gradient_equivalents:.4g}", f"{cost.seconds:.2f}"]
            for row in _shown_values(name, getattr(self, name)):
                rows.append([*row, *price])
                price = ["", ""]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_row(row, widths) for row in rows)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text.

        Args:
          path: a file to write it to as well, or None.

        Returns:
          The text: `num_parameters`, `settings`, `costs` and `measures`. As JSON has no
          NaN, such numbers are texts ("nan", "inf") that `float` reads.
        """
        content = {
            "num_parameters": self.num_parameters,
            "settings": dict(self.settings),
            "costs": {name: cost._asdict() for name, cost in self.costs.items()},
            "measures": {name: _to_json(getattr(self, name)) for name in self.costs},
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Report":
        """Reads what `to_json` made.

        Args:
          source: the path of the file, or its text, which begins with a brace.

        Returns:
          A report with the same numbers.

        Raises:
          ValueError: not the JSON of a report.
        """
        text = str(source)
        if not text.lstrip().startswith("{"):
            text = Path(text).read_text()
        try:
            content = json.loads(text)
            costs = {name: Cost(**cost) for name, cost in content["costs"].items()}
            measures = {
                name: as_kind(MEASURES[name].kind, value)
                for name, value in content["measures"].items()
            }
            shared = {key: content[key] for key in ("num_parameters", "settings")}
            return cls(costs=costs, **shared, **measures)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "`source` must be the JSON text of a Report, or the path to it, "
                f"got {text[:60]!r}."
            ) from error

    def plot(self) -> "Figure":
        """Draws the report; `optax_flat.plotting.report` draws several side by side.

        Raises:
          ImportError: matplotlib, the extra `plot`, is missing.
        """
        return draw_reports({"": self})


def _numbers(name, value):
    """One measure as in `Report.numbers`, of which a curve has none."""
    if isinstance(value, float):
        return {name: Estimate(value, math.nan)}
    if isinstance(value, Estimate):
        return {name: value}
    if isinstance(value, Eigenvalues):
        names = [name, *(f"{name}_{i}" for i in range(2, len(value.values) + 1))]
        values = zip(names, value.values.tolist(), strict=True)
        return {name: Estimate(number, math.nan) for name, number in values}
    return {}


def _shown_values(name, value):
    """Rows of name, value, standard error and residual; of a curve its ends."""
    if isinstance(value, Density | Line):
        covered = value.grid if isinstance(value, Density) else value.losses
        yield words(name), f"{np.min(covered):.2g}..{np.max(covered):.2g}", "", ""
    residuals = iter(value.residuals if isinstance(value, Eigenvalues) else ())
    for number, (best, error) in _numbers(name, value).items():
        errors = [_shown_error(error), _shown_error(next(residuals, math.nan))]
        yield words(number), f"{best:.4g}", *errors


def _shown_error(error):
    return "" if math.isnan(error) else f"{error:.2g}"


def words(name: str) -> str:
    """A name as it is printed."""
    return name.replace("_", " ")


def _row(cells, widths):
    first, *others = (
        cell.rjust(width) for cell, width in zip(cells, widths, strict=True)
    )
    return "  ".join([first.strip().ljust(widths[0]), *others])


def _to_json(value):
    if isinstance(value, tuple):
        return {name: _to_json(field) for name, field in value._asdict().items()}  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, np.ndarray):
        return [_to_json(x) for x in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
