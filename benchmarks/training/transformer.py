"""Small Transformers: characters of the Penn Treebank, and images of CIFAR-10.

* chars: a causal model of the next character in windows of 32, two layers of width 64
  with four heads. Trained on the first million characters, in windows that do not
  overlap; tuned on 65,536 of the validation text and measured on 65,536 of the test
  text, in bits per character (less is more). A loss that is not finite counts as a
  uniform guess.
* vit: patches of 4x4 of images averaged to 16x16, two layers of width 48 with three
  heads. Trained on 8,000 images of the subset, tuned on 2,000, measured on its 2,000
  test images, in percent. No augmentation.

Methods that have an optimizer inside have AdamW. Every run spends the same number of
gradients, 2,000 by default, at batch 16 (chars) or 32 (vit). See benchmarks.situations
for tuning and intervals.

    python -m benchmarks.training.transformer --data DIR,cifar10_small.npz

DIR has ptb.train.txt, ptb.valid.txt and ptb.test.txt.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.images import CLASSES, Images, averaged, load_images, random_images
from benchmarks.models import Model
from benchmarks.situations import (
    Cell,
    Data,
    Task,
    compare,
    image_task,
    options_and_sizes,
)
from benchmarks.training.ptb_lstm import TEXTS

METHODS = (
    "sgd", "adamw", "sam", "asam", "entropy_adam", "ema", "lawa", "swa", "ivon",
    "coolmomentum",
)  # fmt: skip


class Sizes(NamedTuple):
    """What presets change."""

    gradients: int = 2000
    characters: int = 1_000_000
    measured: int = 65_536
    length: int = 32
    width: int = 64
    depth: int = 2
    vit_width: int = 48
    validation: int = 2000
    halved: bool = True  # the sides of the images


SIZES = {
    "smoke": Sizes(40, 4000, 320, 8, 16, 1, 16, 20),
    "small": Sizes(),
    "paper": Sizes(20_000, 5_000_000, 300_000, 128, 256, 4, 192, 10_000, halved=False),
}


def text_task(model: Model, vocabulary: int) -> Task:
    """The next character in windows [B, T + 1]: loss and bits per character."""

    def loss(params, windows):
        logits = model.apply(params, windows[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    def measure(params, windows):
        losses = jax.lax.map(lambda w: loss(params, w[None]), windows, batch_size=64)
        bits, uniform = losses.mean() / jnp.log(2.0), jnp.log2(vocabulary)
        return {"bits": jnp.where(jnp.isfinite(bits), bits, uniform)}

    return Task(model.init, loss, measure, lambda windows, index: windows[index])


def load_characters(folder: Path, sizes: Sizes) -> tuple[Data, int]:
    """Windows of the three texts, and how many characters there are."""
    names = [folder / f"ptb.{name}.txt" for name in TEXTS]
    missing = [path.name for path in names if not path.is_file()]
    if missing:
        raise SystemExit(f"--data: {folder} lacks {', '.join(missing)}.")
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in names]
    known, numbers = np.unique(texts[0], return_inverse=True)
    # A character that the training text lacks would count as the next known one.
    others = [np.searchsorted(known, text) for text in texts[1:]]
    counts = (sizes.characters, sizes.measured, sizes.measured)
    parts = zip((numbers, *others), counts, strict=True)
    return Data(*(windows(x[:n], sizes.length) for x, n in parts)), len(known)


def windows(text: np.ndarray, length: int) -> np.ndarray:
    """Pieces of `length` characters, each with the one behind it: [N, length + 1]."""
    count = (len(text) - 1) // length
    inputs, targets = (
        text[i : i + count * length].reshape(count, length) for i in (0, 1)
    )
    return np.concatenate([inputs, targets[:, -1:]], axis=1).astype(np.int32)


def random_characters(sizes: Sizes) -> tuple[Data, int]:
    """Noise, for smoke runs."""
    draw = np.random.default_rng(0).integers
    counts = (sizes.characters, sizes.measured, sizes.measured)
    return Data(*(windows(draw(9, size=n), sizes.length) for n in counts)), 9


def chars(data: Data, vocabulary: int, sizes: Sizes) -> Cell:
    """The language model."""
    model = models.transformer(vocabulary, sizes.length, sizes.width, sizes.depth)
    count = len(data.train)
    return Cell(
        "chars", text_task(model, vocabulary), lambda _: data, count, sizes.gradients,
        16, base="adamw", tuned_by="bits", measures={"bits": -1},
        ess=count * sizes.length,
    )  # fmt: skip


def vit(images: Images, sizes: Sizes) -> Cell:
    """The images, each pixel of the same colour scaled alike."""
    pixels = [images.train_images, images.test_images]
    scale = averaged if sizes.halved else np.float32
    train, test = (scale(x) for x in pixels)
    mean, deviation = train.mean(axis=(0, 1, 2)), train.std(axis=(0, 1, 2))
    train, test = ((x - mean) / deviation for x in (train, test))
    labels, test_labels = (
        x.astype(np.int32) for x in (images.train_labels, images.test_labels)
    )
    count = len(train) - sizes.validation
    data = Data(
        (train[:count], labels[:count]),
        (train[count:], labels[count:]),
        (test, test_labels),
    )
    model = models.vit(train.shape[1:], 4, sizes.vit_width, sizes.depth, CLASSES)
    return Cell(
        "vit", image_task(model), lambda _: data, count, sizes.gradients, 32,
        base="adamw",
    )  # fmt: skip


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="transformer"
    )
    cells: list[Any] = []
    if options.smoke and not options.data:
        cells.append(chars(*random_characters(sizes), sizes))
        cells.append(vit(random_images((16, 16, 3), 60, 20), sizes))
    elif not options.data:
        raise SystemExit("--data needs a folder with the texts, an .npz file, or both.")
    for path in options.data:
        if path.is_dir():
            cells.append(chars(*load_characters(path, sizes), sizes))
        else:
            cells.append(vit(load_images(path), sizes))
    settings = {
        **sizes._asdict(), "data": [path.name for path in options.data],
        "preset": options.preset,
    }  # fmt: skip
    compare("transformer", cells, options, settings)


if __name__ == "__main__":
    main()
