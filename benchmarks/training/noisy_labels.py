"""Who learns in spite of wrong labels, with which network? 0 and 40 % wrong.

label_noise.py has five parts of wrong labels and more moments with small networks; this
has three kinds of networks, tuned and compared as in all situations. 5,000 images of
Fashion-MNIST for training and 5,000 for tuning, both with a part of wrong labels,
uniform over the other classes and others for every seed; the 10,000 test images have
right ones. Pixels are averaged in squares of 2x2. The networks:

* mlp: 196-128-128-10;
* resnet: two groups of a 3x3 convolution with stride 2 and a residual block, with 16
  and 32 channels;
* vit: nine patches of 5x5, two layers of width 32 with two heads, mean over patches.

For the first two the methods that have an optimizer inside have SGD with momentum, for
the ViT AdamW. Every run spends 4,000 gradients of minibatches of 32, 25 passes, and is
measured at its end. See benchmarks.situations for tuning and intervals.

    python -m benchmarks.training.noisy_labels --data fashion_mnist.npz
"""

import functools
import itertools
from typing import Any, NamedTuple

from benchmarks import models
from benchmarks.images import CLASSES, SHAPE, Images, prepared_file, wrong_labels
from benchmarks.situations import (
    Cell,
    Data,
    compare,
    image_data,
    image_task,
    options_and_sizes,
)

METHODS = (
    "sgd", "adamw", "sam", "asam", "friendly_sam", "entropy_sgd", "ema", "swa", "ivon",
    "sam_decayed", "ema_decayed", "swa_decayed",
)  # fmt: skip


class Sizes(NamedTuple):
    """What presets change."""

    images: int = 5000
    percent: tuple[int, ...] = (0, 40)
    gradients: int = 4000
    batch: int = 32
    width: int = 1  # factor of the networks'


SIZES = {
    "smoke": Sizes(40, (40,), 40, 4),
    "small": Sizes(),
    "paper": Sizes(images=30_000, gradients=30_000, width=4),
}


def networks(width: int) -> dict[str, tuple[Any, str]]:
    """Network to its task and the base of its methods."""
    w = width
    resnet = models.resnet(SHAPE, (16 * w, 32 * w), 1, CLASSES)
    return {
        "mlp": (image_task(models.mlp(SHAPE, (128 * w, 128 * w), CLASSES)), "sgd"),
        "resnet": (image_task(resnet), "sgd"),
        "vit": (image_task(models.vit(SHAPE, 5, 32 * w, 2, CLASSES)), "adamw"),
    }


def spoilt(images: Images, count: int, percent: int, seed: int) -> Data:
    """The first images to train with and as many to tune with, some labels wrong."""
    labels = wrong_labels(images.train_labels[: 2 * count], percent / 100, seed)
    images = images._replace(train_labels=labels)
    return image_data(images, slice(count), slice(count, 2 * count))


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="noisy_labels"
    )
    data, images = prepared_file(options)
    known = networks(sizes.width)
    chosen = ["mlp"] if data == "random" else known
    cells = [
        Cell(
            f"{network}-{percent}", known[network][0],
            functools.partial(spoilt, images, sizes.images, percent),
            sizes.images, sizes.gradients, sizes.batch, base=known[network][1],
        )
        for percent, network in itertools.product(sizes.percent[::-1], chosen)
    ]  # fmt: skip
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    compare("noisy_labels", cells, options, settings)


if __name__ == "__main__":
    main()
