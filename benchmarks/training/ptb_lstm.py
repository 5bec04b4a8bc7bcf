"""CoolMomentum and others with an LSTM on the Penn Treebank, at equal gradients.

The small LSTM of Zaremba et al. (arXiv 1409.2329): two layers of 200 units on
embeddings of 200, no dropout, batch 20, gradients through 20 words, all 4.65 million
params uniform in (-0.1, 0.1) at the start, every gradient clipped to the norm 5. The
text is cut into 20 streams, which are read side by side, and the state of the LSTM is
carried from one minibatch to the next; it is zero at the start of an epoch. Every
method sees the same minibatches in this order from the same start and spends the same
number of gradients. The paper's 13 epochs are shrunk to 5, three quarters of an hour
for all methods and one seed on a core that does nothing else. An epoch is 2320
minibatches; the three left over are not used.

The loss is summed over the 20 words of a sequence and averaged over the 20 sequences,
as in the paper's code: its rate 1 and its norm 5 belong to this scale. SGD has rate 1
for the first 4/13 of the budget and then half of the last one in every further 1/13, as
in the paper; the rates of Adam and Entropy-Adam fall alike. CoolMomentum has a constant
rate and cools its momentum from 0.99 to 0 over the whole budget.

Entropy-Adam has walks of L = 5, as in the language models of its paper, with gamma
1e-4, scoping 1e-3 and noise 1e-4 (random signs). It runs in transparent mode, one
gradient per call, and the state of the LSTM goes on through the minibatches of a walk
as through all others; between calls it comes from the params of the minibatch before,
which any truncated backpropagation accepts. (`make_train_step` would carry it only from
one walk to the next, as it does with batch statistics.)

Three rates are not the paper's. They had the smallest validation perplexity in runs of
half an epoch, all schedules shrunk to it, with a seed that is not used here: Adam's
2e-3 out of 1e-3, 2e-3 and 4e-3; CoolMomentum's 0.1 out of 0.01, 0.03, 0.1 and 0.3;
Entropy-Adam's 0.01 with step 0.3 for the walk, out of nine pairs with steps 0.1, 0.3
and 1. Half an epoch makes a coarse choice, above all for Entropy-Adam, which then has
made 232 updates: six of the nine pairs knew little more than the frequencies of the
words, and walks without noise turned two pairs with step 0.3 around.

Perplexities of validation and test text are those of the params at the end of the
budget, not at their best moment, with Entropy-Adam at the anchor of the walk; the texts
are read in 20 streams, and less than a minibatch at their end is left out. That of the
training text is of the last epoch, as trained. Curves have a point per 29 minibatches,
and the validation one per quarter of an epoch. The temperature is what CoolMomentum's
authors call so, the mean over the params of the squared step, so that Entropy-Adam's
has the steps of the walk and the jump at its end. A run whose loss becomes NaN or
infinite is ended and has no perplexities; its row says in `diverged_at` after how many
gradients.

    python -m benchmarks.training.ptb_lstm --data DIR

DIR has ptb.train.txt, ptb.valid.txt and ptb.test.txt, one sentence per line. A run that
was cut off goes on at the quarter of an epoch where it was.
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
from tqdm.auto import tqdm

import optax_flat
from benchmarks.checkpoint import Checkpoint, run_checkpointed
from benchmarks.harness import COLOURS, Row, parser, table, write_table
from optax_flat import schedules

WALK = 5  # L
LAYERS = 2
PARTS = 4  # of an epoch; each ends with a validation and a checkpoint
POINTS = 20  # of the other curves in a part
DRAWN = 5  # points that the picture averages
TEXTS = ("train", "valid", "test")
MEASURES = ("test_perplexity", "valid_perplexity", "train_perplexity", "diverged_at")
CURVES = {
    "training_losses": "training loss",
    "temperatures": "temperature",
    "valid_perplexities": "validation perplexity",
}


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    epochs: float = 5.0
    batch: int = 20
    steps: int = 20
    width: int = 200


SMOKE = Sizes(1.0, 2, 3, 4)


class Method(NamedTuple):
    """An optimizer and its learning rate at the start."""

    make: Callable[[float, int, jax.Array], optax.GradientTransformation]
    rate: float


def halving(rate: float, updates: int) -> optax.Schedule:
    """The rate for 4/13 of the updates, then half of it for each further 1/13."""
    return optax.piecewise_constant_schedule(
        rate, {updates * thirteenth // 13: 0.5 for thirteenth in range(4, 13)}
    )


def sgd(rate: float, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Without momentum."""
    del key
    return optax.chain(clip(), optax.sgd(halving(rate, updates)))


