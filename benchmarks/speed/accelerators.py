"""What updates need on TPUs and GPUs, by the compilers of machines that are not there.

JAX compiles for a slice of TPUs or for H100s without one. The program is an update of a
decoder Transformer by `make_train_step`: params and state are sharded over all chips
(FSDP) and donated, the minibatch is spread over the chips, layers are stacked for
`jax.lax.scan` or are not. The compiler says how many bytes each chip needs, and its
program what each chip sends. Nothing runs, so nothing here is a speed.

* gradient: the program of the gradient alone, the measure of what is sent.
* sgd, adam: what one would do without this library.
* all others: methods of the library, walks in both modes, those that wrap another
  optimizer around Adam.

A collective of at least 4 KiB counts; smaller ones (norms, losses) have a column of
their own. An all-gather of b bytes, a reduce-scatter of b bytes and an all-to-all send
(n - 1) / n b from each of n chips, an all-reduce twice that. `sent_per_gradient` is in
units of what the gradient's program sends. `state` is in bytes per parameter, and so is
`over_adam`, by how much a chip's temporaries exceed those of Adam beside it, per
parameter of its shard.

    python -m benchmarks.speed.accelerators

The compilers are the extra `accelerators`, some 6 GB; a platform without its compiler
is left out.
"""

import os

# A compiler's package must not make JAX look for the machine. Left to itself, libtpu
# asks the network for its host and lets one process at a time in.
os.environ.update(
    JAX_PLATFORMS="cpu",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_SKIP_MDS_QUERY="1",
    TPU_WORKER_HOSTNAMES="localhost",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
)

import re
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from operator import contains
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_flat
from benchmarks import hlo
from benchmarks.harness import Row, Rows, bars, parser, table, write_table
from optax_flat.training import make_train_step

MEASURES = (
    "state",
    "over_adam",
    "peak_mib",
    "collectives",
    "small_collectives",
    "sent_mib",
    "sent_per_gradient",
)
LENGTH = 4  # gradients of a walk
MEMBERS = 4  # of an ensemble
SMALL = 4096  # bytes of a collective that does not count

# Public data of an H100 SXM, as a GpuTargetConfigProto.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  l2_cache_size: 52428800
  memory_bandwidth: 3352000000000
  device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Machine(NamedTuple):
    """A topology, and the package with its compiler."""

    platform: str
    package: str
    name: str
    arguments: tuple[tuple[str, str], ...] = ()

    def devices(self) -> list[Any]:
        """Its chips, for which one can compile."""
        return topologies.get_topology_desc(
            self.name, platform=self.platform, **dict(self.arguments)
        ).devices


_TPU = partial(Machine, "tpu", "libtpu")
MACHINES = {
    "v5e-8": _TPU("v5e:2x4"),
    "h100-8": Machine(
        "cuda",
        "jax-cuda13-plugin",
        "h100",
        (("topology", "1x1x8"), ("target_config", H100)),
    ),
    "v5e-64": _TPU("v5e:8x8"),
    "v5p-8": _TPU("v5p:2x2x2"),
    "v6e-8": _TPU("v6e:2x4"),
}


class Size(NamedTuple):
    """Of a Transformer, and the tokens of a chip's examples."""

    vocabulary: int
    length: int
    width: int
    depth: int
    head: int


SIZES = {
    "30M": Size(8192, 128, 512, 8, 64),
    "1.3B": Size(32768, 1024, 2048, 24, 128),
}
SMOKE = Size(1024, 32, 256, 2, 32)
# Half of the time for GPUs; neither memory nor collectives depend on it.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
LAYERS = ("stacked", "unstacked")


class Method(NamedTuple):
    """An optimizer, and how many gradients and forward passes its update takes."""

    make: Callable[[], optax.GradientTransformation]
    gradients: int = 1
    one_minibatch: bool = False  # for all of them
    forward_passes: int = 0
    is_public: bool = True


def adam() -> optax.GradientTransformation:
    """What others are compared with, and what stands inside some of them."""
    return optax.adam(1e-3)


