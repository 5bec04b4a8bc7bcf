"""What an update of the sharpness-aware methods, of IVON and of averages costs.

Every program takes twenty minibatches of random data through an MLP, one update each,
in one `lax.scan`. They run in turns, and a ratio is the median of the ratios within the
rounds, the first of which is not counted. The references:

* pair: two gradients of each minibatch, the second at a point that the first one leads
  to, and nothing else: the limit for SAM;
* sgd: SGD with momentum, one gradient per minibatch: the limit for methods of one.

`looksam_bare`, `ivon_bare` and `ema_bare` are those methods' arithmetic written by hand
for this network and these settings, with none of the library around it: what XLA makes
of it. `optax_sam` is the opaque mode of `optax.contrib.sam`. `torch_sam` is the SAM of
pytorch_optimizer on the same network, in eager PyTorch; it is measured if both are
installed (pip install torch pytorch_optimizer) and left out if not. The objective is
the mean loss over the minibatches after the updates.

    python -m benchmarks.speed.sam_time
    python -m benchmarks.speed.sam_time --batch 1024 --out out/sam_time/batch_1024
"""

import importlib.util
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import optax_flat
from benchmarks.harness import COLOURS, Rows, table, write_table
from benchmarks.speed.step_time import loss, objective, options_and_sizes, problem
from optax_flat._core.noise import draw

RATE = 0.1
REFERENCES = ("pair", "sgd")
PERIOD, ALPHA = 5, 0.7  # of looksam
ESS, HESS, DECAY, B1, B2 = 2560.0, 0.5, 1e-4, 0.9, 0.99999  # of ivon
METHODS = {
    "sam": optax_flat.sam(optax.sgd(RATE), rho=0.05),
    "asam": optax_flat.asam(optax.sgd(RATE), rho=0.05),
    "gsam": optax_flat.gsam(optax.sgd(RATE), rho=0.05),
    "friendly_sam": optax_flat.friendly_sam(optax.sgd(RATE), rho=0.05),
    "momentum_sam": optax_flat.momentum_sam(optax.sgd(RATE, 0.9), rho=0.05),
    "looksam": optax_flat.looksam(optax.sgd(RATE, 0.9), rho=0.05, period=PERIOD),
    "ivon": optax_flat.ivon(
        RATE,
        ess=ESS,
        hess_init=HESS,
        weight_decay=DECAY,
        b1=B1,
        b2=B2,
        noise_kind="rademacher",
        key=0,
    ),
    "sgd_swa": optax_flat.swa(optax.sgd(RATE, 0.9), start=0),
    "sgd_ema": optax_flat.ema_weights(optax.sgd(RATE, 0.9)),
}
BARE = ("looksam_bare", "ivon_bare", "ema_bare")
DOUBLE = ("pair", "optax_sam")  # two gradients per update, which nobody counts
NAMES = (*REFERENCES, *METHODS, *BARE, "optax_sam", "torch_sam")
COLUMNS = ["ratio_to_pair", "ratio_to_sgd", "objective", "temp_mib"]


class Program(NamedTuple):
    """What is timed."""

    call: Any  # of nothing; returns when it is done
    gradients: int
    objective: float  # after it
    memory: dict[str, float]  # MiB of the executable, if there is one


def one_update(name):
    """``(params, opt_state, batch) -> params, opt_state``, and the optimizer."""
    grad = jax.grad(loss)
    if name == "pair":

        def two(params, opt_state, batch):
            ahead = jax.tree.map(lambda p, g: p + 0.01 * g, params, grad(params, batch))
            grads = grad(ahead, batch)
            return jax.tree.map(lambda p, g: p - RATE * g, params, grads), opt_state

        return two, optax.identity()
    if name in BARE:
        made = {
            "looksam_bare": bare_looksam, "ivon_bare": bare_ivon, "ema_bare": bare_ema
        }  # fmt: skip
        return made[name]()
    tx = METHODS.get(name, optax.sgd(RATE, 0.9))
    if name == "optax_sam":
        ascend = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
        tx = optax.contrib.sam(optax.sgd(RATE), ascend, opaque_mode=True)
    tx = optax.with_extra_args_support(tx)

    def update(params, opt_state, batch):
        given = {}
        if name == "optax_sam" or name in METHODS:
            given["grad_fn"] = lambda point, _: grad(point, batch)
        grads = grad(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **given)
        return optax.apply_updates(params, updates), opt_state

    return update, tx


