"""Training helpers: steps, loops, a Flax train state, losses, samples, statistics."""

from typing import TYPE_CHECKING

from optax_flat._core.convolutions import fast_convolutions as fast_convolutions
from optax_flat.training.batch_stats import update_batch_stats as update_batch_stats
from optax_flat.training.history import History as History
from optax_flat.training.sampling import Samples as Samples
from optax_flat.training.sampling import collect_samples as collect_samples
from optax_flat.training.sampling import predict as predict
from optax_flat.training.step import make_train_step as make_train_step

if TYPE_CHECKING:
    from optax_flat.training.train_state import TrainState as TrainState


def __getattr__(name: str):
    # TrainState subclasses Flax's class, and Flax is an extra: imported on first use.
    if name == "TrainState":
        from optax_flat.training.train_state import TrainState

        return TrainState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "TrainState"})
