"""Compiled programs around functions of the caller, which live no longer than these.

`jax.jit` keeps a static argument for ever, and with a function the arrays it closes
over. Here the programs of a function are kept beside it, and refer to it weakly.
"""

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import jax


def jit(
    *functions: str, static_argnames: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.jit` of a program that takes functions of the caller by keyword.

    It is compiled once for the same functions, and what was compiled is let go as soon
    as one of them is.

    Args:
      *functions: the names of the keywords. They are functions, bound methods or other
        hashable callables, or None.
      static_argnames: what else is static.

    Raises:
      TypeError: when it is called with a function that is not hashable.
    """

    def decorate(program):
        programs = weakref.WeakKeyDictionary()

        @functools.wraps(program)
        def call(*args, **kwargs):
            place: Any = programs
            methods, references = [], {}
            for name in functions:
                fn = kwargs.pop(name)
                check_hashable(name, fn)
                owner, method, references[name] = _parts(fn)
                place = place.setdefault(owner, weakref.WeakKeyDictionary())
                methods.append(method)
            compiled = place.setdefault(_Nothing, {})
            if tuple(methods) not in compiled:
                compiled[tuple(methods)] = _jitted(program, references, static_argnames)
            jitted, known = compiled[tuple(methods)]
            known.update(references)  # an equal object may have taken the place of one
            return jitted(*args, **kwargs)

        return call

    return decorate


def check_hashable(name: str, fn: Any) -> None:
    """Programs are found by their functions."""
    try:
        hash(fn)
    except TypeError as error:
        raise TypeError(
            f"`{name}` must be hashable, since compiled programs are found by it, got "
            f"an object of type {type(fn).__name__} ({error}). Give a plain function "
            "that calls it."
        ) from error


class _Nothing:
    """Stands for what has no object to live as long as."""


def _parts(fn):
    """What a function lives as long as, what it is of that, and a weak reference."""
    is_method = isinstance(fn, types.MethodType)
    owner, method = (fn.__self__, fn.__func__) if is_method else (fn, None)
    try:
        weakref.ref(owner)
    except TypeError:  # nor can it be let go of: None, a method of a tuple
        return _Nothing, fn, lambda: fn
    return owner, method, (weakref.WeakMethod if is_method else weakref.ref)(fn)


def _jitted(program, references, static_argnames):
    """The jitted program, and the references by which it finds its functions."""
    known = dict(references)

    def call(name, *args, **kwargs):
        return known[name]()(*args, **kwargs)

    arguments = {
        name: None if reference() is None else functools.partial(call, name)
        for name, reference in references.items()
    }
    made = functools.partial(program, **arguments)
    return jax.jit(made, static_argnames=static_argnames), known
