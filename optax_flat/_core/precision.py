"""Params in 16 bits, in which the small steps of a run would round away.

bfloat16 has 8 bits of precision: 1 + 1e-3 is 1 there, however often it is added. Two
adapters keep what is lost, around any optimizer:

    master_weights       the optimizer's own params, in float32; the given ones are
                         those, rounded
    stochastic_rounding  none; each update is rounded up or down at random, so that
                         its mean is right

Papers: Micikevicius et al., arXiv 1710.03740; Gupta et al., arXiv 1502.02551.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import checks, keys, layout, modes, trees
from optax_flat._core.functions import translated
from optax_flat._core.noise import draw

# Other draws than those of a method that was given the same key.
_ROUNDING = np.uint32(0x726F756E)


class MasterWeightsState(NamedTuple):
    """State of `master_weights`."""

    master: optax.Params  # wider params; optax.MaskedNode where they are wide already
    reached: optax.Params  # where the last update led the params; masked likewise
    inner_state: optax.OptState

    def eval_params(self, params: optax.Params) -> optax.Params:
        """What `inner` evaluates, found with the master and rounded at the end."""
        point = _current(self, params)
        return jax.tree.map(
            # What `inner` does not move is where the params are, see `evaluated`.
            lambda there, here, p: p if there is here else there.astype(p.dtype),
            modes.evaluated(self.inner_state, point), point, params,
        )  # fmt: skip


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`."""

    metrics = ("count",)

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count
    inner_state: optax.OptState


@runtime_checkable
class _Displaced(Protocol):
    """A state that keeps its anchor as a distance from where the params are."""

    offset: Any


