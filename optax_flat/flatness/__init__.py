"""How flat a minimum is: the curvature of the loss at the params and around them.

Every function takes ``loss_fn(params, batch)``, the mean loss of a batch, the params
and `batches`. A list, or another iterable that is no pytree (a data loader), holds many
batches: the loss is their mean, each weighed by the leading axis of its leaves, which
must be the same for all of them, and one at a time is in memory. Functions that go
through them several times refuse one-shot iterators. Any other pytree, a tuple
included, is one batch, and then the measure is one compiled program and may itself be
called under `jax.jit`.

Programs are compiled once for each `loss_fn` and kept, with what it closes over, by
JAX's caches, so define it once, outside of loops, and hashable. What changes belongs
into the params or the batch. Before measuring, the loss of the first batch is evaluated
twice without `jit` and once compiled: `ValueError` if the first two differ (noise), or
the compiled one from them by more than 0.1 % and from the same loss compiled anew as
well (it reads something that changed since). Neither shows where `loss_fn` is itself
jitted.
"""

from optax_flat.flatness._measures import Cost as Cost
from optax_flat.flatness._report import Report as Report
from optax_flat.flatness.curvature import Estimate as Estimate
from optax_flat.flatness.curvature import frobenius_norm as frobenius_norm
from optax_flat.flatness.curvature import hvp as hvp
from optax_flat.flatness.curvature import trace as trace
from optax_flat.flatness.density import Density as Density
from optax_flat.flatness.density import spectral_density as spectral_density
from optax_flat.flatness.directions import random_direction as random_direction
from optax_flat.flatness.eigenvalues import Eigenvalues as Eigenvalues
from optax_flat.flatness.eigenvalues import top_eigenvalues as top_eigenvalues
from optax_flat.flatness.landscape import Line as Line
from optax_flat.flatness.landscape import Plane as Plane
from optax_flat.flatness.landscape import line as line
from optax_flat.flatness.landscape import plane as plane
from optax_flat.flatness.local_energy import local_energy as local_energy
from optax_flat.flatness.local_entropy import local_entropy as local_entropy
from optax_flat.flatness.report import report as report
from optax_flat.flatness.sharpness import sharpness as sharpness
