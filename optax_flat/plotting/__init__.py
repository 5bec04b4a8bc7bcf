"""Pictures of optimizers and of minima (extra `plot`).

Every picture is a `matplotlib.figure.Figure` that is returned, not shown: save it with
``figure.savefig(path)``. Nothing here touches pyplot or its global state.
"""

from optax_flat.plotting.animation import animate as animate
from optax_flat.plotting.flatness_report import report as report
from optax_flat.plotting.hessian_spectrum import spectrum as spectrum
from optax_flat.plotting.loss_landscape import landscape as landscape
from optax_flat.plotting.response import gradient_response as gradient_response
from optax_flat.plotting.response import responses as responses
from optax_flat.plotting.surface import paths as paths
from optax_flat.plotting.surface import trajectory as trajectory
from optax_flat.plotting.training_history import history as history
