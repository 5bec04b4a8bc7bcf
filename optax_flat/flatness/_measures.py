"""The measures of a report: how each is computed, and what it spends."""

import functools
import time
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from optax_flat._core import trees
from optax_flat.flatness import _batches, _points
from optax_flat.flatness.curvature import Estimate, frobenius_norm, trace
from optax_flat.flatness.density import Density, spectral_density
from optax_flat.flatness.eigenvalues import Eigenvalues, top_eigenvalues
from optax_flat.flatness.landscape import Line, line
from optax_flat.flatness.local_energy import local_energy
from optax_flat.flatness.local_entropy import local_entropy
from optax_flat.flatness.sharpness import sharpness

LINE_POINTS = 51


class Settings(NamedTuple):
    """Those of `report`."""

    k: int
    num_matvecs: int
    num_samples: int
    num_draws: int
    rho: float
    adaptive_rho: float
    m: int | None
    ascent_steps: int
    sigma: float
    gamma: float
    temperature: float
    entropy_steps: int
    filter_axis: int
    batch_size: int | None


class Cost(NamedTuple):
    """What a measure spent; each count is of passes over all batches.

    Example:
      >>> from optax_flat.flatness import Cost
      >>> Cost(hvps=10, gradients=1, forward_passes=3).gradient_equivalents
      22.0
    """

    hvps: int = 0  # Hessian-vector products
    gradients: int = 0
    forward_passes: int = 0  # without derivatives
    seconds: float = 0.0  # with compilation

    @property
    def gradient_equivalents(self) -> float:
        """Gradients of about the same price: two per product, 1/3 per forward pass."""
        return 2.0 * self.hvps + self.gradients + self.forward_passes / 3.0


class Run:
    """The arguments of a report, what measures share, and the passes spent so far."""

    def __init__(
        self,
        loss_fn: _batches.LossFn,
        params: optax.Params,
        batches: Any,
        key: jax.Array,
        settings: Settings,
        *,
        fast_convolutions: bool,
    ):
        self.found, self.params = _points.prepare(loss_fn, params, batches)
        self.loss_fn = loss_fn
        self.fast_convolutions = fast_convolutions
        self.size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        self.key = key
        self.settings = settings
        self.spent = Cost()

    def at_point(self, measure: Callable[..., Any], **settings: Any) -> Any:
        """A function of this package on the arguments, which are checked once."""
        return measure(
            self.loss_fn, self.params, self.found,
            fast_convolutions=self.fast_convolutions, **settings,
        )  # fmt: skip

    def spend(self, *, hvps: int = 0, gradients: int = 0, forward_passes: int = 0):
        """Adds passes over all batches."""
        before = self.spent
        self.spent = Cost(
            before.hvps + hvps,
            before.gradients + gradients,
            before.forward_passes + forward_passes,
        )

    @functools.cached_property
    def loss_and_gradient(self) -> tuple[jax.Array, Any]:
        """For the loss and for the norm of the gradient."""
        self.spend(gradients=1)
        at = functools.partial(_points.value_and_grad, loss_fn=self.loss_fn)
        return _batches.mean_over(self.found, at, self.params)

    @functools.cached_property
    def top(self) -> Eigenvalues:
        """For the eigenvalues and for the line along the first eigenvector."""
        k = min(self.settings.k, self.size)
        return _eigenvalues(self, "top_eigenvalues", "largest", k)


