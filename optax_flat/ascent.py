r"""Where the sharpness-aware methods take their second gradient.

Each rule is an Optax transformation that makes the perturbation out of the first
gradient. `sam` evaluates the second one at params + `rho` times what the rule returns:

    tx = optax_flat.sam(optax.adam(1e-3), rho=0.05, ascent=optax_flat.ascent.unit())

Rules that choose a direction stand in front of one that sets its length, in an
`optax.chain`: ``optax.chain(ascent.friendly(), ascent.adaptive_unit())``. Any other
transformation may take part. Norms are taken over the whole tree, in at least float32;
where one is zero there is no perturbation.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_flat._core import checks, keys, trees
from optax_flat._core.hyperparams import at


class FriendlyState(NamedTuple):
    """State of `friendly`."""

    count: jax.Array  # int32, [], updates made
    mu: optax.Updates  # running mean of the gradients


class CountState(NamedTuple):
    """State of the rules that only count."""

    count: jax.Array  # int32, [], updates made


class RandomLeavesState(NamedTuple):
    """State of `random_leaves`."""

    count: jax.Array  # int32, [], updates made
    key: jax.Array  # uint32, data of a key, constant: draws fold in the count


def unit(p: float = 2.0, *, per_leaf: bool = False) -> optax.GradientTransformation:
    r"""The direction of steepest ascent, of p-norm 1.

    .. math::
        a = \frac{\mathrm{sign}(g)\, |g|^{q-1}}{(\|g\|_q^q)^{1/p}}, \qquad
        \tfrac{1}{p} + \tfrac{1}{q} = 1

    which is g / ||g|| for p = 2 and sign(g) for p = infinity: of all steps of p-norm 1
    the one along which the loss rises most, to first order.

    Args:
      p: the norm of the ball, in (1, infinity].
      per_leaf: whether every leaf is scaled on its own.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: p not above 1.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule, g = ascent.unit(), jnp.array([3.0, -4.0])
      >>> a, _ = rule.update(g, rule.init(g))
      >>> [round(float(x), 3) for x in a]
      [0.6, -0.8]
    """
    _check_norm(p, per_leaf)
    return optax.stateless(lambda g, params: _unit(g, p, per_leaf))


def adaptive_unit(
    eta: optax.ScalarOrSchedule = 0.01,
    *,
    p: float = 2.0,
    weights: Any = None,
    per_leaf: bool = False,
) -> optax.GradientTransformation:
    r"""Steepest ascent measured relative to the weights, as in ASAM.

    .. math::
        a = t\, \mathrm{unit}(t\, g), \qquad t = |w| + \eta \text{ on weights, else } 1

    Multiplying a layer by a factor and dividing the next one by it, which leaves a ReLU
    network the same function, then changes nothing.

    Args:
      eta: added to the absolute weights, >= 0.
      p: see `unit`.
      weights: which leaves are weights: a tree of bools like the params, or a prefix
        of one (True for all of them); or a function that makes it from the params.
        None is every leaf of two dimensions or more, so that biases and normalization
        parameters have t = 1.
      per_leaf: see `unit`.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule = ascent.adaptive_unit(0.0, weights=True)
      >>> g, w = jnp.array([1.0, 1.0]), jnp.array([2.0, 0.0])
      >>> a, _ = rule.update(g, rule.init(w), w)
      >>> a.tolist()  # an entry that is zero stays zero
      [2.0, 0.0]
    """
    checks.number("eta", eta, 0.0)
    _check_norm(p, per_leaf)

    def update(updates, state, params: Any = None):
        eta_t = at(eta, state.count)
        flags = selection(_matrices if weights is None else weights, params)
        t = jax.tree.map(
            lambda flag, w: jnp.abs(w) + eta_t if flag else jnp.ones([], w.dtype),
            flags, trees.accumulator(params),
        )  # fmt: skip
        scaled = jax.tree.map(jnp.multiply, t, updates)
        a = jax.tree.map(jnp.multiply, t, _unit(scaled, p, per_leaf))
        return trees.cast_like(a, updates), _counted(state)

    return optax.GradientTransformation(_count, update)


def loss_equated(
    budget: optax.ScalarOrSchedule, rho: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    r"""Ascent by a given rise of the loss instead of a given radius, as in LE-SAM.

    .. math::
        a = \min\!\left(\frac{\sigma_t}{\|g\|}, \rho_{\max}\right) \frac{g}{\|g\|}

    To first order the loss rises by the budget :math:`\sigma_t`, however large the
    gradient is. It sets the radius itself: leave the `rho` of `sam` at 1.

    Args:
      budget: :math:`\sigma_t`, >= 0, in units of the loss.
      rho: :math:`\rho_{\max}`, the largest radius, >= 0, which small gradients need.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule, g = ascent.loss_equated(0.1, rho=1.0), jnp.array([3.0, -4.0])
      >>> a, _ = rule.update(g, rule.init(g))
      >>> round(float(jnp.vdot(g, a)), 6)
      0.1
    """
    checks.number("budget", budget, 0.0)
    checks.number("rho", rho, 0.0)

    def update(updates, state, params=None):
        del params
        norm = trees.norm(updates)
        largest = at(rho, state.count)
        safe = jnp.where(norm > 0, norm, 1.0)
        r = jnp.minimum(jnp.where(norm > 0, at(budget, state.count) / safe, 0), largest)
        a = jax.tree.map(lambda g: (r / safe) * g, updates)
        return trees.cast_like(a, updates), _counted(state)

    return optax.GradientTransformation(_count, update)


def friendly(
    sigma: optax.ScalarOrSchedule = 1.0, decay: optax.ScalarOrSchedule = 0.9
) -> optax.GradientTransformation:
    r"""What is special to this minibatch: the gradient without its running mean.

    .. math::
        d = g - \sigma m, \qquad m \leftarrow \lambda m + (1 - \lambda) g

    with the old m in d; the first update has d = m = g. From F-SAM.

    Args:
      sigma: :math:`\sigma`, how much of the mean is taken off, >= 0; 0 is SAM.
      decay: :math:`\lambda`, of the mean, in [0, 1].

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: an argument outside the range given above.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule, g = ascent.friendly(), jnp.array([1.0, 2.0])
      >>> _, state = rule.update(g, rule.init(g))
      >>> d, _ = rule.update(g, state)
      >>> d.tolist()  # a gradient that never changes has nothing special
      [0.0, 0.0]
    """
    checks.number("sigma", sigma, 0.0)
    checks.number("decay", decay, 0.0, 1.0)

    def init(params):
        zeros = optax.tree.zeros_like(trees.accumulator(params))
        return FriendlyState(jnp.zeros([], jnp.int32), zeros)

    def update(updates, state, params=None):
        del params
        s, keep = at(sigma, state.count), at(decay, state.count)
        first = state.count == 0
        grads = trees.cast_like(updates, state.mu)
        d = jax.tree.map(lambda g, m: jnp.where(first, g, g - s * m), grads, state.mu)
        # What is left of a gradient that is its mean is rounding, not a direction.
        rounding = 100 * float(jnp.finfo(jnp.float32).eps) * trees.norm(grads)
        nothing = jax.tree.map(jnp.zeros_like, d)
        d = trees.where(trees.norm(d) > rounding, d, nothing)
        mu = jax.tree.map(
            lambda g, m: jnp.where(first, g, keep * m + (1 - keep) * g), grads, state.mu
        )
        mu = trees.cast_like(mu, state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))
        return trees.cast_like(d, updates), FriendlyState(count, mu)

    return optax.GradientTransformation(init, update)


def outliers(quantile: float = 0.95) -> optax.GradientTransformation:
    r"""The entries of the gradient that stand out within their leaf, as in ZSharp.

    .. math::
        z_i = \frac{g_i - \mathrm{mean}}{\mathrm{std}}, \qquad
        d_i = g_i \text{ where } |z_i| > Q(|z|), \text{ else } 0

    with mean and standard deviation of the leaf, and Q the quantile of `|z|` over the
    whole tree. If nothing is left, d is g.

    Args:
      quantile: what part of the entries is left out, in [0, 1).

    Returns:
      An `optax.GradientTransformation`. It finds the quantile by counting entries, over
      and over: under sharding nothing is gathered, and what is sent are counts.

    Raises:
      ValueError: a quantile outside [0, 1); in `update`, more than 2^32 entries.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule, g = ascent.outliers(0.75), jnp.array([1.0, 1.0, 9.0, 1.0])
      >>> d, _ = rule.update(g, rule.init(g))
      >>> d.tolist()
      [0.0, 0.0, 9.0, 0.0]
    """
    quantile = checks.constant("quantile", quantile, 0.0, 1.0, open_high=True)

    def z_score(g):
        spread = jnp.std(g) if g.size else jnp.zeros([], g.dtype)
        center = jnp.mean(g) if g.size else jnp.zeros([], g.dtype)
        return jnp.abs(g - center) / jnp.where(spread > 0, spread, 1.0)

    def update(updates, params=None):
        del params
        z = jax.tree.map(z_score, trees.accumulator(updates))
        if not jax.tree.leaves(z):
            return updates
        size = sum(leaf.size for leaf in jax.tree.leaves(z))
        if not size:
            return updates
        if size > 2**32:
            raise ValueError(
                f"the quantile of {size} entries: at most 2^32 can be counted. Take "
                "another rule, or `optax_flat.masked` for a part of the params."
            )
        place = quantile * (size - 1)
        below = int(place)
        places = below, min(below + 1, size - 1), size - 1
        below, above, most = _ordered(z, places)
        threshold = below + place % 1 * (above - below)
        nothing = most <= threshold
        return jax.tree.map(
            lambda g, z: jnp.where(nothing | (z > threshold), g, jnp.zeros_like(g)),
            updates, z,
        )  # fmt: skip

    return optax.stateless(update)


def _ordered(z, places):
    """The numbers at some places in the order of all entries of a tree.

    Without a sort, which would gather what is sharded: the bits of numbers that are not
    negative are ordered as the numbers are, NaN at the end, so each bit is decided by
    one count.
    """
    leaves = [leaf for leaf in jax.tree.leaves(z) if leaf.size]
    dtype = jnp.result_type(*leaves)
    unsigned = jnp.dtype(f"uint{8 * dtype.itemsize}")
    last = np.array(np.iinfo(unsigned).max >> 1, unsigned)
    bits = [
        jax.lax.bitcast_convert_type(leaf.astype(dtype), unsigned) & last
        for leaf in leaves
    ]

    def count(end):
        return sum(jnp.sum(leaf <= end, dtype=jnp.uint32) for leaf in bits)

    def halve(_, ends):
        low, high = ends
        middle = low + (high - low) // 2
        found = jnp.stack([count(end) for end in middle]) > np.uint32(places)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    # Zero, which varies over devices in `jax.shard_map` as the entries do.
    first = sum(jnp.min(leaf) for leaf in bits) * np.zeros(len(places), unsigned)
    steps = 8 * dtype.itemsize
    # XLA would put what is made of all leaves into each one's loop, but not a loop.
    _, found = jax.lax.fori_loop(0, steps, halve, (first, first + last))
    return jax.lax.bitcast_convert_type(found, dtype)


def random_leaves(
    probability: optax.ScalarOrSchedule, *, key: jax.typing.ArrayLike
) -> optax.GradientTransformation:
    r"""Each leaf with a probability :math:`\beta`, divided by it, as in ESAM.

    .. math::
        a_l \leftarrow \frac{b_l}{\beta} a_l, \qquad P(b_l = 1) = \beta

    Put it behind the rule that sets the length, which would undo the division.

    Args:
      probability: :math:`\beta`, in (0, 1].
      key: a typed or raw PRNG key, or an int.

    Returns:
      An `optax.GradientTransformation`.

    Raises:
      ValueError: a probability outside (0, 1], or a `key` that is none.
      TypeError: an argument of the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_flat import ascent
      >>> rule, a = ascent.random_leaves(0.5, key=0), [jnp.ones(2)] * 4
      >>> kept, _ = rule.update(a, rule.init(a))
      >>> all(float(x[0]) in (0.0, 2.0) for x in kept)
      True
    """
    checks.number("probability", probability, 0.0, 1.0, open_low=True)
    key = checks.key(key)

    def init(params):
        del params
        return RandomLeavesState(jnp.zeros([], jnp.int32), keys.data(key))

    def update(updates, state, params=None):
        del params
        leaves, structure = jax.tree.flatten(updates)
        beta = jnp.asarray(at(probability, state.count), float)
        drawn = keys.fold_in(state.key, state.count, key)
        kept = jax.random.uniform(drawn, [len(leaves)]) < beta
        scaled = [
            jnp.where(keep, leaf / beta.astype(leaf.dtype), jnp.zeros_like(leaf))
            for keep, leaf in zip(kept, leaves, strict=True)
        ]
        count = jnp.asarray(optax.safe_increment(state.count))
        after = RandomLeavesState(count, state.key)
        return jax.tree.unflatten(structure, scaled), after

    return optax.GradientTransformation(init, update)


def selection(mask: Any, params: optax.Params) -> Any:
    """A bool for every leaf of the params, from a prefix tree or a function.

    Args:
      mask: a tree of bools, or a prefix of one; or a function that makes it from the
        params.
      params: a tree.

    Returns:
      A tree of bools like `params`.

    Raises:
      TypeError: a leaf of the mask that is no bool.
      ValueError: a mask that is no prefix of the params.

    Example:
      >>> from optax_flat.ascent import selection
      >>> params = {"dense": {"bias": 0.0, "kernel": 1.0}, "norm": 2.0}
      >>> selection({"dense": False, "norm": True}, params)
      {'dense': {'bias': False, 'kernel': False}, 'norm': True}
    """
    flags = trees.mask_for(mask, params)

    def spread(flag, part):
        return jax.tree.map(lambda _: bool(flag), part)

    try:
        return jax.tree.map(spread, flags, params)
    except ValueError as error:
        raise ValueError(
            "a mask must be a tree of bools like the params, or a prefix of one.\n"
            f"  got:    {jax.tree.structure(flags)}\n"
            f"  params: {jax.tree.structure(params)}"
        ) from error


def _matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)


def _check_norm(p, per_leaf):
    if p != math.inf:
        checks.constant("p", p, 1.0, open_low=True)
    checks.flag("per_leaf", per_leaf)


def _unit(tree, p, per_leaf):
    """Steepest ascent of p-norm 1; zero where its norm is."""
    if per_leaf:
        return jax.tree.map(lambda leaf: _unit(leaf, p, False), tree)
    if p == 2:
        return _divided(tree, trees.norm(tree))
    if p == math.inf:
        return jax.tree.map(jnp.sign, tree)
    q = p / (p - 1)
    # The rule does not depend on the gradient's size; powers of it would overflow.
    sizes = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    scaled = _divided(tree, jnp.max(jnp.stack(sizes)) if sizes else jnp.zeros([]))
    powers = jax.tree.map(lambda x: jnp.abs(x) ** q, trees.accumulator(scaled))
    total = optax.tree.sum(powers)
    raised = jax.tree.map(lambda x: jnp.sign(x) * jnp.abs(x) ** (q - 1), scaled)
    return _divided(raised, total ** (1 / p))


def _divided(tree, size):
    """The tree over a scalar, in its own dtypes; zeros where the scalar is zero."""
    factor = jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1.0), 0.0)
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _count(params):
    del params
    return CountState(jnp.zeros([], jnp.int32))


def _counted(state):
    return CountState(jnp.asarray(optax.safe_increment(state.count)))
