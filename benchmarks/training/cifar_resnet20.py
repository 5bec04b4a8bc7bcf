"""CoolMomentum and others with ResNet-20 on CIFAR-10, at equal gradients.

The network is ResNet-20 v1 (He et al. 2015): three stages of three basic blocks with
16, 32 and 64 filters, 0.27 million params. Where a stage begins, the shortcut is a 1x1
convolution, as in the Keras example that CoolMomentum's authors trained, not the
parameter-free one of the paper. Images are shifted by up to 4 pixels and flipped.

Every method sees the same minibatches of 128, shifts and flips included, from the same
start and spends the same number of gradients. An epoch is a permutation of the images,
cut into whole walks of L = 13 minibatches, a number that divides the 78 minibatches of
10,000 images and the 390 of 50,000; the few images left over are others in every epoch.

Nothing is selected: all rates are published or usual ones, scaled to the budget.
CoolMomentum has the learning rate 0.01 and cools its momentum from 0.99 to 0 over the
whole budget, with each of the three schedules. SGD with momentum 0.9 starts at 0.1 and
Adam at 1e-3; both are divided by 10 after 50 % and 75 %. Entropy-SGD has what its
authors used for CIFAR-10, but for shorter walks (theirs have L = 20) and for the decay:
step 0.1, Nesterov momentum 0.9, gamma 0.03, scoping 1e-3, noise 1e-4 (random signs),
and the outer rate 1, divided by 5 after 30 % and 60 %. It runs in transparent mode,
which gives a loss for every gradient. Weight decay is 5e-4 for all
methods, an L2 penalty of all params: it is added to every gradient.

Running averages of the batch statistics lag behind the params, and those of a walk
would move only once in it. So no method keeps any: before every evaluation the
statistics of the evaluated params are computed from the first 1,000 training images.
The error is the test error at the end of the budget, not at its best moment; train_loss
is the loss on all training images then, neither shifted nor flipped.

The temperature is what CoolMomentum's authors log under that name: the mean over the
params of the squared step. Entropy-SGD's has the steps of the walk and the jump at its
end. Curves of loss and temperature have one point per 13 gradients, their mean; errors
have one per epoch. A run whose loss becomes NaN counts as guessing, 90 % error; in its
row `diverged_at` says after how many gradients; curves end with the epoch before.

    python -m benchmarks.training.cifar_resnet20 --data cifar10.npz

A run that was cut off goes on at the epoch where it was.
"""

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from tqdm.auto import tqdm

import optax_flat
from benchmarks.checkpoint import Checkpoint, run_checkpointed
from benchmarks.harness import COLOURS, Row, falling, parser, table, write_table
from benchmarks.images import Images, load_or_random
from optax_flat import schedules
from optax_flat.training import make_train_step

WALK = 13  # L, and the gradients per point of a curve
DECAY = 5e-4
CHUNK = 1000  # images per forward pass of an evaluation
CURVES = {
    "training_losses": "training loss",
    "temperatures": "temperature",
    "errors_percent": "test error, %",
}
MEASURES = ("error_percent", "test_loss", "train_loss", "diverged_at")

# Of CIFAR-10's training images, per channel.
MEAN = (125.3, 123.0, 113.9)
DEVIATION = (63.0, 62.1, 66.7)

# An optimizer from the number of gradients and a key.
Maker = Callable[[int, jax.Array], optax.GradientTransformation]


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    epochs: int = 8
    batch: int = 128
    filters: tuple[int, ...] = (16, 32, 64)  # of the stages
    blocks: int = 3  # per stage


SMOKE = Sizes(2, 2, (2, 4), 1)


def coolmomentum(cooling: Callable[[float, int], optax.Schedule]) -> Maker:
    """CoolMomentum with one of its schedules."""

    def make(steps: int, key: jax.Array) -> optax.GradientTransformation:
        del key
        return optax_flat.coolmomentum(0.01, cooling(0.99, steps), weight_decay=DECAY)

    return make


def sgd(steps: int, key: jax.Array) -> optax.GradientTransformation:
    """Momentum 0.9."""
    del key
    rate = falling(0.1, steps, 0.1, 0.5, 0.75)
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, 0.9))


def adam(steps: int, key: jax.Array) -> optax.GradientTransformation:
    """Adam with its usual moments; the decay goes through them, it is not AdamW's."""
    del key
    rate = falling(1e-3, steps, 0.1, 0.5, 0.75)
    return optax.chain(optax.add_decayed_weights(DECAY), optax.adam(rate))


