"""Who knows what it does not know? Calibration and unknown images, at equal gradients.

An MLP 196-64-64-10 is trained on 10,000 images of Fashion-MNIST and tuned by the
negative log-likelihood (NLL) of 5,000 others; pixels are averaged in squares of 2x2.
Fashion-MNIST is the harder one of the two data sets, on which a network can be wrong
and sure of it; MNIST is what is unknown. All methods spend the same number of gradients
of minibatches of 32, and those with draws average the probabilities of 16:

* sgd, adamw, sam, asam, entropy_sgd, ema, swa: one point;
* sgd_tempered: sgd with its logits divided by the temperature that has the smallest NLL
  on the validation images, one number: the baseline to beat;
* swag: draws from independent normal distributions with means and variances of the
  iterates at eight moments of the last quarter (the diagonal SWAG, with all of the
  variance);
* sgld, psgld, sghmc: the chain at 16 moments of its second half; the rate is constant,
  and the second setting is the temperature, in parts of the posterior's 1 / examples;
* cyclical_sgld: the same at four moments at the end of each of four cycles of the rate;
* ivon, bsam: draws from the posterior that the method has learned; ivon's first
  curvature is 0.1, out of 0.1, 0.3 and 1, by validation with the seed of tuning;
* ensemble: four networks of sgd from different starts, each with a quarter of the
  gradients.

The samplers have a normal prior of variance 1, as weight decay. Tuning
(benchmarks.situations) takes what is reported: the NLL of the averaged probabilities,
its mean over three draws of the images. Measured on all 10,000 test images, all numbers
times 100: NLL, Brier score (summed over the classes), accuracy, and the expected
calibration error (ECE) in 15 bins of equal width of the largest probability. Unknown
images are told from test images by the entropy of the averaged probabilities: AUROC for
5,000 MNIST images, and for 5,000 of the test images themselves, turned by 90 degrees.

The ECE of a calibrated model is not 0 but of the order (bins / images)^(1/2), since
every bin adds its sampling error's absolute value. How much that is here is in the rows
and in `calibration.md`: `ece_floor`, the mean ECE over 100 draws of labels from the
model's own probabilities, under which it is calibrated.

`against.md` has paired differences from sgd_tempered, and of ivon from adamw, which the
paper of IVON (arXiv 2402.17641) reports to be worse calibrated. A run that diverged
says the same of every image: all classes alike.

    python -m benchmarks.training.uncertainty --data fashion_mnist.npz,mnist.npz
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.stats

import optax_flat
from benchmarks import models
from benchmarks.harness import Row, Rows
from benchmarks.images import (
    CLASSES,
    SHAPE,
    Images,
    load_images,
    prepared,
    random_images,
)
from benchmarks.methods import CATALOGUES, Method, Setup, sgd
from benchmarks.models import Model
from benchmarks.situations import (
    Cell,
    Data,
    Trained,
    compare,
    image_task,
    interval,
    options_and_sizes,
    random_split,
    verdict,
)
from optax_flat import schedules

METHODS = (
    "sgd", "sgd_tempered", "adamw", "sam", "asam", "entropy_sgd", "ema", "swa", "swag",
    "sgld", "cyclical_sgld", "psgld", "sghmc", "ivon", "bsam", "ensemble",
)  # fmt: skip
POINTS = 32  # of a run, where chains may have a draw
DRAWS = 16
CYCLES = 4
MEMBERS = 4
BINS = 15
LABELS = 100  # draws of labels for the floor of the ECE
PRIOR = 1.0  # precision
MEASURES = {
    "nll": -1, "ece": -1, "brier": -1, "accuracy": 1, "auroc_other": 1,
    "auroc_rotated": 1,
}  # fmt: skip


class Sizes(NamedTuple):
    """What presets change."""

    images: int = 10_000
    held_out: int = 5000
    unknown: int = 5000
    gradients: int = 200 * POINTS
    batch: int = 32
    width: int = 64
    draws: int = 3


SIZES = {
    "smoke": Sizes(40, 20, 20, 4 * POINTS, 4, 8, 1),
    "small": Sizes(),
    "paper": Sizes(55_000, gradients=2400 * POINTS, width=256),
}


# --- methods --------------------------------------------------------------------------


def sampled(sampler: Callable[..., Any], rate: Callable[[Setup], Any], **settings: Any):
    """The posterior with a prior, at a part of its temperature."""

    def make(setup):
        decay = optax.add_decayed_weights(PRIOR / setup.ess)
        noisy = sampler(
            rate(setup), lambda _: setup.second / setup.ess,
            noise_kind="rademacher", key=setup.key, **settings,
        )  # fmt: skip
        return optax.chain(decay, noisy)

    return make


def rising(setup: Setup) -> optax.Schedule:
    """Constant but for the start."""
    return setup.rising


def cyclical(setup: Setup) -> optax.Schedule:
    """Cosines with restarts."""
    cycle = schedules.cyclical_cosine(1.0, setup.updates, CYCLES)
    return lambda count: setup.peak * cycle(count)


def ivon(setup: Setup) -> optax.GradientTransformation:
    """The second setting is the ESS in examples; b2 reaches over the run."""
    return optax_flat.ivon(
        setup.rate, ess=lambda _: setup.second * setup.ess, hess_init=0.1,
        b2=1 - 1 / setup.updates, weight_decay=lambda _: PRIOR / setup.ess,
        noise_kind="rademacher", mode="transparent", key=setup.key,
    )  # fmt: skip


def bsam(setup: Setup) -> optax.GradientTransformation:
    """The second setting is the radius; b2 reaches over a quarter of the run."""
    return optax_flat.bsam(
        setup.rate, num_data=lambda _: setup.ess, rho=lambda _: setup.second,
        b2=1 - 4 / setup.updates, weight_decay=lambda _: PRIOR / setup.ess,
        noise_kind="rademacher", key=setup.key,
    )  # fmt: skip


WARM = (1e-3, 1e-2, 1e-1)
PLAIN = CATALOGUES["sgd"]["sgd"]
OTHERS = {
    "sgd_tempered": PLAIN,
    "ensemble": Method(*PLAIN[:4], num_steps=MEMBERS, members=MEMBERS),
    "swag": Method(
        lambda setup: sgd(setup.falling), 0.03, (0.1, 0.3, 1.0), "rate at the end"
    ),
    "sgld": Method(sampled(optax_flat.sgld, rising), 0.1, WARM, "temperature"),
    "cyclical_sgld": Method(
        sampled(optax_flat.sgld, cyclical), 0.3, WARM, "temperature"
    ),
    "psgld": Method(
        sampled(optax_flat.psgld, rising, eps=1e-3), 1e-3, WARM, "temperature"
    ),
    "sghmc": Method(sampled(optax_flat.sghmc, rising), 0.01, WARM, "temperature"),
    "ivon": Method(ivon, 0.1, (0.1, 0.3, 1.0, 3.0), "ess / examples"),
    "bsam": Method(bsam, 0.1, (0.003, 0.01, 0.03), "rho", 2, one_minibatch=True),
}


def draws_of(name: str, trained: Trained, key: jax.Array) -> Any:
    """The params whose predictions are averaged, stacked."""
    if name == "ensemble":
        return trained.params
    if name in {"sgld", "psgld", "sghmc"}:
        return jax.tree.map(lambda x: x[-DRAWS:], trained.points)
    if name == "cyclical_sgld":
        ends = np.arange(POINTS).reshape(CYCLES, -1)[:, -DRAWS // CYCLES :].ravel()
        return jax.tree.map(lambda x: x[ends], trained.points)
    keys = jax.random.split(key, DRAWS)
    if name == "swag":
        last = jax.tree.map(lambda x: x[-POINTS // 4 :], trained.points)
        mean, deviation = (
            jax.tree.map(lambda x, f=f: f(x, axis=0), last) for f in (jnp.mean, jnp.std)
        )

        def draw(key):
            z = optax.tree.random_like(key, mean)
            return jax.tree.map(lambda m, d, z: m + d * z, mean, deviation, z)

        return jax.vmap(draw)(keys)
    if name in {"ivon", "bsam"}:
        return jax.vmap(
            lambda k: optax_flat.sample_params(trained.opt_state, trained.last, k)
        )(keys)
    return jax.tree.map(lambda x: x[None], trained.params)


# --- measures -------------------------------------------------------------------------


@functools.cache
def predictor(model: Model) -> Callable[[Any, Any], jax.Array]:
    """Logarithms of probabilities, averaged over draws: [N, CLASSES]."""

    def one(draw, image):
        return jax.nn.log_softmax(model.apply(draw, image[None])[0])

    def predicted(draws, images):
        found = jax.lax.map(
            lambda draw: jax.lax.map(lambda x: one(draw, x), images, batch_size=100),
            draws,
        )
        return jax.nn.logsumexp(found, axis=0) - jnp.log(len(found))

    return jax.jit(predicted)


def tempered(log_p: np.ndarray, temperature: float) -> np.ndarray:
    """Logits divided by the temperature."""
    return np.asarray(jax.nn.log_softmax(log_p / temperature, axis=-1))


def nll(log_p: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the images."""
    return -float(np.take_along_axis(log_p, labels[:, None], axis=1).mean())


