"""Every public method once, with what it needs. The contract tests run over this list.

A method that is not here does not exist: `test_catalogue_is_complete` compares it with
the public names.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flat
from optax_flat._core.noise import draw, draw_from, first_seed, next_seed

WALK_MODES = ("scanned", "transparent")
FORWARD = ("forward",)  # outputs of the model in the place of gradients
PLAIN = ("plain",)  # one gradient per update, which stands on the params themselves


# One of each kind of state: a plain walk, one that may end early, params that stand off
# their anchor, noise in the state, replicas.
KINDS_OF_WALKS = {"entropy_sgd", "looksam", "momentum_sam", "ivon", "parle"}
# Tried in transparent mode as well as scanned; `make test-all` tries all.
BOTH_MODES = {"entropy_sgd"}


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
    # Where `closed_form_updates` updates lead from x on a quadratic, minus x, with the
    # arguments `closed_form_arguments`.
    closed_form: Callable[[Quadratic, np.ndarray], np.ndarray]
    closed_form_arguments: dict[str, Any]
    bad: list[tuple[dict[str, Any], type[Exception], str]]  # arguments, error, words
    modes: tuple[str, ...] = WALK_MODES
    length: int = 4  # gradients per outer update, with these arguments
    closed_form_updates: int = 1
    # Whether its state holds floating-point numbers made of gradients and params.
    keeps_floats: bool = True
    # Whether the optimizers inside it that are Optax's work under strict promotion.
    promotes_nothing: bool = True
    # Whether `eval_params` is not where its walks start, but behind a look-ahead point
    # or in a center.
    looks_ahead: bool = False
    # Floats of which the anchor knows nothing before the next outer update.
    late: tuple[str, ...] = ()
    # Whether a walk may end before its last gradient.
    ends_early: bool = False
    # Gradients per update with the arguments `off`; all on one minibatch.
    off_length: int = 1
    # Whether another method runs the same engine, which is tested there: `entropy_sgd`,
    # `sgld`, `swa`; `sam`, `friendly_sam` (whose rule has a state), `looksam` (skips).
    shares_engine: bool = False
    # Whether its closed form and limits are of `eval_params`, not of the params.
    evaluated: bool = False
    # The arguments that give a walk another number of gradients, if any do.
    of_length: Callable[[int], dict[str, Any]] | None = lambda n: {"num_steps": n}

    @property
    def tried(self) -> tuple[str, ...]:
        """The modes that most tests try; `test_modes_agree` compares all of them."""
        return self.modes if self.name in BOTH_MODES else self.modes[:1]

    def is_tried(self, mode: str) -> bool:
        """Whether `make test` tries its engine in a mode: one walk of each kind."""
        is_kind = mode not in WALK_MODES or self.name in KINDS_OF_WALKS
        return not self.shares_engine and is_kind and mode in self.tried

    @property
    def has_key(self) -> bool:
        """Whether it takes a PRNG key."""
        return "key" in self.arguments

    def loop(self, mode: str) -> dict[str, str]:
        """The argument that chooses a mode, where there is a choice."""
        return {"mode": mode} if self.modes == WALK_MODES else {}

    def make(
        self, *, mode: str = "scanned", **overrides: Any
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer with some arguments replaced; equal ones are one object."""
        overrides = self.loop(mode) | overrides
        try:
            key = tuple((k, v, type(v)) for k, v in sorted(overrides.items()))
            hash(key)
        except TypeError:
            return self.factory(**self.arguments | overrides)
        return _make(self.name, key)

    def read(self, run: Any) -> Any:
        """Where a run has led, as this method's closed form and limits mean it."""
        return run.path[-1] if self.evaluated else run.params

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


def elastic_steps(q: Quadratic, x, *, displacement, rate, coupling, step, updates):
    """Displacement after some updates that are pulled to a center, itself on its way.

    `displacement` of q and x is what takes the place of the gradient.
    """
    start, center = x, x
    for _ in range(updates):
        x = x - rate * (displacement(q, x) + coupling * (x - center))
        center = center + step * (x - center)
    return x - start


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


def cooled_steps(q: Quadratic, x, *, learning_rate, momenta, weight_decay):
    """Displacement after some updates of CoolMomentum: one matrix product each.

    With weight decay the quadratic has H + decay and its center moves.
    """
    identity = np.eye(len(x))
    H = q.H + weight_decay * identity
    center = np.linalg.solve(H, q.H @ q.c)
    state = np.concatenate([x - center, np.zeros(len(x))])  # (x - center, dx)
    for rho in momenta:
        descent = learning_rate * (1 + rho) / 2 * H
        step = np.hstack([descent, rho * identity])
        state = np.vstack([np.eye(len(x), 2 * len(x)) - step, step]) @ state
    return state[: len(x)] + center - x


def langevin_steps(q: Quadratic, x, *, rate, temperature, friction, updates):
    """Displacement after some updates of SGHMC; friction 1 is SGLD."""
    y, v = x - q.c, 0.0
    for z in normals(x, updates):
        kick = np.sqrt(2 * friction * rate * temperature) * z
        v = (1 - friction) * v - rate * q.H @ y + kick
        y = y + v
    return y + q.c - x


def rms_langevin_step(q: Quadratic, x, *, rate, temperature, decay, eps):
    """First update of pSGLD."""
    g = q.H @ (x - q.c)
    G = 1 / (np.sqrt((1 - decay) * g**2) + eps)
    return -rate * G * g + np.sqrt(2 * rate * temperature * G) * normals(x, 1)[0]


def projected_gradient(q: Quadratic, x, size, spread):
    """Mean over z of (rise of f along z) z / spread, times the slope of the loss."""

    def f(x):
        return (x - q.c) @ q.H @ (x - q.c) / 2

    slope = f(x)  # of the loss f^2 / 2
    key = jax.random.fold_in(jax.random.key(0), 0)
    zs = [
        np.asarray(draw(jax.random.fold_in(key, k), jnp.asarray(x), "normal"))
        for k in range(size)
    ]
    rises = [(f(x + spread * z) - f(x)) / spread for z in zs]
    return slope * np.mean([c * z for c, z in zip(rises, zs, strict=True)], axis=0)