def entropy_sgd(steps: int, key: jax.Array) -> optax.GradientTransformation:
    """One gradient per call, one outer update per walk."""
    return optax_flat.entropy_sgd(
        falling(1.0, steps // WALK, 0.2, 0.3, 0.6),
        num_steps=WALK,
        step_size=0.1,
        gamma=0.03,
        scoping=1e-3,
        noise=1e-4,
        noise_kind="rademacher",
        inner_transform=optax.chain(
            optax.add_decayed_weights(DECAY), optax.trace(0.9, nesterov=True)
        ),
        mode="transparent",
        key=key,
    )


METHODS = {
    "coolmomentum_exponential": coolmomentum(schedules.exponential_cooling),
    "coolmomentum_temperature": coolmomentum(schedules.temperature_cooling),
    "coolmomentum_linear": coolmomentum(schedules.linear_cooling),
    "sgd": sgd,
    "adam": adam,
    "entropy_sgd": entropy_sgd,
}


class Network(nn.Module):
    """A first convolution, three stages of basic blocks, average pooling, logits."""

    filters: tuple[int, ...]
    blocks: int

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Logits [B, 10] of uint8 images [B, height, width, 3]."""
        init = nn.initializers.he_normal()
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=init)
        # Momentum 0: batch_stats are those of the latest images, see `statistics`.
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.0
        )
        x = (images - jnp.array(MEAN)) / jnp.array(DEVIATION)
        x = nn.relu(norm()(conv(self.filters[0], (3, 3))(x)))
        for stage, width in enumerate(self.filters):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = x if stride == 1 else conv(width, (1, 1), stride)(x)
                x = nn.relu(norm()(conv(width, (3, 3), stride)(x)))
                x = nn.relu(norm()(conv(width, (3, 3))(x)) + shortcut)
        return nn.Dense(10, kernel_init=init)(x.mean(axis=(1, 2)))


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


@functools.partial(jax.jit, static_argnums=0)
def initial(network, key, images):
    """The params to start from."""
    return network.init(key, images, train=False)["params"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def draw(key, count, steps, batch):
    """Keys of the shifts and flips [steps], indices of the images [steps, batch]."""
    order_key, augment_key = jax.random.split(key)
    order = jax.random.permutation(order_key, count)[: steps * batch]
    return jax.random.split(augment_key, steps), order.reshape(steps, batch)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Flips half of the images and shifts all by up to 4 pixels, filled with black."""
    flip_key, shift_key = jax.random.split(key)
    flips = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    images = jnp.where(flips, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 9)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def make_update(network: Network, tx: optax.GradientTransformation):
    """Spends one gradient: the new state of the run, the loss and the temperature."""

    def loss_fn(params, batch):
        images, labels = batch
        logits, _ = network.apply(
            {"params": params}, images, train=True, mutable="batch_stats"
        )
        return cross_entropy(logits, labels).mean()

    step = make_train_step(loss_fn, tx)

    def update(state, key, index, images, labels):
        params, opt_state = state
        batch = (augment(key, images[index]), labels[index])
        moved, opt_state, loss = step(params, opt_state, batch)
        # CoolMomentum's state has it too; measured here it is the same for all.
        change = optax.tree.sub(moved, params)
        temperature = optax.tree.norm(change, squared=True) / optax.tree.size(change)
        return (moved, opt_state), jnp.stack([loss, temperature])

    return jax.jit(update, donate_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def statistics(network, params, images):
    """The batch statistics of these images."""
    _, moved = network.apply(
        {"params": params}, images, train=True, mutable="batch_stats"
    )
    return moved["batch_stats"]


@functools.partial(jax.jit, static_argnums=0)
def sums(network, variables, images, labels):
    """Summed loss and number of errors."""
    logits = network.apply(variables, images, train=False)
    wrong = jnp.argmax(logits, axis=-1) != labels
    return jnp.stack([cross_entropy(logits, labels).sum(), wrong.sum()])


def evaluate(network, some_images, state, images, labels) -> tuple[float, float]:
    """Mean loss, and error in percent, with the batch statistics of `some_images`."""
    params, opt_state = state
    params = optax_flat.eval_params(opt_state, params)
    batch_stats = statistics(network, params, some_images)
    variables = {"params": params, "batch_stats": batch_stats}
    total = 0.0
    # Not `lax.map`: the last chunk may be shorter.
    for first in range(0, len(images), CHUNK):
        chunk = slice(first, first + CHUNK)
        total += sums(network, variables, images[chunk], labels[chunk])
    loss, wrong = np.asarray(total, float) / len(images)
    return float(loss), float(100.0 * wrong)


class Run(NamedTuple):
    """A run that is ready to start."""

    state: Any  # params and the optimizer's state
    steps: int  # gradients per epoch
    spend: Callable  # (state, epoch, bar) -> state, loss and temperature [walks, 2]
    score: Callable  # (state, images, labels) -> mean loss, error in percent


def prepare(method: Maker, images: Images, sizes: Sizes, seed: int) -> Run:
    """Compiles everything that takes part in the time measured."""
    walks, left_over = divmod(len(images.train_images), WALK * sizes.batch)
    if walks == 0:
        raise SystemExit(
            f"An epoch needs at least {WALK * sizes.batch} training images, a walk of "
            f"{WALK} minibatches of {sizes.batch}; the data has {left_over}."
        )
    steps = walks * WALK
    init_key, noise_key, data_key = jax.random.split(jax.random.key(seed), 3)
    training = jax.device_put((images.train_images, images.train_labels))
    network = Network(sizes.filters, sizes.blocks)
    params = initial(network, init_key, training[0][:1])
    tx = method(sizes.epochs * steps, noise_key)
    state = (params, tx.init(params))

    def minibatches(epoch):
        # They depend on seed and epoch only: the same for all methods, cut off or not.
        key = jax.random.fold_in(data_key, epoch)
        return draw(key, len(images.train_images), steps, sizes.batch)

    keys, order = minibatches(0)
    lowered = make_update(network, tx).lower(state, keys[0], order[0], *training)
    update = lowered.compile()

    def spend(state, epoch, bar):
        keys, order = minibatches(epoch)
        points = []
        for first in range(0, steps, WALK):
            walk = []
            for i in range(first, first + WALK):
                state, point = update(state, keys[i], order[i], *training)
                walk.append(point)
            points.append(np.mean(walk, axis=0))
            bar.update(WALK)
            bar.set_postfix(loss=f"{points[-1][0]:.3f}")
        return state, np.array(points, float)

    score = functools.partial(evaluate, network, training[0][:CHUNK])
    return Run(state, steps, spend, score)


def train(
    method: Maker, images: Images, sizes: Sizes, *, seed: int, checkpoint: Checkpoint
) -> Row:
    """One run, or the rest of one that was cut off."""
    run = prepare(method, images, sizes, seed)
    budget = sizes.epochs * run.steps
    log = {
        "epoch": 0,
        "seconds": 0.0,
        "test_loss": 0.0,
        **{name: [] for name in CURVES},
    }
    state, log = checkpoint.restore(run.state, log)
    result = {}
    spent = log["epoch"] * run.steps
    with tqdm(total=budget, initial=spent, unit="gradient", leave=False) as bar:
        while log["epoch"] < sizes.epochs:
            start = time.perf_counter()
            state, points = run.spend(state, log["epoch"], bar)
            log["seconds"] += time.perf_counter() - start
            log["test_loss"], error = run.score(state, *images[2:])
            finite = np.isfinite(points).all(axis=1)
            if not (finite.all() and np.isfinite(log["test_loss"])):
                # The rest of the budget would not change the params: they are NaN.
                spent = log["epoch"] * run.steps + WALK * int(finite.cumprod().sum())
                result = {"error_percent": 90.0, "diverged_at": spent}
                break
            log["training_losses"] += points[:, 0].tolist()
            log["temperatures"] += points[:, 1].tolist()
            log["errors_percent"].append(error)
            log["epoch"] += 1
            checkpoint.save(log["epoch"], state, log)
    if not result:
        result = {
            "error_percent": log["errors_percent"][-1],
            "test_loss": log["test_loss"],
            "train_loss": run.score(state, *images[:2])[0],
        }
    return {
        "gradient_evaluations": budget,
        "forward_passes": 0,
        "seconds": log["seconds"],
        **result,
        **{name: log[name] for name in CURVES},
    }


def picture(rows: Iterable[Row], epochs: int, path: Path) -> None:
    """The curves against gradient evaluations, means over the seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    for axis, (curve, title) in zip(axes, CURVES.items(), strict=True):
        for name, colour in zip(METHODS, COLOURS, strict=False):
            runs = [row for row in rows if row["method"] == name]
            if not runs:
                continue
            budget = runs[0]["gradient_evaluations"]
            every, marker = WALK, ""
            if curve == "errors_percent":  # few points
                every, marker = budget // epochs, "."
            spent = np.arange(every, budget + 1, every)
            # Padded, so that a mean ends where the first of its runs diverged.
            padded = np.full([len(runs), len(spent)], np.nan)
            for line, row in zip(padded, runs, strict=True):
                line[: len(row[curve])] = row[curve]
            label = name.replace("_", " ")
            mean = padded.mean(axis=0)
            axis.plot(spent, mean, color=colour, marker=marker, label=label)
        axis.set_title(title, fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[1].set_xlabel("gradient evaluations")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(__doc__, METHODS, seeds=1, out="out/cifar_resnet20", data=True)
    epochs = Sizes().epochs
    options_of.add_argument("--epochs", type=int, metavar="N", help=f"({epochs})")
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    if options.epochs is not None:
        sizes = sizes._replace(epochs=options.epochs)
    data, images = load_or_random(options, (8, 8, 3), 60, 20)
    settings = {**sizes._asdict(), "data": data}

    def run(name: str, seed: int, checkpoint: Checkpoint) -> Row:
        return train(METHODS[name], images, sizes, seed=seed, checkpoint=checkpoint)

    rows = run_checkpointed(run, options, settings)
    write_table(table(rows, MEASURES), options.out)
    picture(rows, sizes.epochs, options.out / "cifar_resnet20.png")


if __name__ == "__main__":
    main()
