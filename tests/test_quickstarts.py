"""The frameworks' own loops become ours by changing at most five lines."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import optax_flat

ALLOWED = 5  # lines
HERE = Path(__file__).parent / "quickstarts"
IMPORT = {"import optax": "import optax\nimport optax_flat"}

# What stands where the optimizer is made, what is evaluated, and what it becomes.
OPTIMIZER = {
    "linen_cnn": "optax.sgd(learning_rate=0.1, momentum=0.9)",
    "nnx_mlp": "optax.adamw(learning_rate=0.005)",
    "equinox_mlp": "optax.adamw(learning_rate=0.005)",
}
METHODS = {
    "ema_weights": "optax_flat.ema_weights({0}, decay=0.9)",
    "sam": 'optax_flat.sam({0}, rho=0.05, mode="transparent")',
    "entropy_sgd": (
        'optax_flat.entropy_sgd(1.0, num_steps=5, mode="transparent", key=0)'
    ),
}
EVALUATION = {
    "linen_cnn": {
        "    params = state.params\n": (
            "    params = optax_flat.eval_params(state.opt_state, state.params)\n"
        ),
    },
    "nnx_mlp": {
        "    return eval_step": (
            "    params = nnx.state(model, nnx.Param)\n"
            "    params = optax_flat.eval_params(optimizer.opt_state, params)\n"
            "    nnx.update(model, params)\n"
            "    return eval_step"
        ),
    },
    "equinox_mlp": {
        "    return evaluate(model,": (
            "    model = optax_flat.eval_params(opt_state, model)\n"
            "    return evaluate(model,"
        ),
    },
}


def changed(loop: str, method: str) -> tuple[str, int]:
    """The loop with our method, and how many of its lines are new or other ones."""
    source = (HERE / f"{loop}.py").read_text()
    before = source.splitlines()
    optimizer = OPTIMIZER[loop]
    ours = {optimizer: METHODS[method].format(optimizer)}
    for old, new in (IMPORT | ours | EVALUATION[loop]).items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    return source, sum(line not in before for line in source.splitlines())


def batches(repeats: int):
    """Two kinds of stripes under noise: minibatches to train with, and one to test.

    The last one begins a walk, so that the params do not stand on its anchor.
    """

    def draw(key):
        labels_key, noise_key = jax.random.split(key)
        labels = jax.random.bernoulli(labels_key, shape=(64,)).astype(int)
        across = jnp.sign(jnp.sin(jnp.arange(8) * jnp.pi / 2 + 0.1))
        stripes = across * jnp.ones((8, 8))
        images = jnp.where(labels[:, None, None] == 0, stripes, stripes.T)
        noise = 1.5 * jax.random.normal(noise_key, images.shape)
        return (images + noise)[..., None], labels

    *train, last, test = map(draw, jax.random.split(jax.random.key(1), 62))
    return [batch for batch in train for _ in range(repeats)] + [last], test


def run(source: str, name: str, data):
    """Test loss and accuracy."""
    namespace = {"__name__": f"quickstarts.{name}"}
    exec(compile(source, name, "exec"), namespace)
    return map(float, namespace["main"](*data))


# Every loop and every method once; `make test-all` has all pairs.
QUICK = tuple(zip(OPTIMIZER, METHODS, strict=True))


@pytest.mark.parametrize(
    ("loop", "method"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
        for pair in itertools.product(OPTIMIZER, METHODS)
    ],
)
def test_five_lines(loop, method, monkeypatch):
    pytest.importorskip("equinox" if loop == "equinox_mlp" else "flax")
    source, lines = changed(loop, method)
    assert 2 <= lines <= ALLOWED
    # SAM takes both gradients of an update from one minibatch.
    data = batches(repeats=2 if method == "sam" else 1)
    loss, accuracy = run(source, f"{loop}-{method}", data)
    assert accuracy > 0.9
    monkeypatch.setattr(optax_flat, "eval_params", lambda state, params: params)
    loss_on_the_walk, _ = run(source, f"{loop}-{method}", data)
    assert loss != loss_on_the_walk
