"""Every method and every tutorial, compiled for TPUs and GPUs that are not there."""

import os
import subprocess
import sys

import pytest
from catalogue import METHODS, WALK_MODES
from scripts import ROOT

from benchmarks.speed import accelerators

TUTORIALS = sorted(
    path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.stem != "index"
)


def needs(machine):
    """Skips where there is no compiler of a machine."""
    package = accelerators.MACHINES[machine].package
    return pytest.mark.skipif(
        accelerators.version(package) is None,
        reason=f"needs {package}, of the extra `accelerators`",
    )


def start(*command):
    """A process of its own, without the suite's options for quick compilation."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_"))
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_benchmark_compiles_every_method():
    expected = {
        f"{method.name}_transparent" if mode == "transparent" else method.name
        for method in METHODS
        for mode in (method.modes if method.modes == WALK_MODES else [""])
    }
    known = accelerators.catalogue()
    assert {name for name, method in known.items() if method.is_public} == expected
    assert set(accelerators.SOME) <= known.keys()


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(
        accelerators, "version", {"libtpu": "1.0", "jax-cuda13-plugin": None}.get
    )
    assert accelerators.with_compilers(["v5e-8", "h100-8"]) == ["v5e-8"]
    said = capsys.readouterr().err
    assert "h100-8 is left out: jax-cuda13-plugin is not installed" in said
    assert "optax_flat[accelerators]" in said
    with pytest.raises(SystemExit, match="no compiler"):
        accelerators.with_compilers(["h100-8"])
