"""What an update costs beside its gradient: time at ten million parameters.

An optimizer that asks for one gradient per update reads and writes arrays of the
params' size, and samplers draw noise. Here the gradient is given, the params at the
start at every update, so nothing but the update and its application is timed, one
jitted call each with params and state donated. The references are SGD with momentum
0.9 and plain SGD, which is the physical limit: read params and gradient, write params.
`noisy_sgd` is what Optax offers instead of a sampler, noise in front of the rate. The
classic rules stand beside their neighbours in Optax: `leaf_norm` and `global_norm` clip
in front of plain SGD, `loss_slope` is plain SGD behind which the loss is watched, and
`multipoint_nesterov` has one node, so that it too is given one gradient.

The methods take turns, round after round, each right behind the two references, so
that what is compared is close in time; each is called twice, and the second call is
timed. A ratio is the median of the ratios of the rounds, the first three of which are
not counted. The objective beside each time is the mean of x^2 / 2 at the end; the
references make more updates than the others.

    python -m benchmarks.speed.update_time
"""

import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_flat
from benchmarks.harness import Row, Rows, bars, parser, table, write_table

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
    sgd = optax.sgd(RATE)
    made |= {
        "nesterov": optax.sgd(RATE, 0.9, nesterov=True),
        "multipoint_nesterov": optax_flat.multipoint_nesterov(RATE, 0.9),
        "optax_adagrad": optax.adagrad(RATE),
        "adagrad": optax_flat.adagrad(RATE),
        "optax_adadelta": optax.adadelta(RATE),
        "adadelta": optax_flat.adadelta(RATE),
        "global_norm": optax.chain(optax.clip_by_global_norm(1.0), sgd),
        "leaf_norm": optax.chain(optax_flat.clip_by_leaf_norm(1.0), sgd),
        "loss_slope": optax.chain(sgd, optax_flat.scale_by_loss_slope()),
    }
    return {name: optax.with_extra_args_support(tx) for name, tx in made.items()}


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
    updates, state = tx.update(grads, state, params, value=1.0)
    value = state.temperature if reads else jnp.zeros([])
    return optax.apply_updates(params, updates), state, value


def measure(methods: Iterable[str], size: int, rounds: int, seed: int):
    """Runs all methods in turns; gives a row for each."""
    rounds += WARM_UP
    known = optimizers(rounds)
    calls, carries = {}, {}
    for name in dict.fromkeys([*REFERENCES, *methods]):
        reads = name == "coolmomentum_temperature"
        calls[name] = jax.jit(partial(step, known[name], reads), donate_argnums=(0, 1))
        params = start(size, seed)
        carries[name] = (params, known[name].init(params))
    grads = start(size, seed)

    def seconds(name):
        for _ in range(2):  # the first pays for the caches that others left
            begin = time.perf_counter()
            *carry, _ = jax.block_until_ready(calls[name](*carries[name], grads))
            carries[name] = carry
        return time.perf_counter() - begin

    # The references again for each method, so that neighbours in time are compared.
    times = {name: [] for name in methods}
    for _ in range(rounds):
        for name, of_method in times.items():
            of_method.append([seconds(run) for run in (*REFERENCES, name)])
    return {
        name: _row(np.array(of_method[WARM_UP:]), carries[name][0])
        for name, of_method in times.items()
    }


def _row(seconds: np.ndarray, params: Any) -> Row:
    *of_references, of_method = seconds.T
    leaves = jax.tree.leaves(params)
    squares = sum(float(jnp.sum(leaf**2)) for leaf in leaves)
    return {
        "gradient_evaluations": 0,
        "forward_passes": 0,
        "seconds": float(np.median(of_method)),
        "objective": squares / 2 / sum(leaf.size for leaf in leaves),
        **{
            f"ratio_to_{reference}": float(np.median(of_method / of_reference))
            for reference, of_reference in zip(REFERENCES, of_references, strict=True)
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
    write_table(text, options.out)
    label = "time of an update / that of SGD with momentum"
    bars(rows, "ratio_to_sgd_momentum", label, options.out / "update_time.png")


if __name__ == "__main__":
    main()