def walk(name: str, gradients: int, *, one: bool = False, **settings: Any) -> Any:
    """Both modes of a method."""
    factory = getattr(optax_flat, name)
    return {
        name: Method(lambda: factory(**settings), gradients, one),
        f"{name}_transparent": Method(lambda: factory(mode="transparent", **settings)),
    }


def plain(name: str, **settings: Any) -> dict[str, Method]:
    """A method of one gradient."""
    return {name: Method(lambda: getattr(optax_flat, name)(**settings))}


def forward(name: str, passes: int, gradients: int = 0, **settings: Any) -> Any:
    """A method that evaluates the model itself; `make_train_step` does once more."""
    factory = getattr(optax_flat, name)
    made = Method(lambda: factory(**settings), gradients, True, passes)
    return {name: made}


def catalogue() -> dict[str, Method]:
    """What is compiled, by name."""
    of_walk: dict[str, Any] = {"num_steps": LENGTH, "key": 0}
    around: dict[str, Any] = {"outer": adam()}
    noisy: dict[str, Any] = {"temperature": 1e-4, "key": 0}
    sharp = partial(walk, gradients=2, one=True, **around)
    cloud: dict[str, Any] = {"ensemble_size": MEMBERS, "spread": 0.1, "key": 0}
    return {
        "gradient": Method(optax.identity, is_public=False),
        "sgd": Method(lambda: optax.sgd(0.1), is_public=False),
        "adam": Method(adam, is_public=False),
        "entropy_adam_noiseless": Method(
            lambda: optax_flat.entropy_adam(1e-3, noise=0.0, **of_walk),
            LENGTH,
            is_public=False,
        ),
        **walk("entropy_adam", LENGTH, learning_rate=1e-3, **of_walk),
        **walk("entropy_sgd", LENGTH, learning_rate=1.0, **of_walk),
        **walk("local_entropy", LENGTH, **around, **of_walk),
        **walk("parle", LENGTH, learning_rate=1.0, axis_name=None, **of_walk),
        **plain("elastic_averaging", coupling=0.1, axis_name=None, **around),
        **sharp("sam"),
        **sharp("asam"),
        **sharp("gsam"),
        **sharp("looksam"),
        **sharp("friendly_sam"),
        **sharp("wsam"),
        **sharp("gradient_norm_penalty"),
        **sharp("stable_sam"),
        **sharp("loss_equated_sam", budget=0.05),
        **sharp("zsharp"),
        **sharp("ae_sam"),
        **walk("momentum_sam", 1, outer=optax.sgd(0.1, 0.9)),
        **walk("lookbehind_sam", LENGTH, num_steps=LENGTH - 1, one=True, **around),
        **sharp("sampa"),
        **forward("functional_sam", 1, 2, **around),
        **walk(
            "ivon", LENGTH, learning_rate=0.1, ess=1e6, num_samples=LENGTH, key=0,
            one=True,
        ),
        **walk("bsam", 2, learning_rate=0.1, num_data=1e6, key=0, one=True),
        **plain("entropy_mcmc", learning_rate=0.1, **noisy),
        **plain("anti_pgd", learning_rate=0.1, noise=1e-2, key=0),
        **plain("sgld", learning_rate=0.1, **noisy),
        **plain("psgld", learning_rate=0.1, **noisy),
        **plain("sghmc", learning_rate=0.1, **noisy),
        **plain("add_langevin_noise", step_size=0.1, **noisy),
        **plain("coolmomentum", learning_rate=0.1),
        **walk(
            "multipoint_nesterov", 4, learning_rate=0.1, nodes="four"
        ),
        **plain("adagrad", learning_rate=0.1),
        **plain("adadelta", learning_rate=0.1),
        **plain("clip_by_leaf_norm", max_norm=1.0),
        **plain("scale_by_loss_slope", patience=5),
        **plain("swa", inner=adam(), start=0),
        **plain("ema_weights", inner=adam(), decay=0.99),
        **plain("lawa", inner=adam(), k=2),
        **forward("perturbation_gradient", MEMBERS + 1, **around, **cloud),
        **forward("ensemble_kalman", MEMBERS + 1, **cloud),
    }  # fmt: skip


