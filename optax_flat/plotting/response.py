"""How an optimizer answers a sequence of gradients."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_flat._core import checks, figures
from optax_flat.plotting._runs import Source, make_runs, naming, split_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def responses(
    tx: Source, signal: ArrayLike, *, seeds: int = 1, key: ArrayLike = 0
) -> jax.Array:
    r"""The steps that an optimizer makes when a signal is its gradient.

    .. math::
        v_t = \theta_t - \theta_{t+1}, \qquad \theta_0 = 0,
        \qquad \text{gradient}_t = s_t

    with one parameter :math:`\theta` and :math:`s_t` = `signal`: the loss is
    :math:`s_t \theta`, whose gradient is the same wherever the optimizer looks. The
    steps are differences of positions and carry the rounding of these. A walk of L
    gradients answers at every L-th of them, in both modes, and is 0 in between.

    Args:
      tx: any optimizer, or a function ``key -> optimizer``; one without gradients is
        given the loss.
      signal: the gradients, [T].
      seeds: runs of a function, >= 1.
      key: a typed or raw PRNG key, or an int, split into those of the runs.

    Returns:
      The steps downhill, minus the updates, [T], in the signal's dtype (at least the
      default floating-point one); of a function, those of all its runs, [seeds, T].

    Raises:
      TypeError: `tx` is not a gradient transformation.
      ValueError: the signal is not of shape [T] with T >= 1, or shorter than a walk;
        a wrong `seeds` or `key`.

    Example:
      Momentum goes on after the gradient has stopped:

      >>> import jax.numpy as jnp, optax
      >>> from optax_flat.plotting import responses
      >>> tx = optax.sgd(1.0, momentum=0.5)
      >>> responses(tx, jnp.array([1.0, 0.0, 0.0, 0.0])).tolist()
      [1.0, 0.5, 0.25, 0.125]
    """
    gradients = _signal("signal", signal)
    steps = _make_steps("tx", tx, gradients.dtype, split_keys(seeds, key))(gradients)
    return steps if callable(tx) else steps[0]


def gradient_response(
    transforms: Mapping[str, Source | Mapping[str, Source]],
    signals: Mapping[str, ArrayLike],
    *,
    seeds: int = 1,
    key: ArrayLike = 0,
    columns: int = 2,
) -> "Figure":
    """Draws the steps of optimizers above the signals that they get as gradients.

    A panel per signal: above the steps, one line per run, see `responses`; below the
    signal, in grey. All panels share the colours and line styles of the legend.

    Args:
      transforms: optimizers by name. A function ``key -> optimizer`` is drawn `seeds`
        times, in thin lines. A mapping ``{signal's name: optimizer}`` has another one
        for each signal, such as a rule that was made to read that signal ahead.
      signals: gradients by name, each [T]; lengths may differ.
      seeds: runs of each function, >= 1.
      key: a typed or raw PRNG key, or an int; every function is given the same keys,
        split from it.
      columns: panels side by side, >= 1.

    Returns:
      A figure, 4 inches per column, to save with ``figure.savefig(path)``.

    Raises:
      TypeError: not mappings, or a value that is not a gradient transformation.
      ValueError: an empty mapping, a signal that is not of shape [T], shorter than a
        walk or without an optimizer; more than 21 optimizers, 7 with several seeds.
      ImportError: matplotlib, the extra `plot`, is missing.

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
    figures.check_names("transforms", transforms, "optimizers")
    figures.check_names("signals", signals, "arrays [T]")
    columns = min(checks.integer("columns", columns, 1), len(signals))
    gradients = {k: _signal(f"signals[{k!r}]", v) for k, v in signals.items()}
    dtype = jnp.result_type(*gradients.values())
    keys = split_keys(seeds, key)
    make_steps = {
        name: _by_signal(f"transforms[{name!r}]", source, signals, dtype, keys)
        for name, source in transforms.items()
    }
    thin = len(keys) > 1 and any(map(_makes_several, transforms.values()))
    figures.check_count("transforms", len(transforms), thin=thin)

    rows = math.ceil(len(signals) / columns)
    figure = figures.new_figure(4 * columns, 0.4 + 2.9 * rows)
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    lines = []
    for i, (name, signal) in enumerate(gradients.items()):
        row, column = divmod(i, columns)
        above = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=above)
        lines = []
        for j, method in enumerate(transforms):
            with naming(f"signals[{name!r}]"):
                steps = np.asarray(make_steps[method][name](signal.astype(dtype)))
            style = figures.style(j, thin=len(steps) > 1)
            width = 0.7 if len(steps) > 1 else 1.4
            lines += above.plot(steps[0], **style, linewidth=width, label=method)
            above.plot(steps[1:].T, **style, linewidth=width)
        time = np.arange(len(signal))
        below.fill_between(time, np.asarray(signal), color="0.8", linewidth=0)
        below.plot(time, np.asarray(signal), color="0.45", linewidth=1)
        for axes in (above, below):
            figures.plain(axes)
            axes.margins(x=0)
        above.set_title(name)
        above.tick_params(labelbottom=False)
        if column == 0:
            above.set_ylabel("step")
            below.set_ylabel("gradient")
        if i + columns >= len(signals):
            below.set_xlabel("iteration")
    figure.align_ylabels()
    figures.legend_above(figure, lines)
    for line in figure.legends[0].get_lines():  # thin ones hardly show their colour
        line.set_linewidth(1.4)
    return figure


def _make_steps(name, source, dtype, keys) -> Callable[[jax.Array], jax.Array]:
    """What maps a signal [T] to the steps [R, T] of all runs."""
    runs = make_runs(name, source, lambda theta: theta, jnp.zeros([], dtype), keys)
    return lambda signal: -jnp.diff(runs(signal))


def _by_signal(name, entry, signals, dtype, keys):
    """`_make_steps` by signal; one for all of them, unless the entry is a mapping."""
    if not isinstance(entry, Mapping):
        return dict.fromkeys(signals, _make_steps(name, entry, dtype, keys))
    if entry.keys() != signals.keys():
        raise ValueError(
            f"`{name}` must have one optimizer for each of the signals "
            f"{list(signals)}, got {list(entry)}. Give the same names."
        )
    return {
        signal: _make_steps(f"{name}[{signal!r}]", source, dtype, keys)
        for signal, source in entry.items()
    }


def _makes_several(entry):
    sources = entry.values() if isinstance(entry, Mapping) else [entry]
    return any(map(callable, sources))


def _signal(name, value):
    array = jnp.asarray(value)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"`{name}` must be an array [T] of gradients with T >= 1, got shape "
            f"{array.shape}. Give one signal per name."
        )
    return array.astype(jnp.promote_types(array.dtype, jnp.zeros([]).dtype))
