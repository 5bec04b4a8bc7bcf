"""What an update of a method without gradients costs beside its forward passes.

An MLP 784-128-10 on a minibatch of noise. The physical limit of ensemble Kalman
inversion with J members is J forward passes of perturbed models, vmapped, and the two
products of its linear algebra: outputs with loss slopes, [J, M] times [M, J], and
weights with deviations, [J, J] times [J, P]. These are the references `forward` and
`forward_and_products`. The estimate of `perturbation_gradient` with K = J draws its
perturbations anew.

All programs run in turns, round after round; a ratio is the median of the ratios within
the rounds, the first two of which are not counted. The objective beside each time is
the loss after the last update.

    python -m benchmarks.speed.ensemble_time
"""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flat
from benchmarks.harness import (
    Row,
    Rows,
    bars,
    parser,
    random_digits,
    table,
    write_table,
)

REFERENCE = "forward_and_products"
METHODS = (
    "forward",
    REFERENCE,
    "ensemble_kalman",
    "ensemble_kalman_momentum",
    "ensemble_kalman_resampled",
    "perturbation_gradient",
)
MEASURES = ("ratio_to_forward", f"ratio_to_{REFERENCE}", "objective")
WARM_UP = 2


class Sizes(NamedTuple):
    """What a smoke run makes smaller."""

    members: int = 200
    batch: int = 500
    width: int = 128
    rounds: int = 7


SMOKE = Sizes(4, 2, 3, 1)


def output_fn(params: Any, images: jax.Array) -> jax.Array:
    """Logits [B, 10]."""
    hidden = jax.nn.relu(images @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean()


def method(name: str, sizes: Sizes) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a name."""
    settings = {"ensemble_size": sizes.members, "spread": 0.01, "key": 0}
    if name == "perturbation_gradient":
        return optax_flat.perturbation_gradient(optax.sgd(0.1), **settings)
    if name == "ensemble_kalman_momentum":
        settings["momentum"] = 0.9
    if name == "ensemble_kalman_resampled":
        settings["resample"] = 1
    return optax_flat.ensemble_kalman(**settings)


def reference(name: str, params: Any, deviations: Any, batch: Any) -> Any:
    """Forward passes, and with the products if the name says so."""

    def member(deviation):
        return output_fn(optax.tree.add(params, deviation), batch[0])

    outputs = jax.vmap(member)(deviations)
    if name == "forward":
        return outputs
    flat = outputs.reshape(len(outputs), -1)
    weights = flat @ flat.T / 1e6  # of the size and the cost of D
    return jax.tree.map(lambda e: jnp.tensordot(weights, e, axes=1), deviations)


def measure(names: list[str], sizes: Sizes, seed: int) -> dict[str, Row]:
    """Runs everything in turns; gives a row for each name."""
    params, batch = random_digits(sizes.batch, sizes.width, seed)
    deviations = method("ensemble_kalman", sizes).init(params).deviations
    calls, carries = {}, {}
    for name in dict.fromkeys(["forward", REFERENCE, *names]):
        if name in ("forward", REFERENCE):
            # The result is returned too, or there would be nothing to compute.
            calls[name] = jax.jit(
                lambda carry, name=name: (carry, reference(name, *carry, batch))
            )
            carries[name] = (params, deviations)
            continue
        tx = method(name, sizes)

        def update(carry, tx=tx):
            params, state = carry
            updates, state = tx.update(
                None, state, params,
                output_fn=lambda p: output_fn(p, batch[0]),
                loss_fn=lambda logits: loss_fn(logits, batch[1]),
            )  # fmt: skip
            return (optax.apply_updates(params, updates), state), ()

        calls[name] = jax.jit(update)
        carries[name] = (params, tx.init(params))
    times = {name: [] for name in calls}
    for _ in range(WARM_UP + sizes.rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            carry, _ = jax.block_until_ready(call(carries[name]))
            times[name].append(time.perf_counter() - start)
            carries[name] = carry
    seconds = {name: np.array(of[WARM_UP:]) for name, of in times.items()}

    def row(name: str) -> Row:
        return {
            "gradient_evaluations": 0,
            "forward_passes": sizes.members,
            "seconds": float(np.median(seconds[name])),
            "objective": float(
                loss_fn(output_fn(carries[name][0], batch[0]), batch[1])
            ),
            **{
                f"ratio_to_{other}": float(np.median(seconds[name] / seconds[other]))
                for other in ("forward", REFERENCE)
            },
        }

    return {name: row(name) for name in names}


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(__doc__, METHODS, seeds=3, out="out/ensemble_time", data=False)
    options = options_of.parse_args()
    sizes = SMOKE if options.smoke else Sizes()
    rows = Rows(options.out, sizes._asdict())
    for seed in range(options.seeds):
        missing = [name for name in options.methods if (name, seed) not in rows]
        if missing:  # together, because they must run in turns
            measured = measure(missing, sizes, seed)
            for name, of_seed in rows.pending(missing, [seed]):
                rows.record(name, of_seed, measured[name])
    text = table(rows, MEASURES)
    write_table(text, options.out)
    label = "time of an update / that of its forward passes and products"
    bars(rows, f"ratio_to_{REFERENCE}", label, options.out / "ensemble_time.png")


if __name__ == "__main__":
    main()
