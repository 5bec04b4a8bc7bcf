"""A small LSTM on the Penn Treebank, and what the noise does to Entropy-Adam in it.

One layer of 48 units on embeddings of 48, words one by one; the 1,000 most frequent
words are kept, all others are <unk>. The text is cut into windows of 24 words, each
read from a zero state; minibatches are 20 windows drawn without repetition. The loss is
summed over the words of a window and averaged over the windows, and every gradient of
every method is clipped to the norm 5, as in the paper of the LSTM (Zaremba et al.,
arXiv 1409.2329) that ptb_lstm.py trains in full size. All methods spend 1,000
gradients, half a pass over the text, and are tuned by the perplexity of the validation
text (benchmarks.situations); those that have an optimizer inside have AdamW. A run that
diverged has the perplexity of all words alike.

Entropy-Adam's noise. A coordinate without gradients, such as the embedding of a word
that is in no minibatch of a walk, has nothing but the walk's noise in x - mu. The outer
Adam divides by the root of the second moment and so makes full steps of the learning
rate out of it, however small the noise is, unless it is small against `eps`. The same
holds for a coordinate whose gradient is small against the noise. `noise.md` measures
that, three seeds, with the settings of ptb_lstm.py: rate 0.01, walks of five plain
steps of 0.3, no weight decay. "small" is the network above; "full" has all 10,000 words
and half the gradients. The embedding has 50 more rows than there are words.

* dead: the root mean square of the steps of these rows, in learning rates;
* absent: that of the words that are not in the minibatches of the walk;
* drowned: the part of all coordinates, at the end, whose second moment is less than
  twice that of the dead rows, so that their noise is larger than their signal;
* validation perplexity.

    python -m benchmarks.training.recurrent --data DIR

DIR has ptb.train.txt, ptb.valid.txt and ptb.test.txt, one sentence per line.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flat
from benchmarks.harness import Row, Rows, table
from benchmarks.methods import CATALOGUES, SHORT_WALK, Setup, entropy_adam
from benchmarks.situations import (
    Cell,
    Data,
    Task,
    compare,
    measure,
    options_and_sizes,
    ordered,
    side_by_side,
)
from benchmarks.training.ptb_lstm import (
    Text,
    layer_shapes,
    load_text,
    lstm,
    random_text,
    uniform,
)
from optax_flat.training import make_train_step

CLIP = 5.0
SPARE = 50  # rows of the embedding that no word has
NOISELESS = "entropy_adam_noiseless"
OTHERS = {
    NOISELESS: CATALOGUES["adamw"]["entropy_adam"]._replace(
        make=functools.partial(entropy_adam, noise=0.0)
    )
}
METHODS = (
    "sgd", "adamw", "sam", "asam", "ema", "swa", "ivon", "coolmomentum",
    "entropy_sgd_short", "entropy_adam", NOISELESS,
)  # fmt: skip
WALKS = (  # noise and eps
    (0.0, 1e-8), (1e-8, 1e-8), (1e-6, 1e-8), (1e-4, 1e-8), (1e-4, 1e-4), (1e-4, 1e-3),
)  # fmt: skip
FULL_WALKS = (WALKS[0], WALKS[3], WALKS[5])
RATE, STEP_SIZE = 0.01, 0.3  # of the noise study
WATCHED = ("dead", "absent", "drowned", "validation_perplexity")


class Sizes(NamedTuple):
    """What presets change."""

    vocabulary: int = 1000
    steps: int = 24
    batch: int = 20
    width: int = 48
    gradients: int = 1000


SIZES = {
    "smoke": Sizes(20, 3, 2, 4, 20),
    "small": Sizes(),
    "paper": Sizes(10_000, 24, 20, 200, 10_000),
}
FULL = 10_000  # words of the noise study's second network


# --- task -----------------------------------------------------------------------------


@jax.custom_vjp
def clipped(params: Any) -> Any:
    """The params; gradients that come back are clipped to the norm `CLIP`."""
    return params


def _clipped_gradient(_, grads):
    norm = optax.tree.norm(grads)
    scale = jnp.where(norm > CLIP, CLIP / norm, 1.0)
    return (optax.tree.scale(scale, grads),)


clipped.defvjp(lambda params: (params, None), _clipped_gradient)


def words_task(sizes: Sizes, spare: int = 0) -> Task:
    """The LSTM, on windows [B, steps + 1]; `spare` embeddings are no word's."""
    words, width = sizes.vocabulary, sizes.width

    def init(key):
        shapes = {
            "embedding": (words + spare, width),
            "layer": layer_shapes(width),
            "output": {"kernel": (width, words), "bias": (words,)},
        }
        return uniform(key, shapes)

    def loss(params, windows):
        params = clipped(params)
        x = params["embedding"][windows[:, :-1].T]
        _, x = lstm(params["layer"], jnp.zeros([2, len(windows), width]), x)
        logits = x @ params["output"]["kernel"] + params["output"]["bias"]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, windows[:, 1:].T
        )
        return losses.sum(axis=0).mean()

    def perplexity(params, windows):
        losses = jax.lax.map(
            lambda window: loss(params, window[None]), windows, batch_size=50
        )
        mean = losses.mean() / sizes.steps
        return {"perplexity": jnp.where(jnp.isfinite(mean), jnp.exp(mean), words)}

    return Task(init, loss, perplexity, lambda windows, index: windows[index])


