"""The benchmarks' scripts, started as a user would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(script, out, *options):
    """What became of it; its folder is found."""
    (path,) = (ROOT / "benchmarks").glob(f"*/{script}.py")
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    command = [sys.executable, "-m", module, "--out", out, *options]
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
