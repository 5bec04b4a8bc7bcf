"""Images for the benchmarks: from files or noise, smaller, with wrong labels."""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHAPE, CLASSES = (14, 14, 1), 10  # of MNIST's, averaged


class Images(NamedTuple):
    """A labelled data set: images uint8 [N, ...], labels integers [N]."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_images(path: Path | None) -> Images:
    """Reads an .npz file with the arrays of `Images`; SystemExit if it cannot."""
    expected = f"an .npz file with the arrays {', '.join(Images._fields)}"
    if path is None or not path.is_file():
        given = "nothing was given" if path is None else f"there is no file {path}"
        raise SystemExit(
            f"--data needs {expected}, but {given}. Pass --data FILE, or --smoke alone "
            "to try the script on random data."
        )
    with np.load(path) as file:
        missing = [name for name in Images._fields if name not in file]
        if missing:
            raise SystemExit(
                f"--data needs {expected}, but {path} has {', '.join(file)}. Rename or "
                f"add what is missing: {', '.join(missing)}."
            )
        return Images(*(file[name] for name in Images._fields))


def hold_out(images: Images, count: int) -> Images:
    """The last training images in the place of the test images, to choose by."""
    kept, held_out = slice(None, -count), slice(-count, None)
    x, y = images.train_images, images.train_labels
    return Images(x[kept], y[kept], x[held_out], y[held_out])


def random_images(shape: tuple[int, ...], train: int, test: int) -> Images:
    """Noise with random labels from 0 to 9, for smoke runs."""
    random = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        images = random.integers(256, size=(count, *shape), dtype=np.uint8)
        return images, random.integers(10, size=count, dtype=np.uint8)

    return Images(*draw(train), *draw(test))


def load_or_random(
    options: argparse.Namespace, shape: tuple[int, ...], train: int, test: int
) -> tuple[str, Images]:
    """The file of `--data` and its name; noise in a smoke run without one."""
    if options.smoke and options.data is None:
        return "random", random_images(shape, train, test)
    images = load_images(options.data)
    return options.data.name, images


def load_sets(options: argparse.Namespace) -> dict[str, Images]:
    """The files of `--data` by their names; noise in a smoke run without any."""
    if options.smoke and not options.data:
        return {"random": random_images((28, 28), 100, 20)}
    loaded = [(path, load_images(path)) for path in options.data or [None]]
    return {path.name: images for path, images in loaded}


def averaged(images: np.ndarray) -> np.ndarray:
    """Pixels in squares of 2x2 become one: float32 [N, H / 2, W / 2, C]."""
    count, height, width = images.shape[:3]
    squares = images.reshape(count, height // 2, 2, width // 2, 2, -1)
    return squares.mean(axis=(2, 4), dtype=np.float32)


def prepared(images: Images, count: int | None = None) -> Images:
    """Averaged, and scaled with the mean and deviation of all training pixels.

    Only the first `count` training images are kept.
    """
    train, test = averaged(images.train_images[:count]), averaged(images.test_images)
    mean, deviation = train.mean(), train.std()
    train, test = ((x - mean) / deviation for x in (train, test))
    known, labels = images.train_labels[:count], images.test_labels
    return Images(train, known.astype(np.int32), test, labels.astype(np.int32))


def prepared_sets(options: argparse.Namespace, count: int) -> dict[str, Images]:
    """The files of `--data`, `prepared`, by their names without an ending."""
    sets = load_sets(options).items()
    return {Path(name).stem: prepared(images, count) for name, images in sets}


def prepared_file(options: argparse.Namespace) -> tuple[str, Images]:
    """The name of the first file of `--data`, and its images, `prepared`."""
    name, images = next(iter(load_sets(options).items()))
    return name, prepared(images)


def wrong_labels(labels: np.ndarray, part: float, seed: int) -> np.ndarray:
    """Replaces a part of the labels by one of the other classes each."""
    random = np.random.default_rng(seed)
    count = round(part * len(labels))
    chosen = random.choice(len(labels), count, replace=False)
    labels = labels.astype(np.int32)
    labels[chosen] += random.integers(1, CLASSES, size=count, dtype=np.int32)
    return labels % CLASSES
