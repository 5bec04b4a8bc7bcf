"""Programs around functions of the caller: compiled once, and let go with these."""

import dataclasses
import functools
import gc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from problem import assert_equal

import optax_flat
from optax_flat import flatness
from optax_flat.training import collect_samples, predict

SIZE = 1237  # of no other array


def close_over(data):
    return lambda w, *_: jnp.mean((data @ w) ** 2)


def partial(data):
    return functools.partial(lambda data, w, *_: jnp.mean((data @ w) ** 2), data)


class Model:
    def __init__(self, data):
        self.data = data

    def loss(self, w, *_):
        return jnp.mean((self.data @ w) ** 2)

    __call__ = loss


class Tuple(NamedTuple):
    """An object that nothing can refer to weakly."""

    scale: float

    def loss(self, w, *_):
        return self.scale * jnp.mean(w**2)

    __call__ = loss


KINDS = {
    "closure": close_over,
    "partial": partial,
    "object": Model,
    "method": lambda data: Model(data).loss,
}
W = jnp.ones(3)
STATE = optax_flat.ivon(0.1, ess=100.0, key=0).init(W)
LISTS = (jnp.ones((2, 3)), [jnp.ones((2, 3))] * 2)  # one batch, and two


def sgd_step(fn):
    def step(w, state, batch):
        value, grads = jax.value_and_grad(fn)(w)
        return w - 0.1 * grads, state, value

    return step


def on_batches(measure, **settings):
    def use(fn):
        return [measure(fn, W, batches, **settings) for batches in LISTS]

    return use


USES = {
    "predict": lambda fn: predict(fn, STATE, W, 0, num_samples=2),
    "collect_samples": lambda fn: collect_samples(
        sgd_step(fn), W, (), jnp.zeros(4), predict_fn=fn
    ),
    "hvp": on_batches(flatness.hvp, vector=W),
    "top_eigenvalues": on_batches(flatness.top_eigenvalues, key=0),
    "trace": on_batches(flatness.trace, num_samples=2, key=0),
    "worst": on_batches(flatness.sharpness, rho=0.1, num_steps=2),
    "m": on_batches(flatness.sharpness, rho=0.1, m=1),
    "local_energy": on_batches(flatness.local_energy, sigma=0.1, key=0),
    "local_entropy": on_batches(
        flatness.local_entropy, gamma=1.0, num_steps=2, num_chains=2, key=0
    ),
    "line": on_batches(flatness.line, direction=W),
    "report": lambda fn: flatness.report(
        fn, W, LISTS[0], key=0, measures=("loss", "trace", "sharpness_worst")
    ),
}


def alive():
    gc.collect()
    return sum(array.shape == (SIZE, 3) for array in jax.live_arrays())


@pytest.mark.parametrize(
    ("use", "kind"),
    [(use, kind) for use in USES for kind in ("closure", "method")]
    + [(use, kind) for use in ("predict", "trace") for kind in ("partial", "object")],
)
def test_what_a_function_closes_over_is_let_go(use, kind):
    fn = KINDS[kind](jnp.ones((SIZE, 3)))
    USES[use](fn)
    assert alive() >= 1
    del fn
    assert alive() == 0


@pytest.mark.parametrize(
    ("use", "kind"),
    [
        (use, kind)
        for use in ("predict", "collect_samples", "trace")
        for kind in ("plain", "method", "tuple", "tuple's method")
        if (use, kind) != ("trace", "tuple")  # JAX itself refuses it there
    ],
)
def test_is_compiled_once_for_the_same_function(use, kind):
    traces = []

    class Counted(Model):
        def loss(self, w, *_):
            traces.append(isinstance(w, jax.core.Tracer))
            return jnp.mean(w**2)

        __call__ = loss

    class CountedTuple(Tuple):
        def loss(self, w, *_):
            traces.append(isinstance(w, jax.core.Tracer))
            return jnp.mean(w**2)

        __call__ = loss

    model = Counted(None) if kind in ("plain", "method") else CountedTuple(1.0)

    def fn():  # bound methods are others at every look
        return model if kind in ("plain", "tuple") else model.loss

    step = sgd_step(lambda w: jnp.sum(w**2))

    def run():
        if use == "collect_samples":
            collect_samples(step, W, (), jnp.zeros(4), predict_fn=fn())
        else:
            USES[use](fn())
        return sum(traces)

    first = run()
    assert first > 0
    again = run() - first
    if use == "trace":  # the shape of a loss is looked at every time
        assert again < first
    else:
        assert again == 0


def test_two_methods_of_one_object_are_two_functions():
    class Two:
        def one(self, w):
            return jnp.sum(w * 0) + 1.0

        def two(self, w):
            return jnp.sum(w * 0) + 2.0

    model = Two()
    for method, value in ((model.one, 1.0), (model.two, 2.0), (model.one, 1.0)):
        assert predict(method, STATE, W, 0, num_samples=2) == value


def test_equal_objects_share_programs_and_outlive_each_other():
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        scale: float

        def __call__(self, w):
            return self.scale * jnp.sum(w * 0 + 1)

    first, second = Scaled(2.0), Scaled(2.0)
    expected = predict(first, STATE, W, 0, num_samples=2)
    assert_equal(predict(second, STATE, W, 0, num_samples=3), expected)
    del second
    gc.collect()
    short = jnp.ones(2)
    state = optax_flat.ivon(0.1, ess=100.0, key=0).init(short)
    assert_equal(predict(first, state, short, 0, num_samples=3), 2 * expected / 3)


def test_an_unhashable_function_is_refused():
    @dataclasses.dataclass
    class Scaled:
        scale: float

        def __call__(self, w):
            return self.scale * w

    with pytest.raises(TypeError, match="`predict_fn` must be hashable.*Scaled"):
        predict(Scaled(1.0), STATE, W, 0)
    with pytest.raises(TypeError, match="`predict_fn` must be hashable.*Scaled"):
        collect_samples(sgd_step(jnp.sum), W, (), jnp.zeros(4), predict_fn=Scaled(1.0))
