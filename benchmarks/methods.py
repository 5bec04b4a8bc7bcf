"""The methods that the situations compare: two catalogues, around SGD and AdamW.

Every method has a rate and one second setting, and spends the same number of gradients
of minibatches: one that takes two or L of them per update makes fewer updates.
Rates rise over the first twentieth of the updates and fall to 0 by a cosine. The
averages (ema, lawa, swa) have one that stays or falls to a part, their second setting
or 1, since an average stands for the fall; coolmomentum's momentum falls instead.
Where the second setting is not the weight decay, SGD has 5e-4, AdamW 1e-2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flat
from optax_flat import schedules

AXIS = "replica"
WALK = 20  # gradients per update of Entropy-SGD
SHORT_WALK = 5  # of Entropy-Adam, and where there are few updates
REPLICAS = 4


class Setup(NamedTuple):
    """What an optimizer is made of, beside its method."""

    peak: jax.Array  # the highest rate
    second: jax.Array
    updates: int
    ess: jax.Array  # the number of training examples
    key: jax.Array

    def rising(self, count: Any) -> Any:
        """To the peak, over the first twentieth."""
        return self.peak * jnp.minimum(1.0, (count + 1) / (1 + self.updates // 20))

    def rate(self, count: Any) -> Any:
        """Then by a cosine to 0."""
        decay = optax.cosine_decay_schedule(1.0, self.updates)
        return self.rising(count) * decay(count)

    def falling(self, count: Any) -> Any:
        """Then linearly to the part `second`."""
        return self.rising(count) * (1 - (1 - self.second) * count / self.updates)


class Method(NamedTuple):
    """An optimizer and where its tuning starts: the rate, the middle second setting."""

    make: Callable[[Setup], optax.GradientTransformation]
    start: float
    seconds: tuple[float, ...]
    second: str  # what it is
    num_steps: int = 1  # gradients per update
    one_minibatch: bool = False  # for all of them
    replicas: int = 1  # which share a minibatch
    members: int = 1  # of an ensemble: each with its own start and minibatches


Base = Callable[..., optax.GradientTransformation]  # of a schedule, and a decay
DECAY = 5e-4
DECAYS = (0.0, DECAY, 10 * DECAY)
ADAM_DECAYS = (1e-3, 1e-2, 1e-1)
RADII = (0.03, 0.1, 0.3)


def sgd(rate: optax.Schedule, decay: Any = DECAY) -> optax.GradientTransformation:
    """With momentum and weight decay."""
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, 0.9))


def adamw(rate: optax.Schedule, decay: Any = 1e-2) -> optax.GradientTransformation:
    """With the weight decay that is the middle of its grid."""
    return optax.adamw(rate, weight_decay=decay)


def nesterov() -> optax.GradientTransformation:
    """What the gradients of a walk go through: weight decay and momentum."""
    decay = optax.add_decayed_weights(DECAY)
    return optax.chain(decay, optax.trace(0.9, nesterov=True))


def coolmomentum(setup: Setup) -> optax.GradientTransformation:
    """A constant rate; the momentum is cooled to 0 over the whole run."""
    momentum = schedules.exponential_cooling(0.99, setup.updates)
    decay = optax.add_decayed_weights(setup.second)
    return optax.chain(decay, optax_flat.coolmomentum(setup.rising, momentum))


def ivon(setup: Setup) -> optax.GradientTransformation:
    """The second setting multiplies the number of examples; b2 reaches over the run."""
    return optax_flat.ivon(
        setup.rate, ess=lambda _: setup.second * setup.ess,
        b2=1 - 1 / setup.updates, noise_kind="rademacher", mode="transparent",
        key=setup.key,
    )  # fmt: skip


def entropy_sgd(num_steps: int) -> Method:
    """The rate is that of the walk, the outer one falls from 1."""

    def make(setup):
        return optax_flat.entropy_sgd(
            optax.cosine_decay_schedule(1.0, setup.updates), num_steps=num_steps,
            step_size=lambda _: setup.peak, gamma=lambda _: setup.second,
            inner_transform=nesterov(), noise_kind="rademacher", key=setup.key,
        )  # fmt: skip

    return Method(make, 0.01, (0.01, 0.1, 1.0), "gamma", num_steps)


def parle(setup: Setup) -> optax.GradientTransformation:
    """As Entropy-SGD with four replicas, each with a quarter of every minibatch."""
    return optax_flat.parle(
        optax.cosine_decay_schedule(1.0, setup.updates), num_steps=SHORT_WALK,
        step_size=lambda _: setup.peak, coupling=lambda _: setup.second,
        momentum=0.0, inner_transform=nesterov(), noise_kind="rademacher",
        axis_name=AXIS, key=setup.key,
    )  # fmt: skip


def entropy_adam(setup: Setup, **others: Any) -> optax.GradientTransformation:
    """The rate is that of Adam, the second setting the step of the walk."""
    return optax_flat.entropy_adam(
        setup.rate, num_steps=SHORT_WALK, step_size=lambda _: setup.second,
        inner_transform=nesterov(), noise_kind="rademacher", key=setup.key, **others,
    )  # fmt: skip


def around(base: Base, rate: float, strong: float) -> dict[str, Method]:
    """The catalogue of methods, where they have one inside, around a base optimizer.

    Those named `_decayed` have the base with the weight decay `strong`.
    """

    def sharpness_aware(
        method: Callable[..., Any], radii: tuple[float, ...], *decay: float
    ) -> Method:
        def make(setup):
            return method(base(setup.rate, *decay), rho=lambda _: setup.second)

        return Method(make, rate, radii, "rho", 2, one_minibatch=True)

    def ema(*decay: float) -> Method:
        def make(setup):
            forgets = 1 - 1 / (setup.second * setup.updates)
            rising = base(setup.rising, *decay)
            return optax_flat.ema_weights(rising, decay=lambda _: forgets)

        return Method(make, rate, (0.03, 0.1, 0.3), "part of the run averaged")

    def lawa(setup):
        period = max(1, setup.updates // 50)
        return optax_flat.lawa(base(setup.falling), k=10, period=period)

    ends = (0.1, 0.3, 1.0)

    def swa(*decay: float) -> Method:
        def make(setup):
            falling = base(setup.falling, *decay)
            return optax_flat.swa(falling, start=3 * setup.updates // 4)

        return Method(make, rate, ends, "rate at the end")

    return {
        "sgd": Method(
            lambda setup: sgd(setup.rate, setup.second), 0.03, DECAYS, "weight decay"
        ),
        "adamw": Method(
            lambda setup: adamw(setup.rate, setup.second),
            1e-3, ADAM_DECAYS, "weight decay",
        ),
        "sam": sharpness_aware(optax_flat.sam, RADII),
        "sam_decayed": sharpness_aware(optax_flat.sam, RADII, strong),
        "asam": sharpness_aware(optax_flat.asam, (0.3, 1.0, 3.0)),
        "friendly_sam": sharpness_aware(optax_flat.friendly_sam, RADII),
        "entropy_sgd": entropy_sgd(WALK),
        "entropy_sgd_short": entropy_sgd(SHORT_WALK),
        "entropy_adam": Method(
            entropy_adam, 3e-3, (0.01, 0.03, 0.1), "walk's step", SHORT_WALK
        ),
        "parle": Method(
            parle, 0.01, (0.25, 0.75, 2.25), "coupling", SHORT_WALK, replicas=REPLICAS
        ),
        "ema": ema(),
        "ema_decayed": ema(strong),
        "lawa": Method(lawa, rate, ends, "rate at the end"),
        "swa": swa(),
        "swa_decayed": swa(strong),
        "ivon": Method(ivon, 0.1, (1.0, 10.0, 100.0), "ess / examples"),
        "coolmomentum": Method(coolmomentum, 0.003, DECAYS, "weight decay"),
    }  # fmt: skip


CATALOGUES = {
    "sgd": around(sgd, 0.03, DECAYS[-1]),
    "adamw": around(adamw, 1e-3, ADAM_DECAYS[-1]),
}
