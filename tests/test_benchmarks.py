"""The benchmark scripts, started in their smoke setting as a user would."""

import json
import math

import chex
import jax
import numpy as np
import pytest
import scipy.stats
from scripts import MODULES, ROOT, start

from benchmarks import checkpoint, correlation, harness, images
from benchmarks.faults import kills
from benchmarks.speed import step_time
from benchmarks.training import ptb_lstm

# Started a second time; the others would do the same, and compile for longer.
RESUMED = ("update_time",)
METHODS = {
    "step_time": ["mlp/entropy/scan", "compile/sam/5"],
    "sam_time": ["sam", "looksam", "sgd_swa"],
    "update_time": ["coolmomentum_temperature", "sgld_rademacher"],
    "mnist_mlp": ["adam", "entropy_sgd"],
    "mnist_parle": ["elastic_averaging", "parle"],
    "cifar_resnet20": ["coolmomentum_linear"],
    "ptb_lstm": ["coolmomentum", "entropy_adam"],
    "ensemble_time": ["ensemble_kalman"],
    "mnist_ensemble": ["adam_perturbation", "adam_activity", "eki"],
    "flatness_time": ["top_eigenvalue", "top_eigenvalue_few_images"],
    "flat_study": ["sgd", "entropy_sgd", "asam"],
    "label_noise": ["sgd", "friendly_sam", "entropy_sgd"],
    "scaling": ["sgd/strong/1", "sgd/strong/8"],
    "memory": ["sgd", "sgld"],
    "compile_time": ["entropy_sgd_noiseless", "entropy_sgd_normal"],
}
# What the rows are called, if not like the methods.
ROWS = {
    "flat_study": "random-noisy-mlp/{}/x1",
    "label_noise": "random-40/{}",
    "compile_time": "{}/4",
}


@pytest.mark.parametrize("script", MODULES)
def test_says_how_it_is_started(script):
    module = MODULES[script]
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    assert f"\n    python -m {module}" in text.split('"""')[1]


def read_rows(out):
    rows = json.loads((out / "rows.json").read_text())
    return {(row["method"], row["seed"]): row for row in rows}


def numbers(row):
    for value in row.values():
        if isinstance(value, list):
            yield from value
        elif not isinstance(value, str):
            yield value


# Each script in `make test-all`; here those that show most of the common mechanism.
QUICK = ("update_time", "scaling")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=[] if script in QUICK else pytest.mark.slow)
        for script in METHODS
    ],
)
def test_runs_and_resumes(script, tmp_path):
    methods = METHODS[script]
    named = ROWS.get(script, "{}")
    options = ["--smoke", "--seeds", 1, "--methods", ",".join(methods)]
    done = start(script, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path)
    assert list(rows) == [(named.format(method), 0) for method in methods]
    for row in rows.values():
        assert {"gradient_evaluations", "forward_passes", "seconds"} <= row.keys()
        assert all(math.isfinite(value) for value in numbers(row))
    trained = [row for row in rows.values() if "compile" not in row["method"]]
    equal = len({row["gradient_evaluations"] for row in trained}) == 1
    assert equal == (script != "sam_time")  # which compares at equal minibatches
    text = (tmp_path / "table.md").read_text()
    assert text in done.stdout
    assert all(f"| {method}" in text for method in methods)
    assert (tmp_path / f"{script}.png").read_bytes().startswith(b"\x89PNG")

    if script not in RESUMED:
        return
    # As if the run had been cut off before its second row was written.
    lost = (methods[1], 0)
    kept = [row for pair, row in rows.items() if pair != lost]
    (tmp_path / "rows.json").write_text(json.dumps(kept))
    done = start(script, tmp_path, *options)
    assert done.returncode == 0, done.stderr
    again = read_rows(tmp_path)
    assert again.keys() == rows.keys()
    assert [row for pair, row in again.items() if pair != lost] == kept
    assert again[lost]["seconds"] != rows[lost]["seconds"]


@pytest.mark.slow
def test_kills(tmp_path):
    """Killed and resumed, a run ends as if it had not been; its History as well."""
    method = "entropy_sgd/transparent"
    done = start("kills", tmp_path, "--smoke", "--methods", method, "--kills", 2)
    assert done.returncode == 0, done.stderr
    row = read_rows(tmp_path)[method, 0]
    assert row["kills"] == 2
    doing = ("starting", "updating", "writing_history", "writing_checkpoint")
    assert sum(row[name] for name in doing) == 2
    assert row["bit_equal_ends"] == row["runs"] > 0
    assert row["history_faults"] == 0
    assert (tmp_path / "table.md").read_text() in done.stdout
    assert (tmp_path / "kills.png").read_bytes().startswith(b"\x89PNG")