def bare_looksam():
    """LookSAM with SGD; the state is momentum, direction, its norm and a count."""
    grad = jax.grad(loss)

    def seldom(params, direction, size, g, batch):
        del size
        ahead = optax.tree.add_scale(params, 0.05 / optax.tree.norm(g), g)
        g_r = grad(ahead, batch)
        weight = optax.tree.vdot(g, g_r) / optax.tree.vdot(g, g)
        direction = optax.tree.add_scale(g_r, -weight, g)
        return g_r, direction, optax.tree.norm(direction)

    def often(params, direction, size, g, batch):
        del params, batch
        weight = ALPHA * optax.tree.norm(g) / size
        return optax.tree.add_scale(g, weight, direction), direction, size

    def update(params, state, batch):
        momentum, direction, size, count = state
        d, direction, size = jax.lax.cond(
            count % PERIOD == 0, seldom, often,
            params, direction, size, grad(params, batch), batch,
        )  # fmt: skip
        momentum = optax.tree.add_scale(d, 0.9, momentum)
        params = optax.tree.add_scale(params, -RATE, momentum)
        return params, (momentum, direction, size, count + 1)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return zeros, zeros, jnp.zeros([]), jnp.zeros([], jnp.int32)

    return update, optax.GradientTransformation(init, optax.identity().update)


def bare_ivon():
    """IVON with signs; the state is momentum, h, the draw's displacement, a count."""
    grad = jax.grad(loss)

    def update(params, state, batch):
        mu, hess, moves, count = state
        weight = 1 - B1 ** (count + 1.0)

        def new_hess(h, g, move):
            change = (1 - B2) * (g * move * ESS * (h + DECAY) - h)
            return h + change + change**2 / (2 * (h + DECAY))

        def new_mean(p, move, mu, h):
            m = p - move
            rate = RATE * (HESS + DECAY)
            return m - rate * (mu / weight + DECAY * m) / (h + DECAY)

        def displacement(h, z):
            return z * jax.lax.rsqrt(ESS * (h + DECAY))

        g = grad(params, batch)
        mu = jax.tree.map(lambda mu, g: B1 * mu + (1 - B1) * g, mu, g)
        hess = jax.tree.map(new_hess, hess, g, moves)
        mean = jax.tree.map(new_mean, params, moves, mu, hess)
        key = jax.random.fold_in(jax.random.key(0), count)
        signs = draw(key, params, "rademacher")
        moves = jax.tree.map(displacement, hess, signs)
        return optax.tree.add(mean, moves), (mu, hess, moves, count + 1)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        hess = optax.tree.full_like(params, HESS)
        return zeros, hess, zeros, jnp.zeros([], jnp.int32)

    return update, optax.GradientTransformation(init, optax.identity().update)


def bare_ema():
    """SGD, and an average that starts at zero; the state is momentum and average."""

    def update(params, state, batch):
        momentum, average = state
        grads = jax.grad(loss)(params, batch)
        momentum = optax.tree.add_scale(grads, 0.9, momentum)
        params = optax.tree.add_scale(params, -RATE, momentum)
        average = jax.tree.map(lambda a, p: a + 0.001 * (p - a), average, params)
        return params, (momentum, average)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return zeros, zeros

    return update, optax.GradientTransformation(init, optax.identity().update)


