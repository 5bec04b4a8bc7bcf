"""What an update costs beside its gradient: time at ten million parameters.

An optimizer that asks for one gradient per update reads and writes arrays of the
params' size, and samplers draw noise. Here the gradient is given, the params at the
start at every update, so nothing but the update and its application is timed, one
jitted call each with params and state donated. The references are SGD with momentum
0.9 and plain SGD, which is the physical limit: read params and gradient, write params.
`noisy_sgd` is what Optax offers instead of a sampler, noise in front of the rate.

All methods run in turns, round after round, so that a machine that becomes slower does
so for all of them; a ratio is the median of the ratios within the rounds, the first
three of which are not counted. The objective beside each time is the mean of x^2 / 2 at
the end.

    python benchmarks/update_time.py --out out/update_time
"""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Row, Rows, bars, parser, table

import optax_flat

REFERENCES = ("sgd_momentum", "sgd")
MEASURES = ("ratio_to_sgd_momentum", "ratio_to_sgd", "objective")
WARM_UP = 3
RATE, TEMPERATURE = 0.01, 1e-4


def optimizers(rounds: int) -> dict[str, optax.GradientTransformation]:
    """What is timed; the cooling lasts as long as the measurement."""
    cooling = optax_flat.schedules.exponential_cooling(0.99, rounds)
    langevin = {"temperature": TEMPERATURE, "key": 0}
    made = {
        "sgd": optax.sgd(RATE),
        "sgd_momentum": optax.sgd(RATE, momentum=0.9),
        "adam": optax.adam(RATE),
        "noisy_sgd": optax.noisy_sgd(RATE, key=0),
        "coolmomentum": optax_flat.coolmomentum(RATE, cooling),
        "coolmomentum_temperature": optax_flat.coolmomentum(RATE, cooling),
    }
    for name in ("sgld", "psgld", "sghmc"):
        factory = partial(getattr(optax_flat, name), RATE, **langevin)
        for kind in ("rademacher", "normal"):
            made[f"{name}_{kind}"] = factory(noise_kind=kind)
    return made


def start(size: int, seed: int) -> dict[str, jax.Array]:
    """Params in matrices of 1000 columns and one vector, as networks have them."""
    keys = jax.random.split(jax.random.key(seed), 3)
    rows = max(size // 2500, 1)
    shapes = {"a": (rows, 1000), "b": (rows, 1000), "c": (rows * 500,)}
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def step(tx: Any, reads: bool, params: Any, state: Any, grads: Any) -> Any:
    """One update; `reads` for CoolMomentum's temperature."""
    updates, state = tx.update(grads, state, params)
    value = state.temperature if reads else jnp.zeros([])
    return optax.apply_updates(params, updates), state, value


def measure(methods: Iterable[str], size: int, rounds: int, seed: int):
    """Runs all methods in turns; gives a row for each."""
    rounds += WARM_UP
    known = optimizers(rounds)
    calls, carries, times = {}, {}, {}
    for name in dict.fromkeys([*REFERENCES, *methods]):
        reads = name == "coolmomentum_temperature"
        calls[name] = jax.jit(partial(step, known[name], reads), donate_argnums=(0, 1))
        params = start(size, seed)
        carries[name] = (params, known[name].init(params))
        times[name] = []
    grads = start(size, seed)
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            *carry, _ = jax.block_until_ready(call(*carries[name], grads))
            times[name].append(time.perf_counter() - begin)
            carries[name] = carry
    seconds = {name: np.array(of[WARM_UP:]) for name, of in times.items()}
    return {name: _row(name, seconds, carries[name][0]) for name in methods}


def _row(name: str, seconds: dict[str, np.ndarray], params: Any) -> Row:
    leaves = jax.tree.leaves(params)
    squares = sum(float(jnp.sum(leaf**2)) for leaf in leaves)
    return {
        "gradient_evaluations": 0,
        "forward_passes": 0,
        "seconds": float(np.median(seconds[name])),
        "objective": squares / 2 / sum(leaf.size for leaf in leaves),
        **{
            f"ratio_to_{reference}": float(
                np.median(seconds[name] / seconds[reference])
            )
            for reference in REFERENCES
        },
    }


def main() -> None:
    """Runs what is missing, then writes table and picture."""
    options_of = parser(
        __doc__, optimizers(1), seeds=3, out="out/update_time", data=False
    )
    options = options_of.parse_args()
    size, rounds = (2500, 2) if options.smoke else (10_000_000, 40)
    rows = Rows(options.out, {"parameters": size, "rounds": rounds})
    for seed in range(options.seeds):
        missing = [name for name in options.methods if (name, seed) not in rows]
        if missing:  # together, because they must run in turns
            measured = measure(missing, size, rounds, seed)
            for name, of_seed in rows.pending(missing, [seed]):
                rows.record(name, of_seed, measured[name])
    text = table(rows, MEASURES)
    (options.out / "table.md").write_text(text)
    print(text)
    label = "time of an update / that of SGD with momentum"
    bars(rows, "ratio_to_sgd_momentum", label, options.out / "update_time.png")


if __name__ == "__main__":
    main()
