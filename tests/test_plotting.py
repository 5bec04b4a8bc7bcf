"""The runs behind the pictures against loops and closed forms; what pictures hold."""

import dataclasses
import gc
import io
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import matplotlib.animation
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

import optax_flat
from optax_flat import plotting
from optax_flat._core import figures
from optax_flat.flatness import Cost, Density, Estimate, Line, Plane, Report
from optax_flat.problems import Problem
from optax_flat.training import History

CURVATURE = np.array([0.5, 2.0])


def quadratic(x):
    return jnp.sum(CURVATURE.astype(x.dtype) * x**2) / 2


BOWL = Problem(
    "a_bowl",
    quadratic,
    start=np.array([-1.5, 1.0]),
    bounds=np.array([[-2.0, 2.0], [-1.0, 1.5]]),
    minima=np.zeros((1, 2)),
)
SIGNAL = np.sin(np.arange(12.0))
SGD = optax.sgd(0.1)


def walk(mode, num_steps=4):
    return optax_flat.entropy_sgd(
        0.5, momentum=0.9, num_steps=num_steps, noise=0.0, mode=mode, key=0
    )


def noisy(key):
    return optax_flat.sgld(0.1, temperature=0.1, key=key)


def descent(rate, steps, start=BOWL.start):
    return start * (1 - rate * CURVATURE) ** np.arange(steps + 1)[:, None]


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def drawn(axes):
    """The data of the lines of paths, without the marks."""
    return [
        line.get_xydata()
        for line in axes.get_lines()
        if line.get_label().startswith("_")
    ]


def test_response_of_sgd_is_the_signal(x64):
    v = plotting.responses(optax.sgd(0.25), SIGNAL)
    np.testing.assert_allclose(v, 0.25 * SIGNAL, rtol=0, atol=1e-14)


def test_response_equals_a_plain_loop(x64):
    v, expected = 0.0, []
    for g in SIGNAL:
        v = 0.9 * v + 0.25 * g
        expected.append(v)
    tx = optax.chain(optax.scale(0.25), optax.trace(0.9), optax.scale(-1.0))
    np.testing.assert_allclose(plotting.responses(tx, SIGNAL), expected, atol=1e-14)


def test_response_of_a_walk(x64):
    """One step per L gradients in both modes; what does not fill a walk is unused."""
    signal = np.append(SIGNAL, [1.0, 1.0])
    v = plotting.responses(walk("scanned"), signal)
    assert v.shape == signal.shape
    assert np.flatnonzero(v).tolist() == [3, 7, 11]
    np.testing.assert_allclose(
        plotting.responses(walk("transparent"), signal), v, atol=1e-14
    )


def test_path_of_sgd_on_a_quadratic(x64):
    path = plotting.paths(SGD, BOWL, num_steps=20)
    np.testing.assert_allclose(path, descent(0.1, 20), rtol=1e-13)


def test_walks_spend_as_many_gradients_as_others(x64):
    """Both modes walk the same path: 10 gradients are 2 updates of 4, and 2 left."""
    scanned = plotting.paths(walk("scanned"), BOWL, num_steps=10)
    transparent = plotting.paths(walk("transparent"), BOWL, num_steps=10)
    assert scanned.shape == (11, 2)
    moves = np.flatnonzero(np.any(np.diff(scanned, axis=0), axis=1))
    assert moves.tolist() == [3, 7]
    np.testing.assert_allclose(transparent, scanned, rtol=1e-13)


@pytest.mark.parametrize(
    "tx",
    [
        optax_flat.ensemble_kalman(0.1, ensemble_size=8, spread=0.3, key=0),
        optax_flat.perturbation_gradient(
            optax.sgd(0.1), ensemble_size=16, spread=0.1, key=0
        ),
    ],
    ids=["ensemble_kalman", "perturbation_gradient"],
)
def test_methods_without_gradients_make_paths(tx):
    path = plotting.paths(tx, BOWL, num_steps=40)
    assert path.shape == (41, 2)
    assert quadratic(path[-1]) < 0.5 * quadratic(path[0])


