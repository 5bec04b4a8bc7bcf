"""What a measure of flatness costs beside the Hessian-vector products it uses.

An MLP 784-32-10 (25,450 parameters) with tanh on images of noise with random labels.
The physical limit of a measure is its products in one compiled loop, each with the last
result, normalized, as its vector. What comes on top is the check that the loss is a
function (two forward passes), and for eigenvalues the orthogonalization of the Lanczos
vectors, which does not grow with the data: hence two numbers of images. With many
batches the loop runs in Python; the limit stays that of the single large batch.

Measure and limit run in turns, round after round; a ratio is the median of the ratios
of the rounds, the first of which is not counted. The objective beside each time is the
measure's value.

    python -m benchmarks.speed.flatness_time
"""

import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import (
    Row,
    Rows,
    bars,
    parser,
    random_digits,
    table,
    write_table,
)
from optax_flat import flatness

MEASURES = ("ratio", "objective", "products")
WARM_UP = 1


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    few: int = 2048  # images
    many: int = 16_384
    width: int = 32
    matvecs: int = 50
    rounds: int = 5


SMOKE = Sizes(16, 32, 2, 3, 1)


class Method(NamedTuple):
    """A measure on few or many images, in one or more batches."""

    measure: str
    many: bool = True
    batches: int = 1


METHODS = {
    "top_eigenvalue": Method("top"),
    "top_eigenvalue_few_images": Method("top", many=False),
    "top_eigenvalue_eight_batches": Method("top", batches=8),
    "trace": Method("trace"),
    "trace_eight_batches": Method("trace", batches=8),
    "spectral_density": Method("density"),
}


def loss_fn(params: Any, batch: Any) -> jax.Array:
    """Mean cross-entropy."""
    hidden = jnp.tanh(batch[0] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()


@functools.partial(jax.jit, static_argnums=2)
def limit(params: Any, batch: Any, products: int) -> Any:
    """So many Hessian-vector products, one after the other."""

    def body(_, vector):
        grad = jax.grad(loss_fn)
        new = jax.jvp(lambda p: grad(p, batch), (params,), (vector,))[1]
        return optax.tree.scale(1.0 / optax.tree.norm(new), new)

    return jax.lax.fori_loop(0, products, body, params)


def measured(method: Method, sizes: Sizes, params: Any, batches: Any) -> Any:
    """The value of a measure."""
    given: Any = (loss_fn, params, batches)
    counts: Any = {"num_matvecs": sizes.matvecs, "key": 0}
    if method.measure == "top":
        return flatness.top_eigenvalues(*given, **counts).values[0]
    if method.measure == "trace":
        return flatness.trace(*given, num_samples=sizes.matvecs, key=0).value
    return flatness.spectral_density(*given, num_samples=2, **counts).grid[-1]


def measure(method: Method, sizes: Sizes, seed: int) -> Row:
    """One row."""
    params, data = random_digits(sizes.many, sizes.width, seed)
    images = sizes.many if method.many else sizes.few
    batch = jax.tree.map(lambda x: x[:images], data)
    batches: Any = batch
    if method.batches > 1:
        parts = [jnp.split(x, method.batches) for x in batch]
        batches = list(zip(*parts, strict=True))
    # Lanczos makes one more product, for the residual.
    products = {"top": sizes.matvecs + 1, "trace": sizes.matvecs}
    count = products.get(method.measure, 2 * sizes.matvecs)

    times, value = [], np.nan
    for _ in range(WARM_UP + sizes.rounds):
        start = time.perf_counter()
        jax.block_until_ready(limit(params, batch, count))
        between = time.perf_counter()
        value = float(jax.block_until_ready(measured(method, sizes, params, batches)))
        times.append((between - start, time.perf_counter() - between))
    of_limit, seconds = np.array(times[WARM_UP:]).T
    return {
        "gradient_evaluations": 2 * count,  # a product costs about two
        "forward_passes": 0,
        "seconds": float(np.median(seconds)),
        "ratio": float(np.median(seconds / of_limit)),
        "products": count,
        "objective": value,
    }


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(__doc__, METHODS, seeds=3, out="out/flatness_time", data=False)
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    rows = Rows(options.out, sizes._asdict())
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        rows.record(name, seed, measure(METHODS[name], sizes, seed))
    text = table(rows, MEASURES)
    write_table(text, options.out)
    label = "time of a measure / that of its Hessian-vector products"
    bars(rows, "ratio", label, options.out / "flatness_time.png")


if __name__ == "__main__":
    main()