def ensemble_steps(q: Quadratic, x, updates, step_size, eps, size, spread):
    """Displacement of the mean after some explicit updates, member by member.

    The only output is f and the loss is f^2 / 2.
    """
    key = jax.random.fold_in(jax.random.key(0), 2**32 - 1)
    u = np.stack(
        [
            np.asarray(draw(jax.random.fold_in(key, j), jnp.asarray(x), "normal"))
            for j in range(size)
        ]
    )
    u = x + spread * (u - u.mean(axis=0))
    for _ in range(updates):
        f = np.array([(m - q.c) @ q.H @ (m - q.c) / 2 for m in u])
        D = np.outer(f, f - f.mean()) / size
        u = u - step_size / (np.linalg.norm(D) + eps) * D @ u
    return u.mean(axis=0) - x


def look_ahead_steps(q: Quadratic, x, *, rate, momenta, nodes, weights):
    """Displacement of the first node by Nesterov's rule with one node, their mean."""
    mean, theta, v = np.dot(nodes, weights), x, 0.0 * x
    for m in momenta[:-1]:
        v = m * v + rate * q.H @ (theta - mean * m * v - q.c)
        theta = theta - v
    return theta - nodes[0] * momenta[-1] * v - x


def slope_scaled_steps(q: Quadratic, x, factor):
    """Displacement after three steps uphill, the third scaled."""
    y = x - q.c
    for scale in (1.0, 1.0, factor):
        y = y + scale * q.H @ y
    return y + q.c - x


def adadelta_steps(q: Quadratic, x, rate, decay, eps, initial, updates):
    """Displacement after some updates."""
    y, E, X = x - q.c, 0.0, initial
    for _ in range(updates):
        g = q.H @ y
        E = decay * E + (1 - decay) * g**2
        s = np.sqrt(X + eps) / np.sqrt(E + eps) * g
        X = decay * X + (1 - decay) * s**2
        y = y - rate * s
    return y + q.c - x


def mean_descent(q: Quadratic, x, rate, weights):
    """Displacement of a weighted mean of gradient descent's first iterates."""
    y, points = x - q.c, []
    for _ in weights:
        y = y - rate * q.H @ y
        points.append(y)
    return np.average(points, axis=0, weights=weights) + q.c - x


def normals(x, updates):
    """What the key 0 draws."""
    return [
        np.asarray(
            draw(jax.random.fold_in(jax.random.key(0), t), jnp.asarray(x), "normal")
        )
        for t in range(updates)
    ]


def walk_draws(x, t, count):
    """What the walk of outer update t draws with the key 0, in its order."""
    seed = first_seed(jax.random.fold_in(jax.random.key(0), t), jnp.asarray(x))
    for _ in range(count):
        yield np.asarray(draw_from(seed, jnp.asarray(x), "normal"))
        seed = next_seed(seed)


def ivon_steps(q: Quadratic, x, *, rate, ess, h0, b1, b2, decay, samples, updates):
    """Displacement of the draw that the params stand on after some updates."""
    m, w, mu, h = x, x, 0.0, np.full_like(x, h0)
    for t in range(updates):
        deviation = 1 / np.sqrt(ess * (h + decay))
        draws = list(walk_draws(x, t, samples))
        points = np.array([w, *(m + deviation * z for z in draws[1:])])
        g = (points - q.c) @ q.H
        told = samples - (t == 0)  # nothing was drawn for the first gradient
        f = (g * (points - m)).sum(axis=0) / told * ess * (h + decay)
        h = b2 * h + (1 - b2) * f + ((1 - b2) * (h - f)) ** 2 / (2 * (h + decay))
        mu = b1 * mu + (1 - b1) * g.mean(axis=0)
        step = (mu / (1 - b1 ** (t + 1)) + decay * m) / (h + decay)
        m = m - rate * (h0 + decay) * step
        w = m + next(walk_draws(x, t + 1, 1)) / np.sqrt(ess * (h + decay))
    return w - x


def bsam_steps(
    q: Quadratic, x, *, rate, size, rho, b1, b2, decay, damping, s0, shards, updates
):
    """Displacement of the noisy point that the params stand on after some updates."""
    w, noisy, mu, s = x, x, 0.0, np.full_like(x, s0)
    for t in range(updates):
        draws = list(walk_draws(x, t, shards))
        points = np.array([noisy, *(w + z / np.sqrt(size * s) for z in draws[1:])])
        g = (points - q.c) @ q.H
        perturbed = (w + rho * g / s - q.c) @ q.H
        mu = b1 * mu + (1 - b1) * (perturbed.mean(axis=0) + decay * w)
        w = w - rate * mu / s
        target = np.sqrt(s) * np.abs(g).mean(axis=0) + damping + decay
        s = b2 * s + (1 - b2) * target
        noisy = w + next(walk_draws(x, t + 1, 1)) / np.sqrt(size * s)
    return noisy - x


def anchored_steps(q: Quadratic, x, *, rate, temperature, gamma, decay, updates):
    """Displacement after some updates of Entropy-MCMC."""
    y, anchor, scale = x, x, np.sqrt(2 * rate * temperature)
    for t in range(updates):
        first, second = walk_draws(x, t, 2)
        pull = gamma * (y - anchor)
        y, anchor = (
            y - rate * (q.H @ (y - q.c) + decay * y + pull) + scale * first,
            anchor - rate * (decay * anchor - pull) + scale * second,
        )
    return y - x


def anticorrelated_steps(q: Quadratic, x, *, rate, noise, updates):
    """Displacement after some updates of Anti-PGD: descent of v, seen from v + xi."""
    v, xi = x, 0.0
    for t in range(1, updates + 1):
        key = jax.random.fold_in(jax.random.key(0), t)
        v = v - rate * q.H @ (v + xi - q.c)
        xi = noise * np.asarray(draw(key, jnp.asarray(x), "rademacher"))
    return v + xi - x


LANGEVIN_BAD = [
    ({"temperature": -1.0}, ValueError, r"`temperature` must lie in \[0, inf\)"),
    ({"temperature": None}, TypeError, "`temperature` must be a float"),
    ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of 'normal'"),
    ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
]
ENSEMBLE_BAD = [
    ({"ensemble_size": 0}, ValueError, "`ensemble_size` must be an int >= "),
    ({"ensemble_size": 2.0}, TypeError, "`ensemble_size` must be a Python int"),
    ({"spread": 0.0}, ValueError, "`spread` must be a finite .* > 0, got 0.0"),
    ({"spread": "wide"}, TypeError, "`spread` must be a float > 0"),
    ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
]
AVERAGING_BAD = [
    ({"inner": 0.1}, TypeError, "`inner` must be an optax"),
    ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be a floating"),
]
AVERAGING: dict[str, Any] = {
    "noisy": {},
    "keeps_floats": False,  # but points, which are rounded as the params are
    "evaluated": True,
    "modes": PLAIN,
    "length": 1,
}
NEGATIVE_RATE = ({"learning_rate": -1.0}, ValueError, "`learning_rate` must lie in")

