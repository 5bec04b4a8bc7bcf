r"""Test surfaces with known minima, and gradient signals, to try optimizers on.

Every surface is a `Problem`: a function of one point in `jax.numpy` with a start, a
window to draw and its minima. `SURFACES` has those in two dimensions by name; the six
in `ARTICLE` and the signals are those of the Habr article "Neural network optimization
methods". Importing this module runs nothing on a device.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_flat._core import checks


class Problem(NamedTuple):
    """A function to minimise, with all that a test or a picture of it needs.

    The function keeps the dtype of its argument. The arrays are read-only.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_flat.problems import himmelblau
      >>> gradient = jax.grad(himmelblau.function)
      >>> bool(jnp.abs(gradient(jnp.asarray(himmelblau.minima[1]))).max() < 1e-3)
      True
      >>> himmelblau.hessians().shape
      (4, 2, 2)
    """

    name: str  # what it is called in this module
    function: Callable[[jax.Array], jax.Array]  # [d] -> []
    start: np.ndarray  # [d]
    bounds: np.ndarray  # [d, 2], low and high of the window to draw
    minima: np.ndarray  # [m, d], the known ones inside the window, global ones first

    def values(self) -> jax.Array:
        """The function at the minima, [m]."""
        return jax.vmap(self.function)(jnp.asarray(self.minima))

    def hessians(self) -> jax.Array:
        """The second derivatives at the minima, [m, d, d]."""
        return jax.vmap(jax.hessian(self.function))(jnp.asarray(self.minima))


def _problem(function, start, bounds, minima):
    """Freezes the arrays, which all users share."""
    arrays = [np.array(x, np.float64) for x in (start, bounds, minima)]
    for array in arrays:
        array.setflags(write=False)
    return Problem(function.__name__.removeprefix("_"), function, *arrays)


def _square(low, high):
    return [[low, high], [low, high]]


# The article starts every run here and draws [-3, 3] x [-3, 3].
_START = (-2.8, -2.5)


def _wobbly(point):
    x, y = point
    bowl = (x**2 + y**2) / 3 + jnp.abs(x) * jnp.sqrt(jnp.abs(x) + 0.1)
    hill = 8 * jnp.exp(-2 * ((x + 1) ** 2 + (y + 2) ** 2))
    return bowl + 3 * jnp.sin(x + y) + 3 + hill


wobbly = _problem(
    _wobbly,
    start=_START,
    bounds=_square(-3.5, 3.5),  # wider than the article's, to hold the second minimum
    minima=[
        (-0.17242094376299932, -0.9063018409018627),
        (0.8960932762420434, 3.066546978232645),
    ],
)
"""A bowl with a crease along x = 0, oblique waves and a hill beside the start."""


def _basins_and_walls(point):
    x, y = point
    return (x**2 + y**2) / 2 + jnp.sin(4 * x) ** 2


_WELLS = (0.7614565322721501, 1.5220040759402682, 2.28036728849271)
basins_and_walls = _problem(
    _basins_and_walls,
    start=_START,
    bounds=_square(-3, 3),
    minima=[(0, 0), *((sign * x, 0) for x in _WELLS for sign in (-1, 1))],
)
"""Parallel valleys with walls between them, the deepest in the middle."""


def _ripple(point):
    x, y = point
    waves = jnp.sin(20 * x) ** 2 + jnp.sin(20 * y) ** 2
    return (x**2 + y**2) / 3 + waves / 15


ripple = _problem(
    _ripple,
    start=_START,
    bounds=_square(-3, 3),
    minima=[
        (0, 0),
        (-0.15513845202440735, 0),
        (0.15513845202440735, 0),
        (0, -0.15513845202440735),
        (0, 0.15513845202440735),
    ],
)
"""A bowl under fine ripples; of its many minima the five lowest are listed."""


def _giant_plateau(point):
    x, y = point
    return 4 * (1 - jnp.exp(-(x**2 + y**2)))


giant_plateau = _problem(
    _giant_plateau, start=_START, bounds=_square(-3, 3), minima=[(0, 0)]
)
"""One pit in a plateau; the gradient at the start is only 2e-5."""


def _hills_and_canyon(point):
    x, y = point
    hills = (
        3 * jnp.exp(-((x + 1) ** 2 + (y + 2) ** 2))
        + jnp.exp(-1.5 * (2 * (x + 2) ** 2 + (y - 0.5) ** 2))
        + 3 * jnp.exp(-1.5 * ((x - 1) ** 2 + 2 * (y + 1.5) ** 2))
        + 1.5 * jnp.exp(-((x + 1.5) ** 2 + 3 * (y + 0.5) ** 2))
    )
    return (x**2 + y**2) / 3 + hills + 4 * (1 - jnp.exp(-((x + y) ** 2)))


hills_and_canyon = _problem(
    _hills_and_canyon,
    start=_START,
    bounds=_square(-3, 3),
    minima=[
        (-0.04041944691066243, 0.07197372849804837),
        (1.9291459356955831, -1.9214576920479252),
        (-2.0341939933736306, -1.0818787630063285),
    ],
)
"""Four hills around a canyon along x + y = 0."""


def _two_minimums(point):
    x, y = point
    shallow = 0.5 * jnp.exp(-((x + 2.5) ** 2 + (y + 2.5) ** 2))
    return 4 - shallow - 3 * jnp.exp(-(x**2 + y**2))


two_minimums = _problem(
    _two_minimums,
    start=_START,
    bounds=_square(-3, 3),
    minima=[
        (-1.5527953021231566e-06, -1.5527953021231566e-06),
        (-2.499944070180304, -2.499944070180304),
    ],
)
"""A deep pit, and a shallow one in which the start lies."""


def _rosenbrock(point):
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


rosenbrock = _problem(
    _rosenbrock, start=(-1.2, 1), bounds=[(-2, 2), (-1, 3)], minima=[(1, 1)]
)
"""A bent, narrow valley with a nearly flat floor."""


def _beale(point):
    x, y = point
    return (
        (1.5 - x + x * y) ** 2
        + (2.25 - x + x * y**2) ** 2
        + (2.625 - x + x * y**3) ** 2
    )


beale = _problem(_beale, start=(1, 1), bounds=_square(-4.5, 4.5), minima=[(3, 0.5)])
"""A flat floor between corners that rise to 2e5."""


def _himmelblau(point):
    x, y = point
    return (x**2 + y - 11) ** 2 + (x + y**2 - 7) ** 2


himmelblau = _problem(
    _himmelblau,
    start=(0, 0),
    bounds=_square(-5, 5),
    minima=[
        (3, 2),
        (3.5844283403304917, -1.8481265269644036),
        (-3.779310253377747, -3.2831859912861696),
        (-2.805118086952745, 3.131312518250573),
    ],
)
"""Four minima, all of value 0 and of different curvature."""


def _rastrigin(point):
    x, y = point
    waves = jnp.cos(2 * np.pi * x) + jnp.cos(2 * np.pi * y)
    return 20 + x**2 + y**2 - 10 * waves


rastrigin = _problem(
    _rastrigin,
    start=(-3.2, 2.8),
    bounds=_square(-5.12, 5.12),
    minima=[
        (0, 0),
        (-0.9949586376523348, 0),
        (0.9949586376523348, 0),
        (0, -0.9949586376523348),
        (0, 0.9949586376523348),
    ],
)
"""A bowl of deep waves; of its many minima the five lowest are listed."""


def _wide_and_narrow(point):
    x, y = point
    wide = ((x - 1.5) ** 2 + (y - 1) ** 2) / 2
    narrow = 20 * ((x + 1) ** 2 + (y + 1) ** 2) - 0.2
    return -0.1 * jnp.logaddexp(-10 * narrow, -10 * wide)


wide_and_narrow = _problem(
    _wide_and_narrow,
    start=(-2.5, -2.5),
    bounds=_square(-3, 3),
    minima=[(-1, -1), (1.5, 1)],
)
r"""A wide valley, and on the way to it a narrow, deeper hole: for flat-minima methods.