def test_gradient_response_draws_every_response():
    signals = {"waves": SIGNAL, "step": np.ones(7)}
    figure = plotting.gradient_response({"SGD": SGD, "Adam": optax.adam(0.1)}, signals)
    assert isinstance(figure, Figure)
    for i, (name, signal) in enumerate(signals.items()):
        above, below = figure.axes[2 * i : 2 * i + 2]
        lines = labelled(above)
        assert above.get_title() == name and list(lines) == ["SGD", "Adam"]
        v = plotting.responses(SGD, signal)
        np.testing.assert_array_equal(lines["SGD"].get_ydata(), v)
        np.testing.assert_allclose(below.get_lines()[0].get_ydata(), signal, rtol=1e-6)
        assert below.get_xlabel() == "iteration"
    first = figure.axes[:2]
    assert [axes.get_ylabel() for axes in first] == ["step", "gradient"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def test_gradient_response_of_several_seeds_and_of_a_rule_for_each_signal():
    """Functions of a key have a thin line per run; mappings have what they say."""
    signals = {"waves": SIGNAL, "step": np.ones(7)}
    rules = {name: optax.sgd(1 / len(signal)) for name, signal in signals.items()}
    seeds = {"seeds": 3, "key": 5}
    figure = plotting.gradient_response(
        {"SGLD": noisy, "by length": rules}, signals, **seeds
    )
    for axes, signal in zip(figure.axes[::2], signals.values(), strict=True):
        first, *others, by_length = axes.get_lines()
        np.testing.assert_allclose(
            by_length.get_ydata(), signal / len(signal), atol=1e-6
        )
        sgld = [line.get_ydata() for line in (first, *others)]
        np.testing.assert_array_equal(sgld, plotting.responses(noisy, signal, **seeds))
        assert not np.allclose(sgld[0], sgld[1])
        assert first.get_linewidth() < by_length.get_linewidth()
    assert len(figure.legends[0].get_texts()) == 2


def test_what_a_method_reads_from_outside_may_change():
    """Nothing is remembered between pictures, neither numbers nor methods."""
    rate = 0.1

    class Make:
        def __call__(self, key):
            return optax.sgd(rate)

    make = Make()
    for rate in (0.1, 0.2):
        (path,) = plotting.paths(make, BOWL, num_steps=5)
        np.testing.assert_allclose(path, descent(rate, 5), rtol=1e-5)
    alive = weakref.ref(make)
    del make
    gc.collect()
    assert alive() is None


def test_unhashable_functions_make_methods():
    @dataclasses.dataclass
    class Rule:
        rate: float

        def __call__(self, key):
            return optax.sgd(self.rate)

    steps = plotting.responses(Rule(0.25), SIGNAL)
    np.testing.assert_allclose(steps, 0.25 * SIGNAL[None], atol=1e-6)


def test_one_program_for_all_signals_of_a_length():
    traced = []

    def make(key):
        traced.append(isinstance(key, jax.core.Tracer))
        return SGD

    plotting.gradient_response({"SGD": make}, {"a": SIGNAL, "b": -SIGNAL, "c": [1.0]})
    assert sum(traced) == 2


def test_pictures_share_positions():
    """What `paths` returned is drawn as if its method had been given."""
    paths = plotting.paths(noisy, BOWL, num_steps=6, seeds=2)
    settings = {"num_steps": 6, "seeds": 2}
    (given,) = plotting.trajectory({"SGLD": paths}, BOWL, **settings).axes
    (run,) = plotting.trajectory({"SGLD": noisy}, BOWL, **settings).axes
    np.testing.assert_array_equal(drawn(given), drawn(run))
    with pytest.raises(ValueError, match=r"\['a'\]` must have shape .* \(2, 7, 2\)"):
        plotting.trajectory({"a": paths}, BOWL, num_steps=5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plotting.gradient_response({"SGD": SGD}, {"waves": SIGNAL}),
        lambda: plotting.trajectory({"SGD": SGD}, BOWL, num_steps=3),
        lambda: plotting.history(recorded(2)),
    ],
    ids=["gradient_response", "trajectory", "history"],
)
def test_figures_are_rendered(draw):
    buffer = io.BytesIO()
    draw().savefig(buffer)
    with Image.open(buffer) as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_trajectory_draws_every_path():
    """Seeds differ; a path that diverged is cut off, and the legend says so."""
    transforms = {
        "SGD": SGD,
        "SGLD": noisy,
        "fast": optax.sgd(1e10),
    }
    figure = plotting.trajectory(transforms, BOWL, num_steps=12, seeds=2)
    (axes,) = figure.axes
    sgd, *sgld, fast = drawn(axes)
    np.testing.assert_allclose(sgd, descent(0.1, 12), rtol=1e-5)
    assert [len(path) for path in sgld] == [13, 13]
    assert not np.allclose(*sgld)
    assert len(fast) < 10 and np.isfinite(fast).all()
    marks = labelled(axes)
    ends = marks["SGLD"].get_xydata()
    np.testing.assert_array_equal(ends, [sgld[0][-1], sgld[1][-1]])
    paths = plotting.paths(transforms["SGLD"], BOWL, num_steps=12, seeds=2)
    np.testing.assert_array_equal(paths, sgld)
    np.testing.assert_allclose(marks["start"].get_xydata(), [BOWL.start])
    np.testing.assert_allclose(marks["minimum"].get_xydata(), BOWL.minima)
    names = ["start", "minimum", "SGD", "SGLD", "fast (diverged)"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert (axes.get_xlim(), axes.get_ylim()) == ((-2.0, 2.0), (-1.0, 1.5))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("$x_0$", "$x_1$")
    assert axes.get_title() == "a bowl, 12 gradients"


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e9])
def test_any_range_of_values_is_drawn(scale):
    """Constant; so steep that the lowest levels are equal in float64; huge."""
    problem = BOWL._replace(
        function=lambda x: 1 + scale * jnp.exp(9 * x[0]) * quadratic(x)
    )
    (axes,) = plotting.trajectory({"SGD": SGD}, problem, num_steps=1).axes
    levels = [set(np.diff(c.levels) > 0) for c in axes.collections]
    assert levels == ([{True}, {True}] if scale else [])


