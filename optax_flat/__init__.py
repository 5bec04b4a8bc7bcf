"""Flat-minima training in JAX: every method an Optax gradient transformation."""

from importlib.metadata import version as _version

from optax_flat import ascent as ascent
from optax_flat import descent as descent
from optax_flat import flatness as flatness
from optax_flat import plotting as plotting
from optax_flat import problems as problems
from optax_flat import schedules as schedules
from optax_flat import training as training
from optax_flat._core.masking import masked as masked
from optax_flat._core.metrics import metrics as metrics
from optax_flat._core.modes import ScannedState as ScannedState
from optax_flat._core.modes import TransparentState as TransparentState
from optax_flat._core.modes import eval_params as eval_params
from optax_flat._core.modes import scanned as scanned
from optax_flat._core.modes import transparent as transparent
from optax_flat._core.posteriors import sample_params as sample_params
from optax_flat._core.precision import MasterWeightsState as MasterWeightsState
from optax_flat._core.precision import (
    StochasticRoundingState as StochasticRoundingState,
)
from optax_flat._core.precision import master_weights as master_weights
from optax_flat._core.precision import stochastic_rounding as stochastic_rounding
from optax_flat._core.walk import Walk as Walk
from optax_flat._methods.anti_pgd import AntiPGDState as AntiPGDState
from optax_flat._methods.anti_pgd import anti_pgd as anti_pgd
from optax_flat._methods.averaging import EMAState as EMAState
from optax_flat._methods.averaging import LawaState as LawaState
from optax_flat._methods.averaging import RunningAverageState as RunningAverageState
from optax_flat._methods.averaging import SWAState as SWAState
from optax_flat._methods.averaging import ema_weights as ema_weights
from optax_flat._methods.averaging import lawa as lawa
from optax_flat._methods.averaging import swa as swa
from optax_flat._methods.bsam import BSAMState as BSAMState
from optax_flat._methods.bsam import bsam as bsam
from optax_flat._methods.classic import AdadeltaState as AdadeltaState
from optax_flat._methods.classic import AdagradState as AdagradState
from optax_flat._methods.classic import ClipByLeafNormState as ClipByLeafNormState
from optax_flat._methods.classic import adadelta as adadelta
from optax_flat._methods.classic import adagrad as adagrad
from optax_flat._methods.classic import clip_by_leaf_norm as clip_by_leaf_norm
from optax_flat._methods.coolmomentum import CoolMomentumState as CoolMomentumState
from optax_flat._methods.coolmomentum import coolmomentum as coolmomentum
from optax_flat._methods.ensemble_kalman import (
    EnsembleKalmanState as EnsembleKalmanState,
)
from optax_flat._methods.ensemble_kalman import ensemble_kalman as ensemble_kalman
from optax_flat._methods.entropy_mcmc import EntropyMCMCState as EntropyMCMCState
from optax_flat._methods.entropy_mcmc import entropy_mcmc as entropy_mcmc
from optax_flat._methods.functional_sam import FunctionalSAMState as FunctionalSAMState
from optax_flat._methods.functional_sam import functional_sam as functional_sam
from optax_flat._methods.ivon import IVONState as IVONState
from optax_flat._methods.ivon import ivon as ivon
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
from optax_flat._methods.lookbehind_sam import LookbehindSAMState as LookbehindSAMState
from optax_flat._methods.lookbehind_sam import lookbehind_sam as lookbehind_sam
from optax_flat._methods.loss_slope import LossSlopeState as LossSlopeState
from optax_flat._methods.loss_slope import scale_by_loss_slope as scale_by_loss_slope
from optax_flat._methods.momentum_sam import MomentumSAMState as MomentumSAMState
from optax_flat._methods.momentum_sam import momentum_sam as momentum_sam
from optax_flat._methods.nesterov import (
    MultipointNesterovState as MultipointNesterovState,
)
from optax_flat._methods.nesterov import multipoint_nesterov as multipoint_nesterov
from optax_flat._methods.parle import ElasticAveragingState as ElasticAveragingState
from optax_flat._methods.parle import elastic_averaging as elastic_averaging
from optax_flat._methods.parle import parle as parle
from optax_flat._methods.perturbation import (
    PerturbationGradientState as PerturbationGradientState,
)
from optax_flat._methods.perturbation import (
    perturbation_gradient as perturbation_gradient,
)
from optax_flat._methods.perturbation import perturbed_sum as perturbed_sum
from optax_flat._methods.sam import SAMState as SAMState
from optax_flat._methods.sam import sam as sam
from optax_flat._methods.sam_variants import ae_sam as ae_sam
from optax_flat._methods.sam_variants import asam as asam
from optax_flat._methods.sam_variants import friendly_sam as friendly_sam
from optax_flat._methods.sam_variants import (
    gradient_norm_penalty as gradient_norm_penalty,
)
from optax_flat._methods.sam_variants import gsam as gsam
from optax_flat._methods.sam_variants import looksam as looksam
from optax_flat._methods.sam_variants import loss_equated_sam as loss_equated_sam
from optax_flat._methods.sam_variants import stable_sam as stable_sam
from optax_flat._methods.sam_variants import wsam as wsam
from optax_flat._methods.sam_variants import zsharp as zsharp
from optax_flat._methods.sampa import SAMPaState as SAMPaState
from optax_flat._methods.sampa import sampa as sampa

__version__ = _version("optax_flat")
