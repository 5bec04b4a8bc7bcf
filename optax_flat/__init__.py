"""Flat-minima training in JAX: every method an Optax gradient transformation."""

from importlib.metadata import version as _version

from optax_flat import schedules as schedules
from optax_flat import training as training
from optax_flat._core.masking import masked as masked
from optax_flat._core.modes import ScannedState as ScannedState
from optax_flat._core.modes import TransparentState as TransparentState
from optax_flat._core.modes import eval_params as eval_params
from optax_flat._core.modes import scanned as scanned
from optax_flat._core.modes import transparent as transparent
from optax_flat._core.walk import Walk as Walk
from optax_flat._methods.coolmomentum import CoolMomentumState as CoolMomentumState
from optax_flat._methods.coolmomentum import coolmomentum as coolmomentum
from optax_flat._methods.ensemble_kalman import (
    EnsembleKalmanState as EnsembleKalmanState,
)
from optax_flat._methods.ensemble_kalman import ensemble_kalman as ensemble_kalman
from optax_flat._methods.langevin import LangevinNoiseState as LangevinNoiseState
from optax_flat._methods.langevin import PSGLDState as PSGLDState
from optax_flat._methods.langevin import SGHMCState as SGHMCState
from optax_flat._methods.langevin import add_langevin_noise as add_langevin_noise
from optax_flat._methods.langevin import psgld as psgld
from optax_flat._methods.langevin import sghmc as sghmc
from optax_flat._methods.langevin import sgld as sgld
from optax_flat._methods.local_entropy import entropy_adam as entropy_adam
from optax_flat._methods.local_entropy import entropy_sgd as entropy_sgd
from optax_flat._methods.local_entropy import local_entropy as local_entropy
from optax_flat._methods.perturbation import (
    PerturbationGradientState as PerturbationGradientState,
)
from optax_flat._methods.perturbation import (
    perturbation_gradient as perturbation_gradient,
)
from optax_flat._methods.perturbation import perturbed_sum as perturbed_sum

__version__ = _version("optax_flat")
