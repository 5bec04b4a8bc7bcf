"""The examples run in smoke mode and do what they say."""

import importlib.util
import io
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from PIL import Image

from optax_flat.flatness import Report
from optax_flat.plotting import responses
from optax_flat.training import History

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MODES = ("scanned", "transparent")
ACCURACY = 0.9  # of ten classes; guessing gives 0.1
# The same float32 formula in two programs that XLA compiles differently.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def load(name):
    path = EXAMPLES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"examples.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(monkeypatch, example, mode, observe):
    """Lists what `observe(step, ...)` sees in the steps of the first two updates."""
    step, seen = getattr(example, f"{mode}_step"), []
    per_update = example.NUM_STEPS if mode == "transparent" else 1

    def recorded(*args):
        if len(seen) == 2 * per_update:
            return step(*args)
        facts, result = observe(step, *args)
        seen.append(facts)
        return result

    monkeypatch.setattr(example, f"{mode}_step", recorded)
    return seen


def updates(seen):
    return seen[: len(seen) // 2], seen[len(seen) // 2 :]


def first_minibatch(batch, mode):
    return batch if mode == "transparent" else jax.tree.map(lambda x: x[0], batch)


def test_compare_digits(tmp_path, capsys):
    example = load("compare_digits")
    results = example.main(["--smoke", "--out", str(tmp_path)])
    shown, progress = capsys.readouterr()
    assert "loss" not in progress  # no bar where there is no terminal
    for name, runs in results.items():
        assert len(runs) == 2
        assert example.METHODS[name].label in shown
        assert all(run.accuracy[-1] > 100 * ACCURACY for run in runs)
        assert all(run.top_eigenvalue > 0 and run.trace_error > 0 for run in runs)
    assert "standard error" in shown  # what the table shows, in words
    assert (tmp_path / "compare_digits.png").stat().st_size > 10_000
    assert shown.count("|") == 8 * (2 + len(results))
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in shown
    logs = sorted((tmp_path / "history").iterdir())
    assert len(logs) == 2 * len(results)
    assert len(json.loads(logs[0].read_text())["loss"]) == 6


def test_compare_digits_measures_curvature():
    """Largest eigenvalue and trace against the dense Hessian of a quadratic."""
    example = load("compare_digits")
    H = jnp.diag(jnp.linspace(0.1, 3.0, 12)).at[0, 1].set(0.3).at[1, 0].set(0.3)
    top, trace, error = example.curvature(
        lambda x, batch: x @ H @ x / 2, jnp.ones(12), (), jax.random.key(0)
    )
    assert abs(top - jnp.linalg.eigvalsh(H)[-1]) < 1e-4
    assert abs(trace - jnp.trace(H)) < 5 * error
    assert error < 0.2


def test_compare_digits_stops_at_a_lost_run(tmp_path):
    arguments = ["--smoke", "--scale-rates", "1e38", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="Stopped: the training loss became .*json"):
        load("compare_digits").main(arguments)
    log = json.loads((tmp_path / "history" / "SGD-0.json").read_text())
    assert log["loss"][-1] in ("nan", "inf")


@pytest.mark.slow
def test_compare_digits_reads_other_data(tmp_path, capsys, monkeypatch):
    example = load("compare_digits")
    few = dict(list(example.METHODS.items())[:1])
    monkeypatch.setattr(example, "METHODS", few)
    random = np.random.default_rng(0)
    labels = {"train": random.integers(10, size=1400), "test": np.arange(50) % 10}
    images = {  # digits that are easily told apart: bright at their number
        part: np.uint8(200 * np.eye(12)[y][:, None] + random.integers(40, size=12))
        for part, y in labels.items()
    }
    arrays = {f"{part}_images": x for part, x in images.items()}
    arrays |= {f"{part}_labels": y for part, y in labels.items()}
    np.savez(tmp_path / "data.npz", **arrays)
    options = ["--data", str(tmp_path / "data.npz"), "--smoke", "--seeds", "1"]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        results = example.main([*options, "--out", str(tmp_path)])
    # Runs are counted, not passes, of which the first one waits for the compiler.
    assert "| 0/1 [" in terminal.getvalue() and "| 1/1 [" in terminal.getvalue()
    assert "SGD, pass 6, loss" in terminal.getvalue()
    shown = capsys.readouterr().out
    assert "One seed allows no comparison" in shown
    assert "±" not in shown
    assert all(runs[0].accuracy[-1] > 99 for runs in results.values())
    del arrays["test_labels"]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(SystemExit, match="Rename or add: test_labels"):
        example.main(options)


def test_linen(monkeypatch):
    example = load("flax_linen")

    def observe(step, state, batch):
        after = step(state, batch)
        return (state, batch, after.batch_stats), after

    seen = {mode: record(monkeypatch, example, mode, observe) for mode in MODES}
    accuracy = example.main(["--smoke"])
    for mode in MODES:
        assert accuracy[mode] > ACCURACY
        for steps in updates(seen[mode]):
            # The statistics move as in one forward pass from the update's start.
            state, batch, _ = steps[0]
            aux = (state.batch_stats, jax.random.key(0))
            _, (once, _) = jax.jit(example.loss_fn)(
                state.params, first_minibatch(batch, mode), aux
            )
            for _, _, batch_stats in steps:
                chex.assert_trees_all_close(batch_stats, once, **TOLERANCE)


def test_nnx(monkeypatch):
    example = load("flax_nnx")

    def pure(model, kind):
        return nnx.as_pure(nnx.state(model, kind))

    def observe(step, model, optimizer, batch):
        before = nnx.clone(model)
        step(model, optimizer, batch)
        evaluated = example.eval_model(model, optimizer)
        return (before, batch, nnx.clone(model), evaluated), None

    seen = {mode: record(monkeypatch, example, mode, observe) for mode in MODES}
    accuracy = example.main(["--smoke"])
    for mode in MODES:
        assert accuracy[mode] > ACCURACY
        for steps in updates(seen[mode]):
            start, batch, _, _ = steps[0]
            once = nnx.clone(start)
            example.loss_fn(once, first_minibatch(batch, mode))
            for _, _, after, _ in steps:
                chex.assert_trees_all_close(
                    pure(after, nnx.BatchStat), pure(once, nnx.BatchStat), **TOLERANCE
                )
            # In the middle of a walk the anchor is evaluated, and the walk goes on.
            anchor = pure(start, nnx.Param)
            for _, _, after, evaluated in steps[:-1]:
                chex.assert_trees_all_equal(pure(evaluated, nnx.Param), anchor)
                kernel = pure(after, nnx.Param)["out"]["kernel"]
                assert not jnp.array_equal(kernel, anchor["out"]["kernel"])
    # Both saw the same minibatches and dropout masks, so they make the same updates.
    ends = [pure(updates(seen[mode])[0][-1][2], nnx.Param) for mode in MODES]
    chex.assert_trees_all_close(*ends, **TOLERANCE)


def test_interrupted_run_resumes_bit_for_bit(tmp_path):
    results = load("plain_jax").main(["--smoke", "--out", str(tmp_path)])
    assert results["accuracy"] > ACCURACY
    assert results["stopped_at"] > 0  # in the middle of a walk
    straight, resumed = (
        History.load(tmp_path / f"{run}.json", path=None)
        for run in ("straight", "resumed")
    )
    assert (straight.loss, straight.val_loss) == (resumed.loss, resumed.val_loss)
    assert len(straight.loss) == 5 * len(straight.eff_loss) == 10


def test_no_gradients():
    results = load("no_gradients").main(["--smoke"])
    for name, (run,) in results.items():
        assert (run["moved"] == 0) == (name == "Adam, backpropagation")
    accuracy = {name: run["accuracy"] for name, (run,) in results.items()}
    assert accuracy["ensemble Kalman, resampled"] > accuracy["Adam, backpropagation"]


def test_bayes_ivon(tmp_path, capsys):
    example = load("bayes_ivon")
    results = example.main(["--smoke", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert list(results) == ["SGD", "Adam", "IVON, 16 draws", "IVON, mean"]
    for name, found in results.items():
        assert f"\n{name} " in shown
        assert (found["accuracy"] > 80).all()  # of few examples and few updates
        assert all(len(values) == 2 for values in found.values())
    # Averaging over draws makes the predictions less sure than those of the mean.
    assert (results["IVON, 16 draws"]["nll"] != results["IVON, mean"]["nll"]).all()
    with Image.open(tmp_path / "bayes_ivon.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_bayes_ivon_measures_calibration():
    """Nine tenths sure and right three times of four; half sure and always right."""
    example = load("bayes_ivon")
    probabilities = np.zeros([6, 10])
    probabilities[:4, 0], probabilities[:4, 1] = 0.95, 0.05
    probabilities[4:, 2], probabilities[4:, 3] = 0.55, 0.45
    labels = np.array([0, 0, 0, 1, 2, 2])
    found = example.measures(probabilities, labels)
    assert found["accuracy"] == pytest.approx(100 * 5 / 6)
    assert found["ece"] == pytest.approx(100 * (4 * 0.2 + 2 * 0.45) / 6)
    nll = -(3 * np.log(0.95) + np.log(0.05) + 2 * np.log(0.55)) / 6
    assert found["nll"] == pytest.approx(nll)


@pytest.mark.slow  # the next two draw a part of it
def test_gallery(tmp_path, capsys):
    """Smoke pictures of every kind; the full set is what is in the documentation."""
    example = load("gallery")
    written = example.main(["--smoke", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == sorted(written)
    assert {path.stem for path in written} >= {"wobbly_rules", "flat_ends", "king"}
    for path in written:
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == (3 if path.suffix == ".gif" else 1)
            assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert shown.count("method: ") == len(example.FLAT)
    docs = EXAMPLES.parent / "docs"
    names = {n if "." in n else f"{n}.png" for n in example.pictures(example.FULL)}
    assert {path.name for path in (docs / "gallery").iterdir()} == names
    text = (docs / "gallery.md").read_text()
    assert all(f"(gallery/{name})" in text for name in names)


def test_gallery_reads_signals_ahead():
    """Against a loop over the formula, with two of three nodes between samples."""
    signal = np.sin(np.arange(30.0) / 3).astype(np.float32)
    rule = load("gallery").AheadInTime(0.9, nodes="geometric")
    steps, v = [], 0.0
    for t in range(30):
        moments = t + 0.9 * v * np.array([1 / 2, 3 / 4, 1.0])
        ahead = np.interp(moments, np.arange(30), signal, left=0, right=0)
        v = 0.9 * v + 0.25 * ahead @ np.array([1, 2, 4]) / 7
        steps.append(v)
    np.testing.assert_allclose(responses(rule.on(signal), signal), steps, atol=1e-5)


def test_gallery_of_a_few(tmp_path):
    example = load("gallery")
    out = ["--out", str(tmp_path)]
    example.main(["--smoke", "--only", "king", *out])
    assert [path.name for path in tmp_path.iterdir()] == ["king.png"]
    with pytest.raises(SystemExit, match="No picture's name starts so"):
        example.main(["--only", "queen", *out])


@pytest.mark.slow
def test_flatness_report(tmp_path, capsys):
    reports = load("flatness_report").main(["--smoke", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert list(reports) == ["Adam", "Entropy-Adam"]
    for name, found in reports.items():
        assert found.loss < 0.5 and found.top_eigenvalues.values[0] > 0
        assert str(found) in shown
        again = Report.from_json(tmp_path / f"{name}.json")
        assert again.to_json() == found.to_json()
    for picture in ("flatness_report.png", "landscape.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


@pytest.mark.slow
def test_sam_resnet(tmp_path, monkeypatch):
    """It learns; cut off after an epoch it goes on and ends with the same bits."""
    example = load("sam_resnet")
    data = example.load(None)
    straight = example.train("sam", data, 3, tmp_path / "straight")
    assert straight > 0.2  # guessing gives 0.1
    seen = []

    def cut_off(images, rng):
        seen.append(None)
        if len(seen) == 12:  # in the second epoch of eleven updates
            raise KeyboardInterrupt
        return augment(images, rng)

    augment = example.augment
    monkeypatch.setattr(example, "augment", cut_off)
    with pytest.raises(KeyboardInterrupt):
        example.train("sam", data, 3, tmp_path / "cut")
    monkeypatch.setattr(example, "augment", augment)
    example.train("sam", data, 3, tmp_path / "cut")

    def last(folder):
        with ocp.CheckpointManager(tmp_path / folder) as manager:
            return jax.tree.leaves(manager.restore(3, args=ocp.args.StandardRestore()))

    for ours, theirs in zip(last("straight"), last("cut"), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_augmentation_moves_by_a_pixel():
    """Padding moves no pixel in or out of the window but at its border."""
    example = load("sam_resnet")
    images = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype(np.float32)
    moved = example.augment(images, np.random.default_rng(1))
    assert moved.shape == images.shape
    inner = [m[2:6, 2:6] for m in moved]
    for image, part in zip(images, inner, strict=True):
        shifts = [image[i : i + 4, j : j + 4] for i in (1, 2, 3) for j in (1, 2, 3)]
        assert any(np.array_equal(part, shift) for shift in shifts)