def adam(rate: float, updates: int, key: jax.Array) -> optax.GradientTransformation:
    """Adam with its usual moments."""
    del key
    return optax.chain(clip(), optax.adam(halving(rate, updates)))


def coolmomentum(
    rate: float, updates: int, key: jax.Array
) -> optax.GradientTransformation:
    """The rate is constant; the momentum falls from 0.99 to 0."""
    del key
    momentum = schedules.exponential_cooling(0.99, updates)
    return optax.chain(clip(), optax_flat.coolmomentum(rate, momentum))


def entropy_adam(
    rate: float, updates: int, key: jax.Array
) -> optax.GradientTransformation:
    """The rate is that of Adam; the walk has step 0.3."""
    return optax_flat.entropy_adam(
        halving(rate, updates // WALK),
        num_steps=WALK,
        step_size=0.3,
        gamma=1e-4,
        scoping=1e-3,
        noise=1e-4,
        noise_kind="rademacher",
        inner_transform=clip(),
        mode="transparent",
        key=key,
    )


def clip() -> optax.GradientTransformation:
    """What every gradient of every method goes through first."""
    return optax.clip_by_global_norm(5.0)


METHODS = {
    "sgd": Method(sgd, 1.0),
    "adam": Method(adam, 2e-3),
    "coolmomentum": Method(coolmomentum, 0.1),
    "entropy_adam": Method(entropy_adam, 0.01),
}


class Text(NamedTuple):
    """The words of the three texts as numbers below `vocabulary`, int32 [N]."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: int


def load_text(folder: Path | None) -> Text:
    """Reads ptb.train.txt, ptb.valid.txt, ptb.test.txt; SystemExit if it cannot."""
    names = [f"ptb.{name}.txt" for name in TEXTS]
    missing = [n for n in names if folder is None or not (folder / n).is_file()]
    if folder is None or missing:
        given = "nothing was given"
        if folder is not None:
            given = f"{folder} lacks {', '.join(missing)}"
        raise SystemExit(
            f"--data needs a folder with {', '.join(names)}, but {given}. Pass --data "
            "DIR, or --smoke alone to try the script on random words."
        )
    texts = [(folder / n).read_text().replace("\n", " <eos> ").split() for n in names]
    numbers = {word: number for number, word in enumerate(sorted(set(texts[0])))}
    arrays = [np.array([numbers[word] for word in text], np.int32) for text in texts]
    return Text(*arrays, len(numbers))


def random_text() -> Text:
    """Noise, for smoke runs."""
    random = np.random.default_rng(0)
    draws = [random.integers(50, size=n, dtype=np.int32) for n in (500, 60, 60)]
    return Text(*draws, 50)


def streams(words: np.ndarray, batch: int) -> jax.Array:
    """The text cut into `batch` pieces of equal length n, side by side: [n, batch]."""
    length = len(words) // batch
    return jnp.asarray(words[: length * batch].reshape(batch, length).T)


def layer_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Those of the params of `lstm`."""
    return {
        "input": (width, 4 * width),
        "hidden": (width, 4 * width),
        "bias": (4 * width,),
    }


def uniform(key: jax.Array, shapes: Any) -> Any:
    """Params of these shapes, uniform in (-0.1, 0.1)."""
    like = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    draw = functools.partial(jax.random.uniform, minval=-0.1, maxval=0.1)
    return optax.tree.random_like(key, like, draw)


def initial(key: jax.Array, vocabulary: int, width: int) -> Any:
    """The params at the start."""
    shapes = {
        "embedding": (vocabulary, width),
        "layers": [layer_shapes(width)] * LAYERS,
        "output": {"kernel": (width, vocabulary), "bias": (vocabulary,)},
    }
    return uniform(key, shapes)


def lstm(layer, state, x):
    """One layer: x is [T, B, width], the state [2, B, width] output and memory cell."""
    # All words at once; only what depends on the word before stays in the loop.
    projected = x @ layer["input"] + layer["bias"]

    def cell(state, x):
        output, memory = state
        gates = x + output @ layer["hidden"]
        enter, forget, leave, value = jnp.split(gates, 4, axis=-1)
        memory = jax.nn.sigmoid(forget) * memory
        memory += jax.nn.sigmoid(enter) * jnp.tanh(value)
        output = jax.nn.sigmoid(leave) * jnp.tanh(memory)
        return jnp.stack([output, memory]), output

    return jax.lax.scan(cell, state, projected)


def loss_fn(params, state, words):
    """Cross-entropy of the words [T + 1, B] after the first, and the new state.

    Summed over time, averaged over the sequences. The state is [LAYERS, 2, B, width].
    """
    x, after = params["embedding"][words[:-1]], []
    for layer, before in zip(params["layers"], state, strict=True):
        new, x = lstm(layer, before, x)
        after.append(new)
    logits = x @ params["output"]["kernel"] + params["output"]["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, words[1:])
    return losses.sum(axis=0).mean(), jnp.stack(after)


def zero_state(sizes: Sizes) -> jax.Array:
    """What a text starts with."""
    return jnp.zeros([LAYERS, 2, sizes.batch, sizes.width])


@functools.partial(jax.jit, static_argnums=2)
def perplexity(params, words, sizes):
    """Exponential of the mean loss per word of streams [n, B], read in one go."""

    def body(state, start):
        window = jax.lax.dynamic_slice_in_dim(words, start, sizes.steps + 1)
        loss, state = loss_fn(params, state, window)
        return state, loss / sizes.steps

    starts = jnp.arange(0, len(words) - sizes.steps, sizes.steps)
    _, losses = jax.lax.scan(body, zero_state(sizes), starts)
    return jnp.exp(losses.mean())


class Run(NamedTuple):
    """A run that is ready to start."""

    state: Any  # params, the optimizer's state, the LSTM's state
    steps: int  # gradients per part
    spend: Callable  # (state, part) -> state, losses and temperatures [POINTS, 2]
    score: Callable  # (state, words) -> perplexity


def prepare(method: Method, text: Text, sizes: Sizes, seed: int) -> Run:
    """Compiles everything that takes part in the time measured."""
    words = streams(text.train, sizes.batch)
    steps = (len(words) - 1) // sizes.steps // (PARTS * POINTS) * POINTS
    if steps == 0:
        needed = sizes.batch * (PARTS * POINTS * sizes.steps + 1)
        raise SystemExit(
            f"An epoch has {PARTS * POINTS} minibatches or more, which needs {needed} "
            f"words; the training text has {len(text.train)}."
        )
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    params = initial(init_key, text.vocabulary, sizes.width)
    tx = method.make(method.rate, round(sizes.epochs * PARTS) * steps, noise_key)

    def spend(words, carry, part):
        first = part % PARTS * steps

        def body(carry, start):
            params, opt_state, state = carry
            window = jax.lax.dynamic_slice_in_dim(words, start, sizes.steps + 1)
            value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
            (loss, state), grads = value_and_grad(params, state, window)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            square = optax.tree.norm(updates, squared=True) / optax.tree.size(updates)
            point = jnp.stack([loss / sizes.steps, square])
            return (params, opt_state, state), point

        params, opt_state, state = carry
        state = jnp.where(first == 0, 0.0, state)  # an epoch begins
        starts = (first + jnp.arange(steps)) * sizes.steps
        carry, points = jax.lax.scan(body, (params, opt_state, state), starts)
        return carry, points.reshape(POINTS, -1, 2).mean(axis=1)

    state = (params, tx.init(params), zero_state(sizes))
    compiled = jax.jit(spend, donate_argnums=1).lower(words, state, 0).compile()

    def score(state, words):
        params, opt_state, _ = state
        params = optax_flat.eval_params(opt_state, params)
        return float(perplexity(params, streams(words, sizes.batch), sizes))

    return Run(state, steps, functools.partial(compiled, words), score)


def train(
    method: Method, text: Text, sizes: Sizes, *, seed: int, checkpoint: Checkpoint
) -> Row:
    """One run, or the rest of one that was cut off."""
    run = prepare(method, text, sizes, seed)
    parts = round(sizes.epochs * PARTS)
    log = {"part": 0, "seconds": 0.0, **{name: [] for name in CURVES}}
    state, log = checkpoint.restore(run.state, log)
    result = {}
    budget, spent = parts * run.steps, log["part"] * run.steps
    with tqdm(total=budget, initial=spent, unit="gradient", leave=False) as bar:
        while log["part"] < parts:
            start = time.perf_counter()
            state, points = run.spend(state, log["part"])
            points = np.asarray(points, float)  # waits for the computation
            log["seconds"] += time.perf_counter() - start
            valid = run.score(state, text.valid)
            finite = np.isfinite(points).all(axis=1)
            if not (finite.all() and np.isfinite(valid)):
                spent = log["part"] * run.steps
                spent += run.steps // POINTS * int(finite.cumprod().sum())
                result = {"diverged_at": spent}
                break
            log["training_losses"] += points[:, 0].tolist()
            log["temperatures"] += points[:, 1].tolist()
            log["valid_perplexities"].append(valid)
            log["part"] += 1
            checkpoint.save(log["part"], state, log)
            bar.update(run.steps)
            bar.set_postfix(valid_perplexity=f"{valid:.1f}")
    if not result:
        epoch = log["training_losses"][-PARTS * POINTS :]
        result = {
            "test_perplexity": run.score(state, text.test),
            "valid_perplexity": log["valid_perplexities"][-1],
            "train_perplexity": float(np.exp(np.mean(epoch))),
        }
    return {
        "gradient_evaluations": budget,
        "forward_passes": 0,
        "seconds": log["seconds"],
        **result,
        **{name: log[name] for name in CURVES},
    }


def picture(rows: Iterable[Row], parts: int, path: Path) -> None:
    """The curves against gradient evaluations, a line for every run."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
    colours = dict(zip(METHODS, COLOURS, strict=False))
    for axis, (curve, title) in zip(axes, CURVES.items(), strict=True):
        points, drawn = (1, 1) if curve == "valid_perplexities" else (POINTS, DRAWN)
        for row in rows:
            values = np.reshape(row[curve], (-1, drawn)).mean(axis=1)
            # Shorter than the budget if the run diverged.
            length = parts * points // drawn
            spent = np.linspace(0, row["gradient_evaluations"], length + 1)[1:]
            name = row["method"]
            label = name.replace("_", "-") if row["seed"] == 0 else None
            axis.plot(spent[: len(values)], values, color=colours[name], label=label)
        axis.set_title(title, fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[2].yaxis.set_minor_formatter("{x:g}")
    axes[1].set_xlabel("gradient evaluations")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(__doc__, METHODS, seeds=1, out="out/ptb_lstm", data=False)
    add = options_of.add_argument
    epochs = Sizes().epochs
    add("--epochs", type=float, metavar="N", help=f"a multiple of 1/{PARTS} ({epochs})")
    add("--data", type=Path, metavar="DIR", help="folder with ptb.train.txt and others")
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    if options.epochs is not None:
        sizes = sizes._replace(epochs=options.epochs)
    if options.smoke and options.data is None:
        text, data = random_text(), "random"
    else:
        text, data = load_text(options.data), options.data.name
    rates = {name: method.rate for name, method in METHODS.items()}
    settings = {**sizes._asdict(), "data": data, "rates": rates}

    def run(name: str, seed: int, checkpoint: Checkpoint) -> Row:
        return train(METHODS[name], text, sizes, seed=seed, checkpoint=checkpoint)

    rows = run_checkpointed(run, options, settings)
    write_table(table(rows, MEASURES), options.out)
    picture(rows, round(sizes.epochs * PARTS), options.out / "ptb_lstm.png")


if __name__ == "__main__":
    main()
