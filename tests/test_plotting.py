"""The runs behind the pictures against loops and closed forms; what pictures hold."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure
from PIL import Image

import optax_flat
from optax_flat import plotting
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


def test_trajectory_draws_every_path():
    """Seeds differ; a path that diverged is cut off, and the legend says so."""
    transforms = {
        "SGD": SGD,
        "SGLD": lambda key: optax_flat.sgld(0.1, temperature=0.1, key=key),
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
    (mean,) = marks["SGLD"].get_xydata()
    np.testing.assert_allclose(mean, (sgld[0][-1] + sgld[1][-1]) / 2, rtol=1e-6)
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
    styles = [plotting._figure.style(i) for i in range(21)]
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


def test_animation_does_not_repeat_frames(tmp_path):
    path = plotting.animate(
        {"SGD": SGD}, BOWL, tmp_path / "bowl.gif", num_steps=2, frames=50, dpi=20
    )
    with Image.open(path) as image:
        assert image.n_frames == 3


def test_mp4_without_ffmpeg(tmp_path, monkeypatch):
    from matplotlib.animation import FFMpegWriter

    monkeypatch.setattr(FFMpegWriter, "isAvailable", lambda: False)
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


def test_without_matplotlib_and_without_pyplot():
    code = """
import io, sys
sys.modules["matplotlib"] = None
import optax
from optax_flat import plotting, problems
from optax_flat.training import History
tx = {"SGD": optax.sgd(0.1)}
history = History()
assert plotting.responses(tx["SGD"], [1.0]).shape == (1,)
for draw in (
    lambda: plotting.gradient_response(tx, {"s": [1.0]}),
    lambda: plotting.trajectory(tx, problems.wobbly),
    lambda: plotting.animate(tx, problems.wobbly, "never.gif"),
    lambda: plotting.history(history),
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
            r"`fps` must lie in \(0, inf\), got 0",
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
            lambda: plotting.gradient_response({"a": jax.grad}, {"s": [1.0]}),
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
            lambda: plotting.history([1.0]),
            TypeError,
            "`runs` must be a mapping from names to History objects",
        ),
    ],
)
def test_errors_of_others(draw, error, words):
    with pytest.raises(error, match=words):
        draw()
