"""A progress bar for the loops of a measure."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from optax_flat._core import extras


@contextlib.contextmanager
def counter(progress: bool, *, unit: str, desc: str) -> Iterator[Callable[..., None]]:
    """Gives ``count(number, result)``, which waits for the result; or does nothing.

    Args:
      progress: whether to show a bar.
      unit: what is counted.
      desc: what is written before the bar.
    """
    if not progress:
        yield lambda number, result: None
        return
    tqdm = extras.load("tqdm.auto", "progress", "progress=True").tqdm
    with tqdm(unit=unit, desc=desc) as bar:

        def count(number: int, result: Any) -> None:
            jax.block_until_ready(result)
            bar.update(number)

        yield count
