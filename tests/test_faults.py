"""A full disk and files that are not whole: nothing that was saved is lost."""

import resource
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import checkpoint
from optax_flat.training import History

# Random, so that compression leaves most of it.
STATE, OTHER = (
    {"w": np.random.default_rng(seed).normal(size=20_000), "b": np.full(3, seed)}
    for seed in range(2)
)


@contextmanager
def largest_file(size):
    """The system refuses to write more into a file, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_is(found, state):
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_full_disk_and_history(tmp_path):
    path = tmp_path / "run.json"
    history = History(path=path)
    for epoch in range(5):
        history.record(epoch)
    with largest_file(path.stat().st_size + 3), pytest.raises(OSError):
        history.record(5.125)
    assert History.load(path, path=None).loss == [0, 1, 2, 3, 4]
    history.record(6.25)  # there is room again
    assert History.load(path, path=None).loss == [0, 1, 2, 3, 4, 5.125, 6.25]


def test_full_disk_and_checkpoint(tmp_path):
    with checkpoint.Checkpoint(tmp_path) as run:
        run.save(1, STATE, {"epoch": 1})
        with (
            largest_file(20_000),
            pytest.raises(OSError, match="checkpoint 2 could not be .* File too large"),
        ):
            run.save(2, OTHER, {"epoch": 2})
    left_over = tmp_path / "3.orbax-checkpoint-tmp"  # what a kill leaves
    left_over.mkdir()
    with checkpoint.Checkpoint(tmp_path) as run:
        found, log = run.restore(OTHER, {})
        assert_is(found, STATE)
        assert log == {"epoch": 1}
        run.save(2, OTHER, {"epoch": 2})  # waits for what is cleaned up meanwhile
        assert not left_over.exists()
        assert run.restore(STATE, {})[1] == {"epoch": 2}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    """What a reader does not notice that trusts the disk."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
def test_damaged_checkpoint(damage, tmp_path):
    """The one before is restored, loudly; without one, the run is refused."""
    with checkpoint.Checkpoint(tmp_path) as run:
        for epoch in (1, 2, 3):
            run.save(epoch, STATE if epoch == 2 else OTHER, {"epoch": epoch})
    assert sorted(step.name for step in tmp_path.iterdir()) == ["2", "3"]

    def largest(step):
        files = (file for file in (tmp_path / step).rglob("*") if file.is_file())
        return max(files, key=lambda file: file.stat().st_size)

    damage(largest("3"))
    with checkpoint.Checkpoint(tmp_path) as run:
        with pytest.warns(UserWarning, match="from checkpoint 2 .* 3: "):
            found, log = run.restore(OTHER, {})
        assert_is(found, STATE)
        assert log == {"epoch": 2}
        run.save(3, OTHER, {"epoch": 3})  # once more
    with warnings.catch_warnings(), checkpoint.Checkpoint(tmp_path) as run:
        warnings.simplefilter("error")
        assert_is(run.restore(STATE, {})[0], OTHER)
    for step in ("2", "3"):
        damage(largest(step))
    refused = pytest.raises(ValueError, match="can be restored.*Delete the folder")
    with checkpoint.Checkpoint(tmp_path) as run, refused:
        run.restore(OTHER, {})
    assert sorted(step.name for step in tmp_path.iterdir()) == ["2", "3"]


def test_checkpoint_of_another_structure_is_refused(tmp_path):
    with checkpoint.Checkpoint(tmp_path) as run:
        run.save(1, STATE, {})
        with pytest.raises(ValueError, match="another structure.*Delete the folder"):
            run.restore({"w": STATE["w"], "c": STATE["b"]}, {})


def test_digest_sees_every_bit():
    key = jax.random.key(0)
    trees = [
        {"a": np.float32([0, 1]), "key": key},
        {"a": np.float32([-0.0, 1]), "key": key},
        {"a": np.float64([0, 1]), "key": key},
        {"a": np.float32([[0, 1]]), "key": key},
        {"b": np.float32([0, 1]), "key": key},
        {"a": np.float32([0, 1]), "key": jax.random.key(1)},
    ]
    assert len({checkpoint.digest(tree) for tree in trees}) == len(trees)
    same = {"key": key, "a": jax.numpy.float32([0, 1])}
    assert checkpoint.digest(same) == checkpoint.digest(trees[0])
