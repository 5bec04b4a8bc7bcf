"""The functions that a caller gives to `update`, for adapters around a method.

A method asks them at points of its own; an adapter whose method sees other params than
the caller does translates the points on their way out and the gradients on their way
back.
"""

from collections.abc import Callable
from typing import Any

import optax

FUNCTIONS = ("grad_fn", "value_fn", "output_fn")


def translated(
    arguments: dict[str, Any],
    to_caller: Callable[[Any], Any],
    to_method: Callable[[Any], Any],
) -> dict[str, Any]:
    """Extra arguments of `update` in which the functions take the method's points.

    Args:
      arguments: what `update` was given; what is no function of ours stays.
      to_caller: the caller's params of a point of the method.
      to_method: the method's gradient of a gradient of the caller.
    """
    translated = dict(arguments)
    for name in FUNCTIONS:
        function = arguments.get(name)
        if function is not None:
            back = to_method if name == "grad_fn" else None
            translated[name] = _translated(function, to_caller, back)
    return translated


def _translated(function, to_caller, to_method):
    def ask(point: optax.Params, *rest):
        out = function(to_caller(point), *rest)
        if to_method is None:
            return out
        # With `aux`, behind the minibatch, it returns a pair.
        if len(rest) > 1 and isinstance(out, tuple) and len(out) == 2:
            return to_method(out[0]), out[1]
        return to_method(out)

    if hasattr(function, "merges_frozen"):  # see `optax_flat.masked`
        setattr(ask, "merges_frozen", True)  # noqa: B010 - a plain function
    return ask