def test_faults_of_a_history_are_found(tmp_path):
    path = tmp_path / "history.json"
    expected = [4.0, 3.0, 2.0]

    def is_faulty(losses, recorded):
        history = kills.History(path=path)
        for loss in losses:
            history.record(loss)
        return kills.is_faulty(path, expected, recorded)

    assert not kills.is_faulty(path, expected, 0)
    assert kills.is_faulty(path, expected, 1)  # recorded, but there is no file
    assert not is_faulty([4.0, 3.0], 2)
    assert not is_faulty([4.0, 3.0], 1)  # killed behind the write
    assert is_faulty([4.0, 3.0], 3)  # a gap at the end
    assert is_faulty([4.0, 2.0], 2)  # or inside
    assert is_faulty([4.0, 4.0, 3.0], 3)  # a repeat
    assert is_faulty([*expected, 2.0], 3)
    path.write_text(path.read_text()[:20])  # torn
    assert kills.is_faulty(path, expected, 0)


@pytest.mark.parametrize("script", ["step_time"])  # all share the mechanism
def test_refuses_rows_of_other_settings(script, tmp_path):
    (tmp_path / "rows.json").write_text('[{"method": "a", "seed": 0}]')
    (tmp_path / "settings.json").write_text('{"batch": 17}')
    done = start(script, tmp_path, "--smoke")
    assert done.returncode != 0
    assert "batch was 17, is now " in done.stderr
    assert "Choose another --out" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_mnist_mlp_uses_the_selected_rate(tmp_path):
    options = ["--smoke", "--methods", "sgd", "--epochs", 1, "--seeds", 1]
    done = start("mnist_mlp", tmp_path, *options, "--select")
    assert done.returncode == 0, done.stderr
    selected = json.loads((tmp_path / "selection.json").read_text())
    errors = {
        pair[0]: row["error_percent"]
        for pair, row in read_rows(tmp_path / "selection").items()
    }
    assert errors[f"sgd/{selected['sgd']}"] == min(errors.values())
    assert len(errors) == 4


def test_missing_data_is_a_clear_error(tmp_path):
    done = start("mnist_mlp", tmp_path, "--data", tmp_path / "none.npz")
    assert done.returncode != 0
    assert "there is no file" in done.stderr
    assert "Pass --data FILE" in done.stderr
    assert "Traceback" not in done.stderr


def test_load_images(tmp_path):
    path = tmp_path / "images.npz"
    made = images.random_images((2, 2), 3, 4)
    np.savez(path, **made._asdict())
    loaded = images.load_images(path)
    for found, expected in zip(loaded, made, strict=True):
        np.testing.assert_array_equal(found, expected)
    np.savez(path, x_train=made.train_images, test_labels=made.test_labels)
    with pytest.raises(SystemExit, match=r"x_train.*missing: train_images"):
        images.load_images(path)
    with pytest.raises(SystemExit, match="nothing was given"):
        images.load_images(None)


def test_unknown_method_names_the_known_ones(capsys):
    options = harness.parser("Title.", ["a", "b"], seeds=1, out="out", data=False)
    assert options.parse_args(["--methods", "b"]).methods == ["b"]
    with pytest.raises(SystemExit):
        options.parse_args(["--methods", "a,c"])
    assert "unknown c; choose from a, b" in capsys.readouterr().err


def test_rows_are_kept_and_not_repeated(tmp_path):
    costs = {"gradient_evaluations": 1, "forward_passes": 0, "seconds": 0.5}
    rows = harness.Rows(tmp_path, {"size": (1, 2)})
    pairs = []
    for method, seed in rows.pending(["a", "b"], range(2)):
        pairs.append((method, seed))
        rows.record(method, seed, costs)
    assert pairs == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    rows = harness.Rows(tmp_path, {"size": (1, 2)})
    assert list(rows.pending(["c", "a"], range(2))) == [("c", 0), ("c", 1)]
    with pytest.raises(ValueError, match="nan"):
        rows.record("c", 0, {**costs, "loss": math.nan})
    assert len(read_rows(tmp_path)) == 4
    with pytest.raises(KeyError, match="forward_passes"):
        rows.record("c", 0, {"gradient_evaluations": 1})


