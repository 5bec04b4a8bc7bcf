"""Programs grow with the leaves of the params, not with their square."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import METHODS
from problem import update

from benchmarks import hlo

# Those whose rules put a number from all leaves into each; others stand for the rest.
QUICK = {
    ("looksam", "scanned"),
    ("zsharp", "scanned"),
    ("looksam", "transparent"),
    ("ae_sam", "transparent"),
}


def loss(params, batch):
    total = sum(jnp.sum((leaf - batch) ** 2) for leaf in jax.tree.leaves(params))
    return jnp.tanh(total)  # dear enough to be computed once


def instructions(method, mode, leaves: int) -> int:
    params = {f"leaf_{i}": jnp.ones((8, 16)) for i in range(leaves)}
    tx = optax.with_extra_args_support(method.make(mode=mode, **method.noisy))
    step = jax.jit(functools.partial(update, tx, mode, loss=loss))
    given = params, tx.init(params), jnp.ones(method.length)
    text = hlo.compiled(step, *given).as_text()  # fused as users have it
    return sum(" = " in line for line in text.splitlines())


@pytest.mark.parametrize(
    ("method", "mode"),
    [
        pytest.param(
            method, mode, id=f"{method.name}-{mode}",
            marks=() if (method.name, mode) in QUICK else pytest.mark.slow,
        )
        for method in METHODS
        for mode in method.modes
    ],
)  # fmt: skip
def test_program_grows_with_its_leaves(method, mode):
    few, some, many = (instructions(method, mode, n) for n in (8, 16, 32))
    assert many - some <= 1.1 * 2 * (some - few)
