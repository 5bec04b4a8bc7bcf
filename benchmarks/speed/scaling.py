"""How outer updates scale over devices, in counts and by a model of time.

Every update spends 20 gradients of an MLP. The programs are compiled for 1, 2, 4 and 8
virtual devices, on which the examples are spread, and read: the flops of matrix
products and the bytes of collectives on each device, per update. Weak scaling keeps the
examples of a device, strong scaling keeps those of all.

* sgd: data-parallel SGD, 20 steps. What all others are compared with.
* averaged: SGD with a running mean of the params, which communicates nothing more.
* sam: `optax.contrib.sam`, 10 steps of two gradients.
* entropy_sgd: one update. All gradients of its walk are averaged over the devices.
* parle: one update of a replica per device, coupled once per update.

The model of time for n real devices with a rate R (flops per second), a bandwidth B
(bytes per second and direction) and a latency l, which neither overlaps anything nor
counts what is not a matrix product:

    time = flops / R + sum over all-reduces of (2 (n - 1) / n bytes / B + 2 (n - 1) l)

    python -m benchmarks.speed.scaling
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_flat
from benchmarks import hlo
from benchmarks.harness import (
    COLOURS,
    Row,
    Rows,
    parser,
    random_digits,
    table,
    write_table,
)

MEASURES = (
    "devices",
    "examples_per_device",
    "gflops",
    "collectives",
    "mib_communicated",
    "model_milliseconds",
    "efficiency",
)
DEVICES = (1, 2, 4, 8)
SCALINGS = ("weak", "strong")
LENGTH = 20  # gradients per update


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy of an MLP."""
    images, labels = batch
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def data_parallel(tx: Any) -> Callable[..., Any]:
    """An update of `LENGTH` gradients, one per call, with the examples spread."""
    tx = optax.with_extra_args_support(tx)

    def step(carry, batch):
        params, state = carry
        grads = jax.grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def update(params, batches):
        return jax.lax.scan(step, (params, tx.init(params)), batches)[0]

    return update


def replicas(tx: Any) -> Callable[..., Any]:
    """An update of one replica per device, each with its own part of the examples."""
    grad_fn = jax.grad(loss_fn)

    def update(params, batches):
        first, rest = (
            jax.tree.map(lambda x, part=part: x[part], batches)
            for part in (0, slice(1, None))
        )
        updates, state = tx.update(
            grad_fn(params, first),
            tx.init(params),
            params,
            grad_fn=grad_fn,
            batches=rest,
        )
        after = optax.apply_updates(params, updates), state
        return jax.tree.map(lambda x: x[None], after)

    spread = PartitionSpec(None, "devices")
    return jax.shard_map(
        update,
        in_specs=(PartitionSpec(), spread),
        out_specs=PartitionSpec("devices"),
        check_vma=False,  # the replicas begin alike, and part
    )


def programs() -> dict[str, Callable[..., Any]]:
    """An outer update `(params, batches) -> params, state` of each method."""
    sgd, walk = optax.sgd(0.1), {"num_steps": LENGTH, "key": 0}
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    return {
        "sgd": data_parallel(sgd),
        "averaged": data_parallel(optax.chain(sgd, optax.ema(0.99))),
        "sam": data_parallel(optax.contrib.sam(sgd, ascent)),
        "entropy_sgd": data_parallel(
            optax_flat.entropy_sgd(1.0, mode="transparent", **walk)
        ),
        "parle": replicas(optax_flat.parle(1.0, axis_name="devices", **walk)),
    }


def count(method: str, devices: int, examples: int, width: int) -> Any:
    """Costs of the program on one of the devices; the examples are those of all."""
    mesh = jax.make_mesh((devices,), ("devices",), (AxisType.Auto,))

    def on(tree, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    params, batch = jax.eval_shape(lambda: random_digits(examples, width, 0))
    batches = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((LENGTH, *x.shape), x.dtype), batch
    )
    with jax.set_mesh(mesh):
        update = jax.jit(
            programs()[method]
        )  # a new one: JAX keeps the mesh of the last
        program = hlo.compiled(update, on(params), on(batches, None, "devices"))
    return hlo.costs(program)


def model_seconds(
    costs: hlo.Costs, devices: int, rate: float, bandwidth: float, latency: float
) -> float:
    """The time of an update on devices of a rate, with links of a bandwidth."""
    seconds = costs.flops / rate
    for collective, times in costs.collectives.items():
        travels = 2 * (devices - 1) * (collective.bytes / devices / bandwidth + latency)
        seconds += times * travels
    return seconds


def picture(rows: list[Row], path: Path) -> None:
    """Efficiency over devices, a panel per scaling."""
    figure, panels = plt.subplots(
        ncols=2, figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for scaling, axes in zip(SCALINGS, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            name, kind, devices = row["method"].split("/")
            if kind == scaling:
                lines.setdefault(name, []).append((int(devices), row["efficiency"]))
        for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
            axes.plot(
                *zip(*sorted(points), strict=True), "o-", color=colour, label=name
            )
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"devices, {scaling} scaling")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("efficiency in the model of time")
    panels[0].legend()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Counts what is missing, then writes table and picture."""
    known = programs()
    names = [
        f"{name}/{scaling}/{devices}"
        for name in known
        for scaling in SCALINGS
        for devices in DEVICES
    ]
    options_of = parser(__doc__, names, seeds=1, out="out/scaling", data=False)
    add = options_of.add_argument
    add("--rate", type=float, default=1e14, help="flops per second (1e14)")
    add("--bandwidth", type=float, default=1e11, help="bytes per second (1e11)")
    add("--latency", type=float, default=5e-6, help="seconds per message (5e-6)")
    options = options_of.parse_args()
    width, examples = (16, 32) if options.smoke else (4096, 1024)
    machine = {
        "rate": options.rate,
        "bandwidth": options.bandwidth,
        "latency": options.latency,
    }
    rows = Rows(options.out, {"width": width, "examples": examples, **machine})
    alone: dict[str, float] = {}
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        method, scaling, devices = name.split("/")
        n = int(devices)
        of_all = examples * n if scaling == "weak" else examples
        costs = count(method, n, of_all, width)
        seconds = model_seconds(costs, n, **machine)
        ideal = n if scaling == "strong" else 1
        if method not in alone:
            on_one = count(method, 1, examples, width)
            alone[method] = model_seconds(on_one, 1, **machine)
        rows.record(
            name,
            seed,
            {
                "gradient_evaluations": LENGTH,
                "forward_passes": 0,
                "seconds": 0.0,
                "devices": n,
                "examples_per_device": of_all // n,
                "gflops": costs.flops / 1e9,
                "collectives": sum(costs.collectives.values()),
                "mib_communicated": hlo.total_bytes(costs) / 2**20,
                "model_milliseconds": 1000 * seconds,
                "efficiency": alone[method] / seconds / ideal,
            },
        )
    write_table(table(rows, MEASURES), options.out)
    picture(list(rows), options.out / "scaling.png")


if __name__ == "__main__":
    main()
