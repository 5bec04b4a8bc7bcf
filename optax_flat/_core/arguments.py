"""Factories of optimizers: their static arguments, and those that many of them share.

Shared arguments are written once, as the fields of a `TypedDict`::

    class LoopArguments(TypedDict, total=False):
        mode: Annotated[str, Argument("scanned", "what the docstring says")]

    @factory
    def method(rho=0.05, **loop: Unpack[LoopArguments]): ...

Type checkers read that; `factory` gives `inspect.signature`, and so the rendered page
and `optax.inject_hyperparams`, the same list, and the docstring the same text. The
function itself finds all of them in `loop`, the defaults filled in.
"""

import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    NamedTuple,
    ParamSpec,
    Protocol,
    TypedDict,
    cast,
    get_args,
    get_type_hints,
)

import jax
import optax

P = ParamSpec("P")


class Factory(Protocol[P]):
    """A function that makes an optimizer and names its static arguments."""

    static_args: tuple[str, ...]

    def __call__(
        self, *args: P.args, **kwargs: P.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        """Makes the optimizer."""
        ...


class Argument(NamedTuple):
    """The default of a shared argument, and what docstrings say of it."""

    default: Any
    text: str


class LoopArguments(TypedDict, total=False):
    """What every walk takes."""

    inner_transform: Annotated[
        optax.GradientTransformation | None,
        Argument(
            None,
            "an Optax transformation of *every* gradient, before the method "
            "sees it: clipping, weight decay, `pmean`. It sees the point where the "
            "gradient was taken as params; its state starts afresh at every outer "
            "update.",
        ),
    ]
    mode: Annotated[
        str,
        Argument(
            "scanned",
            '"scanned" (one call of `update` is one outer update; it needs '
            '`grad_fn`, see `optax_flat.scanned`) or "transparent" (one call is one '
            "gradient; its updates must be applied as they are, see "
            "`optax_flat.transparent`).",
        ),
    ]
    unroll: Annotated[
        int | bool,
        Argument(
            1,
            "scanned mode only, as in `jax.lax.scan`.",
        ),
    ]
    fast_convolutions: Annotated[
        bool,
        Argument(
            True,
            "scanned mode only: whether convolutions in the loop are given the layout "
            "that is fast on a CPU, see `optax_flat.training.fast_convolutions`. Other "
            "platforms are never affected.",
        ),
    ]
    has_aux: Annotated[
        bool,
        Argument(
            False,
            "scanned mode only: `grad_fn` is ``(params, batch, aux) -> (grads, aux)``.",
        ),
    ]
    skip_nonfinite: Annotated[
        bool,
        Argument(
            False,
            "an outer update in which anything became non-finite changes nothing "
            "and is counted in the state's `skipped`.",
        ),
    ]
    accumulator_dtype: Annotated[
        Any,
        Argument(
            None,
            "dtype of what the method keeps and adds up; None is at least float32. "
            "The params keep their own: in bfloat16 an outer update below their "
            "spacing rounds away, as with any Optax optimizer; `master_weights` "
            "keeps it.",
        ),
    ]


class KeyArgument(TypedDict):
    """What every method with random draws takes."""

    key: Annotated[
        jax.typing.ArrayLike,
        Argument(inspect.Parameter.empty, "a typed or raw PRNG key, or an int."),
    ]


class NoiseArguments(KeyArgument):
    """What every method takes that adds noise to its updates."""

    noise_kind: Annotated[
        str,
        Argument(
            "normal",
            '"normal", or "rademacher": independent signs, much cheaper, of the same '
            "mean and variance.",
        ),
    ]


def factory(
    build: Callable[P, optax.GradientTransformationExtraArgs],
) -> Factory[P]:
    """Marks a public method: spells its shared arguments out, names the static ones.

    Static, which `optax.inject_hyperparams` must not touch, is whatever is not a float
    or a schedule.
    """
    own = inspect.signature(build)
    shared = _shared(own)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    signature = own.replace(parameters=[*named, *(p for p, _ in shared)])

    @functools.wraps(build)
    def made(*args, **kwargs):
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{build.__name__}() {error}") from None
        bound.apply_defaults()
        return build(*bound.args, **bound.kwargs)

    setattr(made, "__signature__", signature)  # noqa: B010 - a plain function
    static = (p for p in signature.parameters.values() if not _is_scheduled(p))
    setattr(made, "static_args", tuple(p.name for p in static))  # noqa: B010
    made.__doc__ = _documented(inspect.getdoc(build), shared)
    return cast(Factory[P], made)


def _shared(signature):
    """Parameters and texts of the fields of ``**shared: Unpack[SomeTypedDict]``."""
    rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
    if not rest:
        return []
    (fields,) = get_args(rest[0].annotation)
    hints = get_type_hints(fields, include_extras=True)
    shared = []
    for name, hint in hints.items():
        kind, argument = get_args(hint)
        parameter = inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=argument.default,
            annotation=kind,
        )
        shared.append((parameter, argument.text))
    return shared


def _is_scheduled(parameter):
    kinds = (optax.ScalarOrSchedule, optax.ScalarOrSchedule | None)
    return parameter.annotation in kinds


def _documented(docstring, shared):
    """The docstring with the texts of the shared arguments behind its own."""
    if docstring is None or not shared:
        return docstring
    texts = [
        textwrap.fill(
            f"{parameter.name}: {text}",
            width=88,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for parameter, text in shared
    ]
    before, after = docstring.split("\n\nReturns:", 1)
    return "\n".join([before, *texts]) + "\n\nReturns:" + after
