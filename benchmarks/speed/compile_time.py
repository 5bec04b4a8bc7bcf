"""What a user waits for at the first update: compilation for hundreds of leaves.

Params of 300 and of 3,000 leaves, each a small matrix of one of twelve shapes as in a
network of many equal layers, and a gradient that is elementwise, so that what takes
long is the optimizer. Programs are compiled in turns, with XLA's default options and
without a cache; a row is the first half of that wait, tracing and lowering, and the
second, XLA. `ratio` is XLA's time relative to that of the walk without noise in the
same turn. `instructions_per_leaf` counts those of the optimized program, which do not
depend on the machine.

    python -m benchmarks.speed.compile_time
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_flat
from benchmarks.harness import Row, Rows, bars, parser, table, write_table

LEAVES = (300, 3000)
SMOKE_LEAVES = (4,)
LENGTH = 20  # gradients of a walk
REFERENCE = "entropy_sgd_noiseless"
MEASURES = ("ratio", "xla_seconds", "trace_seconds", "instructions_per_leaf")


def entropy_sgd(**settings: Any) -> Any:
    """A walk of 20 gradients."""
    return optax_flat.entropy_sgd(1.0, num_steps=LENGTH, key=0, **settings)


def sampler(name: str, **settings: Any) -> Any:
    """A sampler at a temperature."""
    return getattr(optax_flat, name)(0.1, temperature=1e-3, key=0, **settings)


def optax_sam() -> Any:
    """Two gradients, Optax' own."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return optax.contrib.sam(optax.sgd(0.1), ascent, opaque_mode=True)


PROGRAMS: dict[str, tuple[Callable[[], Any], int]] = {
    "adam": (lambda: optax.adam(1e-3), 1),
    "optax_sam": (optax_sam, 2),
    REFERENCE: (partial(entropy_sgd, noise=0.0), LENGTH),
    "entropy_sgd_rademacher": (partial(entropy_sgd, noise_kind="rademacher"), LENGTH),
    "entropy_sgd_normal": (entropy_sgd, LENGTH),
    "transparent_noiseless": (partial(entropy_sgd, noise=0.0, mode="transparent"), 1),
    "transparent_normal": (partial(entropy_sgd, mode="transparent"), 1),
    "sam": (lambda: optax_flat.sam(optax.sgd(0.1)), 2),
    "looksam": (lambda: optax_flat.looksam(optax.sgd(0.1, 0.9)), 2),
    "momentum_sam": (lambda: optax_flat.momentum_sam(optax.sgd(0.1, 0.9)), 1),
    "ivon": (lambda: optax_flat.ivon(0.1, ess=1e4, key=0), 1),
    "sgd_ema": (lambda: optax_flat.ema_weights(optax.sgd(0.1, 0.9)), 1),
    "sgld_rademacher": (partial(sampler, "sgld", noise_kind="rademacher"), 1),
    "sgld": (partial(sampler, "sgld"), 1),
    "psgld": (partial(sampler, "psgld"), 1),
    "sghmc": (partial(sampler, "sghmc"), 1),
}


def make_params(leaves: int) -> dict[str, jax.Array]:
    """Twelve kinds of leaves, one layer of them after the other."""
    return {f"leaf_{i}": jnp.ones((8 * (1 + i % 12), 16)) for i in range(leaves)}


def loss(params: Any, batch: jax.Array) -> jax.Array:
    """A quadratic in every leaf."""
    return sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))


def update(tx: Any, length: int, params: Any, opt_state: Any, batches: Any) -> Any:
    """One outer update."""
    grad_fn = jax.grad(loss)
    more: dict[str, Any] = {}
    if length > 1:
        more = {"grad_fn": lambda point, i: grad_fn(point, batches[i + 1])}
    updates, opt_state = tx.update(
        grad_fn(params, batches[0]), opt_state, params, **more
    )
    return optax.apply_updates(params, updates), opt_state


def compile_once(name: str, leaves: int) -> Row:
    """Traces, lowers, compiles and runs an update."""
    make, length = PROGRAMS[name]
    tx, params = make(), make_params(leaves)
    arguments = params, tx.init(params), jnp.linspace(0.0, 1.0, length)
    start = time.perf_counter()
    lowered = jax.jit(partial(update, tx, length)).lower(*arguments)
    traced = time.perf_counter()
    executable = lowered.compile()
    done = time.perf_counter()
    instructions = sum(" = " in line for line in executable.as_text().splitlines())
    params, _ = executable(*arguments)
    return {
        "gradient_evaluations": length,
        "forward_passes": 0,
        "seconds": done - start,
        "trace_seconds": traced - start,
        "xla_seconds": done - traced,
        "instructions_per_leaf": instructions / leaves,
        "objective": float(loss(params, jnp.float32(0.5))),
    }


def place(row: Row) -> tuple[int, int]:
    """Where a row stands in table and picture."""
    program, leaves = row["method"].split("/")
    return int(leaves), list(PROGRAMS).index(program)


def main() -> None:
    """Compiles what is missing, then writes table and picture."""
    options = parser(__doc__, PROGRAMS, seeds=3, out="out/compile_time", data=False)
    options = options.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    counts = SMOKE_LEAVES if options.smoke else LEAVES
    rows = Rows(options.out, {"leaves": counts, "length": LENGTH})
    compile_once("adam", 1)  # what JAX itself does only once is not counted
    names = [f"{name}/{leaves}" for leaves in counts for name in options.methods]
    for name, seed in rows.pending(names, range(options.seeds)):
        jax.clear_caches()
        program, leaves = name.split("/")
        rows.record(name, seed, compile_once(program, int(leaves)))
    seconds = {(r["method"], r["seed"]): r["xla_seconds"] for r in rows}
    for row in rows:
        reference = (f"{REFERENCE}/{row['method'].split('/')[1]}", row["seed"])
        if reference in seconds:
            row["ratio"] = row["xla_seconds"] / seconds[reference]
    ordered = sorted(rows, key=place)
    write_table(table(ordered, MEASURES), options.out)
    compared = [row for row in ordered if "ratio" in row]
    label = "XLA's time / that of the walk without noise"
    bars(compared, "ratio", label, options.out / "compile_time.png")


if __name__ == "__main__":
    main()
