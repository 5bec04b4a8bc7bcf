"""Arguments that many factories share: one text, complete signatures."""

import inspect
from typing import Annotated, TypedDict, Unpack

import optax
import pytest

from optax_flat._core.arguments import Argument, factory


class Shared(TypedDict, total=False):
    rate: Annotated[optax.ScalarOrSchedule, Argument(0.5, "a rate, " + "long " * 20)]
    kind: Annotated[str, Argument("a", "a kind.")]


class Other(Shared, total=False):
    rate: Annotated[optax.ScalarOrSchedule, Argument(0.25, "another rate.")]


@factory
def first(own, *, more=1, **shared: Unpack[Shared]):
    """Returns what it was given.

    Args:
      own: an argument.
      more: another.

    Returns:
      All.
    """
    return own, more, shared


@factory
def second(own, **shared: Unpack[Other]):
    """The same.

    Args:
      own: an argument.

    Returns:
      All.
    """
    return own, shared


def test_signature_and_docstring_are_complete():
    assert list(inspect.signature(first).parameters) == ["own", "more", "rate", "kind"]
    assert first.static_args == ("own", "more", "kind")
    assert "\n  more: another.\n  rate: a rate, long" in first.__doc__
    assert "\n    long" in first.__doc__  # wrapped
    assert "\n  kind: a kind.\n\nReturns:" in first.__doc__
    assert "\n  rate: another rate.\n" in second.__doc__


def test_defaults_are_filled_in():
    assert first(1) == (1, 1, {"rate": 0.5, "kind": "a"})
    assert first(1, kind="b", more=2) == (1, 2, {"rate": 0.5, "kind": "b"})
    assert second(1) == (1, {"rate": 0.25, "kind": "a"})


def test_wrong_names_are_refused():
    with pytest.raises(TypeError, match=r"first\(\) got an unexpected .*'rates'"):
        first(1, rates=2)
    with pytest.raises(TypeError, match=r"first\(\) missing a required .*'own'"):
        first()
