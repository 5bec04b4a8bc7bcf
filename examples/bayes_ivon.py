"""Does a model know when it is wrong? Calibration of SGD, Adam and IVON's posterior.

A small network learns the handwritten digits from few examples, so that it errs often
enough to count. IVON learns a posterior at one gradient per update, as SGD and Adam
take; its predictions are those of the mean, or averaged over draws (`predict`).

python examples/bayes_ivon.py [--smoke] [--seeds N] [--out DIR]
"""

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_flat
from optax_flat.training import make_train_step, predict

EXAMPLES = 300  # to learn from
BATCH = 50  # examples per minibatch: one gradient
DECAY = 1e-3  # of the weights, with every method: the prior
BINS = 10  # of confidence


class Net(nn.Module):
    """A classifier with one hidden layer."""

    @nn.compact
    def __call__(self, x):
        """Returns logits [batch, 10]."""
        return nn.Dense(10)(nn.relu(nn.Dense(100)(x)))


def loss_fn(params, batch):
    """Mean cross-entropy."""
    logits = Net().apply({"params": params}, batch["image"])
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["label"]
    ).mean()


def make_optimizer(name, updates, key):
    """Each with a cosine schedule, at its best on other examples.

    Best of a small grid of rates, weight decays and `hess_init`: the least negative
    log-likelihood, of IVON averaged over draws; among those within 1 %, the least
    calibration error.
    """
    cosine = functools.partial(optax.cosine_decay_schedule, decay_steps=updates)
    if name == "SGD":
        decay = optax.add_decayed_weights(DECAY)
        return optax.chain(decay, optax.sgd(cosine(0.5), momentum=0.9, nesterov=True))
    if name == "Adam":
        return optax.adamw(cosine(5e-4), weight_decay=DECAY)
    return optax_flat.ivon(
        cosine(0.2), ess=EXAMPLES, hess_init=2.0, b2=0.9995, weight_decay=DECAY, key=key
    )


@functools.partial(jax.jit, static_argnames=("name", "updates", "draws"))
def run(name, updates, draws, data, seed):
    """Trains once; class probabilities of the other images, by way of predicting."""
    train_data, images = data
    init_key, row_key, noise_key, draw_key = jax.random.split(jax.random.key(seed), 4)
    tx = make_optimizer(name, updates, noise_key)
    step = make_train_step(loss_fn, tx)
    params = Net().init(init_key, images[:1])["params"]
    rows = jax.random.randint(row_key, (updates, BATCH), 0, EXAMPLES)

    def update(carry, rows):
        batch = jax.tree.map(lambda x: x[rows], train_data)
        return step(*carry, batch)[:2], None

    (params, state), _ = jax.lax.scan(update, (params, tx.init(params)), rows)

    def probabilities(params):
        return jax.nn.softmax(Net().apply({"params": params}, images))

    if name != "IVON":
        return {name: probabilities(params)}
    average = predict(probabilities, state, params, draw_key, num_samples=draws)
    return {
        "IVON, mean": probabilities(optax_flat.eval_params(state, params)),
        f"IVON, {draws} draws": average,
    }


def reliability(probabilities, labels):
    """Share of the examples, accuracy and confidence in each bin of confidence."""
    confidence, right = probabilities.max(axis=-1), probabilities.argmax(-1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, x, minlength=BINS) for x in (right, confidence)]
    accuracy, mean_confidence = (x / np.maximum(count, 1) for x in sums)
    return count / len(labels), accuracy, mean_confidence


def measures(probabilities, labels):
    """Accuracy in %, negative log-likelihood, expected calibration error in %."""
    share, accuracy, confidence = reliability(probabilities, labels)
    return {
        "accuracy": 100 * np.mean(probabilities.argmax(axis=-1) == labels),
        "nll": -np.log(probabilities[np.arange(len(labels)), labels]).mean(),
        "ece": 100 * np.sum(share * np.abs(accuracy - confidence)),
    }


def draw_picture(found, labels, path):
    """A reliability diagram per way of predicting, over all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (3 * len(found), 3.4)
    figure, axes = plt.subplots(
        1, len(found), figsize=size, sharey=True, layout="constrained"
    )
    for axis, (name, probabilities) in zip(axes, found.items(), strict=True):
        flat = probabilities.reshape(-1, 10)
        share, accuracy, confidence = reliability(
            flat, np.tile(labels, len(probabilities))
        )
        seen = share > 0.002
        axis.plot([0, 1], [0, 1], color="0.7", lw=1)
        axis.plot(confidence[seen], accuracy[seen], marker="o")
        axis.fill_between(confidence[seen], confidence[seen], accuracy[seen], alpha=0.2)
        axis.set(title=name, xlabel="confidence", xlim=(0.2, 1), ylim=(0.2, 1))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv=None):
    """Trains with every method; returns measures [seeds] by way of predicting."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="make few updates")
    parser.add_argument("--seeds", type=int, help="runs per method (10; smoke: 2)")
    parser.add_argument("--out", type=Path, default=Path("out/bayes_ivon"))
    args = parser.parse_args(argv)
    seeds = args.seeds or (2 if args.smoke else 10)
    updates, draws = (300, 16) if args.smoke else (3000, 64)
    args.out.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    images = (images / 8 - 1).astype("f4")
    x, test_x, y, test_y = train_test_split(
        images, labels, train_size=EXAMPLES, random_state=0, stratify=labels
    )
    # On the other part of the rest the settings above were chosen.
    test_x, test_y = test_x[:1000], test_y[:1000]
    data = jax.tree.map(jnp.asarray, ({"image": x, "label": y}, test_x))

    print(f"{EXAMPLES} examples, {updates} gradients of {BATCH} examples each, over")
    print(f"{seeds} seed(s): mean ± standard error.")
    print(f"{'':16} {'accuracy, %':>14} {'NLL':>16} {'ECE, %':>14} {'s':>6}")
    found, results = {}, {}
    for name in ("SGD", "Adam", "IVON"):
        clock = time.perf_counter()
        runs = [run(name, updates, draws, data, s) for s in range(seeds)]
        runs = jax.device_get(runs)
        seconds = time.perf_counter() - clock
        for way in runs[0]:
            found[way] = np.stack([r[way] for r in runs])
            rows = [measures(probabilities, test_y) for probabilities in found[way]]
            results[way] = {k: np.array([row[k] for row in rows]) for k in rows[0]}
            shown = []
            for (measure, values), digits in zip(
                results[way].items(), (2, 4, 2), strict=True
            ):
                error = values.std(ddof=1) / seeds**0.5 if seeds > 1 else np.nan
                width = {"nll": 16}.get(measure, 14)
                text = f"{values.mean():.{digits}f} ± {error:.{digits}f}"
                shown.append(f"{text:>{width}}")
            print(f"{way:16} {' '.join(shown)} {seconds:6.1f}", flush=True)
    draw_picture(found, test_y, args.out / "bayes_ivon.png")
    print(f"Reliability diagrams: {args.out / 'bayes_ivon.png'}")
    return results


if __name__ == "__main__":
    main()
