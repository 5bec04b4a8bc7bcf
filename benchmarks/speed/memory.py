"""Memory of an outer update, beside what the algorithm must hold.

Params and state are donated, so their buffers are written over. The peak of the
compiled program is arguments + outputs + temporaries - what outputs share with
arguments; all of it in multiples of the params. An entry of the gradient needs params
from far away, as in a network, so it cannot be made piece by piece inside the update,
and there is no minibatch: what is left is the method's.

The minimum is what the algorithm cannot do without while its update runs: the params x,
what it remembers between updates, and what it makes from a gradient g on. In scanned
mode Entropy-SGD needs x, the walk's point and its mean, and the gradient.

    python -m benchmarks.speed.memory
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_flat
from benchmarks import hlo
from benchmarks.harness import Row, Rows, bars, parser, table, write_table

MEASURES = ("peak", "minimum", "ratio_to_minimum", "state", "donated_percent")
LENGTH = 20  # gradients of a walk
MEMBERS = 4  # of an ensemble


class Method(NamedTuple):
    """An optimizer, and the arrays of the params' size that it needs at once."""

    make: Callable[[], optax.GradientTransformation]
    needs: tuple[str, ...]
    length: int = 1


def _walk(name: str, **settings: Any) -> Callable[[], Any]:
    factory = getattr(optax_flat, name)
    return lambda: factory(1.0, num_steps=LENGTH, key=0, **settings)


def _sampler(name: str) -> Callable[[], Any]:
    return lambda: getattr(optax_flat, name)(0.1, temperature=1e-3, key=0)


METHODS = {
    "sgd": Method(lambda: optax.sgd(0.1), ("params", "gradient")),
    "sgd_momentum": Method(
        lambda: optax.sgd(0.1, 0.9), ("params", "momentum", "gradient")
    ),
    "adam": Method(lambda: optax.adam(0.1), ("params", "mean", "square", "gradient")),
    "entropy_sgd": Method(
        _walk("entropy_sgd"), ("params", "point", "mean", "gradient"), LENGTH
    ),
    "entropy_sgd_noiseless": Method(
        _walk("entropy_sgd", noise=0.0), ("params", "point", "mean", "gradient"), LENGTH
    ),
    "entropy_sgd_transparent": Method(
        _walk("entropy_sgd", mode="transparent"),
        ("params", "anchor", "mean", "gradient"),
    ),
    "entropy_adam": Method(
        _walk("entropy_adam"),
        ("params", "point", "mean", "gradient", "outer mean", "outer square"),
        LENGTH,
    ),
    "sgld": Method(_sampler("sgld"), ("params", "gradient")),
    "psgld": Method(_sampler("psgld"), ("params", "square", "gradient")),
    "sghmc": Method(_sampler("sghmc"), ("params", "velocity", "gradient")),
    "coolmomentum": Method(
        lambda: optax_flat.coolmomentum(0.1, 0.9), ("params", "momentum", "gradient")
    ),
    "multipoint_nesterov": Method(
        lambda: optax_flat.multipoint_nesterov(0.1, 0.9, nodes="four"),
        ("params", "velocity", "way back", "sum", "gradient"),
        4,
    ),
    "ensemble_kalman": Method(
        lambda: optax_flat.ensemble_kalman(
            0.1, ensemble_size=MEMBERS, spread=0.1, key=0
        ),
        ("params", *[f"member {j}" for j in range(MEMBERS)], "moved member"),
    ),
}


def loss_fn(params: jax.Array, batch: Any) -> jax.Array:
    """Each entry's gradient needs the entry at the other end."""
    return jnp.sum(jnp.cos(params) * params[::-1])


grad_fn = jax.grad(loss_fn)


def update(tx: Any, length: int, params: jax.Array, state: Any) -> Any:
    """One outer update; a step of a transparent walk."""
    grads = grad_fn(params, None)
    more = {"grad_fn": grad_fn} if length > 1 else {"value": jnp.zeros([])}
    parts = {"output_fn": lambda x: loss_fn(x, None)[None], "loss_fn": jnp.sum}
    updates, state = tx.update(grads, state, params, **more, **parts)
    return optax.apply_updates(params, updates), state


def measure(method: Method, size: int) -> Row:
    """Bytes of the executable for params of a size, in units of the params."""
    tx = optax.with_extra_args_support(method.make())
    params = jax.ShapeDtypeStruct((size,), jnp.float32)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(partial(update, tx, method.length), donate_argnums=(0, 1))
    found = hlo.compiled(step, params, state).memory_analysis()
    shared = found.alias_size_in_bytes
    peak = found.argument_size_in_bytes + found.output_size_in_bytes - shared
    peak = (peak + found.temp_size_in_bytes) / (4 * size)
    return {
        "gradient_evaluations": method.length,
        "forward_passes": 0,
        "seconds": 0.0,
        "peak": peak,
        "minimum": len(method.needs),
        "ratio_to_minimum": peak / len(method.needs),
        "state": found.argument_size_in_bytes / (4 * size) - 1,
        "donated_percent": 100 * shared / found.argument_size_in_bytes,
    }


def main() -> None:
    """Measures what is missing, then writes table and picture."""
    options = parser(
        __doc__, METHODS, seeds=1, out="out/memory", data=False
    ).parse_args()
    size = 10_000 if options.smoke else 10_000_000
    rows = Rows(options.out, {"parameters": size})
    for name, seed in rows.pending(options.methods, range(options.seeds)):
        rows.record(name, seed, measure(METHODS[name], size))
    text = table(rows, MEASURES)
    needs = "".join(
        f"- {name}: {', '.join(METHODS[name].needs)}\n" for name in options.methods
    )
    write_table(f"{text}\nThe minimum of each:\n\n{needs}", options.out)
    label = "peak memory of an update / the algorithm's minimum"
    bars(rows, "ratio_to_minimum", label, options.out / "memory.png")


if __name__ == "__main__":
    main()
