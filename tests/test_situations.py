"""The engine of the situations: tuning, differences, networks, and the scripts."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scripts import start

from benchmarks import models, situations
from benchmarks.training import summary, transformer


def search(score):
    """Tunes a method of three second settings, as `tune` does."""
    scores = {}
    while candidate := situations.next_try(scores, 3):
        assert candidate not in scores
        scores[candidate] = score(candidate)
    best = max(scores, key=lambda candidate: scores[candidate])
    return best, scores


@pytest.mark.parametrize("optimum", [-3, -1, 0, 2, 4])
def test_tuning_ends_between_a_smaller_and_a_larger_rate(optimum):
    best, scores = search(lambda c: -abs(c.step - optimum) - c.second)
    assert abs(best.step - optimum) <= 1
    assert situations.has_both_sides(best, scores)
    limit = situations.TRIES + situations.EXTRA
    assert situations.TRIES <= len(scores) <= limit


@pytest.mark.parametrize("second", [0, 2])
def test_every_method_has_as_many_tries(second):
    """The middle settings or others: where the start was good, none has more."""
    best, scores = search(lambda c: -abs(c.step) - (c.second - second) ** 2)
    assert best == (0, second)
    assert len(scores) == situations.TRIES


def test_tuning_that_never_turns_is_told():
    best, scores = search(lambda c: c.step)
    assert len(scores) == situations.TRIES + situations.EXTRA
    assert not situations.has_both_sides(best, scores)


def test_rates_of_a_grid_of_thirds():
    method = situations.CATALOGUES["sgd"]["sgd"]
    rate, second = situations.Candidate(2, 1).of(method)
    assert rate == pytest.approx(3 * method.start)
    assert second == method.seconds[1]
    choice = situations.Choice(situations.Candidate(2, 1), 1.0, 7, at_edge=False)
    rate, _ = situations.scaled(choice, 16.0).candidate.of(method)
    assert rate == pytest.approx(48 * method.start)


def test_interval_agrees_with_scipy():
    of, base = np.random.default_rng(0).normal(size=(2, 5))
    _, low, high = situations.interval(list(of - base))
    expected = scipy.stats.ttest_rel(of, base).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), expected)
    found = [situations.verdict(*bounds) for bounds in ((1, 2), (-1, 2), (-2, -1))]
    assert found == ["better", "same", "worse"]
    assert situations.verdict(*situations.interval([3.0])[1:]) == "same"


def test_all_methods_see_the_same_minibatches():
    cell = situations.Cell(
        "cell", None, None, examples=24, gradients=40, batch=8, points=2
    )  # fmt: skip
    found = {
        name: situations.ordered(cell, method, 3)
        for name, method in situations.CATALOGUES["sgd"].items()
    }
    assert found["sgd"].shape == (2, 20, 8)
    assert found["sam"].shape == (2, 10, 8)  # both gradients of one minibatch
    assert found["entropy_sgd"].shape == (2, 1, 20, 8)
    assert found["parle"].shape == (2, 4, 4, 5, 2)  # four share each minibatch
    expected = found["sgd"].reshape(-1, 8)
    np.testing.assert_array_equal(found["entropy_sgd"].reshape(-1, 8), expected)
    np.testing.assert_array_equal(found["sam"].reshape(-1, 8), expected[:20])
    shared = found["parle"].swapaxes(2, 3).reshape(-1, 8)
    np.testing.assert_array_equal(shared, expected)
    for epoch in expected[:39].reshape(-1, 24):
        assert sorted(epoch) == list(range(24))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_every_method_learns(base):
    images = jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    labels = (images.reshape(64, 4)[:, 0] > 0).astype(jnp.int32)
    data = situations.Data(*[(images, labels)] * 3)
    task = situations.image_task(models.mlp((2, 2, 1), (8,), 2))
    cell = situations.Cell(
        "cell", task, lambda seed: data, examples=64, gradients=2000, batch=8, base=base
    )
    before = task.measure(task.init(jax.random.key(1)), data.test)["accuracy"]
    assert before < 90
    for name, method in situations.CATALOGUES[base].items():
        candidate = situations.Candidate(1, len(method.seconds) // 2)
        trained, _, row = situations.run(cell, name, candidate, 1)
        assert row["gradient_evaluations"] == 2000
        accuracy = task.measure(trained.params, data.test)["accuracy"]
        assert accuracy > 90, name
        last = jax.tree.map(lambda x: x[-1], trained.points)
        jax.tree.map(np.testing.assert_array_equal, last, trained.params)


def networks():
    shape, inputs = (6, 6, 2), jax.random.normal(jax.random.key(1), (5, 6, 6, 2))
    tokens = jax.random.randint(jax.random.key(1), (5, 7), 0, 11)
    return {
        "mlp": (models.mlp(shape, (8,), 3), inputs, (5, 3)),
        "cnn": (models.cnn(shape, (4, 8), 8, 3), inputs, (5, 3)),
        "resnet": (models.resnet(shape, (4, 8), 1, 3), inputs, (5, 3)),
        "vit": (models.vit(shape, 4, 16, 1, 3), inputs, (5, 3)),
        "transformer": (models.transformer(11, 8, 16, 1), tokens, (5, 7, 11)),
    }


@pytest.mark.parametrize(
    "name",
    ["mlp", "cnn", "resnet"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("vit", "transformer")],
)
def test_networks(name):
    """Shapes, logits of order 1, a gradient everywhere, and examples on their own."""
    model, inputs, shape = networks()[name]
    params = model.init(jax.random.key(0))
    logits = jax.jit(model.apply)(params, inputs)
    assert logits.shape == shape
    assert 0.1 < float(logits.std()) < 4
    np.testing.assert_allclose(
        logits[2:3], model.apply(params, inputs[2:3]), rtol=1e-4, atol=1e-5
    )
    moved = jax.tree.map(lambda x: x + 0.1, params)  # away from kernels that are zero
    grads = jax.grad(lambda p: (model.apply(p, inputs) ** 2).sum())(moved)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def test_the_transformer_does_not_see_what_follows():
    model, tokens, _ = networks()["transformer"]
    params = model.init(jax.random.key(0))
    logits, changed = (
        model.apply(params, t) for t in (tokens, tokens.at[:, 4].add(1) % 11)
    )
    np.testing.assert_array_equal(logits[:, :4], changed[:, :4])
    assert bool(jnp.all(jnp.any(logits[:, 4:] != changed[:, 4:], axis=-1)))


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_a_convolution(stride):
    image, kernel = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 7, 7, 3), (3, 3, 3, 4)])
    )
    expected = jax.lax.conv_general_dilated(
        image, kernel, (stride, stride), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    found = models.patches(image, stride) @ kernel.reshape(27, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_windows_have_the_next_character():
    found = transformer.windows(np.arange(10), 3)
    np.testing.assert_array_equal(found, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]])


SCRIPTS = {
    "small_data": (["sgd", "sam"], ["mlp-20"]),
    "transformer": (["adamw", "entropy_adam"], ["chars", "vit"]),
    "noisy_labels": (["adamw", "ema"], ["mlp-40"]),
    "large_batches": (["sgd", "sgd_scaled", "parle"], ["batch-4", "batch-8"]),
    "quantize_later": (["sgd", "sam"], ["mlp"]),
    "uncertainty": (["sgd", "sgd_tempered", "ivon", "ensemble"], ["mlp"]),
    "recurrent": (["adamw", "entropy_adam_noiseless"], ["lstm"]),
}


def read_lines(folder):
    return [json.loads(x) for x in (folder / "summary.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=[] if script == "small_data" else pytest.mark.slow)
        for script in SCRIPTS
    ],
)
def test_scripts_run_and_resume(script, tmp_path):
    methods, cells = SCRIPTS[script]
    options = ["--smoke", "--seeds", 2, "--methods", ",".join(methods)]
    folder = tmp_path / script
    done = start(script, folder, *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "rows.json").read_text())
    names = {f"{cell}/{name}" for cell in cells for name in methods}
    assert len(rows) == 2 * len(names)
    assert {row["method"] for row in rows} == names
    for cell in cells:
        of = [row for row in rows if row["cell"] == cell]
        assert len({row["gradient_evaluations"] for row in of}) == 1
    lines = read_lines(folder)
    found = dict.fromkeys((x["cell"], x["method"]) for x in lines)  # of any measure
    assert list(found) == [(cell, name) for cell in cells for name in methods]
    for line in lines:
        assert math.isfinite(line["mean"])
        assert line["verdict"] in ("better", "same", "worse", "baseline")
        expected = 0 if line["method"].endswith("_scaled") else 7
        assert line["tries"] >= expected
    assert (folder / "table.md").read_text() in done.stdout
    assert (folder / f"{script}.png").read_bytes().startswith(b"\x89PNG")

    # As if the run had been cut off before its last row was written.
    (folder / "rows.json").write_text(json.dumps(rows[:-1]))
    tried = (folder / "selection" / "rows.json").read_bytes()
    assert start(script, folder, *options).returncode == 0
    again = json.loads((folder / "rows.json").read_text())
    assert again[:-1] == rows[:-1]
    assert {**again[-1], "seconds": 0} == {**rows[-1], "seconds": 0}
    assert (folder / "selection" / "rows.json").read_bytes() == tried


def test_summary_compares_with_the_better_baseline_of_each_cell(tmp_path):
    """Seed by seed, averaged over the cells; less may be more, decay may be tuned."""
    values = {  # cell, method: of three seeds
        ("few-a", "sgd"): (80.0, 81.0, 82.0),
        ("few-a", "adamw"): (70.0, 71.0, 72.0),
        ("few-a", "sam"): (82.0, 83.5, 84.0),
        ("few-b", "sgd"): (50.0, 50.0, 50.0),
        ("few-b", "adamw"): (60.0, 60.0, 60.0),
        ("few-b", "sam"): (60.0, 60.5, 61.0),
        ("few-b", "sam_decayed"): (0.0, 0.0, 0.0),  # worse by validation
        ("few-b", "swa"): (99.0, 99.0, 99.0),  # in one cell only
    }
    values["few-a", "sam_decayed"] = values["few-a", "sam"]
    values["few-a", "sam"] = (0.0, 0.0, 0.0)
    scores = {"few-a/sam": 1.0, "few-a/sam_decayed": 2.0}
    scores |= {"few-b/sam": 2.0, "few-b/sam_decayed": 1.0}
    for script, measure, sign in (("small_data", "accuracy", 1),
                                  ("recurrent", "perplexity", -1)):  # fmt: skip
        rows = [
            {"method": f"{cell}/{name}", "cell": cell, "optimizer": name, "seed": seed,
             measure: sign * value}
            for (cell, name), of in values.items()
            for seed, value in enumerate(of)
        ]  # fmt: skip
        (tmp_path / script).mkdir()
        (tmp_path / script / "rows.json").write_text(json.dumps(rows))
        choices = {name: {"score": score} for name, score in scores.items()}
        (tmp_path / script / "selection.json").write_text(json.dumps(choices))
    done = start("summary", tmp_path / "summary", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "summary" / "rows.json").read_text())
    gains = np.array([[2.0, 2.5, 2.0], [0.0, 0.5, 1.0]]).mean(0)
    half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(gains)
    for script in ("small_data", "recurrent"):
        of = {x["method"]: x for x in found if x["script"] == script}
        assert set(of) == {"SGD", "Adam(W)", "SAM"}
        assert of["SAM"]["gain"] == pytest.approx(gains.mean())
        assert of["SAM"]["low"] == pytest.approx(gains.mean() - half)
        assert of["SAM"]["verdict"] == "better"
        assert of["SGD"]["gain"] == of["Adam(W)"]["gain"] == -5.0
        assert of["SGD"]["verdict"] == "worse"
    assert (tmp_path / "summary" / "table.md").read_text() in done.stdout


def test_cells_that_cancel_do_not_make_an_interval_narrow():
    gains = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])  # in the mean 1 for each seed
    mean, low, high = summary.wider_interval(gains)
    half = scipy.stats.t.ppf(0.975, 4) * (1 / 6) ** 0.5  # two variances 1 / 3, over 4
    np.testing.assert_allclose([mean, low, high], [1.0, 1.0 - half, 1.0 + half])
    alone = gains[:1]
    np.testing.assert_allclose(
        summary.wider_interval(alone), situations.interval(alone[0].tolist())
    )
    together = np.array([[0.0, 1.0, 5.0], [0.0, 1.0, 5.0]])  # a seed moves both
    np.testing.assert_allclose(
        summary.wider_interval(together), situations.interval(together[0].tolist())
    )
