"""Two processes train as one, one is killed, and what is left goes on elsewhere."""

import importlib.util
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from problem import tolerance

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "multihost.py"
UPDATES, SURVIVED = 4, 2


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("examples.multihost", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(out, *options):
    """Both processes, one device each; gives what they exit with and say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, EXAMPLE, "--coordinator", address, "--processes", 2]
    command += ["--updates", UPDATES, "--out", out, *options]
    both = [
        subprocess.Popen(
            [str(part) for part in [*command, "--process", i]],
            env={**os.environ, "XLA_FLAGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], said


def assert_same(found, expected):
    for name, params in expected.items():
        for leaf, value in params.items():
            np.testing.assert_allclose(
                found[name][leaf], value, **tolerance(np.float32), err_msg=name
            )


@pytest.mark.slow
def test_two_processes(example, tmp_path):
    """A killed process ends the other; both resume, here and on eight devices."""
    codes, said = start(tmp_path, "--die-after", SURVIVED)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None), said[0]
    assert "Error" in said[0]
    assert not (tmp_path / "params.npz").exists()

    optimizers = example.optimizers()
    straight = example.train(optimizers, tmp_path / "straight", UPDATES)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "copy")
    assert_same(example.train(optimizers, tmp_path / "copy", UPDATES), straight)
    codes, said = start(tmp_path)
    assert codes == [0, 0], said
    with np.load(tmp_path / "params.npz") as file:
        resumed = {
            name: {leaf: file[f"{name}/{leaf}"] for leaf in params}
            for name, params in straight.items()
        }
    assert_same(resumed, straight)
