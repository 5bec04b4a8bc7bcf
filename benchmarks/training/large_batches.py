"""Large batches at equal epochs: 32 to 4,096, with and without linear scaling.

The convolutional network of small_data.py on 8,192 images of Fashion-MNIST, averaged to
14x14, for 20 epochs at every batch; 5,000 others to tune with and the 10,000 test
images to measure. A method of two gradients per update sees half the epochs, with
minibatches of the same size. Four replicas of Parle share each minibatch, so that it
processes as many images as all others.

sgd, adamw, sam, entropy_sgd (walks of five), ema and parle are tuned for every batch.
`sgd_scaled` is SGD with the settings tuned at the smallest batch, the rate multiplied
by batch / smallest, which costs no tuning. See situations.py for tuning and intervals.

    python -m benchmarks.training.large_batches --data fashion_mnist.npz
"""

from typing import NamedTuple

from benchmarks import models
from benchmarks.harness import Images, load_images, random_images
from benchmarks.situations import Cell, Data, compare, image_task, options_of
from benchmarks.training.small_data import CLASSES, SHAPE, prepared

METHODS = (
    "sgd", "adamw", "sam", "entropy_sgd_short", "parle", "ema", "sgd_scaled"
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


def split(images: Images, sizes: Sizes) -> Data:
    """The first images to train with, the next ones to tune with."""
    end = sizes.images + sizes.validation
    pixels, labels = images.train_images, images.train_labels
    return Data(
        (pixels[: sizes.images], labels[: sizes.images]),
        (pixels[sizes.images : end], labels[sizes.images : end]),
        (images.test_images, images.test_labels),
    )


def main() -> None:
    """Runs what is missing, then writes tables, picture and summary."""
    options = options_of(__doc__, METHODS, seeds=3, name="large_batches").parse_args()
    sizes = SIZES["smoke" if options.smoke else options.preset]
    if options.smoke and not options.data:
        images, data = random_images((28, 28), 80, 20), "random"
    else:
        images = load_images(next(iter(options.data), None))
        data = options.data[0].name
    found, w = split(prepared(images), sizes), sizes.width
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