def measure_key(key: jax.Array, name: str) -> jax.Array:
    """The key of one measure, whatever other measures there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def compute(run: Run, name: str) -> tuple[Any, Cost]:
    """A measure, on the host, and what it spent beyond what was there already."""
    before, clock = run.spent, time.perf_counter()
    value = jax.device_get(MEASURES[name].compute(run, name))
    seconds = time.perf_counter() - clock
    cost = Cost(
        run.spent.hvps - before.hvps,
        run.spent.gradients - before.gradients,
        run.spent.forward_passes - before.forward_passes,
        seconds,
    )
    named = hasattr(value, "_asdict")
    fields = value._asdict() if named else value
    return as_kind(MEASURES[name].kind, fields), cost


def as_kind(kind: type, value: Any) -> Any:
    """A float, or a tuple of the kind with floats and arrays.

    Args:
      kind: float or a NamedTuple.
      value: a number, or its fields by name. Texts such as "nan" are numbers too.
    """
    if kind is float:
        return float(value)
    return kind(**{name: _float_or_array(value[name]) for name in value})


def _float_or_array(value):
    if value is None:  # the eigenvectors
        return None
    array = np.asarray(value, float)
    return array if array.ndim else float(array)


def _eigenvalues(run, name, which, k):
    settings = run.settings
    num_matvecs = min(settings.num_matvecs, run.size)
    run.spend(hvps=k * (num_matvecs + 1))
    return run.at_point(
        top_eigenvalues, k=k, which=which, num_matvecs=num_matvecs,
        key=measure_key(run.key, name),
    )  # fmt: skip


def _smallest_eigenvalue(run, name):
    return _eigenvalues(run, name, "smallest", 1)._replace(vectors=None)


def _by_signs(run, name, estimate):
    num_samples = run.settings.num_samples
    run.spend(hvps=num_samples)
    return run.at_point(
        estimate, num_samples=num_samples, key=measure_key(run.key, name)
    )


def _spectral_density(run, name):
    settings = run.settings
    num_matvecs = min(settings.num_matvecs, run.size)
    run.spend(hvps=settings.num_draws * num_matvecs)
    return run.at_point(
        spectral_density, num_matvecs=num_matvecs, num_samples=settings.num_draws,
        key=measure_key(run.key, name),
    )  # fmt: skip


def _sam_step(run, name):
    run.spend(gradients=1, forward_passes=1)
    return run.at_point(sharpness, rho=run.settings.rho)


def _ascent(run, name, rho, adaptive):
    num_steps = run.settings.ascent_steps
    run.spend(gradients=num_steps, forward_passes=2)  # at the params and at the end
    return run.at_point(
        sharpness, rho=rho, adaptive=adaptive, num_steps=num_steps,
        key=measure_key(run.key, name),
    )  # fmt: skip


def _average(run, name):
    num_samples = run.settings.num_samples
    run.spend(forward_passes=2 * num_samples + 1)
    radius = run.settings.sigma * run.size**0.5
    return run.at_point(
        sharpness, rho=radius, kind="average", num_samples=num_samples,
        batch_size=run.settings.batch_size, key=measure_key(run.key, name),
    )  # fmt: skip


def _m_sharpness(run, name):
    settings = run.settings
    # Each shard makes its own share of a pass.
    run.spend(gradients=1, forward_passes=1)
    return run.at_point(
        sharpness, rho=settings.rho, m=settings.m, batch_size=settings.batch_size
    )


def _local_energy(run, name):
    settings = run.settings
    run.spend(forward_passes=2 * settings.num_samples + 1)
    return run.at_point(
        local_energy, sigma=settings.sigma, num_samples=settings.num_samples,
        batch_size=settings.batch_size, key=measure_key(run.key, name),
    )  # fmt: skip


def _local_entropy(run, name):
    settings = run.settings
    chains = settings.num_samples + max(2, settings.num_samples // 4)  # with pilots
    run.spend(
        gradients=2 * (settings.entropy_steps - 1) * chains, forward_passes=chains + 1
    )
    return run.at_point(
        local_entropy, gamma=settings.gamma, temperature=settings.temperature,
        num_steps=settings.entropy_steps, num_chains=settings.num_samples,
        batch_size=settings.batch_size, key=measure_key(run.key, name),
    )  # fmt: skip


def _line(run, **direction):
    run.spend(forward_passes=LINE_POINTS)
    positions = np.linspace(-1.0, 1.0, LINE_POINTS)
    return run.at_point(
        line, positions=positions, batch_size=run.settings.batch_size, **direction
    )


class Measure(NamedTuple):
    """What `compute` and the report need to know of one measure."""

    kind: type  # of the value: float or a NamedTuple
    compute: Callable[[Run, str], Any]  # its own name is the second argument


# In the order in which they are computed and printed; the fields of `Report`.
MEASURES = {
    "loss": Measure(float, lambda run, name: run.loss_and_gradient[0]),
    "gradient_norm": Measure(
        float, lambda run, name: trees.norm(run.loss_and_gradient[1])
    ),
    "parameter_norm": Measure(float, lambda run, name: trees.norm(run.params)),
    "top_eigenvalues": Measure(
        Eigenvalues, lambda run, name: run.top._replace(vectors=None)
    ),
    "smallest_eigenvalue": Measure(Eigenvalues, _smallest_eigenvalue),
    "trace": Measure(Estimate, lambda run, name: _by_signs(run, name, trace)),
    "frobenius_norm": Measure(
        Estimate, lambda run, name: _by_signs(run, name, frobenius_norm)
    ),
    "spectral_density": Measure(Density, _spectral_density),
    "sharpness_one_step": Measure(Estimate, _sam_step),
    "sharpness_worst": Measure(
        Estimate, lambda run, name: _ascent(run, name, run.settings.rho, False)
    ),
    "sharpness_adaptive": Measure(
        Estimate, lambda run, name: _ascent(run, name, run.settings.adaptive_rho, True)
    ),
    "sharpness_average": Measure(Estimate, _average),
    "m_sharpness": Measure(Estimate, _m_sharpness),
    "local_energy": Measure(Estimate, _local_energy),
    "local_entropy": Measure(Estimate, _local_entropy),
    "eigenvector_line": Measure(
        Line,
        lambda run, name: _line(
            run, direction=jax.tree.map(lambda v: v[0], run.top.vectors)
        ),
    ),
    "random_line": Measure(
        Line,
        lambda run, name: _line(
            run,
            key=measure_key(run.key, name),
            filter_axis=run.settings.filter_axis,
        ),
    ),
}