def test_lines_differ_in_more_than_colour():
    styles = [figures.style(i) for i in range(21)]
    assert len({(s["color"], s["linestyle"]) for s in styles}) == 21
    assert styles[0]["linestyle"] != styles[7]["linestyle"]  # the same colour


def test_animation_has_its_frames(tmp_path):
    path = plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "new" / "bowl.gif", num_steps=20, frames=4,
        dpi=40,
    )  # fmt: skip
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (4, (320, 224))
        colours = np.asarray(image.convert("RGB")).reshape(-1, 3)
        image.seek(3)
        last = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # The line grows, and keeps its blue in the palette.
    blue = [
        np.sum(np.abs(c - np.array([0, 114, 178])).max(-1) < 30)
        for c in (colours.astype(int), last.astype(int))
    ]
    assert blue[1] > blue[0] > 0


def test_animation_with_a_trail(tmp_path, monkeypatch):
    shown, show = [], plotting.surface.Paths.show

    def spy(self, gradients, trail):
        show(self, gradients, trail)
        shown.append(self._drawn[0][1][0].get_xydata())

    monkeypatch.setattr(plotting.surface.Paths, "show", spy)
    plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "bowl.gif", num_steps=6, frames=3, trail=2,
        dpi=20,
    )  # fmt: skip
    path = plotting.paths(SGD, BOWL, num_steps=6)
    for line, part in zip(shown, (path[:1], path[1:4], path[4:]), strict=True):
        np.testing.assert_array_equal(line, part)


