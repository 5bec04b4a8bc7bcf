"""Every public method once, with what it needs. The contract tests run over this list.

A method that is not here does not exist: `test_catalogue_is_complete` compares it with
the public names.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

import optax_flat


class Quadratic(NamedTuple):
    """f(x) = (x - c)' H (x - c) / 2."""

    H: np.ndarray
    c: np.ndarray


class Method(NamedTuple):
    """One public method."""

    name: str
    arguments: dict[str, Any]  # required arguments and settings that suit the tests
    floats: dict[str, float]  # every float argument, with a value to test it at
    noisy: dict[str, Any]  # arguments that make its key matter; empty if it has none
    # Limit arguments that make it a known optimizer with one gradient per update.
    off: dict[str, Any]
    off_is: optax.GradientTransformation
    # First update from x on a quadratic, with the arguments `closed_form_arguments`.
    closed_form: Callable[[Quadratic, np.ndarray], np.ndarray]
    closed_form_arguments: dict[str, Any]
    bad: list[tuple[dict[str, Any], type[Exception], str]]  # arguments, error, words
    modes: tuple[str, ...] = ("scanned", "transparent")
    length: int = 4  # gradients per outer update, with these arguments

    def make(self, **overrides: Any) -> optax.GradientTransformationExtraArgs:
        """The optimizer with some arguments replaced; equal ones are one object."""
        try:
            key = tuple((k, v, type(v)) for k, v in sorted(overrides.items()))
            hash(key)
        except TypeError:
            return self.factory(**self.arguments | overrides)
        return _make(self.name, key)

    @property
    def factory(self) -> Callable[..., Any]:
        """The public function."""
        return getattr(optax_flat, self.name)


def gibbs_mean_step(q: Quadratic, x, *, num_steps, step_size, gamma, averaging):
    """x - mu after a noiseless walk, from the geometric series of A = I - eta (H + g).

    x'_k = x* + A^k (x - x*) with x* = (H + g)^-1 (H c + g x), and
    mu = b^L x + a sum_k b^(L-k) x'_k with a = averaging, b = 1 - a, so
    mu - x* = (b^L + a A (A^L - b^L) (A - b)^-1) (x - x*).
    """
    identity = np.eye(len(x))
    stiff = q.H + gamma * identity
    center = np.linalg.solve(stiff, q.H @ q.c + gamma * x)
    A = identity - step_size * stiff
    a, b, L = averaging, 1 - averaging, num_steps
    series = np.linalg.matrix_power(A, L) - b**L * identity
    weight = b**L * identity + a * A @ series @ np.linalg.inv(A - b * identity)
    return x - center - weight @ (x - center)


def first_adam(d, learning_rate, eps):
    """Adam's first update on d."""
    return learning_rate * d / (np.abs(d) + eps)


WALK = {"num_steps": 7, "step_size": 0.15, "gamma": 0.8, "averaging": 0.6}
NOISELESS = {**WALK, "noise": 0.0}
LOCAL_ENTROPY_FLOATS = {
    "step_size": 0.07,
    "gamma": 0.5,
    "scoping": 0.2,
    "noise": 0.05,
    "averaging": 0.5,
}
LOCAL_ENTROPY_OFF = {
    "num_steps": 1,
    "step_size": 0.2,
    "gamma": 0.0,
    "noise": 0.0,
    "averaging": 1.0,
}
LOCAL_ENTROPY_BAD = [
    ({"num_steps": 0}, ValueError, "`num_steps` must be an int >= 1, got 0"),
    ({"num_steps": 2.0}, TypeError, "`num_steps` must be a Python int .* got 2.0"),
    ({"num_steps": True}, TypeError, "`num_steps` .* got True"),
    ({"gamma": -0.1}, ValueError, r"`gamma` must lie in \[0, inf\), got -0.1"),
    ({"noise": -1.0}, ValueError, r"`noise` must lie in \[0, inf\), got -1"),
    ({"step_size": -0.1}, ValueError, r"`step_size` must lie in \[0, inf\), got -0.1"),
    ({"step_size": float("nan")}, ValueError, "`step_size` must lie in .* got nan"),
    ({"step_size": "0.1"}, TypeError, "`step_size` must be a .* got '0.1'"),
    ({"averaging": 0.0}, ValueError, r"`averaging` must lie in \(0, 1\], got 0"),
    ({"averaging": 1.1}, ValueError, r"`averaging` must lie in \(0, 1\], got 1.1"),
    ({"scoping": -1.0}, ValueError, r"`scoping` must lie in \(-1, inf\), got -1"),
    ({"mode": "opaque"}, ValueError, "`mode` must be one of 'scanned', 'transparent'"),
    ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of 'normal'"),
    ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
    ({"key": 0.5}, ValueError, "`key` must be one typed key .* got 0.5"),
    ({"inner_transform": 1.0}, TypeError, "`inner_transform` must be an optax"),
    ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be a floating"),
]

