"""Draws the pictures of the site itself: icon, link preview, what was measured.

python docs/pictures.py FOLDER
"""

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from choices import SITUATIONS
from evidence import results
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#767676"


def valley(x):
    """A loss with a narrow hole on the left and a wide valley on the right."""
    return (
        1 - 0.95 * np.exp(-(((x + 1.1) / 0.16) ** 2)) - 0.85 * np.exp(-((x - 0.7) ** 2))
    )


def draw_valley(axes, width):
    """The valley, with a dot where the flat minimum is."""
    x = np.linspace(-2, 2.6, 500)
    axes.plot(x, valley(x), color=BLUE, linewidth=width, solid_capstyle="round")
    axes.plot(0.7, valley(0.7) + 0.045, "o", color=ORANGE, markersize=3.2 * width)
    axes.axis("off")


def favicon(path: Path) -> None:
    """The valley in a square."""
    figure = Figure(figsize=(1, 1))
    axes = figure.add_axes((0.02, 0.08, 0.96, 0.84))
    draw_valley(axes, 5)
    figure.savefig(path, transparent=True)


def social(path: Path) -> None:
    """The valley beside the name, 1200 by 630, as link previews want it."""
    figure = Figure(figsize=(12, 6.3), facecolor="white")
    draw_valley(figure.add_axes((0.05, 0.08, 0.9, 0.5)), 8)
    figure.text(0.06, 0.78, "optax_flat", fontsize=68, weight="bold")
    figure.text(
        0.06, 0.67, "flat minima for JAX, each method an Optax optimizer", fontsize=25
    )
    figure.savefig(path, dpi=100)


def measured(path: Path) -> None:
    """The effects of choices.py, with 95 % intervals."""
    effects = [effect for s in SITUATIONS for effect in s.effects]
    figure = Figure(figsize=(7.5, 0.9 + 0.34 * len(effects)), layout="constrained")
    axes = figure.add_subplot()
    for y, effect in enumerate(effects):
        mean, half = results(effect.benchmark).gain(
            effect.method, effect.baseline, effect.measure
        )
        mean *= effect.sign
        colour = GREY if abs(mean) < half else (BLUE if mean > 0 else ORANGE)
        axes.errorbar(mean, y, xerr=half, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(effects)), [effect.label for effect in effects])
    axes.invert_yaxis()
    axes.set_xlabel("points of test accuracy over SGD, at equal gradients")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def draw(folder: Path) -> None:
    """All of them, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "optax_flat"}):
        favicon(folder / "favicon.svg")
    social(folder / "social.png")
    measured(folder / "measured.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