def test_animation_does_not_repeat_frames(tmp_path):
    path = plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "bowl.gif", num_steps=2, frames=50, dpi=20
    )
    with Image.open(path) as image:
        assert image.n_frames == 3


@pytest.mark.parametrize(("fps", "milliseconds"), [(15, 70), (30, 30), (50, 20)])
def test_gif_keeps_its_frame_rate(fps, milliseconds, tmp_path):
    path = plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "bowl.gif", num_steps=2, fps=fps, dpi=10
    )
    durations = []
    with Image.open(path) as image:
        for frame in range(image.n_frames):
            image.seek(frame)
            durations.append(image.info["duration"])
    assert durations == [milliseconds, milliseconds, 2000]


def test_palette_of_few_colours():
    """Of a plain image too."""
    image = Image.new("RGB", (3, 3), "#0072B2")
    palette = plotting.animation._palette(image)
    same = image.quantize(palette=palette).convert("RGB")
    assert same.getcolors() == image.getcolors()


@pytest.mark.skipif(
    not matplotlib.animation.FFMpegWriter.isAvailable(), reason="ffmpeg is missing"
)
def test_mp4(tmp_path):
    path = plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "bowl.mp4", num_steps=3, fps=60, dpi=20
    )
    assert path.read_bytes()[4:8] == b"ftyp"


def test_mp4_without_ffmpeg(tmp_path, monkeypatch):
    from matplotlib.animation import FFMpegWriter

    def runs(*args):
        raise AssertionError("runs were made for nothing")

    monkeypatch.setattr(FFMpegWriter, "isAvailable", lambda: False)
    monkeypatch.setattr(plotting.animation, "prepare", runs)
    with pytest.raises(RuntimeError, match=r"Install ffmpeg.* or write a \.gif"):
        plotting.animate({"SGD": SGD}, BOWL, tmp_path / "bowl.mp4")
    assert not list(tmp_path.iterdir())


def recorded(num_steps, path=None):
    log = History(num_steps=num_steps, path=path, stop=False)
    for epoch in range(5):
        log.record(4.0 / (epoch + 1), val_loss=5.0 if num_steps > 1 else None)
    return log


def test_history_draws_every_loss(tmp_path):
    """From objects and files alike; no line where no validation loss is."""
    path = tmp_path / "walk.json"
    sgd, entropy = recorded(1), recorded(2, path)
    figure = plotting.history({"SGD": sgd, "walk": path}, log_scale=True)
    epochs, effective = figure.axes
    names = ["SGD", "walk", "walk, validation"]
    assert list(labelled(epochs)) == list(labelled(effective)) == names
    line = labelled(epochs)["walk"]
    np.testing.assert_array_equal(line.get_xydata().T, [range(1, 6), entropy.loss])
    line = labelled(effective)["walk"]
    np.testing.assert_array_equal(line.get_xydata().T, [[1, 2], entropy.eff_loss])
    assert (epochs.get_xlabel(), effective.get_xlabel()) == ("epoch", "effective epoch")
    assert (epochs.get_ylabel(), epochs.get_yscale()) == ("loss", "log")


def test_history_of_one_run(tmp_path):
    path = tmp_path / "run.json"
    log = recorded(1, path)
    before = path.read_text()
    for run, name in ((log, "run"), (str(path), "run")):
        (axes,) = plotting.history(run).axes
        assert list(labelled(axes)) == [name]
    assert path.read_text() == before


A = np.linspace(-1.0, 1.0, 5)
LINES = {"flat": Line(A, A**2), "sharp": Line(A, 9 * A**2)}
DENSITIES = {
    "one": Density(A, np.array([0.1, 1.0, 8.0, 1.0, 0.0])),
    "two": Density(2 * A, np.array([0.0, 0.5, 4.0, 0.5, 0.01])),
}