def compiled(name, params, batches):
    """A program of JAX."""
    update, tx = one_update(name)

    @jax.jit
    def run(params, opt_state, batches):
        def body(carry, batch):
            return update(*carry, batch), None

        return jax.lax.scan(body, (params, opt_state), batches)[0]

    arguments = (params, tx.init(params), batches)
    executable = run.lower(*arguments).compile()
    params, opt_state = executable(*arguments)
    counted = optax.tree.get(opt_state, "gradient_evaluations")
    updates = len(batches[1])
    if name == "looksam_bare":
        counted = updates + -(-updates // PERIOD)
    if name not in BARE:
        params = optax_flat.eval_params(opt_state, params)
    return Program(
        lambda: jax.block_until_ready(executable(*arguments)),
        int(counted) if counted is not None else updates * (1 + (name in DOUBLE)),
        float(objective(params, batches)),
        {"temp_mib": executable.memory_analysis().temp_size_in_bytes / 2**20},
    )


def torch_sam(params, batches):
    """pytorch_optimizer's SAM in eager PyTorch."""
    import pytorch_optimizer
    import torch

    layers = []
    for layer in params:
        width, out = layer["w"].shape
        linear = torch.nn.Linear(width, out)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor(np.array(layer["w"]).T.copy()))
            linear.bias.copy_(torch.tensor(np.array(layer["b"])))
        layers += [linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    entropy = torch.nn.CrossEntropyLoss()
    images = torch.tensor(np.array(batches[0]).reshape(*batches[1].shape, -1))
    labels = torch.tensor(np.array(batches[1]), dtype=torch.long)

    def call():
        model.load_state_dict(start)
        optimizer = pytorch_optimizer.SAM(
            model.parameters(), torch.optim.SGD, rho=0.05, lr=RATE
        )
        for x, y in zip(images, labels, strict=True):
            entropy(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)

    call()
    with torch.no_grad():
        losses = [entropy(model(x), y) for x, y in zip(images, labels, strict=True)]
    return Program(call, 2 * len(labels), float(np.mean(losses)), {})


def measure(names, sizes, seed):
    """Runs the programs in turns; a row for each."""
    params, batches = problem("mlp", sizes, sizes.num_steps, seed)
    programs = {
        name: (torch_sam(params, batches) if name == "torch_sam"
               else compiled(name, params, batches))
        for name in dict.fromkeys((*REFERENCES, *names))
    }  # fmt: skip
    times = {name: [] for name in programs}
    for _ in range(1 + sizes.rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            program.call()
            times[name].append(time.perf_counter() - start)
    seconds = {name: np.array(of_one[1:]) for name, of_one in times.items()}
    return {
        name: {
            "gradient_evaluations": programs[name].gradients,
            "forward_passes": 0,
            "seconds": float(np.median(seconds[name])),
            **{
                f"ratio_to_{other}": float(np.median(seconds[name] / seconds[other]))
                for other in REFERENCES
            },
            "objective": programs[name].objective,
            **programs[name].memory,
        }
        for name in names
    }


def picture(rows, path):
    """Bars of the time relative to two bare gradients."""
    names = [n for n in NAMES if any(row["method"] == n for row in rows)]
    ratios = [
        [row["ratio_to_pair"] for row in rows if row["method"] == name]
        for name in names
    ]
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    bars = axes.barh(names, [np.mean(r) for r in ratios], color=COLOURS[0])
    axes.bar_label(bars, fmt=" %.2f", fontsize=8)
    axes.axvline(1.0, color="silver", zorder=0)
    axes.set_xlabel("time / two bare gradients'")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Measures what has no row yet, then writes table and picture."""
    available = [
        name for name in NAMES
        if name != "torch_sam" or importlib.util.find_spec("pytorch_optimizer")
    ]  # fmt: skip
    options, sizes = options_and_sizes(__doc__, available, "out/sam_time")
    rows = Rows(options.out, {**sizes._asdict(), "rate": RATE})
    for _, seed in rows.pending(options.methods, range(options.seeds)):
        missing = [name for name in options.methods if (name, seed) not in rows]
        if not missing:
            continue
        for name, row in measure(missing, sizes, seed).items():
            rows.record(name, seed, row)
    ordered = sorted(rows, key=lambda row: NAMES.index(row["method"]))
    write_table(table(ordered, COLUMNS), options.out)
    picture(ordered, options.out / "sam_time.png")


if __name__ == "__main__":
    main()
