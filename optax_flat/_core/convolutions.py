"""Convolutions in the one layout that XLA's CPU backend is fast at.

That backend has fast kernels for convolutions with the batch first and the features
last. XLA brings the others into this layout, but only outside of loops: inside
`jax.lax.scan` a gradient's convolutions run many times slower. Here it is done
beforehand, in the jaxpr of a function that has been differentiated already: each
convolution is replaced by a call with the same arguments and results. All else stays
as it is, and so does what is not known here.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.extend.core.primitives import (
    call_p,
    closed_call_p,
    cond_p,
    conv_general_dilated_p,
    custom_jvp_call_p,
    custom_vjp_call_p,
    jit_p,
    remat_p,
    scan_p,
    while_p,
)

P = ParamSpec("P")
T = TypeVar("T")

# Calls, loops and branches whose insides are rewritten; a Pallas kernel's are not.
ENTERED = {
    call_p.name,
    closed_call_p.name,
    cond_p.name,
    custom_jvp_call_p.name,
    custom_vjp_call_p.name,
    jit_p.name,
    remat_p.name,
    scan_p.name,
    while_p.name,
    "shard_map",  # not public
}

_said: list[bool] = []  # whether this process was told that rewriting fails


def fast_convolutions(fn: Callable[P, T]) -> Callable[P, T]:
    r"""The same function with convolutions that are fast in loops on a CPU.

    For the body of a `jax.lax.scan`, `map` or `while_loop` of your own in which a
    model with convolutions is trained or evaluated; the loops of this library do it by
    themselves, and `make_train_step` for its step. In such a loop XLA's CPU backend
    takes a slow path for every convolution whose layout is not ``NHWC, HWIO -> NHWC``
    (or its like in one and three dimensions), which includes those of a gradient. Here
    they are given this layout::

        transpose operands -> barrier -> convolve -> transpose the result

    That is decided when the program is lowered: for any other platform the
    convolutions are as they were. So is a function without convolutions.

    Args:
      fn: a function of trees of arrays, with the gradient *inside*: rules of
        differentiation that `fn` brings along (`jax.custom_vjp`) are not rewritten, and
      neither are convolutions in groups with negative padding, which the fast kernels
      get wrong. Convolutions whose outputs are sharded over an Explicit mesh stay as
        they are, and so do those of a `jax.shard_map` inside `fn` that checks what
        varies (``check_vma=True``); `fn` itself may stand inside one.

    Returns:
      A function with the same arguments and results. It may be jitted, mapped and
      differentiated.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from optax_flat.training import fast_convolutions
      >>> image = jnp.ones((8, 16, 16, 3))
      >>> def loss(kernel):
      ...     layout = ("NHWC", "HWIO", "NHWC")
      ...     outputs = jax.lax.conv_general_dilated(
      ...         image, kernel, (1, 1), "SAME", dimension_numbers=layout)
      ...     return jnp.mean(outputs ** 2)
      >>> def train(wrapper, kernel):
      ...     def body(kernel, _):
      ...         return kernel - 1e-4 * jax.grad(loss)(kernel), None
      ...     return jax.lax.scan(wrapper(body), kernel, length=3)[0]
      >>> kernel = jnp.ones((3, 3, 3, 4))
      >>> fast, plain = train(fast_convolutions, kernel), train(lambda f: f, kernel)
      >>> bool(jnp.allclose(fast, plain))
      True
    """

    @functools.wraps(fn)
    def rewritten(*args: P.args, **kwargs: P.kwargs) -> T:
        jaxpr, shapes = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        outputs = jaxpr_as_fun(_fast(jaxpr))(*jax.tree.leaves((args, kwargs)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return rewritten


def fast_if(fast: bool, fn: Callable[P, T]) -> Callable[P, T]:
    """`fast_convolutions(fn)`, or `fn` itself where that is switched off."""
    return fast_convolutions(fn) if fast else fn


def _fast(jaxpr: ClosedJaxpr) -> ClosedJaxpr:
    try:
        return _rewritten(jaxpr)
    except Exception as error:  # the insides of a jaxpr are not JAX's to promise
        if not _said:
            warnings.warn(
                "fast_convolutions cannot rewrite what this version of JAX "
                f"({jax.__version__}) traced: {error!r}. Convolutions in loops stay "
                "slow on a CPU. Give fast_convolutions=False to silence this.",
                RuntimeWarning,
                stacklevel=3,
            )
            _said.append(True)
        return jaxpr


def _rewritten(value: Any) -> Any:
    """What stands in a jaxpr; itself where nothing in it is rewritten."""
    if isinstance(value, JaxprEqn):
        return _equation(value)
    if isinstance(value, Jaxpr):  # newer JAX has no ClosedJaxpr besides, so it is first
        new = _rewritten(value.eqns)
        return value if new is value.eqns else value.replace(eqns=new)
    if isinstance(value, ClosedJaxpr):
        new = _rewritten(value.jaxpr)
        return value if new is value.jaxpr else value.replace(jaxpr=new)
    if type(value) in (list, tuple):
        new = type(value)(map(_rewritten, value))
        return value if _same(new, value) else new
    return value


def _equation(eqn: JaxprEqn) -> JaxprEqn:
    if eqn.primitive is conv_general_dilated_p:
        return _convolution(eqn)
    done = eqn.params.get("name") == "_fast_convolve"
    if done or eqn.primitive.name not in ENTERED:
        return eqn
    params = {name: _rewritten(value) for name, value in eqn.params.items()}
    same = _same(params.values(), eqn.params.values())
    return eqn if same else eqn.replace(params=params)


def _same(new: Iterable[Any], old: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _convolution(eqn: JaxprEqn) -> JaxprEqn:
    """A call of `_fast_convolve`, which is the convolution on any other platform."""
    numbers = eqn.params["dimension_numbers"]
    if numbers == _fast_layout(len(numbers.lhs_spec)):
        return eqn
    if _is_sharded(eqn.params.get("out_sharding")) or _is_cropped_in_groups(eqn.params):
        return eqn
    operands: list[Any] = [operand.aval for operand in eqn.invars]
    trace = jax.make_jaxpr(_fast_convolve, static_argnums=2)
    with jax.sharding.use_abstract_mesh(operands[0].sharding.mesh):
        (call,) = trace(*operands, tuple(eqn.params.items())).eqns
    if call.outvars[0].aval != eqn.outvars[0].aval:  # what varies inside shard_map
        return eqn
    return eqn.replace(primitive=call.primitive, params=call.params)


def _is_sharded(sharding: Any) -> bool:
    return sharding is not None and any(axes is not None for axes in sharding.spec)


def _is_cropped_in_groups(params: Mapping[str, Any]) -> bool:
    """Whether XLA's fast kernels would read what is not there (jaxlib 0.10)."""
    groups = params["feature_group_count"], params["batch_group_count"]
    return max(groups) > 1 and any(
        end < 0 for ends in params["padding"] for end in ends
    )


