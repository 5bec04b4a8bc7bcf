"""The benchmarks' scripts, started as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {  # of all scripts
    path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").glob("*/*.py")
    if path.stem != "__init__"
}


def start(script, out, *options):
    """What became of it."""
    command = [sys.executable, "-m", MODULES[script], "--out", out, *options]
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        # The time goes into compilation.
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