.. math::
    f = -T \log\left(e^{-q_n / T} + e^{-q_w / T}\right), \quad T = 0.1, \quad
    q_n = 20 |x - (-1, -1)|^2 - 0.2, \quad q_w = \tfrac{1}{2} |x - (1.5, 1)|^2

Gradient descent from the start, with a rate up to 0.045, falls into the hole; a method
that averages the loss or its gradient over a neighbourhood as wide as the hole (radius
0.5) passes over it into the valley. To double precision the minima are the two centres,
with values -0.2 and 0 and Hessians 40 and 1 times the identity. At temperature 0.1 the
density exp(-f / 0.1) is a mixture of two normal distributions, of which the valley has
the share :math:`1 / (1 + e^2 / 40) = 0.844`: samplers and local entropy prefer it too.
"""


# Rows are the eigenvectors: the reflection that takes (1, 2, 3, 4) to its negative.
_AXES = np.eye(4) - np.outer([1, 2, 3, 4], [1, 2, 3, 4]) / 15
_CURVATURE = _AXES.T @ np.diag([1.0, 4.0, 15.0, 60.0]) @ _AXES
_CENTRE = np.array([1.0, -0.5, 2.0, 0.25])


def _skewed_quadratic(point):
    offset = point - jnp.asarray(_CENTRE, point.dtype)
    return offset @ jnp.asarray(_CURVATURE, point.dtype) @ offset / 2


skewed_quadratic = _problem(
    _skewed_quadratic,
    start=(-1, 1.5, 0, -2),
    bounds=[(-3, 3)] * 4,
    minima=[_CENTRE],
)
"""Half a quadratic form in four dimensions, off the origin and oblique to the axes.