SAM_BAD = [
    ({"rho": -1.0}, ValueError, r"`rho` must lie in \[0, inf\), got -1"),
    ({"outer": 0.1}, TypeError, "`outer` must be an optax"),
    ({"num_groups": 0}, ValueError, "`num_groups` must be an int >= 1, got 0"),
    ({"mode": "opaque"}, ValueError, "`mode` must be one of 'scanned', 'transparent'"),
    ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be a floating"),
]


def sam_method(name, closed_form, *, arguments=None, floats=None, bad=(), **fields):
    """A named member of the sharpness-aware family.

    `closed_form` makes what SGD with the rate 0.3 takes off x, out of the gradient
    function, x, and g there, with rho = 0.2 or as `closed_form_arguments` say.
    """

    def update(q, x):
        def gradient(x):
            return q.H @ (x - q.c)

        return -0.3 * closed_form(gradient, x, gradient(x))

    arguments = arguments or {}
    settings = {
        "off": {"rho": 0.0, "outer": optax.sgd(0.1, momentum=0.9)},
        "off_is": optax.sgd(0.1, momentum=0.9),
        "closed_form_arguments": {},
    } | fields
    settings["closed_form_arguments"] = {
        "outer": optax.sgd(0.3), "rho": 0.2
    } | settings["closed_form_arguments"]  # fmt: skip
    return Method(
        name=name,
        shares_engine=name not in {"sam", "friendly_sam", "looksam"},
        arguments={"outer": optax.sgd(0.03, momentum=0.9), "rho": 0.1} | arguments,
        floats={"rho": 0.3} | (floats or {}),
        noisy={},
        closed_form=update,
        bad=[*SAM_BAD, *bad],
        length=2,
        off_length=2,
        of_length=None,
        **settings,
    )


def look_sam(gradient, x, *, rate, rho, alpha):
    """What three updates with period 3 take off x, over the rate."""
    g = gradient(x)
    g_r = gradient(x + rho * unit(g))
    direction, y = unit(across(g_r, g)), x - rate * g_r
    for _ in range(2):
        g = gradient(y)
        y = y - rate * (g + alpha * np.linalg.norm(g) * direction)
    return (x - y) / rate


def friendly_sam(gradient, x, *, rate, rho):
    """What three updates with sigma 0.6 and decay 0.7 take off x, over the rate."""
    y, mean = x, None
    for _ in range(3):
        g = gradient(y)
        d = g if mean is None else g - 0.6 * mean
        mean = g if mean is None else 0.7 * mean + 0.3 * g
        y = y - rate * gradient(y + rho * unit(d))
    return (x - y) / rate


def adaptive_sam(gradient, x, *, rate, rho):
    """What three updates with threshold 0.1 and decay 0.9 take off x, over the rate."""
    y, mean, variance, took = x, 0.0, 0.0, []
    for _ in range(3):
        g = gradient(y)
        mean = 0.9 * mean + 0.1 * g @ g
        variance = 0.9 * variance + 0.1 * (g @ g - mean) ** 2
        took.append(g @ g >= mean + 0.1 * np.sqrt(variance))
        y = y - rate * (gradient(y + rho * unit(g)) if took[-1] else g)
    assert set(took) == {True, False}  # else it would not test the rule
    return (x - y) / rate


def momentum_sam(q: Quadratic, x, *, rate, momentum, rho):
    """Where three updates lead the perturbed point, minus x."""
    w, v, wt = x, 0.0, x
    for _ in range(3):
        v = momentum * v + q.H @ (wt - q.c)
        w = w - rate * v
        wt = w - rho * unit(v)
    return wt - x


def lookbehind_step(q: Quadratic, x, *, rate, rho, alpha):
    """Displacement after three ascents and as many descents."""
    point, fast = x, x
    for _ in range(3):
        point = point + rho * unit(q.H @ (point - q.c))
        fast = fast - rate * q.H @ (point - q.c)
    return alpha * (fast - x)


def parallel_sam(q: Quadratic, x, *, rate, rho, lam):
    """Displacement of w after three updates."""
    w, y, before = x, x, None
    for _ in range(3):
        there = w if before is None else w + rho * unit(before)
        before = q.H @ (y - q.c)
        w = w - rate * ((1 - lam) * q.H @ (there - q.c) + lam * before)
        y = w - rate * before
    return w - x


def functional_sam_step(q: Quadratic, x, *, rate, rho):
    """Displacement for the output f and the loss f^2 / 2."""
    f, g = (x - q.c) @ q.H @ (x - q.c) / 2, q.H @ (x - q.c)
    return -rate * f * q.H @ (x + rho * unit(f * g) - q.c)


def unit(g):
    """g / ||g||."""
    return g / np.linalg.norm(g)


def across(g, to):
    """The part of g that is orthogonal to another vector."""
    return g - (g @ to) / (to @ to) * to


def asam_gradient(gradient, x, g):
    """With every entry a weight and eta = 0.3."""
    t = np.abs(x) + 0.3
    return gradient(x + 0.2 * t * unit(t * g))


def outlier_gradient(gradient, x, g):
    """With the entries above the median of the absolute z-scores."""
    z = np.abs((g - g.mean()) / g.std())
    return gradient(x + 0.2 * unit(g * (z > np.quantile(z, 0.5))))


