"""Paths of optimizers on a surface, as a moving picture."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from optax_flat._core import checks, extras
from optax_flat.plotting.surface import Drawn, Paths, draw_problem, prepare, set_title
from optax_flat.problems import Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".gif", ".mp4")
_FREQUENT, _RARE = 64, 128  # colours of a GIF, which keep it small
_HOLD = 2.0  # seconds that the last frame of a GIF stays
_FASTEST = 50  # frames per second of a GIF; programs slow faster ones down
_COARSEST = 10  # dots per inch; with fewer the letters vanish, which FreeType refuses


def animate(
    transforms: Mapping[str, Drawn],
    problem: Problem,
    path: str | os.PathLike[str],
    *,
    num_steps: int = 125,
    seeds: int = 1,
    key: jax.typing.ArrayLike = 0,
    frames: int = 70,
    trail: int | None = None,
    fps: float = 15.0,
    dpi: float = 100.0,
) -> Path:
    """Writes the paths of optimizers on a two-dimensional problem as an animation.

    The moving form of `trajectory`: at each moment all methods have spent the same
    number of gradients. A progress line is shown if tqdm is installed.

    Args:
      transforms: optimizers, functions ``key -> optimizer``, or positions that `paths`
        returned, by name.
      problem: an `optax_flat.problems.Problem`.
      path: the file to write: ".gif", or ".mp4" if ffmpeg is installed.
      num_steps: gradient evaluations of each method, >= 1.
      seeds: runs of each function, >= 1.
      key: a typed or raw PRNG key, or an int.
      frames: number of pictures, >= 2; at most num_steps + 1 are drawn.
      trail: gradients whose steps are drawn as a line behind each mark, >= 1; None
        draws the whole path.
      fps: frames per second, >= 0.01. Of a GIF at most 50, and a frame stays for
        100 / fps hundredths of a second, rounded.
      dpi: pixels per inch, of which the picture is 8 wide and 5.6 high, >= 10.

    Returns:
      The path of the file.

    Raises:
      TypeError: not a mapping, or a value that is no gradient transformation.
      ValueError: another suffix, a number that is too small, more than 50 frames per
        second in a GIF, and where `trajectory` raises it.
      RuntimeError: an .mp4 is wanted and ffmpeg is not found.
      ImportError: matplotlib, the extra `plot`, is missing.

    Example:
      >>> import pathlib, tempfile
      >>> import optax, PIL.Image
      >>> from optax_flat.plotting import animate
      >>> from optax_flat.problems import wobbly
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     file = animate({"SGD": optax.sgd(0.1)}, wobbly,
      ...                    pathlib.Path(folder, "wobbly.gif"), num_steps=3)
      ...     PIL.Image.open(file).n_frames  # after 0, 1, 2 and 3 gradients
      4
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"`path` must end in {' or '.join(_SUFFIXES)}, got {str(path)!r}. The "
            "suffix chooses the format."
        )
    frames = checks.integer("frames", frames, 2)
    if trail is not None:
        trail = checks.integer("trail", trail, 1)
    fps = checks.constant("fps", fps, 0.01)
    dpi = checks.constant("dpi", dpi, float(_COARSEST))
    if path.suffix == ".mp4":
        _check_ffmpeg(path)
    elif fps > _FASTEST:
        raise ValueError(
            f"`fps` must be at most {_FASTEST} for a .gif, got {fps:g}. Give less, or "
            "write an .mp4."
        )
    runs, figure = prepare(transforms, problem, num_steps, seeds, key)
    figure.set_dpi(dpi)
    axes = draw_problem(figure, problem)
    lines = Paths(axes, runs)
    figure.legend(loc="outside right upper", frameon=False)
    moments = np.linspace(0, num_steps, min(frames, num_steps + 1)).round().astype(int)

    def pictures() -> Iterator[None]:
        for gradients in _progress(moments, path.name):
            lines.show(gradients, trail)
            set_title(axes, problem, gradients)
            yield

    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    write(figure, pictures(), path, fps)
    return path


def _write_gif(figure: "Figure", pictures: Iterator[None], path: Path, fps: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    images = []
    for _ in pictures:
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    # One palette and no dithering: what does not move is equal in all frames, and the
    # file holds it once.
    palette = _palette(images[-1])
    images = [
        image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images
    ]
    # In milliseconds, of which the format keeps whole tens.
    durations = [10 * round(100 / fps)] * (len(images) - 1) + [int(1000 * _HOLD)]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=durations, loop=0
    )


def _palette(image: Any) -> Any:
    """The image's most frequent colours as they are, and the best for the others.

    Were all treated alike, the many pixels of the background would leave no colours
    for thin lines; those of the lines' soft edges would tint the background.
    """
    from PIL import Image

    pixels = np.asarray(image).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    colours = colours[np.argsort(-counts)]
    frequent, others = colours[:_FREQUENT], colours[_FREQUENT:]
    rare = []
    if len(others):
        # All but equal colours are merged; the median cut would merge blue and green.
        merged = Image.fromarray(others[None]).quantize(
            _RARE, Image.Quantize.MAXCOVERAGE, kmeans=3
        )
        rare = merged.getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*frequent.ravel(), *rare])
    return palette


def _write_mp4(figure: "Figure", pictures: Iterator[None], path: Path, fps: float):
    from matplotlib.animation import FFMpegWriter

    writer = FFMpegWriter(fps=fps)  # pyright: ignore[reportArgumentType]
    with writer.saving(figure, path, dpi=figure.dpi):
        for _ in pictures:
            writer.grab_frame()


def _check_ffmpeg(path):
    extras.load("matplotlib", "plot", "optax_flat.plotting")
    from matplotlib.animation import FFMpegWriter

    if not FFMpegWriter.isAvailable():
        raise RuntimeError(
            f"{path} cannot be written: ffmpeg was not found. Install ffmpeg, set "
            "matplotlib's rcParams['animation.ffmpeg_path'], or write a .gif."
        )


def _progress(moments: np.ndarray, name: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return moments
    return tqdm(moments, desc=name, unit="frame", leave=False)