Its Hessian has the eigenvalues 1, 4, 15 and 60. The density exp(-f) is normal with the
inverse of the Hessian as covariance.
"""


SURFACES: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        wobbly,
        basins_and_walls,
        ripple,
        giant_plateau,
        hills_and_canyon,
        two_minimums,
        rosenbrock,
        beale,
        himmelblau,
        rastrigin,
        wide_and_narrow,
    )
}
"""The problems in two dimensions by name."""

ARTICLE = tuple(SURFACES)[:6]
"""The names of the article's surfaces."""


def signals(length: int = 300, *, key: jax.Array | int) -> dict[str, jax.Array]:
    r"""Six gradients of one parameter over time, to see how a rule responds to them.

    With t = 0, 1, ..., `length` - 1, square brackets 1 where true and 0 elsewhere, and
    U uniform on [-0.5, 0.5), drawn anew for every t and either signal:

    .. math::
        \begin{align*}
        \text{spikes} &= [t \bmod 60 = 0] \\
        \text{rectangles} &= 2 [t \bmod 40 < 20] - 1 \\
        \text{saturation} &= [t \bmod 80 < 40] \\
        \text{noisy\_sin} &= \sin(t / 20) + U \\
        \text{very\_noisy\_sin} &= \sin(t / 20) / 5 + U \\
        \text{uneven\_sawtooth} &= (t \bmod 20) / (15 [t > 80] + 5)
        \end{align*}

    Args:
      length: number of steps, >= 1.
      key: for the two noisy signals, which get independent parts of it.

    Returns:
      The signals by name, each [length], in the default float dtype.

    Raises:
      ValueError: `length` below 1, or `key` not one key.
      TypeError: `length` not an int.

    Example:
      Momentum 0.9 makes ten steps of a gradient that keeps its sign:

      >>> import jax, optax
      >>> from optax_flat.problems import signals
      >>> rule = optax.trace(0.9)
      >>> gradient = signals(key=0)["saturation"]
      >>> _, steps = jax.lax.scan(
      ...     lambda state, g: rule.update(g, state)[::-1], rule.init(gradient[0]),
      ...     gradient)
      >>> bool(9.8 < steps.max() < 10)
      True

    References:
      "Neural network optimization methods", an article on Habr.
    """
    length = checks.integer("length", length, 1)
    key, other = jax.random.split(checks.key(key))
    t = np.arange(length)
    noise, other_noise = (
        jax.random.uniform(k, [length], float, -0.5, 0.5) for k in (key, other)
    )
    return {
        "spikes": jnp.asarray(t % 60 == 0, float),
        "rectangles": jnp.asarray(2 * (t % 40 < 20) - 1, float),
        "noisy_sin": jnp.asarray(np.sin(t / 20)) + noise,
        "very_noisy_sin": jnp.asarray(np.sin(t / 20) / 5) + other_noise,
        "uneven_sawtooth": jnp.asarray((t % 20) / (15 * (t > 80) + 5)),
        "saturation": jnp.asarray(t % 80 < 40, float),
    }
