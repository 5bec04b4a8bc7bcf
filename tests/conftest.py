"""Eight CPU devices for every test, and float64 where a test asks for it."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation; the benchmarks run what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


@pytest.fixture
def x64():
    """Double precision, for oracles and golden trajectories."""
    with jax.enable_x64(True):
        yield
