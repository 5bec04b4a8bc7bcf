"""What an update of Entropy-SGD costs: time, compilation, memory.

Time. An outer update of L = 20 gradients, without noise and with each kind of it, is
compared on random data with 20 steps of plain gradient descent (bare: no optimizer can
be faster) and of Nesterov-SGD (sgd), both in a `lax.scan`; so is Entropy-SGD without
noise in transparent mode, 20 updates, and with Nesterov's momentum inside and outside,
as published (entropy_nesterov). All programs of a model run in turns, round
after round, so that a machine that becomes slower does so for all of them; a ratio is
the median of the ratios within the rounds, the first of which is not counted. The CPU
backend is slow at a convolution inside `lax.scan`: every program is measured with its
loop as a scan and unrolled, and a ratio compares two of the same kind.

Compilation. The seconds from the function to the executable, for several L, against the
opaque mode of `optax.contrib.sam`, which unrolls its loop.

Memory. XLA's account of each executable: arguments, outputs, temporary buffers.

The objective beside each time is the mean loss over the minibatches after the update.
On a CPU most of the script's time goes into LeNet's convolutions in a scan.

    python benchmarks/step_time.py --out out/step_time
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from harness import COLOURS, Row, Rows, parser, table, write_table

import optax_flat


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    num_steps: int = 20
    batch: int = 128
    mlp: tuple[int, ...] = (784, 1024, 1024, 10)
    lenet: tuple[int, ...] = (20, 50, 500)
    rounds: int = 7
    compile_lengths: tuple[int, ...] = (5, 20, 80)


SMOKE = Sizes(2, 2, (784, 4, 10), (2, 2, 4), 1, (5,))
MODELS = ("mlp", "lenet")
PROGRAMS = (
    "bare",
    "sgd",
    "entropy",
    "entropy_rademacher",
    "entropy_normal",
    "entropy_nesterov",
    "transparent",
)
LOOPS = {"scan": 1, "unrolled": True}  # the argument `unroll` of lax.scan


def method_names(sizes: Sizes) -> list[str]:
    """model/program/loop for time and memory, compile/program/L for compilation."""
    steps = [f"{m}/{p}/{loop}" for m in MODELS for loop in LOOPS for p in PROGRAMS]
    lengths = sizes.compile_lengths
    return steps + [f"compile/{p}/{n}" for n in lengths for p in ("entropy", "sam")]


# The networks. `init` makes a list of layers, `apply` maps [B, 28, 28, 1] to [B, 10].


def init(model: str, sizes: Sizes, key: jax.Array) -> list[dict[str, jax.Array]]:
    """Params with He's scale."""
    if model == "mlp":
        shapes = list(zip(sizes.mlp, sizes.mlp[1:], strict=False))
    else:
        a, b, c = sizes.lenet
        shapes = [(5, 5, 1, a), (5, 5, a, b), (4 * 4 * b, c), (c, 10)]
    keys = jax.random.split(key, len(shapes))
    return [
        {"w": jax.nn.initializers.he_normal()(k, s), "b": jnp.zeros(s[-1])}
        for k, s in zip(keys, shapes, strict=True)
    ]


