"""Eight CPU devices for every test, and float64 where a test asks for it."""

import gc
import os
from importlib.metadata import version
from pathlib import Path

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
if version("jaxlib").startswith("0.10."):  # others may not know them, and would abort
    # Half of the time to compile: nothing here is large enough to be fused with gain.
    flags.append("--xla_cpu_use_fusion_emitters=false")
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation; the benchmarks run what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one worker or run has compiled, another need not compile again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

collect_ignore = ["tutorial_for_tpu.py"]  # a script; it needs a TPU's compiler

import jax  # noqa: E402 - reads the environment
import pytest  # noqa: E402

# Tracing makes millions of small objects: looking for cycles among them as often as
# usual takes a tenth of the time.
gc.set_threshold(100_000, 10, 10)


def pytest_sessionfinish():
    """Leaves nothing to collect: xdist interrupts a worker that needs 5 s to end."""
    jax.clear_caches()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module():
    """JAX keeps what it has compiled, gigabytes if it were that of all modules."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision, for oracles and golden trajectories."""
    with jax.enable_x64(True):
        yield
