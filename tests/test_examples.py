"""The examples run in smoke mode and do what they say."""

import importlib.util
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
from flax import nnx

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
MODES = ("scanned", "transparent")
ACCURACY = 0.9  # of ten classes; guessing gives 0.1
# The same float32 formula in two programs that XLA compiles differently.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
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
    straight = json.loads((tmp_path / "straight.json").read_text())
    resumed = json.loads((tmp_path / "resumed.json").read_text())
    assert straight == resumed
    assert len(straight["loss"]) == 5 * len(straight["eff_loss"]) == 10
