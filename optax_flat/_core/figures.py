"""What the pictures share: matplotlib, colours, line styles, legends."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optax_flat._core import extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, told apart with any kind of colour vision. Three line styles
# and seven colours make 21 pairs, so neither is the only sign of a method.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES: tuple[Any, ...] = ("solid", (0, (6, 1.5)), (0, (1.5, 1)))
MARKERS = "osD^vP"


def new_figure(width: float, height: float, *, layout: Any = "constrained") -> "Figure":
    """An empty figure of so many inches, 100 pixels each."""
    extras.load("matplotlib", "plot", "optax_flat.plotting")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=100, layout=layout)


def style(index: int, *, thin: bool = False) -> dict[str, Any]:
    """Colour and line style of the method with this number.

    Thin lines, those of several runs, are solid: dashes would not be seen.
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[0 if thin else index % len(LINES)],
    }


def marker(index: int) -> str:
    """Marker of the method with this number."""
    return MARKERS[index % len(MARKERS)]


def plain(axes: "Axes") -> None:
    """No frame, and a grid that stays in the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


def legend_above(figure: "Figure | SubFigure", handles: list[Any]) -> None:
    """A legend over the whole width, outside the data."""
    columns = min(len(handles), 4)
    figure.legend(
        handles=handles, loc="outside upper center", ncols=columns, frameon=False
    )


def check_names(name: str, value: Any, of_what: str) -> None:
    """A mapping with at least one entry."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"`{name}` must be a mapping from names to {of_what}, got {value!r} of "
            f"type {type(value).__name__}. Give a dict, such as {{'name': ...}}."
        )
    if not value:
        raise ValueError(
            f"`{name}` must hold at least one entry, got an empty mapping. Give names "
            f"and {of_what}."
        )


def check_count(name: str, number: int, *, thin: bool) -> None:
    """Not more methods than differ in colour and line style."""
    most = len(COLOURS) if thin else len(COLOURS) * len(LINES)
    if number > most:
        why = " where one is drawn in thin lines, one for each of its seeds" * thin
        raise ValueError(
            f"`{name}` must hold at most {most} methods{why}, got {number}: two would "
            "look the same. Draw them in several figures."
        )


def check_kinds(name: str, value: Any, kind: type, kind_name: str) -> None:
    """A mapping with at least one entry, each of one kind."""
    check_names(name, value, f"{kind.__name__} objects")
    for entry, found in value.items():
        if not isinstance(found, kind):
            raise TypeError(
                f"`{name}[{entry!r}]` must be an {kind_name}, got {found!r} of type "
                f"{type(found).__name__}."
            )
