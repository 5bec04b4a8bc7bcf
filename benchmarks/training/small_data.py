"""Who learns from few labels? 100 to 3,000 of Fashion-MNIST, with three networks.

Every seed draws its own labelled images out of the 60,000 for training: n to train with
and n / 4 more to tune with, since whoever has few labels has few to choose by. To make
the choice less of a lottery the smaller sets are drawn several times for tuning, three
times for n = 100 and twice for 300, and the accuracy is averaged. The test images are
all 10,000. Pixels are averaged in squares of 2x2. The networks:

* mlp: 196-64-64-10;
* cnn: 3x3 convolutions with stride 2 to 16 and 32 channels, then 64-10;
* vit: nine patches of 5x5, two layers of width 32 with two heads, mean over patches.

For the first two the methods that have an optimizer inside have SGD with momentum, for
the ViT AdamW. Every run spends the same number of gradients of minibatches of 16,
whatever n is. See benchmarks.situations for tuning and intervals.

    python -m benchmarks.training.small_data --data fashion_mnist.npz
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np

from benchmarks import models
from benchmarks.images import CLASSES, SHAPE, Images, prepared_file
from benchmarks.situations import (
    Cell,
    Data,
    compare,
    image_data,
    image_task,
    options_and_sizes,
)

METHODS = (
    "sgd", "adamw", "sam", "asam", "friendly_sam", "entropy_sgd", "ema", "swa", "ivon"
)  # fmt: skip


class Sizes(NamedTuple):
    """What presets change."""

    labels: tuple[int, ...] = (100, 300, 1000, 3000)
    draws: tuple[int, ...] = (3, 2, 1, 1)
    gradients: int = 3000
    batch: int = 16
    width: int = 1  # factor of the networks'


SIZES = {
    "smoke": Sizes((20,), (1,), 40, 4),
    "small": Sizes(),
    "paper": Sizes(gradients=12_000, width=4),
}


def networks(width: int) -> dict[str, tuple[Any, str]]:
    """Network to its task and the base of its methods."""
    w = width
    cnn = models.cnn(SHAPE, (16 * w, 32 * w), 64 * w, CLASSES)
    return {
        "mlp": (image_task(models.mlp(SHAPE, (64 * w, 64 * w), CLASSES)), "sgd"),
        "cnn": (image_task(cnn), "sgd"),
        "vit": (image_task(models.vit(SHAPE, 5, 32 * w, 2, CLASSES)), "adamw"),
    }


def drawn(images: Images, labels: int, most: int, seed: int) -> Data:
    """`labels` images to train with, in the first places of `most`; a quarter to tune.

    All sizes have arrays of one shape, so that they share a program.
    """
    count = len(images.train_images)
    order = np.random.default_rng(seed).permutation(count)
    train, validation = order[:most], order[labels : labels + labels // 4]
    return image_data(images, train, validation)


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="small_data"
    )
    data, images = prepared_file(options)
    known = networks(sizes.width)
    chosen = ["mlp"] if data == "random" else known
    cells = [
        Cell(
            f"{network}-{labels}", known[network][0],
            functools.partial(drawn, images, labels, max(sizes.labels)),
            labels, sizes.gradients, sizes.batch, base=known[network][1], draws=draws,
        )
        for network, (labels, draws) in itertools.product(
            chosen, zip(sizes.labels, sizes.draws, strict=True)
        )
    ]  # fmt: skip
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    compare("small_data", cells, options, settings)


if __name__ == "__main__":
    main()
