r"""What an update of Entropy-SGD costs: time, compilation, memory.

Time. An outer update of L = 20 gradients, without noise and with each kind of it, is
compared on random data with 20 steps of plain gradient descent (bare: no optimizer can
be faster) and of Nesterov-SGD (sgd), both in a `lax.scan`; so is Entropy-SGD without
noise in transparent mode, 20 updates, and with Nesterov's momentum inside and outside,
as published (entropy_nesterov). All programs of a model run in turns, round
after round, so that a machine that becomes slower does so for all of them; a ratio is
the median of the ratios within the rounds, the first of which is not counted. Every
program is measured with its loop as a scan and unrolled, and its ratios compare it with
references of the same kind; `ratio_to_unrolled` compares a scan with the same program
unrolled, which for LeNet and ResNet-20 is always measured beside it. "untouched" is a
scan whose convolutions are as JAX's gradient has them (`fast_convolutions=False`), with
the ratios to references that are not. "products" is LeNet again, its convolutions
written as matrix products of patches. `lenet/entropy/torch` is the same outer update in
eager PyTorch on as many threads, measured if torch is installed and left out if not.

Compilation. The seconds from the function to the executable: of these programs
(`compile_seconds`), and of the MLP's for several L, against the opaque mode of
`optax.contrib.sam`, which unrolls its loop.

Memory. XLA's account of each executable: arguments, outputs, temporary buffers.

The objective beside each time is the mean loss over the minibatches after the update.
On a CPU most of the script's time goes into ResNet-20 and into what is untouched.

    python -m benchmarks.speed.step_time
    python -m benchmarks.speed.step_time --batch 4 --seeds 10 --methods \
        lenet/entropy/scan,lenet/entropy/products,lenet/entropy/torch \
        --out out/step_time/batch_4
"""

import argparse
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Patch

import optax_flat
from benchmarks.harness import COLOURS, Row, Rows, parser, table, write_table
from benchmarks.models import patches
from benchmarks.training.cifar_resnet20 import Network
from optax_flat.training import fast_convolutions


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    num_steps: int = 20
    batch: int = 128
    mlp: tuple[int, ...] = (784, 1024, 1024, 10)
    lenet: tuple[int, ...] = (20, 50, 500)
    rounds: int = 7
    cnn_rounds: int = 2  # of LeNet and ResNet-20, which take seconds each
    compile_lengths: tuple[int, ...] = (5, 20, 80)
    filters: tuple[int, ...] = (16, 32, 64)  # of ResNet-20's stages
    blocks: int = 3  # per stage


SMOKE = Sizes(2, 2, (784, 4, 10), (2, 2, 4), 1, 1, (5,), (2, 4), 1)
PROGRAMS = (
    "bare",
    "sgd",
    "entropy",
    "entropy_rademacher",
    "entropy_normal",
    "entropy_nesterov",
    "transparent",
)


class Loop(NamedTuple):
    """How a program repeats its gradients."""

    unroll: int | bool  # as in `jax.lax.scan`
    fast: bool  # whether convolutions are given the layout that is fast on a CPU
    reference: str  # the loop of the programs that it is compared with
    products: bool = False  # whether convolutions are written as matrix products


LOOPS = {
    "scan": Loop(1, True, "scan"),
    "unrolled": Loop(True, False, "unrolled"),
    "untouched": Loop(1, False, "scan"),
    "products": Loop(1, True, "scan", products=True),
    "torch": Loop(1, False, "scan"),  # Python's own
}
MODELS = {  # which of the programs with which loop
    "mlp": {"scan": PROGRAMS, "unrolled": PROGRAMS},
    "lenet": {
        "scan": PROGRAMS,
        "unrolled": PROGRAMS,
        "untouched": ("bare", "entropy"),
        "products": ("bare", "entropy"),
        "torch": ("entropy",),
    },
    "resnet20": {"scan": PROGRAMS[:3], "unrolled": PROGRAMS[:3]},
}
WALK = {"step_size": 0.1, "gamma": 0.03, "averaging": 0.75}
RATIOS = ("bare", "sgd", "unrolled")
CONVOLUTIONAL = ("lenet", "resnet20")


def method_names(sizes: Sizes) -> list[str]:
    """model/program/loop for time and memory, compile/program/L for compilation."""
    steps = [
        f"{model}/{program}/{loop}"
        for model, loops in MODELS.items()
        for loop, programs in loops.items()
        for program in programs
    ]
    lengths = sizes.compile_lengths
    return steps + [f"compile/{p}/{n}" for n in lengths for p in ("entropy", "sam")]


# The networks. `init` makes a list of layers, `apply` maps [B, 28, 28, 1] to [B, 10].