def minimum(scale, **measures):
    """A report without the work."""
    measures = {
        "trace": Estimate(3.0 * scale, 0.1),
        "local_entropy": Estimate(-scale, 0.1),
        "random_line": Line(A, scale * A**2),
    } | measures
    costs = {name: Cost(seconds=1.0) for name in measures}
    return Report(num_parameters=4, settings={}, costs=costs, **measures)


def test_landscape_of_lines():
    figure = plotting.landscape(LINES, log_scale=True)
    (axes,) = figure.axes
    drawn = labelled(axes)
    for name, line in LINES.items():
        np.testing.assert_array_equal(drawn[name].get_xydata().T, line)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (
        "position along the direction", "loss", "log",
    )  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(LINES)
    alone = plotting.landscape(LINES["flat"])
    assert not alone.legends
    np.testing.assert_array_equal(alone.axes[0].get_lines()[-1].get_ydata(), A**2)


def test_landscape_of_a_plane():
    """Levels are closer where the loss is low; what is no number has no contour."""
    y = np.linspace(0.0, 2.0, 4)
    losses = 1.0 + A**2 + 100 * y[:, None] ** 2
    losses[3, 4] = np.nan
    points = {"Adam": (0.0, 0.0), "SAM": (1.0, 0.5)}
    figure = plotting.landscape(Plane(A, y, losses), points=points)
    axes, bar = figure.axes
    levels = axes.collections[0].levels
    assert levels[0] == 1.0 and levels[-1] == np.nanmax(losses)
    ratios = np.diff(levels)[2:] / np.diff(levels)[1:-1]
    np.testing.assert_allclose(ratios, ratios[0])
    assert ratios[0] > 1.5
    assert (axes.get_xlim(), axes.get_ylim()) == ((-1.0, 1.0), (0.0, 2.0))
    assert "first direction" in axes.get_xlabel()
    assert "second direction" in axes.get_ylabel()
    assert bar.get_ylabel() == "loss"
    for name, line in labelled(axes).items():
        assert tuple(*line.get_xydata()) == points[name]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(points)


@pytest.mark.parametrize("value", [0.0, np.inf, 1e30])
def test_landscape_without_levels(value):
    flat = Plane(A, A, np.full((5, 5), value))
    assert len(plotting.landscape(flat).axes) == 1


def test_spectrum_draws_every_density():
    figure = plotting.spectrum(DENSITIES)
    (axes,) = figure.axes
    drawn = labelled(axes)
    for name, density in DENSITIES.items():
        np.testing.assert_array_equal(drawn[name].get_xydata().T, density)
    assert axes.get_yscale() == "log" and axes.get_ylabel() == "density"
    assert axes.get_xlabel() == "eigenvalue of the Hessian"
    assert axes.get_xlim()[0] < -2.0  # what is negative is seen
    assert 0.0 < axes.get_ylim()[0] < 0.01 and axes.get_ylim()[1] > 8.0
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    assert not plotting.spectrum(DENSITIES["one"]).legends


def test_report_draws_what_it_has():
    found = {
        "flat": minimum(1.0, spectral_density=DENSITIES["one"]),
        "sharp": minimum(2.0, spectral_density=DENSITIES["two"]),
    }
    figure = plotting.report(found)
    numbers, spectrum, line = figure.axes
    titles = ["Measures", "Spectrum of the Hessian", "Along a random direction"]
    assert [axes.get_title() for axes in figure.axes] == titles
    assert [text.get_text() for text in numbers.get_yticklabels()] == ["trace"]
    ends = [c.lines[0].get_xdata().item() for c in numbers.containers]
    assert ends == [3.0, 6.0]
    bars = numbers.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bars[:, 0], [2.8, 3.2])  # two standard errors
    np.testing.assert_array_equal(labelled(line)["sharp"].get_ydata(), 2 * A**2)
    assert set(DENSITIES["two"].grid) == set(labelled(spectrum)["sharp"].get_xdata())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(found)
    alone = found["flat"].plot()
    assert [axes.get_title() for axes in alone.axes] == titles and not alone.legends
    # A panel has all of them or is not drawn.
    found["other"] = minimum(1.0)
    assert len(plotting.report(found).axes) == 2