METHODS = [
    sam_method("sam", lambda gradient, x, g: gradient(x + 0.2 * unit(g))),
    sam_method(
        "asam",
        asam_gradient,
        floats={"eta": 0.5},
        closed_form_arguments={"eta": 0.3, "weights": True},
        bad=[({"eta": -1.0}, ValueError, "`eta` must lie in")],
    ),
    sam_method(
        "gsam",
        lambda gradient, x, g: (
            gradient(x + 0.2 * unit(g)) - 0.7 * across(g, gradient(x + 0.2 * unit(g)))
        ),
        floats={"alpha": 0.1},
        closed_form_arguments={"alpha": 0.7},
        off={"rho": 0.0, "alpha": 3.0, "outer": optax.sgd(0.1, momentum=0.9)},
        bad=[({"alpha": -1.0}, ValueError, "`alpha` must lie in")],
    ),
    sam_method(
        "looksam",
        lambda gradient, x, g: look_sam(gradient, x, rate=0.3, rho=0.2, alpha=0.5),
        arguments={"period": 2},
        floats={"alpha": 0.1},
        closed_form_arguments={"period": 3, "alpha": 0.5},
        closed_form_updates=3,
        off={"rho": 0.0, "period": 1, "outer": optax.sgd(0.1, momentum=0.9)},
        late=("alpha",),
        ends_early=True,
        bad=[
            ({"alpha": -1.0}, ValueError, "`alpha` must lie in"),
            ({"period": 0}, ValueError, "`period` must be an int >= 1, got 0"),
        ],
    ),
    sam_method(
        "friendly_sam",
        lambda gradient, x, g: friendly_sam(gradient, x, rate=0.3, rho=0.2),
        floats={"sigma": 0.5, "decay": 0.3},
        closed_form_arguments={"sigma": 0.6, "decay": 0.7},
        closed_form_updates=3,
        late=("decay",),
        bad=[
            ({"sigma": -1.0}, ValueError, "`sigma` must lie in"),
            ({"decay": 1.5}, ValueError, "`decay` must lie in"),
        ],
    ),
    sam_method(
        "wsam",
        lambda gradient, x, g: g + 3.0 * (gradient(x + 0.2 * unit(g)) - g),
        arguments={"gamma": 0.4},
        floats={"gamma": 0.3},
        closed_form_arguments={"gamma": 0.75},
        bad=[
            ({"gamma": 1.0}, ValueError, r"`gamma` must lie in \[0, 1\), got 1"),
            ({"learning_rate": -1.0}, ValueError, "`learning_rate` must lie in"),
        ],
    ),
    sam_method(
        "gradient_norm_penalty",
        lambda gradient, x, g: 0.4 * g + 0.6 * gradient(x + 0.2 * unit(g)),
        floats={"alpha": 0.3},
        closed_form_arguments={"alpha": 0.6},
        bad=[({"alpha": -1.0}, ValueError, "`alpha` must lie in")],
    ),
    sam_method(
        "stable_sam",
        lambda gradient, x, g: np.linalg.norm(g) * unit(gradient(x + 0.2 * unit(g))),
    ),
    sam_method(
        "loss_equated_sam",
        lambda gradient, x, g: gradient(x + 0.4 * g / (g @ g)),
        arguments={"budget": 0.05, "rho": 0.08},
        floats={"rho": 0.01, "budget": 0.01},
        closed_form_arguments={"budget": 0.4, "rho": 10.0},
        bad=[({"budget": -1.0}, ValueError, "`budget` must lie in")],
    ),
    sam_method(
        "zsharp",
        outlier_gradient,
        arguments={"quantile": 0.5},
        closed_form_arguments={"quantile": 0.5},
        bad=[
            ({"quantile": 1.0}, ValueError, r"`quantile` must lie in \[0, 1\), got 1"),
            ({"quantile": "half"}, TypeError, "`quantile` must be a float"),
        ],
    ),
    sam_method(
        "ae_sam",
        lambda gradient, x, g: adaptive_sam(gradient, x, rate=0.3, rho=0.2),
        arguments={
            "outer": optax.chain(optax.clip_by_global_norm(3.0), optax.sgd(0.15)),
            "threshold": 0.5,
            "decay": 0.9,
        },
        floats={"threshold": 3.0, "decay": 0.05},
        closed_form_arguments={"threshold": 0.1, "decay": 0.9},
        closed_form_updates=3,
        ends_early=True,
        bad=[({"decay": 1.0}, ValueError, r"`decay` must lie in \[0, 1\), got 1")],
    ),
    Method(
        name="momentum_sam",
        arguments={"outer": optax.sgd(0.03, momentum=0.9), "rho": 0.1},
        floats={"rho": 0.3},
        noisy={},
        off={"rho": 0.0, "outer": optax.sgd(0.1, momentum=0.9)},
        off_is=optax.sgd(0.1, momentum=0.9),
        closed_form=lambda q, x: momentum_sam(q, x, rate=0.1, momentum=0.8, rho=0.4),
        closed_form_arguments={"outer": optax.sgd(0.1, momentum=0.8), "rho": 0.4},
        closed_form_updates=3,
        bad=[*SAM_BAD[:2], *SAM_BAD[3:]],
        length=1,
        of_length=None,
        keeps_floats=False,  # but the rounding of the params, in `offset`
        looks_ahead=True,
    ),
    Method(
        name="lookbehind_sam",
        arguments={"outer": optax.sgd(0.02, momentum=0.5), "rho": 0.05, "num_steps": 3},
        floats={"rho": 0.2, "alpha": 0.9},
        noisy={},
        off={
            "rho": 0.0,
            "alpha": 1.0,
            "num_steps": 1,
            "outer": optax.sgd(0.1, momentum=0.9),
        },
        off_is=optax.sgd(0.1, momentum=0.9),
        closed_form=lambda q, x: lookbehind_step(q, x, rate=0.1, rho=0.2, alpha=0.7),
        closed_form_arguments={"outer": optax.sgd(0.1), "rho": 0.2, "alpha": 0.7},
        bad=[
            *SAM_BAD[:2],
            *SAM_BAD[3:],
            ({"alpha": 0.0}, ValueError, r"`alpha` must lie in \(0, 1\], got 0"),
            ({"num_steps": 0}, ValueError, "`num_steps` must be an int >= 1, got 0"),
        ],
        length=4,
        off_length=2,
        of_length=lambda n: {"num_steps": n - 1},
    ),
    Method(
        name="sampa",
        arguments={"outer": optax.sgd(0.03, momentum=0.9), "rho": 0.1},
        floats={"rho": 0.3, "lam": 0.9},
        noisy={},
        # With lam = 0 and no radius the gradient at w alone counts.
        off={"rho": 0.0, "lam": 0.0, "outer": optax.sgd(0.1, momentum=0.9)},
        off_is=optax.sgd(0.1, momentum=0.9),
        closed_form=lambda q, x: parallel_sam(q, x, rate=0.1, rho=0.4, lam=0.3),
        closed_form_arguments={"outer": optax.sgd(0.1), "rho": 0.4, "lam": 0.3},
        closed_form_updates=3,
        bad=[
            *SAM_BAD[:2],
            *SAM_BAD[3:],
            ({"lam": 1.5}, ValueError, r"`lam` must lie in \[0, 1\], got 1.5"),
        ],
        length=2,
        off_length=2,
        of_length=None,
        keeps_floats=False,  # but the rounding of the params, in `offset`
        evaluated=True,
        looks_ahead=True,
    ),
    Method(
        name="functional_sam",
        arguments={"outer": optax.sgd(3e-3), "rho": 0.1},
        floats={"rho": 0.3},
        noisy={},
        off={"outer": optax.set_to_zero()},
        off_is=optax.set_to_zero(),
        closed_form=lambda q, x: functional_sam_step(q, x, rate=0.1, rho=0.4),
        closed_form_arguments={"outer": optax.sgd(0.1), "rho": 0.4},
        bad=[*SAM_BAD[:2], SAM_BAD[-1]],
        modes=FORWARD,
        length=1,
        keeps_floats=False,
    ),
    Method(
        name="local_entropy",
        shares_engine=True,
        arguments={
            "outer": optax.rmsprop(0.1, eps=1e-3),
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
            ({"nesterov": 2.0}, TypeError, "`nesterov` must be True or False, got"),
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
        shares_engine=True,
        arguments={"learning_rate": 0.05, "num_steps": 4, "noise": 0.0, "key": 0},
        floats=LOCAL_ENTROPY_FLOATS
        | {"learning_rate": 0.02, "b1": 0.8, "b2": 0.95, "eps": 1e-3},
        noisy={"noise": 0.02},
        off=LOCAL_ENTROPY_OFF,
        off_is=optax.chain(optax.scale(0.2), optax.adam(0.05)),
        closed_form=lambda q, x: -first_adam(gibbs_mean_step(q, x, **WALK), 0.05, 0.1),
        closed_form_arguments=NOISELESS | {"eps": 0.1},
        promotes_nothing=False,  # the bias correction of Optax's Adam does
        bad=[
            *LOCAL_ENTROPY_BAD,
            ({"b1": -0.1}, ValueError, r"`b1` must lie in \[0, 1\), got -0.1"),
            ({"b2": 1.0}, ValueError, r"`b2` must lie in \[0, 1\), got 1"),
            ({"eps": -1.0}, ValueError, "`eps` must lie in"),
        ],
    ),
    Method(
        # A single replica, which a center that lags behind holds back.
        name="parle",
        arguments={
            "learning_rate": 0.5,
            "coupling": 0.8,
            "center_step": 0.4,
            "num_steps": 4,
            "axis_name": None,
            "key": 0,
        },
        floats=LOCAL_ENTROPY_FLOATS
        | {"learning_rate": 0.7, "momentum": 0.5, "coupling": 0.3, "center_step": 0.9},
        noisy={"noise": 0.02},
        off=LOCAL_ENTROPY_OFF | {"coupling": 0.0},
        off_is=optax.sgd(0.5 * 0.2, momentum=0.9),
        closed_form=lambda q, x: elastic_steps(
            q,
            x,
            displacement=functools.partial(gibbs_mean_step, **WALK),
            rate=0.5,
            coupling=0.8,
            step=0.4,
            updates=3,
        ),
        closed_form_arguments=NOISELESS | {"momentum": 0.0, "scoping": 0.0},
        closed_form_updates=3,
        bad=[
            *LOCAL_ENTROPY_BAD,
            NEGATIVE_RATE,
            ({"coupling": -1.0}, ValueError, r"`coupling` must lie in \[0, inf\)"),
            ({"center_step": 0.0}, ValueError, r"`center_step` must lie in \(0, 1\]"),
        ],
        looks_ahead=True,
    ),
    Method(
        name="elastic_averaging",
        arguments={
            "outer": optax.sgd(0.1, momentum=0.9),
            "coupling": 0.8,
            "center_step": 0.4,
            "axis_name": None,
        },
        floats={"coupling": 0.3, "center_step": 0.9},
        noisy={},
        off={"coupling": 0.0},
        off_is=optax.sgd(0.1, momentum=0.9),
        closed_form=lambda q, x: elastic_steps(
            q,
            x,
            displacement=lambda q, x: q.H @ (x - q.c),
            rate=0.2,
            coupling=0.8,
            step=0.4,
            updates=3,
        ),
        closed_form_arguments={"outer": optax.sgd(0.2)},
        closed_form_updates=3,
        bad=[
            ({"outer": 0.1}, TypeError, "`outer` must be an optax"),
            ({"coupling": -1.0}, ValueError, r"`coupling` must lie in \[0, inf\)"),
            ({"center_step": 1.1}, ValueError, r"`center_step` must lie in \(0, 1\]"),
            ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be"),
        ],
        looks_ahead=True,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="coolmomentum",
        arguments={"learning_rate": 0.2, "momentum": 0.9, "weight_decay": 0.03},
        floats={"learning_rate": 0.3, "momentum": 0.5, "weight_decay": 0.1},
        noisy={},
        off={"momentum": 0.0, "weight_decay": 0.0},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: cooled_steps(
            q, x, learning_rate=0.1, momenta=[0.9, 0.8, 0.0], weight_decay=0.05
        ),
        closed_form_arguments={
            "learning_rate": 0.1,
            "momentum": lambda t: jnp.array([0.9, 0.8, 0.0])[t],
            "weight_decay": 0.05,
        },
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            (
                {"momentum": 1.1},
                ValueError,
                r"`momentum` must lie in \[0, 1\], got 1.1",
            ),
            ({"momentum": "0.9"}, TypeError, "`momentum` must be a float"),
            ({"weight_decay": -0.1}, ValueError, "`weight_decay` must lie in"),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="add_langevin_noise",
        shares_engine=True,
        arguments={"step_size": 0.1, "temperature": 0.02, "key": 0},
        floats={"step_size": 0.3, "temperature": 0.1},
        noisy={"temperature": 0.05, "noise_kind": "rademacher"},
        off={"temperature": 0.0},
        off_is=optax.identity(),
        closed_form=lambda q, x: (
            q.H @ (x - q.c) + np.sqrt(2 * 0.1 * 0.3) * normals(x, 1)[0]
        ),
        closed_form_arguments={"step_size": 0.1, "temperature": 0.3},
        bad=[
            *LANGEVIN_BAD,
            ({"step_size": -0.1}, ValueError, "`step_size` must lie in"),
        ],
        keeps_floats=False,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="sgld",
        arguments={"learning_rate": 0.1, "temperature": 0.0, "key": 0},
        floats={"learning_rate": 0.3, "temperature": 0.1},
        noisy={"temperature": 0.05},
        off={"temperature": 0.0},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: langevin_steps(
            q, x, rate=0.1, temperature=0.3, friction=1.0, updates=3
        ),
        closed_form_arguments={"temperature": 0.3},
        closed_form_updates=3,
        bad=[*LANGEVIN_BAD, NEGATIVE_RATE],
        keeps_floats=False,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="psgld",
        arguments={"learning_rate": 0.1, "temperature": 0.0, "eps": 0.1, "key": 0},
        floats={"learning_rate": 0.3, "temperature": 0.1, "decay": 0.9, "eps": 0.5},
        noisy={"temperature": 0.05},
        off={"temperature": 0.0},
        off_is=optax.rmsprop(0.1, decay=0.99, eps=0.1, eps_in_sqrt=False),
        closed_form=lambda q, x: rms_langevin_step(
            q, x, rate=0.1, temperature=0.3, decay=0.8, eps=0.2
        ),
        closed_form_arguments={"temperature": 0.3, "decay": 0.8, "eps": 0.2},
        bad=[
            *LANGEVIN_BAD,
            NEGATIVE_RATE,
            ({"decay": 1.0}, ValueError, r"`decay` must lie in \[0, 1\), got 1"),
            ({"eps": 0.0}, ValueError, r"`eps` must lie in \(0, inf\), got 0"),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="sghmc",
        arguments={"learning_rate": 0.1, "temperature": 0.0, "key": 0},
        floats={"learning_rate": 0.3, "temperature": 0.1, "friction": 0.6},
        noisy={"temperature": 0.05},
        off={"temperature": 0.0, "friction": 0.1},
        off_is=optax.sgd(0.1, momentum=0.9),
        closed_form=lambda q, x: langevin_steps(
            q, x, rate=0.1, temperature=0.3, friction=0.4, updates=3
        ),
        closed_form_arguments={"temperature": 0.3, "friction": 0.4},
        closed_form_updates=3,
        bad=[
            *LANGEVIN_BAD,
            NEGATIVE_RATE,
            (
                {"friction": 1.1},
                ValueError,
                r"`friction` must lie in \[0, 1\], got 1.1",
            ),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="entropy_mcmc",
        arguments={
            "learning_rate": 0.1,
            "temperature": 0.0,
            "gamma": 0.8,
            "weight_decay": 0.02,
            "key": 0,
        },
        floats={
            "learning_rate": 0.3,
            "temperature": 0.1,
            "gamma": 0.3,
            "weight_decay": 0.1,
        },
        noisy={"temperature": 0.05},
        off={"gamma": 0.0, "weight_decay": 0.0, "temperature": 0.03},
        off_is=optax_flat.sgld(0.1, 0.03, key=0),
        closed_form=lambda q, x: anchored_steps(
            q, x, rate=0.1, temperature=0.3, gamma=0.8, decay=0.02, updates=3
        ),
        closed_form_arguments={"temperature": 0.3},
        closed_form_updates=3,
        bad=[
            *LANGEVIN_BAD,
            NEGATIVE_RATE,
            ({"gamma": -1.0}, ValueError, r"`gamma` must lie in \[0, inf\), got -1"),
            ({"weight_decay": -1.0}, ValueError, "`weight_decay` must lie in"),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="anti_pgd",
        arguments={"learning_rate": 0.1, "noise": 0.0, "key": 0},
        floats={"learning_rate": 0.3, "noise": 0.1},
        noisy={"noise": 0.05},
        off={"noise": 0.0},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: anticorrelated_steps(
            q, x, rate=0.1, noise=0.3, updates=3
        ),
        closed_form_arguments={"noise": 0.3, "noise_kind": "rademacher"},
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            ({"noise": -1.0}, ValueError, r"`noise` must lie in \[0, inf\), got -1"),
            ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of"),
            ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
        ],
        keeps_floats=False,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="ivon",
        arguments={
            "learning_rate": 0.1,
            "ess": 50.0,
            "hess_init": 0.5,
            "b2": 0.9,
            "weight_decay": 0.05,
            "num_samples": 4,
            "key": 0,
        },
        floats={
            "learning_rate": 0.3,
            "ess": 20.0,
            "b1": 0.5,
            "b2": 0.5,
            "weight_decay": 0.2,
        },
        noisy={"ess": 30.0},
        off={"ess": 1e20, "b2": 1.0, "num_samples": 1},
        off_is=optax.chain(
            optax.ema(0.9), optax.add_decayed_weights(0.05), optax.scale(-0.1)
        ),
        closed_form=lambda q, x: ivon_steps(
            q,
            x,
            rate=0.1,
            ess=7.0,
            h0=0.5,
            b1=0.9,
            b2=0.9,
            decay=0.05,
            samples=4,
            updates=3,
        ),
        closed_form_arguments={"ess": 7.0},
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            ({"ess": 0.0}, ValueError, r"`ess` must lie in \(0, inf\), got 0"),
            ({"hess_init": 0.0}, ValueError, r"`hess_init` must lie in \(0, inf\)"),
            (
                {"hess_init": optax.constant_schedule(1.0)},
                TypeError,
                "`hess_init` is read once, .* Give a float > 0",
            ),
            ({"b1": 1.0}, ValueError, r"`b1` must lie in \[0, 1\), got 1"),
            ({"b2": 1.1}, ValueError, r"`b2` must lie in \[0, 1\], got 1.1"),
            ({"weight_decay": -1.0}, ValueError, "`weight_decay` must lie in"),
            ({"num_samples": 0}, ValueError, "`num_samples` must be an int >= 1"),
            ({"rescale_lr": 2.0}, TypeError, "`rescale_lr` must be True or False"),
            ({"debias": 2.0}, TypeError, "`debias` must be True or False"),
            ({"clip_radius": 0.0}, ValueError, r"`clip_radius` must lie in \(0, inf"),
            ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of"),
            ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be"),
            ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
        ],
        looks_ahead=True,
        keeps_floats=False,  # the rounding of the params is in all of them
        of_length=lambda n: {"num_samples": n},
    ),
    Method(
        name="bsam",
        arguments={
            "learning_rate": 0.1,
            "num_data": 50.0,
            "rho": 0.05,
            "b2": 0.9,
            "weight_decay": 0.05,
            "num_shards": 2,
            "key": 0,
        },
        floats={
            "learning_rate": 0.3,
            "num_data": 20.0,
            "rho": 0.2,
            "b1": 0.5,
            "b2": 0.5,
            "weight_decay": 0.2,
            "damping": 0.5,
        },
        noisy={"num_data": 30.0},
        late=("b2", "damping"),  # the old s divides
        off={"num_data": 1e20, "rho": 0.0, "b2": 1.0, "num_shards": 1},
        off_is=optax.chain(
            optax.add_decayed_weights(0.05),
            optax.ema(0.9, debias=False),
            optax.scale(-0.1),
        ),
        off_length=2,
        closed_form=lambda q, x: bsam_steps(
            q,
            x,
            rate=0.1,
            size=7.0,
            rho=0.3,
            b1=0.9,
            b2=0.9,
            decay=0.05,
            damping=0.1,
            s0=0.8,
            shards=2,
            updates=3,
        ),
        closed_form_arguments={"num_data": 7.0, "rho": 0.3, "s_init": 0.8},
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            ({"num_data": 0.0}, ValueError, r"`num_data` must lie in \(0, inf\)"),
            ({"rho": -1.0}, ValueError, r"`rho` must lie in \[0, inf\), got -1"),
            ({"b1": 1.0}, ValueError, r"`b1` must lie in \[0, 1\), got 1"),
            ({"b2": 1.1}, ValueError, r"`b2` must lie in \[0, 1\], got 1.1"),
            ({"weight_decay": -1.0}, ValueError, "`weight_decay` must lie in"),
            ({"damping": -1.0}, ValueError, "`damping` must lie in"),
            ({"s_init": 0.0}, ValueError, r"`s_init` must lie in \(0, inf\), got 0"),
            ({"num_shards": 0}, ValueError, "`num_shards` must be an int >= 1"),
            ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of"),
            ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be"),
            ({"key": None}, ValueError, "`key` must be one typed key .* got None"),
        ],
        looks_ahead=True,
        keeps_floats=False,  # the rounding of the params is in all of them
        of_length=lambda n: {"num_shards": n // 2},
    ),
    Method(
        name="perturbation_gradient",
        arguments={
            "outer": optax.sgd(3e-3),
            "ensemble_size": 4,
            "spread": 0.3,
            "key": 0,
        },
        floats={},
        noisy={"ensemble_size": 4},
        off={"outer": optax.set_to_zero()},
        off_is=optax.set_to_zero(),
        closed_form=lambda q, x: -0.1 * projected_gradient(q, x, 3, 0.2),
        closed_form_arguments={
            "outer": optax.sgd(0.1),
            "ensemble_size": 3,
            "spread": 0.2,
            "noise_kind": "normal",
        },
        bad=[
            *ENSEMBLE_BAD,
            ({"antithetic": -1.0}, TypeError, "`antithetic` must be True or False"),
            ({"outer": 0.1}, TypeError, "`outer` must be an optax"),
            ({"noise_kind": "uniform"}, ValueError, "`noise_kind` must be one of"),
            ({"batch_size": 3}, ValueError, "`batch_size` must divide .* 4, got 3"),
        ],
        modes=FORWARD,
        length=1,
        keeps_floats=False,
    ),
    Method(
        name="ensemble_kalman",
        arguments={
            "step_size": 0.2,
            "ensemble_size": 4,
            "spread": 0.1,
            "key": 0,
            "eps": 0.1,
            "momentum": 0.5,
            "output_noise": 0.1,
        },
        floats={"step_size": 0.5, "eps": 1.0, "momentum": 0.9, "output_noise": 0.3},
        noisy={"ensemble_size": 4},
        off={"step_size": 0.0, "momentum": 0.0},
        off_is=optax.set_to_zero(),
        closed_form=lambda q, x: ensemble_steps(q, x, 3, 0.3, 0.5, 5, 0.4),
        closed_form_arguments={
            "step_size": 0.3,
            "eps": 0.5,
            "ensemble_size": 5,
            "spread": 0.4,
            "output_noise": 0.0,
            "momentum": 0.0,
        },
        closed_form_updates=3,
        bad=[
            *ENSEMBLE_BAD,
            ({"output_axis_name": 2.0}, TypeError, "`output_axis_name` must be the"),
            ({"step_size": -1.0}, ValueError, "`step_size` must lie in"),
            ({"eps": -1.0}, ValueError, "`eps` must lie in"),
            ({"momentum": 1.5}, ValueError, r"`momentum` must lie in \[0, 1\]"),
            ({"output_noise": -1.0}, ValueError, "`output_noise` must lie in"),
            ({"resample": 0}, ValueError, "`resample` must be an int >= 1, got 0"),
            ({"batch_size": 3}, ValueError, "`batch_size` must divide .* 4, got 3"),
            ({"noise_covariance": -1.0}, ValueError, "`noise_covariance` must be"),
            ({"sharding": "members"}, TypeError, "`sharding` must be a NamedSharding"),
        ],
        modes=FORWARD,
        length=1,
        keeps_floats=False,
    ),
    Method(
        name="multipoint_nesterov",
        arguments={"learning_rate": 0.05, "momentum": 0.8, "nodes": "four"},
        floats={"learning_rate": 0.1, "momentum": 0.5},
        noisy={},
        off={"nodes": (1.0,), "weights": None},
        off_is=optax.sgd(0.05, 0.8, nesterov=True),
        closed_form=lambda q, x: look_ahead_steps(
            q,
            x,
            rate=0.1,
            momenta=[0.9, 0.8, 0.7, 0.5],
            nodes=[0.4, 0.1, 1.0, 0.7],
            weights=[0.5, 0.1, 0.1, 0.3],
        ),
        closed_form_arguments={
            "learning_rate": 0.1,
            "momentum": lambda t: jnp.array([0.9, 0.8, 0.7, 0.5])[t],
            "nodes": (0.4, 0.1, 1.0, 0.7),
            "weights": (0.5, 0.1, 0.1, 0.3),
        },
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            ({"momentum": 1.5}, ValueError, r"`momentum` must lie in \[0, 1\]"),
            ({"nodes": ()}, ValueError, r"`nodes` must be one or more .* \(0, 1\]"),
            ({"nodes": (0.0, 1.0)}, ValueError, r"`nodes` .* in \(0, 1\], got \(0.0"),
            ({"nodes": (0.5, 1.1)}, ValueError, r"`nodes` .* in \(0, 1\], got"),
            ({"nodes": 0.5}, TypeError, "`nodes` must be a sequence of floats"),
            ({"nodes": "fifths"}, ValueError, "`nodes` must be one of 'thirds'"),
            ({"weights": (1.0,)}, ValueError, "`weights` belong to the rule nodes="),
            (
                {"nodes": (0.5, 1.0), "weights": (1.0,)},
                ValueError,
                "`weights` must be one number for each of the 2 nodes, got 1",
            ),
            (
                {"nodes": (0.5, 1.0), "weights": (0.5, 0.6)},
                ValueError,
                "`weights` must be finite and sum to 1, got .* with sum 1.1",
            ),
            (
                {"nodes": (0.5, 1.0), "weights": (float("nan"), 1.0)},
                ValueError,
                r"`weights\[0\]` must lie in .* got nan",
            ),
            ({"nodes": ("0.5", 1.0)}, TypeError, r"`nodes\[0\]` must be a float"),
            ({"accumulator_dtype": int}, TypeError, "`accumulator_dtype` must be"),
        ],
        looks_ahead=True,
        keeps_floats=False,  # but the rounding of the params
        of_length=lambda n: {"nodes": tuple((i + 1) / n for i in range(n))},
    ),
    Method(
        name="adagrad",
        arguments={"learning_rate": 0.1, "eps": 0.01, "power": 0.5},
        floats={"learning_rate": 0.3, "eps": 0.5, "power": 0.8},
        noisy={},
        off={"eps_in_sqrt": True, "initial_accumulator_value": 0.1, "eps": 0.01},
        off_is=optax.adagrad(0.1, initial_accumulator_value=0.1, eps=0.01),
        closed_form=lambda q, x: (
            -0.2 * (q.H @ (x - q.c)) / ((0.3 + (q.H @ (x - q.c)) ** 2) ** 0.7 + 0.1)
        ),
        closed_form_arguments={
            "learning_rate": 0.2,
            "eps": 0.1,
            "power": 0.7,
            "initial_accumulator_value": 0.3,
        },
        bad=[
            NEGATIVE_RATE,
            ({"eps": -1.0}, ValueError, "`eps` must lie in"),
            ({"power": -1.0}, ValueError, "`power` must lie in"),
            (
                {"initial_accumulator_value": -1.0},
                ValueError,
                "`initial_accumulator_value` must lie in",
            ),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="adadelta",
        arguments={"learning_rate": 0.5, "eps": 1e-3, "initial_update": 0.5},
        floats={"learning_rate": 0.7, "decay": 0.5, "eps": 0.1},
        noisy={},
        off={"initial_update": 0.0},
        off_is=optax.adadelta(0.5, rho=0.9, eps=1e-3),
        closed_form=lambda q, x: adadelta_steps(q, x, 0.2, 0.8, 0.01, 3.0, 3),
        closed_form_arguments={
            "learning_rate": 0.2,
            "decay": 0.8,
            "eps": 0.01,
            "initial_update": 3.0,
        },
        closed_form_updates=3,
        bad=[
            NEGATIVE_RATE,
            ({"decay": 1.0}, ValueError, r"`decay` must lie in \[0, 1\), got 1"),
            ({"eps": 0.0}, ValueError, r"`eps` must lie in \(0, inf\), got 0"),
            ({"initial_update": -1.0}, ValueError, "`initial_update` must lie in"),
        ],
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="clip_by_leaf_norm",
        arguments={"max_norm": 0.5},
        floats={"max_norm": 0.2},
        noisy={},
        off={"max_norm": 1e30},
        off_is=optax.identity(),
        closed_form=lambda q, x: (
            0.7 * q.H @ (x - q.c) / np.linalg.norm(q.H @ (x - q.c))
        ),
        closed_form_arguments={"max_norm": 0.7},
        bad=[({"max_norm": -1.0}, ValueError, "`max_norm` must lie in")],
        keeps_floats=False,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="scale_by_loss_slope",
        arguments={"patience": 3, "factor": 0.5},
        floats={"factor": 0.2, "min_scale": 0.9},
        noisy={},
        off={"factor": 1.0},
        off_is=optax.identity(),
        closed_form=lambda q, x: slope_scaled_steps(q, x, 0.3),
        closed_form_arguments={"patience": 3, "factor": 0.3},
        closed_form_updates=3,
        bad=[
            ({"patience": 2}, ValueError, "`patience` must be an int >= 3, got 2"),
            ({"factor": 0.0}, ValueError, r"`factor` must lie in \(0, 1\], got 0"),
            ({"min_scale": 2.0}, ValueError, r"`min_scale` must lie in \[0, 1\]"),
        ],
        keeps_floats=False,
        modes=PLAIN,
        length=1,
    ),
    Method(
        name="swa",
        arguments={"inner": optax.sgd(0.1), "start": 1},
        floats={},
        off={"start": 1000},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: mean_descent(q, x, 0.2, [0, 1, 0, 1, 0]),
        closed_form_arguments={"inner": optax.sgd(0.2), "start": 1, "period": 2},
        closed_form_updates=5,
        bad=[
            *AVERAGING_BAD,
            ({"start": -1}, ValueError, "`start` must be an int >= 0, got -1"),
            ({"start": 1.0}, TypeError, "`start` must be a Python int .* got 1.0"),
            ({"period": 0}, ValueError, "`period` must be an int >= 1, got 0"),
        ],
        **AVERAGING,
    ),
    Method(
        name="ema_weights",
        shares_engine=True,
        arguments={"inner": optax.sgd(0.1), "decay": 0.5},
        floats={"decay": 0.8},
        off={"decay": 0.0},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: mean_descent(q, x, 0.2, [0.49, 0.7, 1]),
        closed_form_arguments={"inner": optax.sgd(0.2), "decay": 0.7},
        closed_form_updates=3,
        bad=[
            *AVERAGING_BAD,
            ({"decay": 1.0}, ValueError, r"`decay` must lie in \[0, 1\), got 1"),
            ({"debias": 1.0}, TypeError, "`debias` must be True or False"),
        ],
        **AVERAGING,
    ),
    Method(
        name="lawa",
        arguments={"inner": optax.sgd(0.1), "k": 2},
        floats={},
        off={"k": 1},
        off_is=optax.sgd(0.1),
        closed_form=lambda q, x: mean_descent(q, x, 0.2, [0, 0, 0, 1, 0, 1, 0, 1, 0]),
        closed_form_arguments={"inner": optax.sgd(0.2), "k": 3, "period": 2},
        closed_form_updates=9,
        bad=[
            *AVERAGING_BAD,
            ({"k": 0}, ValueError, "`k` must be an int >= 1, got 0"),
            ({"k": 2.0}, TypeError, "`k` must be a Python int .* got 2.0"),
            ({"period": 0}, ValueError, "`period` must be an int >= 1, got 0"),
        ],
        **AVERAGING,
    ),
]


@functools.cache
def _make(name: str, overrides: tuple) -> optax.GradientTransformationExtraArgs:
    # One object for all tests means one compilation of its update.
    method = next(method for method in METHODS if method.name == name)
    return method.factory(**method.arguments | {k: v for k, v, _ in overrides})
