"""Convolutions in loops: the same values, in the layout that is fast on a CPU."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core
from jax.extend.core import primitives
from jax.sharding import AxisType
from problem import assert_close

import optax_flat
from benchmarks import hlo
from optax_flat import flatness
from optax_flat._core import convolutions
from optax_flat.training import (
    collect_samples,
    fast_convolutions,
    make_train_step,
    predict,
)

FAST = {"b0f_0io->b0f", "b01f_01io->b01f", "b012f_012io->b012f"}
NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES = jax.random.normal(jax.random.key(0), (4, 6, 6, 3))
KERNEL = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))


def loss(kernel, images):
    outputs = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=NHWC
    )
    return jnp.mean(jnp.tanh(outputs) ** 2)


gradient = jax.grad(loss)


def layouts(program):
    """Those of all convolutions in a compiled program."""
    return set(re.findall(r" convolution\(.*dim_labels=([^,\s]+)", program.as_text()))


def calls(function, *args):
    """How many convolutions were given another layout."""
    return str(jax.make_jaxpr(function)(*args)).count("name=_fast_convolve")


def drawn(seed):
    """A convolution with settings of every kind, and arguments for it."""
    rng = np.random.default_rng(seed)
    ndim = int(rng.integers(1, 4))
    groups, kind = int(rng.integers(1, 4)), rng.choice(["none", "feature", "batch"])
    batch, inputs, outputs = 2 * groups, 2 * groups, 3 * groups
    kernel_inputs = inputs // groups if kind == "feature" else inputs
    kernel = rng.integers(1, 4, ndim)
    sizes = {
        "N": batch, "C": inputs, "O": outputs, "I": kernel_inputs,
        **dict(zip("DHW", rng.integers(6, 9, ndim), strict=False)),
    }  # fmt: skip
    space = "DHW"[:ndim]
    order = [
        "".join(rng.permutation(list(space + ends))) for ends in ("NC", "IO", "NC")
    ]
    settings = {
        "window_strides": tuple(map(int, rng.integers(1, 3, ndim))),
        "padding": [tuple(map(int, rng.integers(0, 3, 2))) for _ in space],
        "lhs_dilation": tuple(map(int, rng.integers(1, 3, ndim))),
        "rhs_dilation": tuple(map(int, rng.integers(1, 3, ndim))),
        "dimension_numbers": tuple(order),
        "feature_group_count": groups if kind == "feature" else 1,
        "batch_group_count": groups if kind == "batch" else 1,
    }
    kernel_sizes = sizes | dict(zip(space, kernel, strict=True))
    lhs = jnp.asarray(rng.normal(size=[sizes[axis] for axis in order[0]]), "float32")
    rhs = rng.normal(size=[kernel_sizes[axis] for axis in order[1]])
    rhs = jnp.asarray(rhs, "float32")
    if rng.random() < 0.3:
        lhs, rhs = lhs.astype(jnp.bfloat16), rhs.astype(jnp.bfloat16)
        settings["preferred_element_type"] = jnp.float32
    return functools.partial(jax.lax.conv_general_dilated, **settings), lhs, rhs


def test_this_version_of_jax_can_be_rewritten():
    """Without a word, every convolution in a loop is in the fast layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        traced = jax.make_jaxpr(fast_convolutions(scan))(KERNEL, IMAGES)

    def body(traced):
        (loop,) = (eqn for eqn in traced.eqns if eqn.primitive is primitives.scan_p)
        return loop.params["jaxpr"].eqns

    def slow(eqns):
        numbers = (eqn.params.get("dimension_numbers") for eqn in eqns)
        return [n for n in numbers if n not in (None, convolutions._fast_layout(4))]

    assert slow(body(jax.make_jaxpr(scan)(KERNEL, IMAGES)))
    assert not slow(body(traced))
    assert "_fast_convolve" in [eqn.params.get("name") for eqn in body(traced)]