def resnet(sizes: Sizes) -> Network:
    """ResNet-20, with the batch statistics of each minibatch."""
    return Network(sizes.filters, sizes.blocks)


def init(model: str, sizes: Sizes, key: jax.Array) -> Any:
    """Params with He's scale."""
    if model == "resnet20":
        return resnet(sizes).init(key, jnp.zeros((1, 32, 32, 3)), train=True)["params"]
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


def convolved(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """A convolution, and max-pooling of 2x2."""
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=layout)
    pool = (1, 2, 2, 1)
    return jax.lax.reduce_window(x + b, -jnp.inf, jax.lax.max, pool, pool, "VALID")


def multiplied(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """The same, as a matrix product of patches, and a maximum over an axis."""
    x = patches(x, padding=0, side=len(w)) @ w.reshape(-1, w.shape[-1]) + b
    count, height, width, channels = x.shape
    squares = x.reshape(count, height // 2, 2, width // 2, 2, channels)
    return squares.max(axis=(2, 4))


def apply(
    params: list[dict[str, jax.Array]], x: jax.Array, layer_of: Any = convolved
) -> jax.Array:
    """Convolutions with max-pooling, then dense layers; ReLU between all."""
    for layer in params:
        w, b = layer["w"], layer["b"]
        x = layer_of(x, w, b) if w.ndim == 4 else x.reshape(len(x), -1) @ w + b
        if layer is not params[-1]:
            x = jax.nn.relu(x)
    return x


def problem(model: str, sizes: Sizes, num_steps: int, seed: int):
    """Params and `num_steps` minibatches of noise."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (32, 32, 3) if model == "resnet20" else (28, 28, 1)
    images = jax.random.normal(keys[0], (num_steps, sizes.batch, *shape))
    labels = jax.random.randint(keys[1], (num_steps, sizes.batch), 0, 10)
    return init(model, sizes, keys[2]), (images, labels)


def loss(
    params: Any, batch: tuple[jax.Array, jax.Array], layer_of: Any = convolved
) -> jax.Array:
    """Mean cross-entropy of a minibatch."""
    logits = apply(params, batch[0], layer_of)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@functools.cache
def loss_of(
    model: str, sizes: Sizes, products: bool = False
) -> Callable[[Any, Any], jax.Array]:
    """The loss of a model, the same function every time."""
    if model != "resnet20":
        return functools.partial(loss, layer_of=multiplied) if products else loss

    def resnet_loss(params, batch):
        images, labels = batch
        logits, _ = resnet(sizes).apply(
            {"params": params}, images, train=True, mutable="batch_stats"
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return resnet_loss


@functools.partial(jax.jit, static_argnames="loss_fn")
def objective(
    params: Any,
    batches: tuple[jax.Array, jax.Array],
    *,
    loss_fn: Callable[[Any, Any], jax.Array] = loss,
) -> jax.Array:
    """Mean loss over all minibatches."""
    return jax.lax.map(functools.partial(loss_fn, params), batches).mean()


# The programs: an optimizer, and `(params, opt_state, batches) -> params, opt_state`.


class Program(NamedTuple):
    """What is timed."""

    optimizer: Any
    run: Callable[[Any, Any, Any], tuple[Any, Any]]


def one_by_one(tx: Any, loss_fn: Any, loop: Loop) -> Program:
    """One update per minibatch."""

    def run(params, opt_state, batches):
        def body(carry, batch):
            params, opt_state = carry
            grads = jax.grad(loss_fn)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        if loop.fast:
            body = fast_convolutions(body)
        start = (params, opt_state)
        return jax.lax.scan(body, start, batches, unroll=loop.unroll)[0]

    return Program(tx, run)


def all_at_once(tx: Any, loss_fn: Any) -> Program:
    """One outer update."""

    def run(params, opt_state, batches):
        (x, y), grad_fn = batches, jax.grad(loss_fn)
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


def program(name: str, loss_fn: Any, num_steps: int, loop: Loop) -> Program:
    """The program of `num_steps` gradients that a name stands for."""
    entropy_sgd = functools.partial(
        optax_flat.entropy_sgd, 1.0, num_steps=num_steps, key=0, **WALK
    )
    match name:
        case "bare":
            return one_by_one(optax.sgd(0.1), loss_fn, loop)
        case "sgd":
            return one_by_one(optax.sgd(0.1, 0.9, nesterov=True), loss_fn, loop)
        case "transparent":
            tx = entropy_sgd(noise=0.0, mode="transparent")
            return one_by_one(tx, loss_fn, loop)
        case "sam":
            return opaque_sam(num_steps)
    settings: dict[str, Any] = {"noise_kind": name.removeprefix("entropy_")}
    if name == "entropy":
        settings = {"noise": 0.0}
    elif name == "entropy_nesterov":
        inner = optax.trace(0.9, nesterov=True)
        settings = {"momentum": 0.9, "nesterov": True, "inner_transform": inner}
        settings["noise"] = 0.0
    settings |= {"unroll": loop.unroll, "fast_convolutions": loop.fast}
    return all_at_once(entropy_sgd(**settings), loss_fn)


def torch_entropy(params: Any, batches: Any) -> Callable[[], list[Any]]:
    """The program `entropy` for LeNet in eager PyTorch: one outer update."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(os.cpu_count() or 1)
    start = []
    for layer in params:
        w = torch.tensor(np.array(layer["w"]))
        start += [w.permute(3, 2, 0, 1) if w.ndim == 4 else w.T]
        start += [torch.tensor(np.array(layer["b"]))]
    start = [tensor.contiguous() for tensor in start]
    images = torch.tensor(np.array(batches[0])).permute(0, 1, 4, 2, 3).contiguous()
    labels = torch.tensor(np.array(batches[1]), dtype=torch.long)

    def torch_loss(point, x, y):
        for w, b in zip(point[::2], point[1::2], strict=True):
            if w.ndim == 4:
                x = functional.max_pool2d(functional.conv2d(x, w, b), 2)
            else:  # the features last, as in JAX
                x = x.permute(0, 2, 3, 1).flatten(1) if x.ndim == 4 else x
                x = functional.linear(x, w, b)
            x = x if w is point[-2] else functional.relu(x)
        return functional.cross_entropy(x, y)

    def update():
        point = [tensor.clone().requires_grad_() for tensor in start]
        mean = [tensor.clone() for tensor in start]
        for x, y in zip(images, labels, strict=True):
            grads = torch.autograd.grad(torch_loss(point, x, y), point)
            with torch.no_grad():
                for p, g, m, anchor in zip(point, grads, mean, start, strict=True):
                    p.sub_(WALK["step_size"] * (g + WALK["gamma"] * (p - anchor)))
                    m.lerp_(p, WALK["averaging"])
        return mean  # the new params, as the outer rate is 1

    return update


def from_torch(tensors: list[Any]) -> list[dict[str, jax.Array]]:
    """LeNet's params of PyTorch's weights and biases."""
    layers = []
    for w, b in zip(tensors[::2], tensors[1::2], strict=True):
        kernel = w.permute(2, 3, 1, 0) if w.ndim == 4 else w.T
        layers.append({"w": jnp.asarray(kernel.numpy()), "b": jnp.asarray(b.numpy())})
    return layers


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


def build(name: str, model: str, sizes: Sizes, num_steps: int, loop: str) -> Executable:
    """Compiles a program."""
    loss_fn = loss_of(model, sizes, LOOPS[loop].products)
    optimizer, run = program(name, loss_fn, num_steps, LOOPS[loop])
    params, batches = problem(model, sizes, num_steps, seed=0)
    opt_state = optimizer.init(params)
    start = time.perf_counter()
    call = jax.jit(run).lower(params, opt_state, batches).compile()
    return Executable(optimizer, call, time.perf_counter() - start)


build_once = functools.cache(build)  # executables do not depend on the seed


def step_times(
    model: str, methods: Iterable[str], sizes: Sizes, seed: int
) -> dict[str, Row]:
    """Runs the methods of a model in turns; gives a row for each."""
    references = {method: references_of(method) for method in methods}
    wanted = {m for of_one in references.values() for m in of_one.values()}
    params, batches = problem(model, sizes, sizes.num_steps, seed)
    executables, runs = {}, {}
    for method in sorted(wanted.union(methods)):
        _, name, loop = method.split("/")
        if loop == "torch":
            runs[method] = torch_entropy(params, batches)
            continue
        built = build_once(name, model, sizes, sizes.num_steps, loop)
        executables[method] = built
        opt_state = built.optimizer.init(params)
        runs[method] = functools.partial(built.call, params, opt_state, batches)
    times, ends = {method: [] for method in runs}, {}
    rounds = sizes.rounds if model == "mlp" else sizes.cnn_rounds
    for _ in range(1 + rounds):
        for method, run in runs.items():
            start = time.perf_counter()
            ends[method] = jax.block_until_ready(run())
            times[method].append(time.perf_counter() - start)
    seconds = {method: np.array(of_method[1:]) for method, of_method in times.items()}

    def row(method: str) -> Row:
        ratios = {
            f"ratio_to_{name}": float(np.median(seconds[method] / seconds[reference]))
            for name, reference in references[method].items()
        }
        if method in executables:
            end, opt_state = ends[method]
            end = optax_flat.eval_params(opt_state, end)
            program = executables[method]
            compiled = {"compile_seconds": program.seconds, **program.memory()}
        else:
            end, compiled = from_torch(ends[method]), {}
        loss_fn = loss_of(model, sizes)
        return {
            "gradient_evaluations": sizes.num_steps,
            "forward_passes": 0,
            "seconds": float(np.median(seconds[method])),
            **ratios,
            "objective": float(objective(end, batches, loss_fn=loss_fn)),
            **compiled,
        }

    return {method: row(method) for method in methods}


def references_of(method: str) -> dict[str, str]:
    """What the time of a method is divided by, each by its name."""
    model, name, loop = method.split("/")
    same = LOOPS[loop].reference
    references = {p: f"{model}/{p}/{same}" for p in ("bare", "sgd")}
    if model in CONVOLUTIONAL:
        references["unrolled"] = f"{model}/{name}/unrolled"
    return references


def compilation(name: str, sizes: Sizes, num_steps: int, seed: int) -> Row:
    """Compiles a program for the MLP; gives a row."""
    build(name, "mlp", sizes, 2, "scan")  # JAX's own first time is not counted
    executable = build(name, "mlp", sizes, num_steps, "scan")
    params, batches = problem("mlp", sizes, num_steps, seed)
    opt_state = executable.optimizer.init(params)
    end, opt_state = executable.call(params, opt_state, batches)
    end = optax_flat.eval_params(opt_state, end)
    return {
        "gradient_evaluations": num_steps,
        "forward_passes": 0,
        "seconds": executable.seconds,
        "objective": float(objective(end, batches)),
        **executable.memory(),
    }


def picture(rows: Sequence[Row], path: Path) -> None:
    """Bars of the time relative to Nesterov-SGD, one panel for each measured model."""
    measured = [row["method"].split("/") for row in rows]
    models = [m for m in MODELS if any(m == model for model, _, _ in measured)]
    loops = [k for k in LOOPS if any(k == loop for _, _, loop in measured)]
    size = (1 + 3 * len(models), 2 + 0.8 * len(loops))
    width = 0.8 / len(loops)
    figure, panels = plt.subplots(
        1, len(models), figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    panels = panels[0]
    colours = dict(zip(loops, COLOURS, strict=False))
    for panel, model in zip(panels, models, strict=True):
        own = [
            k for k in loops if any((m, loop) == (model, k) for m, _, loop in measured)
        ]
        for shift, loop in enumerate(own):
            ratios = {}
            for row in rows:
                of_model, name, of_loop = row["method"].split("/")
                if (of_model, of_loop) == (model, loop):
                    place = PROGRAMS.index(name) + width * (shift - (len(own) - 1) / 2)
                    ratios.setdefault(place, []).append(row["ratio_to_sgd"])
            means = [np.mean(of_place) for of_place in ratios.values()]
            bars = panel.barh(list(ratios), means, 0.95 * width, color=colours[loop])
            panel.bar_label(bars, fmt=" %.2f", fontsize=8)
        panel.axvline(1.0, color="silver", zorder=0)
        panel.set_title(model)
        panel.set_xlabel("time / Nesterov-SGD's")
        panel.margins(x=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(PROGRAMS)), [p.replace("_", "\n") for p in PROGRAMS])
    panels[0].invert_yaxis()
    handles = [Patch(color=colour, label=loop) for loop, colour in colours.items()]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(loops), frameon=False
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


def options_and_sizes(
    doc: str | None, methods: Sequence[str], out: str
) -> tuple[argparse.Namespace, Sizes]:
    """The command line of a script that measures times, with the minibatch's size."""
    options_of = parser(doc, methods, seeds=3, out=out, data=False)
    batch = Sizes().batch
    options_of.add_argument("--batch", type=int, metavar="N", help=f"({batch})")
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    if options.batch is not None:
        sizes = sizes._replace(batch=options.batch)
    return options, sizes


def main() -> None:
    """Measures what is missing, then writes table and picture."""
    options, sizes = options_and_sizes(
        __doc__, method_names(Sizes()), "out/step_time"
    )  # fmt: skip
    jax.config.update("jax_enable_compilation_cache", False)
    methods = [m for m in options.methods if m in method_names(sizes)]
    if importlib.util.find_spec("torch") is None:
        methods = [m for m in methods if not m.endswith("/torch")]
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
    memory = ["compile_seconds", "argument_mib", "output_mib", "temp_mib"]
    text = (
        "Time of an update, and of it relative to the references\n\n"
        + table(timed, [f"ratio_to_{name}" for name in RATIOS] + ["objective"])
        + "\nCompilation and memory of the executables\n\n"
        + table(timed, memory)
        + "\nSeconds of compilation of an MLP's outer update\n\n"
        + table(compiled, ["objective", "temp_mib"])
    )
    write_table(text, options.out)
    picture(timed, options.out / "step_time.png")


if __name__ == "__main__":
    main()
