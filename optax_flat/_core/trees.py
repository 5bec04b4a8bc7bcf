"""Pytree helpers: dtypes, copies, norms and selections."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed PRNG key (or an array of them)."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_traced(tree: Any) -> bool:
    """Whether a leaf stands for a value that is known only when the program runs."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def accumulator(params: optax.Params, dtype: Any = None) -> optax.Params:
    """Params in the dtype of anchors and means: `dtype`, or at least float32."""

    def cast(leaf):
        leaf = jnp.asarray(leaf)
        wide = jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.dtype.itemsize >= 4
        return leaf.astype(dtype or (leaf.dtype if wide else jnp.float32))

    return jax.tree.map(cast, params)


def cast_like(tree: Any, like: Any) -> Any:
    """Each leaf in the dtype of its partner, without weak types."""

    def cast(leaf, partner):
        if is_key(partner):
            return leaf
        # NumPy's params may be in float64, which is float32 here.
        return jnp.asarray(leaf, jax.dtypes.canonicalize_dtype(partner.dtype))

    return jax.tree.map(cast, tree, like)


def rounded_like(tree: Any, like: Any) -> Any:
    """Each leaf as a cast to its partner's dtype and back leaves it.

    XLA leaves such pairs of casts out.
    """

    def rounded(leaf, partner):
        ours, theirs = jnp.finfo(leaf.dtype), jnp.finfo(partner.dtype)
        if ours.bits <= theirs.bits:
            return leaf
        short = jax.lax.reduce_precision(leaf, theirs.nexp, theirs.nmant)
        if theirs.nexp == ours.nexp:
            return short
        # It makes zeros of subnormals, which a cast to float16 does not.
        smallest = np.asarray(theirs.smallest_subnormal, leaf.dtype)
        subnormal = jnp.round(leaf / smallest) * smallest
        return jnp.where(jnp.abs(leaf) < float(theirs.tiny), subnormal, short)

    return jax.tree.map(rounded, tree, like)