@pytest.mark.parametrize("seed", range(24))
def test_any_convolution_and_its_gradients(seed):
    convolve, lhs, rhs = drawn(seed)

    def everything(lhs, rhs):
        def total(lhs, rhs):
            return jnp.sum(convolve(lhs, rhs).astype(jnp.float32) ** 2)

        return convolve(lhs, rhs), jax.grad(total, (0, 1))(lhs, rhs)

    def in_loop(fn):
        """Twice the same; outside of loops XLA itself takes the fast kernels."""
        return jax.jit(lambda *xs: jax.lax.map(lambda x: fn(*x), xs))(
            *(jnp.stack([x, x]) for x in (lhs, rhs))
        )

    fast = fast_convolutions(everything)
    assert calls(fast, lhs, rhs) > 0
    tolerance = 1e-5 if lhs.dtype == jnp.float32 else 2e-2
    found, expected = in_loop(fast), in_loop(everything)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_fast_kernels_that_read_what_is_not_there():
    """In groups with negative padding, where XLA's give other numbers every time."""
    settings = {"padding": [(-2, 2), (-1, 0)], "feature_group_count": 2}

    def convolve(images, kernel):
        numbers = ("NCHW", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (2, 1), dimension_numbers=numbers, **settings
        )

    images, kernel = jnp.ones((3, 4, 9, 8)), jnp.ones((2, 2, 2, 6))
    assert calls(fast_convolutions(convolve), images, kernel) == 0
    settings["feature_group_count"], kernel = 1, jnp.ones((2, 2, 4, 6))
    assert calls(fast_convolutions(convolve), images, kernel) == 1


@jax.custom_vjp
def doubled(kernel, images):
    return 2.0 * loss(kernel, images)


doubled.defvjp(
    lambda kernel, images: (doubled(kernel, images), (kernel, images)),
    lambda kept, g: (2.0 * g * gradient(*kept), jnp.zeros_like(kept[1])),
)


def scan(kernel, images):
    body = lambda kernel, _: (kernel - gradient(kernel, images), None)
    return jax.lax.scan(body, kernel, length=3)[0]


def while_loop(kernel, images):
    step = lambda carry: (carry[0] - gradient(carry[0], images), carry[1] + 1)
    return jax.lax.while_loop(lambda carry: carry[1] < 3, step, (kernel, 0))[0]