def best_temperature(log_p: np.ndarray, labels: np.ndarray) -> float:
    """With the smallest NLL, between 1/20 and 20."""
    found = scipy.optimize.minimize_scalar(
        lambda log_t: nll(tempered(log_p, np.exp(log_t)), labels),
        bounds=(-3, 3), method="bounded",
    )  # fmt: skip
    return float(np.exp(found.x))


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """ECE of `right` [..., N], over bins: part of the images x |accuracy - confidence|.

    The last bin has the confidence 1.
    """
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    member = places == np.arange(BINS)[:, None]
    return np.abs((right - confidence) @ member.T).sum(axis=-1) / len(confidence)


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """How often an unknown one has the larger number; half, where they are equal."""
    ranks = scipy.stats.rankdata(np.concatenate([known, unknown]))[len(known) :]
    pairs = len(known) * len(unknown)
    return float((ranks.sum() - len(unknown) * (len(unknown) + 1) / 2) / pairs)


def entropy(log_p: np.ndarray) -> np.ndarray:
    """Of each image's probabilities."""
    return -(np.exp(log_p) * log_p).sum(axis=-1)


def scores(log_p: np.ndarray, labels: np.ndarray) -> Row:
    """The measures that need labels, times 100."""
    p = np.exp(log_p)
    confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
    uniform = np.random.default_rng(0).random((LABELS, len(p)))
    found = {
        "nll": nll(log_p, labels),
        "ece": calibration_error(confidence, right),
        "ece_floor": calibration_error(confidence, uniform < confidence).mean(),
        "brier": np.square(p - np.eye(CLASSES)[labels]).sum(axis=1).mean(),
        "accuracy": right.mean(),
    }
    return {name: 100 * float(value) for name, value in found.items()}