def test_table():
    costs = {"gradient_evaluations": 7, "seconds": 2.0}
    rows = [{"method": "a", "loss": loss, **costs} for loss in (1.0, 1.02, 1.07)]
    rows.append({"method": "b", **costs})
    lines = harness.table(rows, ["loss"]).splitlines()
    assert lines[0] == "| method | loss | gradient evaluations | seconds | seeds |"
    assert lines[2:] == ["| a | 1.030 ± 0.036 | 7 | 2 | 3 |", "| b | - | 7 | 2 | 1 |"]


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    """After an interruption a run ends as if there had been none."""
    text, sizes = ptb_lstm.random_text(), ptb_lstm.SMOKE

    class Interrupted(ptb_lstm.Checkpoint):
        def save(self, step, state, log):
            super().save(step, state, log)
            if step == 2:
                raise KeyboardInterrupt

    def train(kind, folder):
        with kind(tmp_path / folder) as checkpoint:
            row = ptb_lstm.train(
                ptb_lstm.METHODS["entropy_adam"], text, sizes, seed=0,
                checkpoint=checkpoint,
            )  # fmt: skip
        row.pop("seconds")
        return row

    straight = train(ptb_lstm.Checkpoint, "straight")
    with pytest.raises(KeyboardInterrupt):
        train(Interrupted, "cut")
    assert train(ptb_lstm.Checkpoint, "cut") == straight
    assert len(straight["valid_perplexities"]) == 4


def test_checkpoint(tmp_path):
    """State and log come back together; without a file, what was given."""
    import jax
    import jax.numpy as jnp

    state = {"x": jnp.arange(3.0), "key": jax.random.key(1)}
    fresh = {"x": jnp.zeros(3), "key": jax.random.key(0)}
    with checkpoint.Checkpoint(tmp_path / "run") as run:
        assert run.restore(fresh, {"epoch": 0}) == (fresh, {"epoch": 0})
        run.save(1, fresh, {"epoch": 1})
        run.save(2, state, {"epoch": 2})
    with checkpoint.Checkpoint(tmp_path / "run") as run:
        found, log = run.restore(fresh, {"epoch": 0})
    assert log == {"epoch": 2}
    np.testing.assert_array_equal(found["x"], state["x"])
    assert found["key"] == state["key"]
    run.delete()
    assert not (tmp_path / "run").exists()


def test_kendalls_tau_agrees_with_scipy():
    random = np.random.default_rng(0)
    x, y = random.integers(6, size=(2, 20))  # with ties
    counts = np.stack([np.ones(20), np.arange(20) % 3])
    expected = [
        scipy.stats.kendalltau(*(np.repeat(z, count.astype(int)) for z in (x, y)))[0]
        for count in counts
    ]
    np.testing.assert_allclose(correlation.taus(x, y, counts), expected)
    np.testing.assert_array_equal(correlation.taus(x, 0 * y, counts), 0.0)


def test_correlations_compare_only_within_cells():
    """In either cell the gap falls with the measure; over both together it rises."""
    cells = {
        cell: [
            {"a": shift + i, "gap": shift - i, "configuration": f"x{i}"}
            for i in range(10)
        ]
        for cell, shift in {"low": 0, "high": 100}.items()
    }
    found = correlation.correlations(cells, {"all": list(cells)}, ["a"], ["gap"])
    assert [row["cell"] for row in found] == ["all", "low", "high"]
    assert all(row["tau"] == row["low"] == row["high"] == -1 for row in found)
    assert "| a | -1.00 [-1.00, -1.00] |" in correlation.markdown(found, ["all"], "tau")


def test_intervals_are_those_of_configurations():
    """Three equal seeds of each configuration are worth no more than one."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(12, 2))
    runs = [
        {"a": a, "gap": gap, "configuration": f"x{i}"}
        for i, (a, gap) in enumerate(numbers)
    ]
    once, thrice = (
        correlation.correlations({"cell": rows}, {}, ["a"], ["gap"])[0]
        for rows in (runs, 3 * runs)
    )
    # tau-b counts pairs of equal runs as ties, of both kinds alike
    assert abs(thrice["tau"] - once["tau"]) < 0.1
    width = {id(row): row["high"] - row["low"] for row in (once, thrice)}
    assert width[id(thrice)] > 0.8 * width[id(once)]


def test_partial_tau():
    """What a control explains is gone: x and y follow c, with noise of their own."""
    random = np.random.default_rng(0)
    rows = [
        {"x": c + a, "y": c + b, "c": c, "configuration": str(c)}
        for c, a, b in zip(range(200), *random.normal(size=(2, 200)), strict=True)
    ]
    plain, given = (
        correlation.correlations({"cell": rows}, {}, ["x"], ["y"], control=control)[0]
        for control in (None, "c")
    )
    assert plain["tau"] > 0.9
    assert abs(given["tau"]) < 0.2


def test_lenet_as_products_is_lenet():
    sizes = step_time.SMOKE
    params, (images, labels) = step_time.problem("lenet", sizes, 1, seed=0)
    losses = [step_time.loss_of("lenet", sizes, products) for products in (False, True)]
    found = [jax.value_and_grad(f)(params, (images[0], labels[0])) for f in losses]
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)
