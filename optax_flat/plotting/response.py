"""How an optimizer answers a sequence of gradients."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from optax_flat._core import checks
from optax_flat.plotting import _figure
from optax_flat.plotting._runs import positions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def responses(tx: optax.GradientTransformation, signal: ArrayLike) -> jax.Array:
    r"""The steps that an optimizer makes when a signal is its gradient.

    .. math::
        v_t = \theta_t - \theta_{t+1}, \qquad \theta_0 = 0,
        \qquad \text{gradient}_t = s_t

    with one parameter :math:`\theta` and :math:`s_t` = `signal`: the loss is
    :math:`s_t \theta`, whose gradient is the same wherever the optimizer looks. The
    steps are differences of positions and carry the rounding of these. A walk of L
    gradients answers at every L-th of them, in both modes, and is 0 in between.

    Args:
      tx: any optimizer; one without gradients is given the loss.
      signal: the gradients, [T].

    Returns:
      The steps downhill, minus the updates, [T], in the signal's dtype (at least the
      default floating-point one).

    Raises:
      TypeError: `tx` is not a gradient transformation.
      ValueError: the signal is not of shape [T] with T >= 1, or shorter than a walk.

    Example:
      Momentum goes on after the gradient has stopped:

      >>> import jax.numpy as jnp, optax
      >>> from optax_flat.plotting import responses
      >>> tx = optax.sgd(1.0, momentum=0.5)
      >>> responses(tx, jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
      [1.0, 0.5, 0.25, 0.125]
    """
    checks.transformation("tx", tx)
    gradients = _signal("signal", signal)
    start = jnp.zeros([], gradients.dtype)
    keys = jax.random.key(0)[None]
    stands = positions(tx, _parameter, start, gradients, keys)[0]
    return -jnp.diff(stands)


def gradient_response(
    transforms: Mapping[
        str, optax.GradientTransformation | Callable[[jax.Array], Any]
    ],
    signals: Mapping[str, ArrayLike],
    *,
    columns: int = 2,
) -> "Figure":
    """Draws the steps of optimizers above the signals that they get as gradients.

    A panel per signal: above the steps, one line per optimizer, see `responses`; below
    the signal, in grey. All panels share the colours and line styles of the legend.

    Args:
      transforms: optimizers by name; or functions ``signal -> optimizer``, which make
        one for each signal, such as a rule that reads the signal ahead.
      signals: gradients by name, each [T]; lengths may differ.
      columns: panels side by side, >= 1.

    Returns:
      A figure, 4 inches per column, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: not mappings, or a value that is not a gradient transformation.
      ValueError: an empty mapping, or a signal that is not of shape [T].
      ImportError: matplotlib is missing: ``pip install 'optax_flat[plot]'``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from optax_flat.plotting import gradient_response
      >>> t = jnp.arange(100)
      >>> figure = gradient_response(
      ...     {"SGD": optax.sgd(0.1), "Adam": optax.adam(0.1)},
      ...     {"wave": jnp.sin(t / 10), "switch": jnp.where(t % 40 < 20, 1.0, -1.0)})
      >>> [axes.get_title() for axes in figure.axes[::2]]
      ['wave', 'switch']
    """
    _figure.check_names("transforms", transforms, "optimizers")
    _figure.check_names("signals", signals, "arrays [T]")
    columns = min(checks.integer("columns", columns, 1), len(signals))
    gradients = {k: _signal(f"signals[{k!r}]", v) for k, v in signals.items()}
    for name, source in transforms.items():
        tx = _made(source, next(iter(gradients.values())))
        checks.transformation(f"transforms[{name!r}]", tx)

    rows = math.ceil(len(signals) / columns)
    figure = _figure.new_figure(4 * columns, 0.4 + 2.9 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    lines = []
    for i, (name, signal) in enumerate(gradients.items()):
        row, column = divmod(i, columns)
        above = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        lines = [
            above.plot(
                np.asarray(responses(_made(source, signal), signal)),
                **_figure.style(j), linewidth=1.4, label=method,
            )[0]
            for j, (method, source) in enumerate(transforms.items())
        ]  # fmt: skip
        time = np.arange(len(signal))
        below.fill_between(time, np.asarray(signal), color="0.8", linewidth=0)
        below.plot(time, np.asarray(signal), color="0.45", linewidth=1)
        for axes in (above, below):
            _figure.plain(axes)
            axes.margins(x=0)
        above.set_title(name)
        above.tick_params(labelbottom=False)
        if column == 0:
            above.set_ylabel("step")
            below.set_ylabel("gradient")
        if i + columns >= len(signals):
            below.set_xlabel("iteration")
    figure.align_ylabels()
    _figure.legend_above(figure, lines)
    return figure


def _made(source, signal) -> Any:
    return source(signal) if callable(source) else source


def _parameter(theta):
    return theta


def _signal(name, value):
    array = jnp.asarray(value)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must be an array [T] of gradients with T >= 1, got shape "
            f"{array.shape}. Give one signal per name."
        )
    return array.astype(jnp.promote_types(array.dtype, jnp.zeros([]).dtype))