class Model:
    """A decoder Transformer whose params lie on all chips.

    Args:
      size: its sizes.
      chips: the mesh, of one axis.
      is_stacked: whether its layers are one, with a leading axis.
    """

    def __init__(self, size: Size, chips: Mesh, is_stacked: bool):
        self.size, self.chips, self.is_stacked = size, chips, is_stacked

    def place(self, leaf: Any) -> jax.ShapeDtypeStruct:
        """The array with its longest axis on all chips, if it has one of many."""
        spec: list[str | None] = [None] * leaf.ndim
        longest = max(range(leaf.ndim), key=leaf.shape.__getitem__, default=None)
        if longest is not None and leaf.shape[longest] >= self.size.width:
            spec[longest] = "chips"
        sharding = NamedSharding(self.chips, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def params(self) -> Any:
        """Shapes."""
        vocabulary, length, width, depth, _ = self.size
        layer = {
            "scales": (2, width),
            "qkv": (width, 3 * width),
            "mixed": (width, width),
            "up": (width, 4 * width),
            "down": (4 * width, width),
        }
        of_all = {name: (depth, *shape) for name, shape in layer.items()}
        shapes = {
            "tokens": (vocabulary, width),
            "places": (length, width),
            "layers": of_all if self.is_stacked else [layer] * depth,
            "scale": (width,),
        }
        made = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        return jax.tree.map(self.place, made)

    def batches(self, *stack: int) -> jax.ShapeDtypeStruct:
        """One minibatch, an example on each chip, or a stack of them."""
        spec = PartitionSpec(*[None] * len(stack), "chips")
        shape = (*stack, self.chips.size, self.size.length + 1)
        sharding = NamedSharding(self.chips, spec)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

    def _on(self, x: jax.Array, *spec: str) -> jax.Array:
        sharding = NamedSharding(self.chips, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _whole(self, leaf: jax.Array) -> jax.Array:
        """FSDP: gathered, in the dtype of the products, where it is used."""
        return self._on(leaf.astype(jnp.bfloat16))

    def _layer(self, x: jax.Array, sharded: Any) -> tuple[jax.Array, None]:
        layer = jax.tree.map(self._whole, sharded)
        scales = layer["scales"]
        qkv = normalized(x, scales[0]) @ layer["qkv"]
        qkv = qkv.reshape(*x.shape[:2], 3, -1, self.size.head)
        mixed = jax.nn.dot_product_attention(
            *jnp.moveaxis(qkv, 2, 0), is_causal=True, implementation="xla"
        )
        x = x + mixed.reshape(x.shape) @ layer["mixed"]
        hidden = jax.nn.gelu(normalized(x, scales[1]) @ layer["up"])
        return self._on(x + hidden @ layer["down"], "chips"), None

    def apply(self, params: Any, words: jax.Array) -> jax.Array:
        """[B, T + 1] words to [B, T, words] logits of the next one."""
        tokens = self._whole(params["tokens"])
        x = tokens[words[:, :-1]] + self._whole(params["places"])
        x, layer = self._on(x, "chips"), jax.checkpoint(self._layer)
        if self.is_stacked:
            x, _ = jax.lax.scan(layer, x, params["layers"])
        else:
            for sharded in params["layers"]:
                x, _ = layer(x, sharded)
        x = normalized(x, self._whole(params["scale"]))
        return (x @ tokens.T).astype(jnp.float32)


def normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root mean square one."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True)
    return x * jax.lax.rsqrt(square + 1e-6).astype(x.dtype) * scale


def loss_fn(logits: jax.Array, words: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, words[:, 1:])
    return losses.mean()


def lowered(name: str, method: Method, model: Model) -> tuple[Any, Any]:
    """An update, not compiled, and the shapes of its state."""
    params, tx = model.params(), method.make()
    state = jax.tree.map(model.place, jax.eval_shape(tx.init, params))
    stack = method.gradients > 1 and not method.one_minibatch
    batch = model.batches(*[method.gradients] * stack)
    if name == "gradient":
        grad_fn = jax.value_and_grad(lambda p, b: loss_fn(model.apply(p, b), b))
        whole = NamedSharding(model.chips, PartitionSpec())
        places = (whole, jax.tree.map(lambda x: x.sharding, params))
        return jax.jit(grad_fn, out_shardings=places).lower(params, batch), state
    step = make_train_step(loss_fn, tx, output_fn=model.apply)
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    places = (*places, NamedSharding(model.chips, PartitionSpec()))
    update = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)
    return update.lower(params, state, batch), state


def sent(collective: hlo.Collective, chips: int) -> float:
    """Bytes that each chip sends, by the ring's or any other algorithm of least bytes.

    Args:
      collective: its kind and the bytes of its result.
      chips: that take part.
    """
    others = chips - 1
    factor = {
        "all-reduce": 2 * others / chips,
        "reduce-scatter": others,  # whose result is a part
        "collective-permute": 1,
    }
    return factor.get(collective.kind, others / chips) * collective.bytes


def check_groups(text: str, chips: int) -> None:
    """All collectives are of all chips, as `sent` takes them.

    Raises:
      ValueError: if one is not.
    """
    everyone = ",".join(map(str, range(chips)))
    for found in re.findall(r"replica_groups=(\{.*?\}\}|\S+)", text):
        whole = {f"{{{{{everyone}}}}}", f"[1,{chips}]<=[{chips}],"}
        if found not in whole and not re.match(rf"mesh\['\w+'={chips}\]", found):
            raise ValueError(f"a collective of some chips only: {found}")


def measure(name: str, model: Model, options: dict[str, Any] | None = None) -> Row:
    """Compiles one update, with the compiler's options, and reads its program."""
    method, chips = catalogue()[name], model.chips.size
    start = time.perf_counter()
    program, state = lowered(name, method, model)
    traced = time.perf_counter()
    executable = program.compile(compiler_options=options)
    done = time.perf_counter()
    found, text = executable.memory_analysis(), executable.as_text()
    check_groups(text, chips)
    collectives = hlo.costs(executable).collectives
    large = {c: times for c, times in collectives.items() if c.bytes >= SMALL}
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params()))
    of_state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    peak = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
    return {
        "gradient_evaluations": method.gradients,
        "forward_passes": method.forward_passes,
        "seconds": done - start,
        "trace_seconds": traced - start,
        "compile_seconds": done - traced,
        "parameters": parameters,
        "state": of_state / parameters,
        "arguments_mib": found.argument_size_in_bytes / 2**20,
        "temporaries_mib": found.temp_size_in_bytes / 2**20,
        "temporaries": found.temp_size_in_bytes / (parameters / chips),
        "peak_mib": peak / 2**20,
        "largest_mib": hlo.largest_array(text) / 2**20,
        "collectives": sum(large.values()),
        "small_collectives": sum(collectives.values()) - sum(large.values()),
        "sent_mib": sum(sent(c, chips) * times for c, times in collectives.items())
        / 2**20,
    }