NESTED = {
    "scan": scan,
    "while": while_loop,
    "cond": lambda kernel, images: jax.lax.cond(
        images.sum() > 0, gradient, lambda kernel, _: kernel, kernel, images
    ),
    "jit": jax.jit(gradient),
    "remat": jax.grad(jax.checkpoint(loss)),
    "vmap": lambda kernel, images: jax.vmap(gradient, (0, None))(
        jnp.stack([kernel, -kernel]), images
    ),
    "custom_vjp": jax.grad(doubled),
    "custom_vjp_call": lambda kernel, images: doubled(
        kernel.transpose(1, 0, 2, 3), images
    ) + jnp.sum(gradient(kernel, images)),
    "hessian": lambda kernel, images: jax.jvp(
        lambda kernel: gradient(kernel, images), (kernel,), (jnp.ones_like(kernel),)
    )[1],
    "scan of jit of cond": lambda kernel, images: jax.lax.map(
        jax.jit(functools.partial(NESTED["cond"], kernel)), jnp.stack([images] * 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_nested(name):
    fast = fast_convolutions(NESTED[name])
    assert calls(fast, KERNEL, IMAGES) > 0
    assert_close(jax.jit(fast)(KERNEL, IMAGES), NESTED[name](KERNEL, IMAGES))


def test_transformed_afterwards():
    """Derivatives, maps and collectives of what was rewritten are still right."""
    fast = fast_convolutions(gradient)
    kernels = jnp.stack([KERNEL, 2 * KERNEL])
    square = lambda function, kernel: jnp.sum(function(kernel, IMAGES) ** 2)
    hessian = lambda function: jax.grad(functools.partial(square, function))(KERNEL)
    assert_close(hessian(fast), hessian(gradient))
    assert_close(
        jax.vmap(fast, (0, None))(kernels, IMAGES),
        jax.vmap(gradient, (0, None))(kernels, IMAGES),
    )

    def mean(kernel):
        return jax.lax.pmean(gradient(kernel, IMAGES), "replica")

    operator = lambda images: jax.lax.conv_general_dilated(
        images, KERNEL.transpose(3, 2, 0, 1), (1, 1), "SAME"
    )
    images = IMAGES.transpose(0, 3, 1, 2)
    transposes = [
        jax.linear_transpose(function, images)(operator(images))
        for function in (fast_convolutions(operator), operator)
    ]
    assert_close(*transposes)
    mapped = functools.partial(jax.vmap, axis_name="replica")
    assert_close(mapped(fast_convolutions(mean))(kernels), mapped(mean)(kernels))
    assert calls(fast_convolutions(fast), KERNEL, IMAGES) == 1  # not twice


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def train(wrapper):
        def body(kernel, images):
            step = lambda kernel, _: (
                kernel - jax.lax.pmean(gradient(kernel, images), "data"), None,
            )  # fmt: skip
            return jax.lax.scan(wrapper(step), kernel, length=2)[0]

        return jax.shard_map(
            body, mesh=mesh, in_specs=(jax.P(), jax.P("data")), out_specs=jax.P(),
            check_vma=check_vma,
        )  # fmt: skip

    assert calls(train(fast_convolutions), KERNEL, IMAGES) == 1
    plain = train(lambda body: body)
    assert_close(
        jax.jit(train(fast_convolutions))(KERNEL, IMAGES), plain(KERNEL, IMAGES)
    )
    # From outside: what varies over devices is not known, and is left alone.
    outside = fast_convolutions(plain)
    assert calls(outside, KERNEL, IMAGES) == (0 if check_vma else 1)
    assert_close(jax.jit(outside)(KERNEL, IMAGES), plain(KERNEL, IMAGES))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_minibatches(kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        images = jax.device_put(IMAGES, jax.NamedSharding(mesh, jax.P("data")))
        kernel = jax.device_put(KERNEL, jax.NamedSharding(mesh, jax.P()))
        fast = jax.jit(fast_convolutions(scan))(kernel, images)
    assert_close(fast, scan(KERNEL, IMAGES))


def test_keys_effects_and_closures_survive(capfd):
    @jax.jit
    def run(key, images):
        twice = 2.0 * images

        def body(carry, _):
            kernel, key = carry
            key, other = jax.random.split(key)
            jax.debug.print("a pass")
            kernel += jax.random.normal(other, kernel.shape)
            return (kernel - gradient(kernel, twice), key), None

        body = fast_convolutions(body)
        return jax.lax.scan(body, (KERNEL, key), length=2)[0][0]

    found = run(jax.random.key(3), IMAGES)
    jax.effects_barrier()
    assert capfd.readouterr().out.count("a pass") == 2
    kernel, key = KERNEL, jax.random.key(3)
    for _ in range(2):
        key, other = jax.random.split(key)
        kernel += jax.random.normal(other, kernel.shape)
        kernel -= gradient(kernel, 2.0 * IMAGES)
    assert_close(found, kernel)


def test_what_needs_no_change_is_the_same_program():
    def dense(w, x):
        return jax.lax.scan(lambda w, x: (w - jnp.tanh(w @ x) * w, None), w, x)[0]

    w, x = jnp.ones((3, 4)), jnp.ones((5, 4, 4))
    plain, fast = (
        str(jax.make_jaxpr(f)(w, x)) for f in (dense, fast_convolutions(dense))
    )
    assert plain == fast
    assert calls(fast_convolutions(loss), KERNEL, IMAGES) == 0  # in this layout already


def test_other_platforms_get_other_programs_untouched():
    """Decided when a program is lowered, not where it was traced."""
    fast = jax.jit(fast_convolutions(scan))
    text = {
        platform: fast.trace(KERNEL, IMAGES)
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    numbers = r"dim_numbers = (\S+x\S+->\S+),"
    plain = jax.jit(scan).lower(KERNEL, IMAGES).as_text()
    for platform in ("tpu", "cuda"):
        found = re.findall(numbers, text[platform].replace(", ", ","))
        assert found == re.findall(numbers, plain.replace(", ", ","))
        assert "barrier" not in text[platform]
        assert text[platform].count("transpose") == plain.count("transpose")
    assert "barrier" in text["cpu"]


def test_unknown_primitives_and_versions(monkeypatch):
    """What is not known stays as it is; a jaxpr that cannot be rewritten as well."""
    opaque = core.Primitive("opaque")
    opaque.def_abstract_eval(lambda x, *, jaxpr: x)
    opaque.def_impl(lambda x, *, jaxpr: x)
    inner = jax.make_jaxpr(gradient)(KERNEL, IMAGES)
    unknown = fast_convolutions(lambda x: opaque.bind(x, jaxpr=inner))
    assert calls(unknown, KERNEL) == 0

    def fails(eqn):
        raise AttributeError("ctx")

    monkeypatch.setattr(convolutions, "_convolution", fails)
    monkeypatch.setattr(convolutions, "_said", [])
    with pytest.warns(RuntimeWarning, match="fast_convolutions=False") as said:
        for _ in range(3):  # once per process, whatever is traced
            found = fast_convolutions(gradient)(KERNEL, IMAGES)
    assert len(said) == 1
    assert_close(found, gradient(KERNEL, IMAGES))


# Where the library has loops.


def scanned_update(fast):
    tx = optax_flat.entropy_sgd(
        0.1, num_steps=4, noise=0.0, fast_convolutions=fast, key=0
    )
    batches = jnp.stack([IMAGES] * 3)

    def run(kernel):
        grads = gradient(kernel, IMAGES)
        updates, _ = tx.update(
            grads, tx.init(kernel), kernel, grad_fn=gradient, batches=batches
        )
        return updates

    return run


def by_value_fn(fast):
    tx = optax_flat.entropy_sgd(
        0.1, num_steps=4, noise=0.0, fast_convolutions=fast, key=0
    )
    value_fn = lambda kernel: loss(kernel, IMAGES)
    return lambda kernel: tx.update(
        jax.grad(value_fn)(kernel), tx.init(kernel), kernel, value_fn=value_fn
    )[0]


def groups(fast):
    tx = optax_flat.sam(optax.sgd(0.1), rho=0.1, num_groups=2, fast_convolutions=fast)
    step = make_train_step(loss, tx, num_groups=2, fast_convolutions=fast)
    return in_a_scan(step, tx)


def in_a_scan(step, tx):
    def run(kernel):
        body = lambda carry, _: (step(*carry, IMAGES)[:2], None)
        return jax.lax.scan(body, (kernel, tx.init(kernel)), length=3)[0][0]

    return run


def users_scan(fast):
    tx = optax_flat.sgld(0.1, temperature=0.0, key=0)
    return in_a_scan(make_train_step(loss, tx, fast_convolutions=fast), tx)


def transparent(fast):
    tx = optax_flat.entropy_sgd(0.1, num_steps=2, mode="transparent", key=0)
    return in_a_scan(make_train_step(loss, tx, fast_convolutions=fast), tx)


def features(kernel, images):
    """A model whose forward pass has another layout."""
    images, kernel = images.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    return jax.lax.conv(images, kernel, (1, 1), "SAME").mean((2, 3))


def ensemble(make):
    def run(fast):
        tx = make(
            ensemble_size=4, spread=0.1, batch_size=2, fast_convolutions=fast, key=0
        )
        return lambda kernel: tx.update(
            None, tx.init(kernel), kernel,
            output_fn=lambda kernel: features(kernel, IMAGES),
            loss_fn=lambda outputs: jnp.sum(outputs**2),
        )[0]  # fmt: skip

    return run


def predicted(fast):
    tx = optax_flat.ivon(0.1, ess=100.0, hess_init=1.0, key=0)
    probabilities = lambda kernel: features(kernel, IMAGES)
    return lambda kernel: predict(
        probabilities, tx.init(kernel), kernel, 0, num_samples=3, fast_convolutions=fast
    )


def collected(fast):
    tx = optax.sgd(0.1)

    def step(kernel, state, images):
        updates, state = tx.update(gradient(kernel, images), state)
        return optax.apply_updates(kernel, updates), state, 0.0

    return lambda kernel: collect_samples(
        step, kernel, tx.init(kernel), jnp.stack([IMAGES] * 4), thin=2,
        predict_fn=lambda kernel: features(kernel, IMAGES), fast_convolutions=fast,
    ).prediction  # fmt: skip


def measure(name, **settings):
    def of(fast):
        return lambda kernel: getattr(flatness, name)(
            loss, kernel, IMAGES, fast_convolutions=fast, **settings
        )

    return of


def hessian_product(fast):
    def run(kernel):
        product = lambda kernel, _: (
            flatness.hvp(loss, kernel, IMAGES, kernel, fast_convolutions=fast), None,
        )  # fmt: skip
        return jax.lax.scan(product, kernel, length=3)[0]

    return run


LOOPS = {
    "scanned": scanned_update,
    "value_fn": by_value_fn,
    "groups": groups,
    "make_train_step": users_scan,
    "transparent": transparent,
    "ensemble_kalman": ensemble(optax_flat.ensemble_kalman),
    "perturbation_gradient": ensemble(
        functools.partial(optax_flat.perturbation_gradient, optax.sgd(0.1))
    ),
    "predict": predicted,
    "collect_samples": collected,
    "hvp": hessian_product,
    "trace": measure("trace", num_samples=3, key=0),
    "frobenius_norm": measure("frobenius_norm", num_samples=3, key=0),
    "spectral_density": measure(
        "spectral_density", num_matvecs=3, num_samples=2, key=0
    ),
    "top_eigenvalues": measure("top_eigenvalues", num_matvecs=4, key=0),
    "sharpness": measure("sharpness", rho=0.1, num_steps=4),
    "m_sharpness": measure("sharpness", rho=0.1, m=1, batch_size=2),
    "local_entropy": measure(
        "local_entropy", gamma=1.0, num_steps=3, num_chains=2, batch_size=2, key=0
    ),
}


# The other measures evaluate their products as `hvp` and `trace` do.
SLOW = {
    "frobenius_norm", "spectral_density", "top_eigenvalues", "m_sharpness", "trace",
    "perturbation_gradient",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in LOOPS],
)
def test_loops_have_the_fast_layout_only(name):
    """XLA leaves convolutions in loops as they are; one argument shows it."""
    fast, plain = (
        hlo.compiled(jax.jit(LOOPS[name](fast)), KERNEL) for fast in (True, False)
    )
    assert layouts(fast) <= FAST
    assert layouts(plain) - FAST
    assert_close(fast(KERNEL), plain(KERNEL))


def on_features(name, **settings):
    def model_loss(kernel, images):
        return jnp.mean(features(kernel, images) ** 2)

    def of(fast):
        return lambda kernel: getattr(flatness, name)(
            model_loss, kernel, IMAGES, fast_convolutions=fast, key=0, **settings
        )

    return of


@pytest.mark.parametrize("name", ["line", "plane", "local_energy", "average"])
def test_forward_passes_in_loops(name):
    settings = {
        "line": ("line", {}),
        "plane": ("plane", {}),
        "local_energy": ("local_energy", {"sigma": 0.1}),
        "average": ("sharpness", {"rho": 0.1, "kind": "average"}),
    }
    measure_name, arguments = settings[name]
    of = on_features(measure_name, **arguments)
    assert calls(of(True), KERNEL) > 0
    assert calls(of(False), KERNEL) == 0
    assert_close(of(True)(KERNEL), of(False)(KERNEL))


def test_report_passes_the_argument_on(monkeypatch):
    seen = []
    original = convolutions.fast_if
    monkeypatch.setattr(
        convolutions,
        "fast_if",
        lambda fast, fn: seen.append(fast) or original(fast, fn),
    )

    def fresh(kernel, images):  # compiled here, not found in a cache
        return loss(kernel, images)

    measures = ("trace", "sharpness_average", "random_line")
    report = functools.partial(flatness.report, fresh, KERNEL, IMAGES, key=0)
    found = report(measures=measures, num_samples=2, fast_convolutions=False)
    assert seen and not any(seen)
    assert np.isfinite(found.trace.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda flag: optax_flat.sam(optax.sgd(0.1), fast_convolutions=flag),
        lambda flag: make_train_step(loss, optax.sgd(0.1), fast_convolutions=flag),
        lambda flag: flatness.trace(
            loss, KERNEL, IMAGES, num_samples=2, key=0, fast_convolutions=flag
        ),
    ],
)
def test_argument_is_checked(make):
    with pytest.raises(TypeError, match="`fast_convolutions` must be True or False"):
        make("yes")