def master_weights(
    inner: optax.GradientTransformation,
    dtype: Any = jnp.float32,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains params in 16 bits by way of a copy in float32, which the state holds.

    .. math::
        w \leftarrow w + \mathrm{Inner}(\nabla f(\mathrm{round}(w))), \qquad
        \text{params} = \mathrm{round}(w)

    Inside everything is as with params of that `dtype`: gradients, moments, points of
    a walk, averages. The caller's params are the master w rounded to nearest, in
    transparent mode also on the points of a walk, and `grad_fn`, `value_fn` and
    `output_fn` are asked at rounded points. Params that are as wide as `dtype` already
    get no copy, and are trained as by `inner`, to the bit.

    Give it the *whole* optimizer: nothing behind it may alter the updates, since the
    next one starts from the master, not from the params. An average goes inside, where
    it averages the master.

    Cost:
      `inner`'s gradients per update; state: 3 copies of bfloat16 params beside
      `inner`'s.

    Args:
      inner: any Optax transformation, a chain, or a method of this library.
      dtype: of the master, a floating-point dtype; params with fewer bits get one.

    Returns:
      A transformation whose state is a `MasterWeightsState`. Its updates have the
      params' dtype and lead to the rounded master; where a single update more than
      doubles an entry, or changes its sign, they may miss it by 2^-8 of the step
      (in bfloat16), which the next one makes good. Params that were replaced since the
      last update, by pretrained ones for instance, replace the master.

    Raises:
      TypeError: an argument of the wrong type, or params that are not floating point.

    Example:
      A hundred steps of 1e-3, each below half the spacing of bfloat16 at 1:

      >>> import jax.numpy as jnp, optax, optax_flat
      >>> def train(tx):
      ...     params = jnp.ones(1, jnp.bfloat16)
      ...     state = tx.init(params)
      ...     for _ in range(100):
      ...         updates, state = tx.update(-jnp.ones_like(params), state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return float(params[0])
      >>> train(optax.sgd(1e-3)), train(optax_flat.master_weights(optax.sgd(1e-3)))
      (1.0, 1.1015625)

    References:
      Micikevicius et al., `Mixed Precision Training
      <https://arxiv.org/abs/1710.03740>`_, 2018.

    Differs from the paper:
      Its loss scaling is a matter of the gradient, not of the optimizer: the page on
      mixed precision has the recipe.
    """
    optimizer = checks.transformation("inner", inner)
    dtype = checks.float_dtype("dtype", dtype) or jnp.float32

    def init(params):
        checks.float_params(params)
        params = trees.concrete(params)
        here = _widened(params, dtype)
        master = _of_narrow(params, here, dtype)
        reached = _of_narrow(params, params, dtype)
        state = MasterWeightsState(master, reached, optimizer.init(here))
        return trees.copy(state, params)

    def update(updates, state, params: Any = None, **extra_args):
        checks.float_params(params)
        layout.check(init, state, params)
        here = _current(state, params)
        steps, inner_state = optimizer.update(
            _widened(updates, dtype),
            state.inner_state,
            here,
            **_for_inner(extra_args, params, dtype),
        )
        there = optax.apply_updates(here, steps)
        to_rounded = modes.difference(trees.rounded_like(there, params), params)
        updates = _merged(_of_narrow(params, to_rounded, dtype), steps)
        master = _of_narrow(params, there, dtype)
        updates = trees.cast_like(updates, params)
        reached = _of_narrow(params, trees.applied(params, updates), dtype)
        return updates, MasterWeightsState(master, reached, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_rounding(
    inner: optax.GradientTransformation,
    *,
    key: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains params in 16 bits without a copy: updates round up or down at random.

    .. math::
        w \leftarrow \begin{cases}
        \lceil t \rceil & \text{with probability }
            (t - \lfloor t \rfloor) / (\lceil t \rceil - \lfloor t \rfloor) \\
        \lfloor t \rfloor & \text{else}
        \end{cases}, \qquad t = w + \mathrm{Inner}(\nabla f(w))

    between the two neighbours of t in the params' dtype, so that the mean is t. What
    `inner` keeps and computes is in float32. The rounding is noise, of variance up to a
    quarter of the spacing squared per update, which `master_weights` does not have; in
    exchange nothing is kept. Params in float32 are trained as by `inner`, to the bit.

    Give it the *whole* optimizer. Not one whose params must stand on exact points: in
    transparent mode, and in `momentum_sam`, `multipoint_nesterov`, `sampa`, `parle` and
    `elastic_averaging`, the anchor is a distance from there.

    Cost:
      `inner`'s gradients per update; state: 0 copies of bfloat16 params beside
      `inner`'s.

    Args:
      inner: an Optax transformation, a chain, or a method of this library.
      key: a typed or raw PRNG key, or an int. Each entry has draws of its own, on any
        number of devices the same.

    Returns:
      A transformation whose state is a `StochasticRoundingState`. Its updates have the
      params' dtype; where a single one more than doubles an entry, or changes its sign,
      they may miss the rounded point by 2^-8 of the step (in bfloat16).

    Raises:
      TypeError: an argument of the wrong type, or params that are not floating point.
      ValueError: a `key` that is none; in `init`, an `inner` as above.

    Example:
      A hundred steps of 1e-3; on the mean they survive:

      >>> import jax.numpy as jnp, optax, optax_flat
      >>> tx = optax_flat.stochastic_rounding(optax.sgd(1e-3), key=0)
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...     updates, state = tx.update(-jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(abs(params.astype(float).mean() - 1.1) < 2e-3)
      True

    References:
      Gupta, Agrawal, Gopalakrishnan and Narayanan, `Deep Learning with Limited
      Numerical Precision <https://arxiv.org/abs/1502.02551>`_, 2015. Zamirai et al.,
      `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020.

    Differs from the paper:
      Nothing for the params; activations and products are not ours to round.
    """
    optimizer = checks.transformation("inner", inner)
    key = checks.key(key)

    def init(params):
        checks.float_params(params)
        params = trees.concrete(params)
        inner_state = optimizer.init(trees.accumulator(params))
        _check_no_exact_points(inner_state)
        count = jnp.zeros([], jnp.int32)
        state = StochasticRoundingState(count, keys.data(key), inner_state)
        return trees.copy(state, params)

    def update(updates, state, params: Any = None, **extra_args):
        checks.float_params(params)
        layout.check(init, state, params)
        here = trees.accumulator(params)
        steps, inner_state = optimizer.update(
            trees.accumulator(updates),
            state.inner_state,
            here,
            **_for_inner(extra_args, params, jnp.float32),
        )
        there = optax.apply_updates(here, steps)
        own = jax.random.fold_in(keys.fold_in(state.key, state.count, key), _ROUNDING)
        uniform = draw(own, there, "uniform")
        rounded = jax.tree.map(_rounded_at_random, there, uniform, params)
        to_rounded = modes.difference(rounded, params)
        updates = _merged(_of_narrow(params, to_rounded, jnp.float32), steps)
        count = jnp.asarray(optax.safe_increment(state.count))
        return (
            trees.cast_like(updates, params),
            StochasticRoundingState(count, state.key, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_no_exact_points(inner_state):
    for state in modes.states(inner_state, modes.TransparentState | _Displaced):
        raise ValueError(
            "stochastic_rounding cannot go around a method whose params must stand on "
            "exact points, since it restores its anchor by a distance from there, got "
            f'one with a {type(state).__name__}. Build a walk with mode="scanned", or '
            "use optax_flat.master_weights, which goes around every method."
        )


def _is_narrow(leaf, dtype):
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return is_float and jnp.finfo(leaf.dtype).bits < jnp.finfo(dtype).bits


def _widened(tree, dtype):
    """Floats with fewer bits in the given dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if _is_narrow(x, dtype) else x, tree)


def _of_narrow(params, tree, dtype):
    """The leaves of a tree whose params have fewer bits, the others masked."""
    return jax.tree.map(
        lambda p, x: x if _is_narrow(p, dtype) else optax.MaskedNode(), params, tree
    )


def _current(state, params):
    """The master, and the params where they were replaced, by pretrained ones say."""

    def choose(master, p, reached):
        here = trees.rounded_like(p.astype(master.dtype), p)
        return jnp.where(here == reached.astype(master.dtype), master, here)

    return trees.map_selected(choose, state.master, params, state.reached)


def _merged(selected, whole):
    return trees.map_selected(lambda leaf, _: leaf, selected, whole)


def _for_inner(extra_args, params, dtype):
    """Extra arguments for an optimizer that sees wider params than the caller."""

    def to_caller(point):
        return jax.tree.map(
            lambda x, p: _nearest(x, p) if _is_narrow(p, dtype) else x, point, params
        )

    def to_method(grads):
        return _widened(grads, dtype)

    arguments = translated(extra_args, to_caller, to_method)
    if "grad" in arguments:  # the first gradient once more, for line searches
        arguments["grad"] = to_method(arguments["grad"])
    return arguments


def _nearest(point, param):
    """The point in the param's dtype; derivatives pass as through a cast."""
    rounded = trees.rounded_like(point, param)
    return (point + jax.lax.stop_gradient(rounded - point)).astype(param.dtype)


def _rounded_at_random(there, uniform, param):
    """One of a float32's two neighbours in the param's dtype; itself if exact."""
    if not _is_narrow(param, there.dtype):
        return there
    spacing = _spacing(there, jnp.finfo(param.dtype))
    low = jnp.floor(there / spacing)
    up = (uniform < there / spacing - low).astype(there.dtype)
    return jnp.where(jnp.isfinite(there), (low + up) * spacing, there)


def _spacing(x, narrow):
    """How far the neighbours of a float32 in a narrow dtype are apart: a power of 2."""
    wide = jnp.finfo(jnp.float32)
    # Without the bits of the mantissa a number is the power of two below it.
    mantissa = jnp.full(x.shape, 2**wide.nmant - 1, jnp.int32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    power = jax.lax.bitcast_convert_type(bits & ~mantissa, jnp.float32)
    # Of subnormals it is constant; it must not be a subnormal float32, which is zero.
    eps = float(narrow.eps)
    least = max(float(narrow.tiny), float(wide.tiny) / eps)
    return jnp.maximum(power, least) * np.float32(eps)