def evaluate(model: Model, name: str, trained: Trained, data: Data, part: str) -> Row:
    """What is said of a run on "validation" or "test" images."""
    draws = draws_of(name, trained, jax.random.key(0))

    def predicted(images):
        log_p = np.asarray(predictor(model)(draws, images), np.float64)
        known = np.isfinite(log_p).all(axis=1, keepdims=True)
        return np.where(known, log_p, -np.log(CLASSES))

    temperature = 1.0
    if name == "sgd_tempered":
        images, labels = data.validation
        temperature = best_temperature(predicted(images), labels)
    images, labels, *unknown = getattr(data, part)
    log_p = tempered(predicted(images), temperature)
    row = {**scores(log_p, labels), "temperature": temperature}
    for kind, others in zip(("other", "rotated"), unknown, strict=False):
        other = tempered(predicted(others), temperature)
        row[f"auroc_{kind}"] = 100 * auroc(entropy(log_p), entropy(other))
    return row


# --- what comes of it -----------------------------------------------------------------


def calibration(rows: Sequence[Row], methods: Sequence[str]) -> str:
    """Markdown: the ECE beside what it would be if the model were calibrated."""
    lines = ["| method | ECE | if calibrated | temperature |\n| --- |" + " ---: |" * 3]
    for method in methods:
        of = [row for row in rows if row["optimizer"] == method]
        means = [np.mean([row[k] for row in of]) for k in ("ece", "ece_floor")]
        temperature = np.mean([row["temperature"] for row in of])
        entries = [method, *(f"{mean:.2f}" for mean in means), f"{temperature:.2f}"]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def against(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> str:
    """Markdown: how much better the first of each pair is, with its 95 % interval."""
    text = ""
    by_name = {(row["optimizer"], row["seed"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    for measure, sign in MEASURES.items():
        text += f"### {measure.replace('_', ' ')}, times 100\n\n"
        text += "| method | against | better by | 95 % interval | verdict |\n"
        text += "| --- | --- | ---: | ---: | --- |\n"
        for method, base in pairs:
            gains = [
                sign * (by_name[method, s][measure] - by_name[base, s][measure])
                for s in seeds
            ]
            mean, low, high = interval(gains)
            text += f"| {method} | {base} | {mean:+.2f} | {low:+.2f} to {high:+.2f} | "
            text += f"{verdict(low, high)} |\n"
        text += "\n"
    return text


def drawn(images: Images, unknown: Sequence[np.ndarray], sizes: Sizes, seed: int):
    """A random split, with the unknown images behind those for testing."""
    data = random_split(images, sizes.images, sizes.held_out, seed)
    return data._replace(test=(*data.test, *unknown))


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="uncertainty"
    )
    if options.smoke and not options.data:
        known, other = (random_images((28, 28), 60, 20) for _ in range(2))
        data = ["random"]
    else:
        paths = [*options.data, None, None][:2]
        known, other = map(load_images, paths)
        data = [path.name for path in options.data]
    images = prepared(known)
    # Scaled like the known ones.
    unknown = prepared(known._replace(test_images=other.test_images)).test_images
    rotated = np.rot90(images.test_images, axes=(1, 2))
    others = [np.ascontiguousarray(x[: sizes.unknown]) for x in (unknown, rotated)]
    model = models.mlp(SHAPE, (sizes.width, sizes.width), CLASSES)
    cell = Cell(
        "mlp", image_task(model), functools.partial(drawn, images, others, sizes),
        sizes.images, sizes.gradients, sizes.batch, others=OTHERS, tuned_by="nll",
        measures=MEASURES, evaluate=functools.partial(evaluate, model),
        draws=sizes.draws, points=POINTS,
    )  # fmt: skip
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    compare("uncertainty", [cell], options, settings)
    rows = list(Rows(options.out, settings))
    (options.out / "calibration.md").write_text(calibration(rows, options.methods))
    pairs = [
        (name, "sgd_tempered") for name in options.methods if name != "sgd_tempered"
    ]
    pairs = [
        pair for pair in (*pairs, ("ivon", "adamw")) if {*pair} <= {*options.methods}
    ]
    (options.out / "against.md").write_text(against(rows, pairs))


if __name__ == "__main__":
    main()
