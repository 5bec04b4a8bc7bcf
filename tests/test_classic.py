"""Look-ahead momentum and the classic rules, against published trajectories.

The tables of docs/methods/classic.md are evaluated, line by line: what they call equal
is replayed.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import train
from test_golden import cross_entropy, load

import optax_flat
from optax_flat.plotting import responses

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "classic.md"


def rows(title):
    """Expression and golden name of every line of the table with that title."""
    table = PAGE.read_text().split(f"| {title} |")[1].split("\n\n")[0]
    lines = re.findall(r"^\|.*\| `(.*)` \| (\w+) \|$", table, re.MULTILINE)
    return [pytest.param(*line, id=line[1]) for line in lines]


RULES, SCHEDULERS, ARTICLE = map(rows, ("numpy-ml", "numpy-ml's scheduler", "rule"))


def evaluate(expression, **names):
    return eval(expression, {"optax": optax, "optax_flat": optax_flat} | names)


def replay(tx, golden, mode="plain", length=1):
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    data = [
        jax.tree.map(lambda x: jnp.stack([x] * length), batch)
        for batch in zip(golden["X"], golden["y"], strict=True)
    ]
    run = train(tx, mode, params, data, loss=cross_entropy)
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=1e-10)


def test_tables_are_complete():
    assert [len(table) for table in (RULES, SCHEDULERS, ARTICLE)] == [13, 3, 7]
    names = {row.values[1] for row in RULES}
    files = (Path(__file__).parent / "golden").glob("numpy_ml_*.npz")
    assert names == {file.stem for file in files}
    assert {row.values[1] for row in SCHEDULERS} < names


@pytest.mark.parametrize(("expression", "name"), RULES)
def test_numpy_ml(expression, name, x64):
    meta, golden = load(name)
    schedulers = dict(row.values[::-1] for row in SCHEDULERS)
    rates = jnp.asarray(golden["lr"])  # of each update, where they are recorded

    def schedule(count):
        if name not in schedulers:
            return rates[count]
        made = evaluate(schedulers[name], **meta["scheduler"])
        return made(jnp.asarray(count, float))

    replay(evaluate(expression, **meta["config"], schedule=schedule), golden)


@pytest.mark.parametrize(("expression", "rule"), ARTICLE)
def test_article(expression, rule, x64):
    _, golden = load("habr_signals")
    names = [key for key in golden if key.startswith(f"{rule}_")]
    replayed = 0
    for parameter in {key.removeprefix(f"{rule}_").split("_")[0] for key in names}:
        tx = evaluate(expression, m=float(parameter), eps=float(parameter))
        signals = [k for k in golden if k.startswith("signal_")]
        expected = [golden[k.replace("signal", f"{rule}_{parameter}")] for k in signals]
        fed = jnp.stack([golden[k] for k in signals])
        ours = jax.vmap(functools.partial(responses, tx))(fed)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
        replayed += len(ours)
    assert replayed == len(names) == 18


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("1", None),
        ("3_equal", "thirds"),
        ("3_geometric", "geometric"),
        ("4_equal", "four"),
    ],
)
def test_multipoint_nesterov(name, rule, mode, x64):
    """In both modes, read through eval_params; the names stand for their numbers."""
    meta, golden = load(f"lookahead_nesterov_{name}")
    config = meta["config"]
    arguments = {"nodes": config["nodes"], "weights": config["weights"]}
    if rule is not None and mode == "scanned":
        arguments = {"nodes": rule}
    tx = optax_flat.multipoint_nesterov(
        config["learning_rate"], config["momentum"], mode=mode, **arguments
    )
    replay(tx, golden, mode, length=len(config["nodes"]))


def test_only_the_mean_node_matters_on_a_quadratic(x64):
    """And elsewhere the nodes do matter."""

    def run(f, **rule):
        tx = optax_flat.multipoint_nesterov(0.02, 0.9, **rule)
        length = len(rule["nodes"])
        data = jnp.zeros((20, length))
        path = train(tx, "scanned", jnp.array([2.0, -1.0]), data, loss=f).path
        return np.stack(path)

    def quadratic(x, batch):
        return x @ jnp.array([[3.0, 1.0], [1.0, 2.0]]) @ x / 2

    def quartic(x, batch):
        return jnp.sum(x**4)

    two, one = {"nodes": (0.2, 1.0)}, {"nodes": (0.6,)}
    np.testing.assert_allclose(run(quadratic, **two), run(quadratic, **one), atol=1e-13)
    assert np.abs(run(quartic, **two) - run(quartic, **one)).max() > 1e-3


def test_adagrad_power_zero_is_gradient_descent():
    tx = optax_flat.adagrad(0.1, eps=0.0, power=0.0)
    g = jnp.array([3.0, 0.0, -1e-30])  # the square of the last one is zero
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, -0.1 * g)


def test_adagrad_without_eps_stays_finite():
    """Zero gradients, and gradients whose squares underflow."""
    tx = optax_flat.adagrad(0.1, eps=0.0)
    g = jnp.array([0.0, 1e-30, 2.0])
    updates, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(updates, [0.0, 0.0, -0.1], rtol=1e-6)


def test_adadelta_without_gradients_stays_finite():
    """Even where eps underflows."""
    tx = optax_flat.adadelta(eps=1e-40, initial_update=1.0)
    updates, _ = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)))
    np.testing.assert_array_equal(updates, 0.0)


def test_huge_gradients_are_clipped_too():
    """Also where the square of the norm overflows."""
    g = jnp.array([3e30, 4e30])
    tx = optax_flat.clip_by_leaf_norm(5.0)
    np.testing.assert_allclose(tx.update(g, tx.init(g))[0], [3.0, 4.0], rtol=1e-6)


def test_leaf_norms_are_bounded_one_by_one():
    grads = {
        "long": jnp.array([30.0, 40.0]),
        "short": jnp.array([0.3]),
        "zero": jnp.zeros(2),
    }
    tx = optax_flat.clip_by_leaf_norm(5.0)
    clipped, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(clipped["long"], [3.0, 4.0], rtol=1e-6)
    np.testing.assert_array_equal(clipped["short"], grads["short"])
    np.testing.assert_array_equal(clipped["zero"], grads["zero"])


def test_set_params_and_copy():
    """What numpy-ml does by set_params and copy."""
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    x, g = jnp.ones(2), jnp.ones(2)
    kept = tx.init(x)
    rate = {"learning_rate": jnp.asarray(0.5)}
    state = kept._replace(hyperparams=kept.hyperparams | rate)
    np.testing.assert_allclose(tx.update(g, state, x)[0], -0.5 * g)
    np.testing.assert_allclose(tx.update(g, kept, x)[0], -0.1 * g)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
def test_theta_outlives_the_rounding_of_the_params(mode):
    """Steps below the spacing of bfloat16 add up in theta."""
    tx = optax_flat.multipoint_nesterov(1e-4, 0.9, mode=mode)
    data = jnp.zeros((200, 1))
    run = train(tx, mode, jnp.ones(1, jnp.bfloat16), data, loss=lambda x, _: x.sum())
    theta, v = 1.0, 0.0
    for _ in range(200):
        v = 0.9 * v + 1e-4
        theta -= v
    spacing = 1 / 256  # of bfloat16 below 1
    assert abs(float(run.path[-1][0]) - theta) < spacing