METHODS = [
    Method(
        name="local_entropy",
        arguments={
            "outer": optax.rmsprop(0.1),
            "num_steps": 4,
            "noise": 0.0,
            "key": 0,
        },
        floats=LOCAL_ENTROPY_FLOATS,
        noisy={"noise": 0.02},
        off=LOCAL_ENTROPY_OFF | {"outer": optax.sgd(0.5, momentum=0.9)},
        off_is=optax.sgd(0.5 * 0.2, momentum=0.9),
        closed_form=lambda q, x: -0.5 * gibbs_mean_step(q, x, **WALK),
        closed_form_arguments=NOISELESS | {"outer": optax.sgd(0.5)},
        bad=[
            *LOCAL_ENTROPY_BAD,
            ({"outer": 0.1}, TypeError, "`outer` must be an optax"),
        ],
    ),
    Method(
        name="entropy_sgd",
        arguments={
            "learning_rate": 0.5,
            "momentum": 0.9,
            "num_steps": 4,
            "noise": 0.0,
            "key": 0,
        },
        floats=LOCAL_ENTROPY_FLOATS | {"learning_rate": 0.7, "momentum": 0.5},
        noisy={"noise": 0.02},
        off=LOCAL_ENTROPY_OFF | {"momentum": 0.9, "nesterov": True},
        off_is=optax.sgd(0.5 * 0.2, momentum=0.9, nesterov=True),
        closed_form=lambda q, x: -0.5 * gibbs_mean_step(q, x, **WALK),
        closed_form_arguments=NOISELESS | {"momentum": 0.0},
        bad=[
            *LOCAL_ENTROPY_BAD,
            ({"learning_rate": -1.0}, ValueError, "`learning_rate` must lie in"),
            (
                {"momentum": 1.5},
                ValueError,
                r"`momentum` must lie in \[0, 1\], got 1.5",
            ),
        ],
    ),
    Method(
        name="entropy_adam",
        arguments={"learning_rate": 0.05, "num_steps": 4, "noise": 0.0, "key": 0},
        floats=LOCAL_ENTROPY_FLOATS
        | {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-3},
        noisy={"noise": 0.02},
        off=LOCAL_ENTROPY_OFF,
        off_is=optax.chain(optax.scale(0.2), optax.adam(0.05)),
        closed_form=lambda q, x: -first_adam(gibbs_mean_step(q, x, **WALK), 0.05, 0.1),
        closed_form_arguments=NOISELESS | {"eps": 0.1},
        bad=[
            *LOCAL_ENTROPY_BAD,
            ({"b1": -0.1}, ValueError, r"`b1` must lie in \[0, 1\), got -0.1"),
            ({"b2": 1.0}, ValueError, r"`b2` must lie in \[0, 1\), got 1"),
            ({"eps": -1.0}, ValueError, "`eps` must lie in"),
        ],
    ),
]


@functools.cache
def _make(name: str, overrides: tuple) -> optax.GradientTransformationExtraArgs:
    # One object for all tests means one compilation of its update.
    method = next(method for method in METHODS if method.name == name)
    return method.factory(**method.arguments | {k: v for k, v, _ in overrides})
