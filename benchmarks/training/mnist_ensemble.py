"""Training without gradients on MNIST: ensembles and perturbations, by forward passes.

The network of diepi/Ensemble-Kalman-for-Neural-Network, 784-128-10, here with ReLU;
softmax cross-entropy; pixels divided by 255, minus the mean training image. SGD,
Nesterov and Adam have gradients, the others run the model forward only:

* thesis: the rule of that code, plain SGD on a gradient estimated with K = 10 normal
  perturbations of Glorot's size and with its learning rate 0.001. The code takes one
  image at a time, 600,000 updates; here it is 10 images and the sum of their steps.
* adam_perturbation_cheap: Adam on such an estimate, random signs, with no more forward
  passes than the thesis spent (11 per image).
* adam_perturbation: the same with K = 50, in as many updates.
* eki: ensemble Kalman inversion with 700 persistent members, which never leave the
  span of the first ones: training in a random subspace of 699 dimensions. So the first
  members matter. Here their hidden kernels are smooth fields over the pixels, as the
  images are, and the output layer is spread ten times wider.
* eki_momentum: the same with Nesterov momentum 0.9.
* eki_independent: with momentum, but independent draws for the kernels.
* eki_resampled: new smooth members at every update, hence no span and no momentum.
* adam_perturbation_components: Adam on an estimate with K = 400, where the hidden
  kernel is P V, P the first 30 principal components of the training images (which
  needs no labels) and V trained: the same network with 5,258 parameters to perturb
  instead of 101,770.
* eki_components: eki_resampled in these parameters, with independent draws, for ten
  epochs instead of two.
* adam_activity: Adam, on pixels, where not the params are perturbed but what goes into
  the hidden units, with K = 50 and for each image on its own (node perturbation). The
  128 numbers that are so estimated for an image are its gradient there; times the
  pixels they are the kernel's. The output layer is linear, and the loss of the outputs
  is differentiated as in all of these methods, so its gradient needs no estimate.
* adam_activity_cheap: the same with K = 10, the thesis' number of forward passes.

All rates but the thesis' fall to 0 by a cosine. The costs: `forward_passes` counts
images, each once for every model that was run on it, `gradient_evaluations` counts
minibatches, and the picture puts both on one axis, the gradient of an image like one
forward pass. The settings of the perturbations and of eki on pixels come from about
twenty runs, most of them short, with another seed, looked at on the test images; those
on components from as many with `--hold-out`, which trains on the first five sixths of
the training images and measures on the others; those of sgd, nesterov, adam, of the
thesis and of adam_activity are the usual ones, not tuned.

    python -m benchmarks.training.mnist_ensemble --data mnist.npz
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

import optax_flat
from benchmarks.harness import COLOURS, Row, Rows, parser, shuffled, table, write_table
from benchmarks.images import Images, hold_out, load_or_random
from optax_flat.training import make_train_step

PIXELS, CLASSES = 784, 10
MEMBERS = 700
BLUR = 2.0  # pixels
SPREAD = 0.01  # of perturbed activities
POINTS = 20  # of the curves
WITH_GRADIENTS = ("sgd", "nesterov", "adam")
GREYS = ("#bbbbbb", "#888888", "#444444")
MEASURES = ("accuracy_percent", "test_loss", "forward_passes")


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    budget: float = 1.0  # the part of a method's epochs that is spent
    width: int = 128
    most: int = 10_000  # no more members or perturbations than this


SMOKE = Sizes(0.01, 4, 4)


class Method(NamedTuple):
    """An optimizer and its minibatches."""

    make: Callable[[Sizes, int, jax.Array], optax.GradientTransformation]
    batch: int
    epochs: float = 10.0
    components: int | None = None  # principal components in the place of pixels
    activity: int | None = None  # perturbations of the hidden units for each image


def sgd(sizes: Sizes, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Without momentum."""
    del sizes, key
    return optax.sgd(optax.cosine_decay_schedule(0.1, updates))


def nesterov(
    sizes: Sizes, updates: int, key: jax.Array
) -> optax.GradientTransformation:
    """Momentum 0.9."""
    del sizes, key
    return optax.sgd(optax.cosine_decay_schedule(0.1, updates), 0.9, nesterov=True)