def _fast_layout(ndim: int) -> lax.ConvDimensionNumbers:
    """Batch, space, features; the kernel is space, inputs, outputs."""
    image = (0, ndim - 1, *range(1, ndim - 1))
    kernel = (ndim - 1, ndim - 2, *range(ndim - 2))
    return lax.ConvDimensionNumbers(image, kernel, image)


@functools.partial(jax.jit, static_argnums=2)
def _fast_convolve(lhs, rhs, params):
    settings = dict(params)
    given = settings["dimension_numbers"]
    fast = _fast_layout(lhs.ndim)

    def directly(lhs, rhs):
        return conv_general_dilated_p.bind(lhs, rhs, **settings)

    def on_cpu(lhs, rhs):
        lhs = _transposed(lhs, given.lhs_spec, fast.lhs_spec)
        rhs = _transposed(rhs, given.rhs_spec, fast.rhs_spec)
        # Without it XLA takes the transpositions back into the convolution.
        # One for each: JAX cannot transpose a common one where one operand is constant.
        lhs, rhs = lax.optimization_barrier(lhs), lax.optimization_barrier(rhs)
        new = settings | {"dimension_numbers": fast}
        out = conv_general_dilated_p.bind(lhs, rhs, **new)
        return _transposed(out, fast.out_spec, given.out_spec)

    return lax.platform_dependent(lhs, rhs, cpu=on_cpu, default=directly)


def _transposed(x, old, new):
    """Moves axes from where `old` says they are to where `new` says."""
    axes = [0] * x.ndim
    for source, target in zip(old, new, strict=True):
        axes[target] = source
    return lax.transpose(x, axes)