# Those that are compiled in every way.
SOME = (
    "gradient", "sgd", "adam", "entropy_adam_noiseless", "entropy_adam",
    "entropy_adam_transparent", "sam", "looksam", "ivon", "sgld", "ema_weights",
    "coolmomentum",
)  # fmt: skip
# Machine, size, layers and methods; what comes first matters most.
PLAN = (
    ("v5e-8", "30M", "stacked", None),
    ("h100-8", "30M", "stacked", None),
    ("h100-8", "1.3B", "stacked", SOME),
    ("v5e-64", "1.3B", "stacked", SOME),
    ("v5e-8", "30M", "unstacked", SOME),
    ("h100-8", "30M", "unstacked", SOME),
    ("v5e-64", "30M", "stacked", SOME),
    ("v5p-8", "30M", "stacked", SOME),
    ("v6e-8", "30M", "stacked", SOME),
)


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def with_compilers(machines: list[str]) -> list[str]:
    """Those one can compile for here; says what is missing.

    Raises:
      SystemExit: if none is left.
    """
    left = []
    for name in machines:
        package = MACHINES[name].package
        if version(package):
            left.append(name)
        else:
            print(
                f"{name} is left out: {package} is not installed. It comes with "
                'pip install "optax_flat[accelerators]"',
                file=sys.stderr,
            )
    if not left:
        raise SystemExit("There is no compiler of any of these machines.")
    return left