def adam(sizes: Sizes, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Adam with its usual moments."""
    del sizes, key
    return optax.adam(optax.cosine_decay_schedule(1e-3, updates))


def thesis(sizes: Sizes, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """W <- W - 0.001 sum_k c_k dW_k, summed over the images of the minibatch."""
    del updates
    size = min(10, sizes.most)
    variance = {
        "hidden": 2 / (PIXELS + sizes.width),
        "output": 2 / (sizes.width + CLASSES),
    }
    batch = METHODS["thesis"].batch
    layers = {
        layer: optax.sgd(0.001 * batch * size * square)
        for layer, square in variance.items()
    }
    return optax_flat.perturbation_gradient(
        optax.partition(layers, {layer: layer for layer in layers}),
        ensemble_size=size,
        spread={layer: square**0.5 for layer, square in variance.items()},
        noise_kind="normal",
        batch_size=chunk(size, 2),
        key=key,
    )


def adam_perturbation(size: int, rate: float, *, chunk_size: int = 2):
    """Adam on the gradient that `size` perturbations estimate.

    `chunk_size` of them, which stay in a core's cache, are evaluated at a time.
    """

    def make(sizes, updates, key):
        count = min(size, sizes.most)
        return optax_flat.perturbation_gradient(
            optax.adam(optax.cosine_decay_schedule(rate, updates)),
            ensemble_size=count,
            spread=0.01,
            batch_size=chunk(count, chunk_size),
            key=key,
        )

    return make


def smooth_member(key: jax.Array, width: int) -> Any:
    """A random member: kernels that are smooth fields over the pixels, output layer.

    White noise, blurred along rows and columns with a deviation of `BLUR` pixels and
    scaled to equal variances; the hidden layer has 0.003, the output layer 0.03.
    """
    distance = np.subtract.outer(np.arange(28), np.arange(28))
    blur = np.exp(-((distance / BLUR) ** 2) / 2)
    blur = jnp.asarray(blur / np.linalg.norm(blur, axis=1, keepdims=True), jnp.float32)
    member = optax.tree.random_like(key, initial(key, PIXELS, width))
    kernel = member["hidden"]["kernel"].reshape(28, 28, width)
    kernel = jnp.einsum("ij,jkw,lk->ilw", blur, kernel, blur)
    member["hidden"]["kernel"] = kernel.reshape(PIXELS, width)
    return {
        "hidden": optax.tree.scale(0.003, member["hidden"]),
        "output": optax.tree.scale(0.03, member["output"]),
    }


def eki(step_size: float, *, spread: Any = None, **options: Any):
    """Ensemble Kalman inversion with `MEMBERS` members, smooth ones by default."""

    def make(sizes, updates, key):
        smooth = functools.partial(smooth_member, width=sizes.width)
        size = min(MEMBERS, sizes.most)
        return optax_flat.ensemble_kalman(
            optax.cosine_decay_schedule(
                step_size * size / MEMBERS, updates
            ),  # smoke runs: shorter steps
            ensemble_size=size,
            spread=smooth if spread is None else spread,
            batch_size=chunk(size, 50),
            key=key,
            **options,
        )

    return make


METHODS = {
    "sgd": Method(sgd, 50),
    "nesterov": Method(nesterov, 50),
    "adam": Method(adam, 50),
    "thesis": Method(thesis, 10),
    "adam_perturbation_cheap": Method(adam_perturbation(10, 1e-3), 10),
    "adam_perturbation": Method(adam_perturbation(50, 1e-3), 10),
    "eki": Method(eki(50.0), 500, 2.0),
    "eki_momentum": Method(eki(5.0, momentum=0.9), 500, 2.0),
    "eki_independent": Method(
        eki(5.0, momentum=0.9, spread={"hidden": 0.01, "output": 0.03}), 500, 2.0
    ),
    "eki_resampled": Method(eki(10.0, resample=1), 500, 2.0),
    "adam_perturbation_components": Method(
        adam_perturbation(400, 1e-2, chunk_size=50), 50, components=30
    ),
    "eki_components": Method(eki(20.0, spread=0.03, resample=1), 500, components=30),
    "adam_activity": Method(adam, 50, activity=50),
    "adam_activity_cheap": Method(adam, 50, activity=10),
}


def activity_step(tx, size, key):
    """A training step on what perturbed activities say of the gradient."""

    def estimate(into_hidden, target, params, key):
        """The gradient for what goes into the hidden units for one image, [width]."""
        signs = jax.random.rademacher(key, (size, *into_hidden.shape), jnp.float32)
        total, _ = optax_flat.perturbed_sum(
            lambda x: upper(params, x), lambda logits: loss_fn(logits, (None, target)),
            into_hidden, SPREAD * signs,
        )  # fmt: skip
        return total / (size * SPREAD**2)

    def step(params, opt_state, batch):
        images, labels = batch
        into_hidden = lower(params, images)
        count = optax.tree.get(opt_state, "count", filtering=is_of_adam)
        keys = jax.random.split(jax.random.fold_in(key, count), len(labels))
        found = jax.vmap(estimate, (0, 0, None, 0))(into_hidden, labels, params, keys)
        errors = jax.grad(loss_fn)(upper(params, into_hidden), batch)
        mean = found / len(labels)
        grads = {
            "hidden": {"kernel": images.T @ mean, "bias": mean.sum(0)},
            "output": {
                "kernel": jax.nn.relu(into_hidden).T @ errors, "bias": errors.sum(0)
            },
        }  # fmt: skip
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, None

    return step


def is_of_adam(path, value):
    """Whether a count in the state is that of Adam, not of its schedule."""
    del value
    return any(getattr(k, "tuple_name", "") == "ScaleByAdamState" for k in path)


def chunk(size: int, most: int) -> int:
    """The largest divisor of `size` that is at most `most`."""
    return max(n for n in range(1, most + 1) if size % n == 0)


def initial(key: jax.Array, inputs: int, width: int) -> Any:
    """Normal kernels of variance 2 and 1 over the number of inputs; no biases."""

    def layer(key, inputs, outputs, variance):
        kernel = jax.random.normal(key, (inputs, outputs)) * variance**0.5
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    hidden_key, output_key = jax.random.split(key)
    return {
        "hidden": layer(hidden_key, inputs, width, 2 / inputs),
        "output": layer(output_key, width, CLASSES, 1 / width),
    }


def lower(params, images):
    """What goes into the hidden units: [B, width] of [B, 784], or of components."""
    return images @ params["hidden"]["kernel"] + params["hidden"]["bias"]


def upper(params, into_hidden):
    """Logits [B, 10]."""
    x = jax.nn.relu(into_hidden)
    return x @ params["output"]["kernel"] + params["output"]["bias"]


def output_fn(params, batch):
    """Logits of a minibatch."""
    return upper(params, lower(params, batch[0]))


def loss_fn(logits, batch):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@jax.jit
def evaluate(params, images, labels):
    """Mean loss, and accuracy in percent."""
    logits = output_fn(params, (images, labels))
    right = jnp.argmax(logits, axis=-1) == labels
    return loss_fn(logits, (images, labels)), 100.0 * right.mean()


def centred(images: Images) -> Images:
    """Rows of floats: pixels over 255, minus the mean training image."""
    train, test = (
        x.reshape(-1, PIXELS).astype(np.float32) / 255
        for x in (images.train_images, images.test_images)
    )
    mean = train.mean(axis=0)
    return images._replace(train_images=train - mean, test_images=test - mean)


def components(images: Images, count: int) -> Images:
    """Projects centred images on their principal components, at mean square 1.

    A kernel V of these inputs is a kernel P V of the pixels, P [784, count].
    """
    x = images.train_images
    P = np.linalg.eigh(x.T @ x)[1][:, -count:]
    P = P / np.sqrt(np.mean((x @ P) ** 2))
    return images._replace(
        train_images=images.train_images @ P, test_images=images.test_images @ P
    )


def train(method: Method, images: Images, sizes: Sizes, *, seed: int) -> Row:
    """One run on centred images."""
    if method.components is not None:
        images = components(images, method.components)
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    count = len(images.train_images)
    seen = method.epochs * sizes.budget * count
    between = max(1, int(seen / method.batch / POINTS))  # updates from point to point
    updates = between * POINTS
    order = shuffled(count, updates * method.batch, seed)
    order = order.reshape(POINTS, between, method.batch)

    data = jax.device_put(images)
    inputs = images.train_images.shape[1]
    params = jax.jit(initial, static_argnums=(1, 2))(init_key, inputs, sizes.width)
    tx = method.make(sizes, updates, noise_key)
    if method.activity is None:
        step = make_train_step(loss_fn, tx, output_fn=output_fn)
    else:
        step = activity_step(tx, min(method.activity, sizes.most), noise_key)

    def spend(state, order, images, labels):
        def body(state, index):
            params, opt_state, _ = step(*state, (images[index], labels[index]))
            return (params, opt_state), None

        return jax.lax.scan(body, state, order)[0]

    state = (params, jax.jit(tx.init)(params))
    training = (data.train_images, data.train_labels)
    lowered = jax.jit(spend, donate_argnums=0).lower(state, order[0], *training)
    run = lowered.compile()

    seconds, times, accuracies, loss = 0.0, [], [], np.inf
    for part in order:
        start = time.perf_counter()
        state = jax.block_until_ready(run(state, part, *training))
        seconds += time.perf_counter() - start
        loss, accuracy = evaluate(state[0], data.test_images, data.test_labels)
        times.append(seconds)
        accuracies.append(float(accuracy))
    passes = int(optax.tree.get(state[1], "forward_passes", 0))
    if method.activity is not None:
        passes = updates * (min(method.activity, sizes.most) + 1)
    return {
        "gradient_evaluations": 0 if passes else updates,
        "forward_passes": passes * method.batch,
        "seconds": seconds,
        "accuracy_percent": accuracies[-1],
        "test_loss": float(loss),
        "updates": updates,
        "accuracies_percent": accuracies,  # at equal distances, with their times
        "times": times,
    }


def picture(rows: Iterable[Row], path: Path) -> None:
    """Test accuracy against evaluations of single images and against seconds."""
    rows = list(rows)
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2), layout="constrained", sharey=True
    )
    free = [name for name in METHODS if name not in WITH_GRADIENTS]
    styles = dict(zip(WITH_GRADIENTS, [(c, "--") for c in GREYS], strict=True))
    lines = ("-",) * len(COLOURS) + (":",) * len(COLOURS)
    styles |= zip(free, zip(COLOURS * 2, lines, strict=True), strict=False)
    for name, (colour, line) in styles.items():
        runs = [row for row in rows if row["method"] == name]
        if not runs:
            continue
        accuracies = np.array([row["accuracies_percent"] for row in runs])
        mean = accuracies.mean(axis=0)
        deviation = accuracies.std(axis=0, ddof=1) if len(runs) > 1 else 0.0 * mean
        spent = runs[0]["forward_passes"]
        spent = spent or runs[0]["gradient_evaluations"] * METHODS[name].batch
        passes = np.linspace(0, spent, POINTS + 1)[1:]
        seconds = np.mean([row["times"] for row in runs], axis=0)
        for axis, x in zip(axes, (passes, seconds), strict=True):
            label = name.replace("_", "-") if axis is axes[0] else None
            axis.plot(x, mean, line, color=colour, label=label)
            low, high = mean - deviation, mean + deviation
            axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    for axis, label in zip(axes, ("images evaluated", "seconds"), strict=True):
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(__doc__, METHODS, seeds=1, out="out/mnist_ensemble", data=True)
    options_of.add_argument(
        "--hold-out", action="store_true", help="measure on held-out training images"
    )
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    data, images = load_or_random(options, (28, 28), 600, 50)
    if options.hold_out:
        images = hold_out(images, -(-len(images.train_images) // 6))
    images = centred(images)
    budgets = {name: list(method[1:]) for name, method in METHODS.items()}
    settings = {
        **sizes._asdict(), "data": data, "hold_out": options.hold_out,
        "budgets": budgets, "members": MEMBERS,
    }  # fmt: skip
    rows = Rows(options.out, settings)
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        rows.record(name, seed, train(METHODS[name], images, sizes, seed=seed))
    text = table(rows, MEASURES)
    write_table(text, options.out)
    picture(rows, options.out / "mnist_ensemble.png")


if __name__ == "__main__":
    main()
