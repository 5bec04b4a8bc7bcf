"""Large batches at equal epochs: 32 to 4,096, with and without linear scaling.

The convolutional network of small_data.py on 8,192 images of Fashion-MNIST, averaged to
14x14, for 20 epochs at every batch; 5,000 others to tune with and the 10,000 test
images to measure. A method of two gradients per update sees half the epochs, with
minibatches of the same size. Four replicas of Parle share each minibatch, so that it
processes as many images as all others.

All methods are tuned for every batch (entropy_sgd has walks of five) but `sgd_scaled`,
which is SGD with the settings tuned at the smallest batch, the rate multiplied
by batch / smallest, which costs no tuning. See benchmarks.situations for tuning and
intervals.

    python -m benchmarks.training.large_batches --data fashion_mnist.npz
"""

from typing import NamedTuple

from benchmarks import models
from benchmarks.images import CLASSES, SHAPE, prepared_file
from benchmarks.situations import (
    Cell,
    compare,
    image_data,
    image_task,
    options_and_sizes,
)

METHODS = (
    "sgd", "adamw", "sam", "asam", "entropy_sgd_short", "parle", "ema", "swa", "ivon",
    "sgd_scaled",
)  # fmt: skip


class Sizes(NamedTuple):
    """What presets change."""

    batches: tuple[int, ...] = (32, 128, 512, 2048, 4096)
    images: int = 8192
    validation: int = 5000
    epochs: int = 20
    width: int = 1  # factor of the network's


SIZES = {
    "smoke": Sizes((4, 8), 40, 20, 8),
    "small": Sizes(),
    "paper": Sizes(images=49_152, epochs=60, width=4),
}


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options, sizes = options_and_sizes(
        __doc__, METHODS, SIZES, seeds=5, name="large_batches"
    )
    data, images = prepared_file(options)
    # The first ones to train with, the next ones to tune with.
    count, w = sizes.images, sizes.width
    found = image_data(images, slice(count), slice(count, count + sizes.validation))
    task = image_task(models.cnn(SHAPE, (16 * w, 32 * w), 64 * w, CLASSES))
    smallest = sizes.batches[0]
    cells = [
        Cell(
            f"batch-{batch}", task, lambda _: found, sizes.images,
            sizes.epochs * sizes.images // batch, batch,
            scaled_from=(f"batch-{smallest}", batch / smallest),
        )
        for batch in sizes.batches
    ]  # fmt: skip
    settings = {**sizes._asdict(), "data": data, "preset": options.preset}
    compare("large_batches", cells, options, settings)


if __name__ == "__main__":
    main()