def relative(rows: list[Row]) -> None:
    """Adds what compares rows with those of Adam and of the gradient beside them."""
    beside = {row["method"]: row for row in rows}
    for row in rows:
        group = row["method"].rpartition("/")[0]
        of_adam = beside.get(f"{group}/adam")
        alone = beside.get(f"{group}/gradient")
        if of_adam:
            row["over_adam"] = row["temporaries"] - of_adam["temporaries"]
            row["peak_to_adam"] = row["peak_mib"] / of_adam["peak_mib"]
        if alone and row["gradient_evaluations"]:
            spent = row["gradient_evaluations"] * alone["sent_mib"]
            row["sent_per_gradient"] = row["sent_mib"] / spent


def main() -> None:
    """Compiles what is missing, then writes table and picture."""
    known = catalogue()
    options_of = parser(__doc__, known, seeds=1, out="out/accelerators", data=False)
    for name, values in {
        "machines": MACHINES,
        "sizes": SIZES,
        "layers": LAYERS,
    }.items():
        listed = ",".join(values)
        options_of.add_argument(
            f"--{name}",
            type=lambda text: text.split(","),
            default=list(values),
            metavar="A,B",
            help=listed,
        )
    options = options_of.parse_args()
    sizes, plan = SIZES, PLAN
    if options.smoke:
        sizes, options.sizes = {"smoke": SMOKE}, ["smoke"]
        plan = [(m, "smoke", "stacked", None) for m in ("v5e-8", "h100-8")]
    jax.config.update("jax_enable_compilation_cache", False)
    machines = with_compilers(options.machines)
    packages = dict.fromkeys(MACHINES[name].package for name in MACHINES)
    settings = {package: version(package) for package in packages}
    rows = Rows(options.out, {"sizes": sizes, "length": LENGTH, **settings})
    planned = [
        (machine, size, layers, method)
        for machine, size, layers, methods in plan
        for method in known
        if methods is None or method in methods
    ]
    chosen = (machines, options.sizes, options.layers, options.methods)
    names = ["/".join(names) for names in planned if all(map(contains, chosen, names))]
    for name, seed in rows.pending(names, range(options.seeds)):
        machine, size, layers, method = name.split("/")
        chips = Mesh(np.array(MACHINES[machine].devices()), ("chips",))
        model = Model(sizes[size], chips, layers == "stacked")
        quick = QUICK if options.smoke and machine.startswith("h100") else None
        rows.record(name, seed, measure(method, model, quick))
        jax.clear_caches()
    places = {"/".join(names): place for place, names in enumerate(planned)}
    write_results(sorted(rows, key=lambda row: places[row["method"]]), options.out)


def write_results(rows: list[Row], folder: Path) -> None:
    """A table for each machine, size and kind of layers; the picture of the first."""
    relative(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group, _, method = row["method"].rpartition("/")
        groups.setdefault(group, []).append({**row, "method": method})
    tables = [
        f"{group.replace('/', ', ')} layers:\n\n{table(listed, MEASURES)}"
        for group, listed in groups.items()
    ]
    write_table("\n".join(tables), folder)
    first = next(iter(groups.values()))
    compared = [row for row in first if "peak_to_adam" in row]
    label = "peak memory of a chip / that of Adam"
    bars(compared, "peak_to_adam", label, folder / "accelerators.png")


if __name__ == "__main__":
    main()