def test_without_matplotlib_and_without_pyplot():
    code = """
import io, sys
sys.modules["matplotlib"] = None
import optax
from optax_flat import plotting, problems
from optax_flat.flatness import Density, Line, Report
from optax_flat.training import History
line = Line([0.0, 1.0], [0.0, 1.0])
tx = {"SGD": optax.sgd(0.1)}
history = History()
assert plotting.responses(tx["SGD"], [1.0]).shape == (1,)
for draw in (
    lambda: plotting.gradient_response(tx, {"s": [1.0]}),
    lambda: plotting.trajectory(tx, problems.wobbly),
    lambda: plotting.animate(tx, problems.wobbly, "never.gif"),
    lambda: plotting.history(history),
    lambda: plotting.landscape(line),
    lambda: plotting.spectrum(Density(*line)),
    lambda: Report(num_parameters=1, settings={}, costs={}, random_line=line).plot(),
):
    try:
        draw()
    except ImportError as error:
        assert "pip install 'optax_flat[plot]'" in str(error), error
    else:
        raise AssertionError("a picture without matplotlib")
del sys.modules["matplotlib"]
plotting.gradient_response(tx, {"s": [1.0]}).savefig(io.BytesIO())
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


BOTH = [plotting.trajectory, lambda *a, **k: plotting.animate(*a, "x.gif", **k)]
CUBE = BOWL._replace(start=np.zeros(3), bounds=np.zeros((3, 2)))


@pytest.mark.parametrize("draw", BOTH, ids=["trajectory", "animate"])
@pytest.mark.parametrize(
    ("transforms", "problem", "settings", "error", "words"),
    [
        ({}, BOWL, {}, ValueError, "`transforms` must hold at least one entry"),
        (SGD, BOWL, {}, TypeError, "`transforms` must be a mapping from names to opt"),
        ({"a": 0.1}, BOWL, {}, TypeError, r"`transforms\['a'\]` must be an optax"),
        ({"a": lambda key: 1}, BOWL, {}, TypeError, "must be an optax.* got 1 of"),
        ({"a": SGD}, CUBE, {}, ValueError, r"two-dimensional.* got \(3,\) and \(3, 2"),
        (
            {"a": SGD},
            BOWL._replace(function=lambda x: x),
            {},
            ValueError,
            r"must map \[2\] to a scalar, got .*2",
        ),
        (
            {"a": SGD},
            BOWL._replace(start=np.array([np.nan, 0.0])),
            {},
            ValueError,
            "`problem.start` must be finite, got .*nan",
        ),
        (
            {"a": SGD},
            BOWL._replace(function=lambda x: jnp.sum(x) * jnp.nan),
            {"num_steps": 1},
            ValueError,
            "`problem.function` is NaN or infinite in the whole window",
        ),
        (
            dict.fromkeys("abcdefgh", noisy),
            BOWL,
            {"seeds": 2},
            ValueError,
            "at most 7 methods where one is drawn in thin lines.* got 8",
        ),
        ({"a": SGD}, BOWL, {"num_steps": 0}, ValueError, "`num_steps` .* >= 1, got 0"),
        ({"a": SGD}, BOWL, {"seeds": 0}, ValueError, "`seeds` must be an int >= 1"),
        ({"a": SGD}, BOWL, {"key": None}, ValueError, "`key` must be one typed key"),
        (
            {"a": walk("scanned")},
            BOWL,
            {"num_steps": 3},
            ValueError,
            "spends 4 gradients, but there are only 3",
        ),
    ],
)
def test_errors_of_trajectories(draw, transforms, problem, settings, error, words):
    with pytest.raises(error, match=words):
        draw(transforms, problem, **settings)


@pytest.mark.parametrize(
    ("draw", "error", "words"),
    [
        (
            lambda: plotting.animate({"a": SGD}, BOWL, "bowl.png"),
            ValueError,
            r"`path` must end in \.gif or \.mp4, got 'bowl.png'",
        ),
        (
            lambda: plotting.animate({"a": SGD}, BOWL, "bowl.gif", frames=1),
            ValueError,
            "`frames` must be an int >= 2, got 1",
        ),
        (
            lambda: plotting.animate({"a": SGD}, BOWL, "bowl.gif", fps=0.0),
            ValueError,
            r"`fps` must lie in \[0.01, inf\), got 0",
        ),
        (
            lambda: plotting.animate({"a": SGD}, BOWL, "bowl.gif", fps=60),
            ValueError,
            r"`fps` must be at most 50 for a \.gif, got 60",
        ),
        (
            lambda: plotting.animate({"a": SGD}, BOWL, "bowl.gif", dpi=5.0),
            ValueError,
            r"`dpi` must lie in \[10, inf\), got 5",
        ),
        (
            lambda: plotting.gradient_response(
                {"a": {"s": SGD}}, {"s": [1.0], "t": [1.0]}
            ),
            ValueError,
            r"`transforms\['a'\]` must have one optimizer for each .*\['s', 't'\]",
        ),
        (
            lambda: plotting.gradient_response({"a": walk("scanned")}, {"s": [1.0]}),
            ValueError,
            r"(?s)`transforms\['a'\]` spends 4 .*about `signals\['s'\]`",
        ),
        (
            lambda: plotting.gradient_response(
                {"a": lambda signal: optax.sgd(1 / len(signal))}, {"s": [1.0]}
            ),
            TypeError,
            r"(?s)This is about `transforms\['a'\]`",
        ),
        (
            lambda: plotting.gradient_response(
                dict.fromkeys(map(str, range(22)), SGD), {"s": [1.0]}
            ),
            ValueError,
            "`transforms` must hold at most 21 methods, got 22",
        ),
        (
            lambda: plotting.paths(0.1, BOWL),
            TypeError,
            "`tx` must be an optax",
        ),
        (
            lambda: plotting.responses(SGD, jnp.ones((3, 2))),
            ValueError,
            r"`signal` must be an array \[T\] .* got shape \(3, 2\)",
        ),
        (
            lambda: plotting.gradient_response({"a": SGD}, {}),
            ValueError,
            "`signals` must hold at least one entry",
        ),
        (
            lambda: plotting.gradient_response({"a": SGD}, {"s": []}),
            ValueError,
            r"`signals\['s'\]` must be .* got shape \(0,\)",
        ),
        (
            lambda: plotting.gradient_response({"a": 0.1}, {"s": [1.0]}),
            TypeError,
            r"`transforms\['a'\]` must be an optax",
        ),
        (
            lambda: plotting.history({}),
            ValueError,
            "`runs` must hold at least one entry",
        ),
        (
            lambda: plotting.history({"a": [1.0]}),
            TypeError,
            r"`runs\['a'\]` must be an optax_flat.training.History or the path",
        ),
        (
            lambda: plotting.landscape({"a": A}),
            TypeError,
            r"`losses\['a'\]` must be an optax_flat.flatness.Line",
        ),
        (
            lambda: plotting.landscape(LINES, points={"a": (0, 0)}),
            ValueError,
            "`points` are of a plane",
        ),
        (
            lambda: plotting.landscape(Plane(A, A, np.ones((5, 5))), points={"a": 1}),
            ValueError,
            r"`points` must be pairs \(x, y\) by name",
        ),
        (
            lambda: plotting.spectrum({}),
            ValueError,
            "`densities` must hold at least one entry",
        ),
        (
            lambda: plotting.report([1.0]),
            TypeError,
            "`reports` must be a mapping from names to Report objects",
        ),
        (
            lambda: plotting.history([1.0]),
            TypeError,
            "`runs` must be a mapping from names to History objects",
        ),
    ],
)
def test_errors_of_others(draw, error, words):
    with pytest.raises(error, match=words):
        draw()
