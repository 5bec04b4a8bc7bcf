"""Runs a tutorial on the CPU, and compiles for TPUs whatever it jits.

    python tests/tutorial_for_tpu.py PAGE

Prints how many programs that were. Arrays that lie on several devices go to as many
chips, along the same axes.
"""

import functools
import os
import re
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.speed import accelerators  # noqa: I001 - reads no environment later

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from test_docs import CELL, small

CHIPS = np.array(accelerators.Machine("tpu", "libtpu", "v5e:2x2").devices())
on_cpu = jax.jit
programs = []


def place(x):
    """An array's shape, on the chip or the chips."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | float | int):
        return x
    there = getattr(x, "sharding", None)
    sharding = SingleDeviceSharding(CHIPS[0])
    if isinstance(there, NamedSharding):
        mesh = there.mesh
        chips = CHIPS[: mesh.size].reshape(mesh.devices.shape)
        sharding = NamedSharding(Mesh(chips, mesh.axis_names), there.spec)
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def jit(fn=None, **options):
    """`jax.jit`; before the first call for any shapes, a compilation for the chips."""
    if fn is None:
        return functools.partial(jit, **options)
    jitted, for_chips, done = on_cpu(fn, **options), on_cpu(fn, **options), set()

    @functools.wraps(fn)
    def call(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        shapes = jax.tree.map(place, (args, kwargs))
        key = str(shapes)
        if key not in done and not any(isinstance(x, jax.core.Tracer) for x in leaves):
            done.add(key)
            args_there, kwargs_there = shapes
            for_chips.lower(*args_there, **kwargs_there).compile()
            programs.append(getattr(fn, "__name__", ""))
        return jitted(*args, **kwargs)

    return call


def main(page):
    matplotlib.use("agg")
    jax.jit = jit
    text, namespace = page.read_text(), {"__name__": "__main__"}
    for match in CELL.finditer(text):
        options, code = match.groups()
        code = small(code) if "parameters" in options else code
        code = re.sub(r"^%.*$", "", code, flags=re.M)  # IPython's
        line = text.count("\n", 0, match.start(2))
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    print(len(programs))


main(Path(sys.argv[1]))