def apply(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Convolutions with max-pooling, then dense layers; ReLU between all."""
    for layer in params:
        w, b = layer["w"], layer["b"]
        if w.ndim == 4:
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, w, (1, 1), "VALID", dimension_numbers=layout
            )
            pool = (1, 2, 2, 1)
            x = jax.lax.reduce_window(x + b, -jnp.inf, jax.lax.max, pool, pool, "VALID")
        else:
            x = x.reshape(x.shape[0], -1) @ w + b
        if layer is not params[-1]:
            x = jax.nn.relu(x)
    return x


def problem(model: str, sizes: Sizes, num_steps: int, seed: int):
    """Params and `num_steps` minibatches of noise."""
    keys = jax.random.split(jax.random.key(seed), 3)
    images = jax.random.normal(keys[0], (num_steps, sizes.batch, 28, 28, 1))
    labels = jax.random.randint(keys[1], (num_steps, sizes.batch), 0, 10)
    return init(model, sizes, keys[2]), (images, labels)


def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy of a minibatch."""
    logits = apply(params, batch[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@jax.jit
def objective(params: Any, batches: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean loss over all minibatches."""
    return jax.lax.map(functools.partial(loss, params), batches).mean()


# The programs: an optimizer, and `(params, opt_state, batches) -> params, opt_state`.


class Program(NamedTuple):
    """What is timed."""

    optimizer: Any
    run: Callable[[Any, Any, Any], tuple[Any, Any]]


def one_by_one(tx: Any, unroll: int | bool) -> Program:
    """One update per minibatch."""

    def run(params, opt_state, batches):
        def body(carry, batch):
            params, opt_state = carry
            grads = jax.grad(loss)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(body, (params, opt_state), batches, unroll=unroll)[0]

    return Program(tx, run)


def all_at_once(tx: Any) -> Program:
    """One outer update."""

    def run(params, opt_state, batches):
        (x, y), grad_fn = batches, jax.grad(loss)
        updates, opt_state = tx.update(
            grad_fn(params, (x[0], y[0])),
            opt_state,
            params,
            grad_fn=grad_fn,
            batches=(x[1:], y[1:]),
        )
        return optax.apply_updates(params, updates), opt_state

    return Program(tx, run)


def opaque_sam(num_steps: int) -> Program:
    """One outer update of optax.contrib.sam, which asks for gradients by index."""
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))
    tx = optax.contrib.sam(
        optax.sgd(0.1), ascent, sync_period=num_steps, opaque_mode=True
    )

    def run(params, opt_state, batches):
        x, y = batches

        def gradient(params, index):
            return jax.grad(loss)(params, (x[index], y[index]))

        updates, opt_state = tx.update(
            gradient(params, 0),
            opt_state,
            params,
            grad_fn=lambda point, step: gradient(point, step + 1),
        )
        return optax.apply_updates(params, updates), opt_state

    return Program(tx, run)


def program(name: str, num_steps: int, unroll: int | bool) -> Program:
    """The program of `num_steps` gradients that a name stands for."""
    entropy_sgd = functools.partial(
        optax_flat.entropy_sgd, 1.0, num_steps=num_steps, key=0
    )
    match name:
        case "bare":
            return one_by_one(optax.sgd(0.1), unroll)
        case "sgd":
            return one_by_one(optax.sgd(0.1, 0.9, nesterov=True), unroll)
        case "transparent":
            return one_by_one(entropy_sgd(noise=0.0, mode="transparent"), unroll)
        case "sam":
            return opaque_sam(num_steps)
    settings: dict[str, Any] = {"noise_kind": name.removeprefix("entropy_")}
    if name == "entropy":
        settings = {"noise": 0.0}
    elif name == "entropy_nesterov":
        inner = optax.trace(0.9, nesterov=True)
        settings = {"momentum": 0.9, "nesterov": True, "inner_transform": inner}
        settings["noise"] = 0.0
    return all_at_once(entropy_sgd(unroll=unroll, **settings))


# The measurements.


class Executable(NamedTuple):
    """A compiled program."""

    optimizer: Any
    call: Any
    seconds: float  # from the function to here

    def memory(self) -> dict[str, float]:
        """Sizes in MiB."""
        found = self.call.memory_analysis()
        return {
            f"{kind}_mib": getattr(found, f"{kind}_size_in_bytes") / 2**20
            for kind in ("argument", "output", "temp")
        }


def build(
    name: str, model: str, sizes: Sizes, num_steps: int, unroll: int | bool
) -> Executable:
    """Compiles a program."""
    optimizer, run = program(name, num_steps, unroll)
    params, batches = problem(model, sizes, num_steps, seed=0)
    opt_state = optimizer.init(params)
    start = time.perf_counter()
    call = jax.jit(run).lower(params, opt_state, batches).compile()
    return Executable(optimizer, call, time.perf_counter() - start)


# Executables do not depend on the seed. Typed, because `unroll` is 1 or True.
build_once = functools.lru_cache(maxsize=None, typed=True)(build)


def objective_after(executable: Executable, params: Any, batches: Any) -> float:
    """The mean loss after one call."""
    opt_state = executable.optimizer.init(params)
    params, opt_state = executable.call(params, opt_state, batches)
    return float(objective(optax_flat.eval_params(opt_state, params), batches))


def step_times(
    model: str, methods: Iterable[str], sizes: Sizes, seed: int
) -> dict[str, Row]:
    """Runs the methods of a model in turns; gives a row for each."""
    loops = {method.split("/")[-1] for method in methods}
    references = {f"{model}/{p}/{loop}" for p in ("bare", "sgd") for loop in loops}
    params, batches = problem(model, sizes, sizes.num_steps, seed)
    executables, arguments = {}, {}
    for method in sorted(references.union(methods)):
        _, name, loop = method.split("/")
        built = build_once(name, model, sizes, sizes.num_steps, LOOPS[loop])
        executables[method] = built
        arguments[method] = (params, built.optimizer.init(params), batches)
    times = {method: [] for method in executables}
    for _ in range(1 + sizes.rounds):
        for method, executable in executables.items():
            start = time.perf_counter()
            jax.block_until_ready(executable.call(*arguments[method]))
            times[method].append(time.perf_counter() - start)
    seconds = {method: np.array(of_method[1:]) for method, of_method in times.items()}

    def row(method: str) -> Row:
        loop = method.rsplit("/", maxsplit=1)[-1]
        ratio = {
            f"ratio_to_{reference}": float(
                np.median(seconds[method] / seconds[f"{model}/{reference}/{loop}"])
            )
            for reference in ("bare", "sgd")
        }
        return {
            "gradient_evaluations": sizes.num_steps,
            "forward_passes": 0,
            "seconds": float(np.median(seconds[method])),
            **ratio,
            "objective": objective_after(executables[method], params, batches),
            **executables[method].memory(),
        }

    return {method: row(method) for method in methods}


def compilation(name: str, sizes: Sizes, num_steps: int, seed: int) -> Row:
    """Compiles a program for the MLP; gives a row."""
    build(name, "mlp", sizes, 2, 1)  # what JAX itself does only once is not counted
    executable = build(name, "mlp", sizes, num_steps, 1)
    params, batches = problem("mlp", sizes, num_steps, seed)
    return {
        "gradient_evaluations": num_steps,
        "forward_passes": 0,
        "seconds": executable.seconds,
        "objective": objective_after(executable, params, batches),
        **executable.memory(),
    }


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of the time relative to Nesterov-SGD, one panel for each measured model."""
    measured = [row["method"].split("/") for row in rows]
    models = [m for m in MODELS if any(m == model for model, _, _ in measured)]
    loops = [k for k in LOOPS if any(k == loop for _, _, loop in measured)]
    size = (1 + 3 * len(models), 3.6)
    figure, panels = plt.subplots(
        1, len(models), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    panels = panels[0]
    for panel, model in zip(panels, models, strict=True):
        for shift, (loop, colour) in enumerate(zip(loops, COLOURS, strict=False)):
            ratios = {}
            for row in rows:
                of_model, name, of_loop = row["method"].split("/")
                if (of_model, of_loop) == (model, loop):
                    place = PROGRAMS.index(name) + 0.4 * shift - 0.2
                    ratios.setdefault(place, []).append(row["ratio_to_sgd"])
            means = [np.mean(of_place) for of_place in ratios.values()]
            bars = panel.barh(list(ratios), means, 0.38, color=colour, label=loop)
            panel.bar_label(bars, fmt=" %.2f", fontsize=8)
        panel.axvline(1.0, color="silver", zorder=0)
        panel.set_title(model)
        panel.set_xlabel("time / Nesterov-SGD's")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(PROGRAMS)), [p.replace("_", "\n") for p in PROGRAMS])
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Measures what is missing, then writes table and picture."""
    known = method_names(Sizes())
    options_of = parser(__doc__, known, seeds=3, out="out/step_time", data=False)
    options = options_of.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    sizes = SMOKE if options.smoke else Sizes()
    methods = [m for m in options.methods if m in method_names(sizes)]
    rows = Rows(options.out, sizes._asdict())
    for method, seed in rows.pending(methods, range(options.seeds)):
        group, name, length = method.split("/")
        if group == "compile":
            found = {method: compilation(name, sizes, int(length), seed)}
        else:
            same = [m for m in methods if m.startswith(group) and (m, seed) not in rows]
            found = step_times(group, same, sizes, seed)
        for measured, row in found.items():
            rows.record(measured, seed, row)
    timed = [row for row in rows if "ratio_to_sgd" in row]
    compiled = [row for row in rows if "ratio_to_sgd" not in row]
    memory = ["argument_mib", "output_mib", "temp_mib"]
    text = (
        "Time of an update, and of it relative to the references\n\n"
        + table(timed, ["ratio_to_bare", "ratio_to_sgd", "objective"])
        + "\nMemory of the executables\n\n"
        + table(timed, memory)
        + "\nSeconds of compilation of an MLP's outer update\n\n"
        + table(compiled, ["objective", "temp_mib"])
    )
    write_table(text, options.out)
    picture(timed, options.out / "step_time.png")


if __name__ == "__main__":
    main()