def applied(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`, rounded to the params' dtype where XLA would not."""
    wide = accumulator(params)
    moved = jax.tree.map(lambda p, u: p + u.astype(p.dtype), wide, updates)
    return cast_like(rounded_like(moved, params), params)


def steps_to(point: Any, params: Any) -> tuple[Any, Any]:
    """Updates that lead from `params` to a point, and where they really lead.

    Both have the point's dtype, rounded as the params are: an anchor that is kept as a
    distance from there loses nothing by it.
    """
    here = cast_like(params, point)
    updates = rounded_like(optax.tree.sub(point, here), params)
    return updates, rounded_like(optax.tree.add(here, updates), params)


def select_like(tree: Any, like: Any) -> Any:
    """`tree` in the dtypes of `like`, with its masked leaves masked."""

    def is_masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def select(partner, leaf):
        return partner if is_masked(partner) else jnp.asarray(leaf, partner.dtype)

    return jax.tree.map(select, like, tree, is_leaf=is_masked)


def concrete(tree: Any) -> Any:
    """The same tree of JAX's arrays, zeros where it holds only shapes and dtypes."""

    def make(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return jnp.asarray(leaf)
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)

    return jax.tree.map(make, tree)


def arrays(tree: Any) -> Any:
    """Python numbers as arrays, so that every leaf has a dtype of its own."""
    return jax.tree.map(_array, tree)


def _array(leaf: Any) -> Any:
    if hasattr(leaf, "dtype"):
        return leaf
    return jnp.asarray(leaf, jnp.result_type(leaf))


def plain(tree: Any) -> Any:
    """The tree with arrays in the place of NNX's variables."""
    nnx: Any = sys.modules.get("flax.nnx")  # where it is not there, they are not
    return tree if nnx is None else nnx.as_pure(tree)


def copy(tree: Any, params: Any = None) -> Any:
    """A new state: every leaf in a buffer of its own, parts like the params sharded so.

    State and params can be donated together then. Under `jit` the buffers that begin
    with constants would otherwise be on every device in full. Without `jit` counters
    would be on one device, and a training step would be compiled twice.
    """
    tree, structure = arrays(tree), jax.tree.structure(params)

    def is_like_params(part):
        return jax.tree.structure(part) == structure

    meshes = {
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(params)
        if not is_traced(leaf) and isinstance(leaf, jax.Array)
        and isinstance(leaf.sharding, NamedSharding)
    }  # fmt: skip

    def on_mesh(leaf):
        if len(meshes) != 1 or is_traced(leaf) or len(leaf.devices()) > 1:
            return leaf
        (mesh,) = meshes
        return jax.device_put(leaf, NamedSharding(mesh, jax.P()))

    def own(part):
        if is_like_params(part):
            part = sharded_like(part, params)
        return jax.tree.map(lambda leaf: on_mesh(jnp.array(leaf, copy=True)), part)

    return jax.tree.map(own, tree, is_leaf=is_like_params)


def sharded_like(tree: Any, like: Any) -> Any:
    """Each leaf sharded like its partner, if they have one shape."""

    def sharded(leaf, partner):
        if leaf.ndim == 0 or leaf.shape != partner.shape:
            return leaf
        # All ones, whatever the partner holds. On an Auto mesh its layout is not known
        # here, but the compiler hands it on from operand to operand. (JAX's shard_alike
        # would put all leaves of one shape into one group.)
        ones = jnp.where(jnp.less(partner, partner), 0, 1)
        return leaf * ones.astype(leaf.dtype)

    return jax.tree.map(sharded, tree, like)


def replicated(tree: Any) -> Any:
    """Every leaf whole on all devices, where its type says that it is not.

    Only the types on an Explicit mesh do; elsewhere the compiler decides.
    """

    def gather(leaf):
        there = jax.typeof(leaf).sharding
        if not any(there.spec):
            return leaf
        return jax.sharding.reshard(leaf, NamedSharding(there.mesh, jax.P()))

    return jax.tree.map(gather, tree)


def spread_like(tree: Any, like: Any) -> Any:
    """Every leaf's leading axis on the devices of that of `like`, an array.

    On an Explicit mesh, that is, as with `replicated`. Of what one `jax.vmap` makes the
    parts that depend on nothing mapped are whole everywhere, and another refuses them.
    """
    there = jax.typeof(like).sharding
    axis = there.spec[:1]

    def spread(leaf):
        spec = jax.typeof(leaf).sharding.spec
        if not any(axis) or spec[:1] == axis:
            return leaf
        on_axis = NamedSharding(there.mesh, jax.P(*axis, *spec[1:]))
        return jax.sharding.reshard(leaf, on_axis)

    return jax.tree.map(spread, tree)


def where(condition: jax.Array | bool, on_true: Any, on_false: Any) -> Any:
    """`on_true` if the scalar condition holds, else `on_false`, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), on_true, on_false)


def finite(tree: Any) -> Any:
    """Zeros in the place of what is NaN or infinite."""
    return where_finite(tree, tree)


def where_finite(params: Any, tree: Any, otherwise: Any = None) -> Any:
    """`tree` where the params are finite, else zero or what another tree has."""
    if otherwise is None:
        otherwise = optax.tree.zeros_like(tree)

    def select(p, x, o):
        return jnp.where(jnp.isfinite(p), x, o)

    return jax.tree.map(select, params, tree, otherwise)


def mean_of_groups(tree: Any) -> Any:
    """Means over the leading axis; what is no float is taken from the first group."""

    def merge(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return replicated(leaf)[0]
        return jnp.mean(leaf, axis=0)

    return jax.tree.map(merge, tree)


def saturating_add(count: jax.Array, increment: Any) -> jax.Array:
    """A counter that stays at its maximum instead of turning negative."""
    return jnp.where(
        count > jnp.iinfo(count.dtype).max - increment, count, count + increment
    )


def all_finite(tree: Any, before: Any = None) -> jax.Array:
    """True if no floating-point leaf holds NaN or infinity that was not there before.

    Args:
      tree: any tree.
      before: a tree of the same structure whose non-finite entries are excused.

    Returns:
      A bool, [].
    """

    def finite(leaf):
        return True if is_key(leaf) else jnp.isfinite(leaf)  # integers always are

    def is_fine(leaf, was=None):
        excused = False if was is None else jnp.logical_not(finite(was))
        return jnp.all(jnp.logical_or(finite(leaf), excused))

    trees = (tree,) if before is None else (tree, before)
    fine = jax.tree.leaves(jax.tree.map(is_fine, *trees)) or [True]
    return jnp.all(_of_leaves(fine))


def vdot(a: Any, b: Any) -> jax.Array:
    """Inner product over the whole tree, summed in at least float32."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), accumulator(a), accumulator(b))
    return jnp.sum(_of_leaves(jax.tree.leaves(products) or [jnp.zeros(())]))


def _of_leaves(scalars: list[Any]) -> jax.Array:
    """One number for each leaf, behind a barrier.

    XLA would else copy the sum over all leaves into the program of every leaf that uses
    it, which then grows with their square.
    """
    dtype = jnp.result_type(*scalars)
    stacked = jnp.stack([jnp.asarray(x, dtype) for x in scalars])
    return jax.lax.optimization_barrier(stacked)


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over the whole tree, summed in at least float32."""
    return jnp.sqrt(vdot(tree, tree))


def cosine(a: Any, b: Any) -> jax.Array:
    """Of the angle between two trees; 0 if either is zero."""
    product = norm(a) * norm(b)
    safe = jnp.where(product > 0, product, 1.0)
    return jnp.where(product > 0, vdot(a, b) / safe, 0.0)


def mask_for(mask: Any, params: Any) -> Any:
    """A mask as a tree of bools, or a prefix of one, from what a user gave.

    It may be a function that makes it from the params. A tree of bools that can be
    called, as one in the shape of an Equinox model can, is no such function.

    Raises:
      TypeError: a leaf of the mask that is no bool.
    """
    if not jax.tree.leaves(params):  # as when `optax.tree.map_params` looks for them
        return params
    leaves = jax.tree.leaves(mask)
    if leaves and all(callable(leaf) for leaf in leaves):
        mask = mask(params)
    for flag in jax.tree.leaves(mask):
        if not isinstance(flag, bool | np.bool):
            raise TypeError(
                "a mask must be a tree of bools like the params, or a prefix of one, "
                f"got {flag!r} in it. Make one from names by "
                "jax.tree_util.tree_map_with_path."
            )
    return mask


def map_selected(
    fn: Callable[..., Any], selected: Any, whole: Any, *others: Any
) -> Any:
    """`fn(leaf of selected, leaf of whole)`; masked leaves are taken from `whole`.

    And the leaves of `others`, which are masked as `selected` is.

    Masked leaves are Optax's placeholders, or None, which Equinox's filters leave.

    Raises:
      ValueError: the leaves have other shapes, or the trees another structure.
    """

    def is_masked(leaf):
        return leaf is None or isinstance(leaf, optax.MaskedNode)

    def one(s, w, *more):
        if is_masked(s):
            return w
        if jnp.shape(s) != jnp.shape(w):
            raise ValueError(
                "`params` must have the shapes of those that the state was made for, "
                f"got {jnp.shape(w)}, expected {jnp.shape(s)}"
            )
        return fn(s, w, *more)

    return jax.tree.map(one, selected, whole, *others, is_leaf=is_masked)