def frequent(text: Text, vocabulary: int) -> list[np.ndarray]:
    """The three texts with the most frequent words as 1, 2, ...; 0 for all others."""
    counts = np.bincount(text.train, minlength=text.vocabulary)
    numbers = np.zeros(text.vocabulary, np.int32)
    numbers[np.argsort(-counts, kind="stable")[: vocabulary - 1]] = np.arange(
        1, vocabulary
    )
    return [numbers[words] for words in (text.train, text.valid, text.test)]


def windows_of(words: np.ndarray, steps: int) -> np.ndarray:
    """[N, steps + 1]; the last word of a window is the first of the next."""
    starts = np.arange(0, len(words) - steps, steps)
    return words[starts[:, None] + np.arange(steps + 1)]


# --- noise ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("task", "words"))
def watched(params, windows, order, settings, *, task: Task, words: int) -> Any:
    """Params at the end of a run of Entropy-Adam, and what `WATCHED` says of it."""
    noise, eps, key = settings
    peak, second, ess = map(jnp.float32, (RATE, STEP_SIZE, 1.0))
    rate = Setup(peak, second, len(order), ess, key).rate
    tx = optax_flat.entropy_adam(
        rate, eps=lambda _: eps, num_steps=SHORT_WALK, step_size=STEP_SIZE,
        noise=lambda _: noise, noise_kind="rademacher", key=key,
    )  # fmt: skip
    step = make_train_step(task.loss, tx)

    def update(state, index):
        params, opt_state, count = state
        new, opt_state, _ = step(params, opt_state, windows[index])
        moves = (new["embedding"] - params["embedding"]) / rate(count)
        used = windows[index][..., :-1].ravel()
        absent = jnp.ones(len(moves)).at[used].set(0.0).at[words:].set(0.0)
        squares = jnp.square(moves).mean(axis=1)
        of_absent = (squares * absent).sum() / jnp.maximum(absent.sum(), 1.0)
        roots = jnp.sqrt(jnp.stack([squares[words:].mean(), of_absent]))
        return (new, opt_state, count + 1), roots

    state = (params, tx.init(params), 0)
    (params, opt_state, _), roots = jax.lax.scan(update, state, order)
    nu = optax.tree.get(opt_state, "nu")
    limit = 2 * nu["embedding"][words:].mean()
    alive = {**nu, "embedding": nu["embedding"][:words]}
    drowned = sum(jnp.sum(x < limit) for x in jax.tree.leaves(alive))
    dead, absent = roots.mean(axis=0)
    part = drowned / optax.tree.size(alive)
    return params, {"dead": dead, "absent": absent, "drowned": part}


Walks = Sequence[tuple[float, float]]


def noise_row(cell: Cell, sizes: Sizes, walk: tuple[float, float], seed: int) -> Row:
    """One run of the noise study: `cell` has spare rows."""
    data = cell.data(seed)
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    order = ordered(cell, CATALOGUES["adamw"]["entropy_adam"], seed)
    start = time.perf_counter()
    params, found = watched(
        cell.task.init(init_key), data.train, order.reshape(-1, *order.shape[-2:]),
        (*map(jnp.float32, walk), noise_key), task=cell.task, words=sizes.vocabulary,
    )  # fmt: skip
    valid = measure(cell.task)(params, data.validation)["perplexity"]
    return {
        "gradient_evaluations": order.size // cell.batch,
        "forward_passes": 0,
        "validation_perplexity": float(valid),
        **{name: float(value) for name, value in found.items()},
        "seconds": time.perf_counter() - start,
    }


def noise_study(
    cells: Sequence[tuple[Cell, Sizes, Walks]], seeds: int, rows: Rows
) -> str:
    """Runs what is missing, in a folder of its own; a table."""
    jobs = {
        f"{cell.name}, noise {walk[0]:g}, eps {walk[1]:g}": (cell, sizes, walk)
        for cell, sizes, walks in cells
        for walk in walks
    }

    def work(name, seed):
        rows.record(name, seed, noise_row(*jobs[name], seed))

    runs = [(name, seed) for seed in range(seeds) for name in jobs]
    side_by_side(work, [pair for pair in runs if pair not in rows], "noise")
    names = list(jobs)
    return table(sorted(rows, key=lambda row: names.index(row["method"])), WATCHED)


def cell_of(name: str, text: Text, sizes: Sizes, *, spare: int = 0) -> Cell:
    """The same text for every seed."""
    windows = [windows_of(x, sizes.steps) for x in frequent(text, sizes.vocabulary)]
    return Cell(
        name, words_task(sizes, spare), lambda _: Data(*windows), len(windows[0]),
        sizes.gradients, sizes.batch, base="adamw", others=OTHERS,
        tuned_by="perplexity", measures={"perplexity": -1},
    )  # fmt: skip


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="recurrent"
    )
    if options.smoke and not options.data:
        text, data = random_text(), "random"
    else:
        text = load_text(next(iter(options.data), None))
        data = options.data[0].name
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    compare("recurrent", [cell_of("lstm", text, sizes)], options, settings)
    if NOISELESS in options.methods:
        full = sizes if options.smoke else sizes._replace(vocabulary=FULL)
        full = full._replace(gradients=sizes.gradients // 2)
        studied = [
            (cell_of(name, text, of, spare=SPARE), of, walks)
            for name, of, walks in (("small", sizes, WALKS), ("full", full, FULL_WALKS))
        ]
        found = noise_study(
            studied, options.seeds, Rows(options.out / "noise", settings)
        )
        (options.out / "noise.md").write_text(found)
        print(found)


if __name__ == "__main__":
    main()
