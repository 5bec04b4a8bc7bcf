"""Trajectories of published codes, replayed in float64."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problem import train

import optax_flat
from optax_flat._core import keys, noise
from optax_flat._methods import bsam, entropy_mcmc, ivon

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def cross_entropy(params, batch):
    """The problem of all golden files: softmax regression on a minibatch."""
    X, y = batch
    logits = X @ params["W"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start_of(golden):
    return {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}


def assert_follows(run, golden):
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=1e-10)


@pytest.fixture
def replay(monkeypatch):
    """Makes a method draw recorded noise: for each leaf [update, draw, ...]."""

    def patch(method, recorded):
        recorded = jax.tree.map(jnp.asarray, recorded)
        no_keys = SimpleNamespace(data=keys.data, fold_in=lambda data, t, like: t)
        changes = {
            "keys": no_keys,
            "first_seed": lambda t, like: jnp.stack([t, 0 * t]).astype("uint32"),
            "next_seed": lambda seed: seed + jnp.array([0, 1], "uint32"),
            "draw_from": lambda seed, like, kind: jax.tree.map(
                lambda x: x[seed[0], seed[1]], recorded
            ),
        }
        for name, replacement in changes.items():
            monkeypatch.setattr(method, name, replacement, raising=False)
        monkeypatch.setattr(noise, "draw_from", changes["draw_from"])

    return patch


def on_first_draw(tx, params, deviation, recorded, **memory):
    """Params and state as if `init` could move the params to the first draw."""
    state = tx.init(params)
    first = jax.tree.map(lambda x: jnp.asarray(x[0, 0]) * deviation, recorded)
    memory |= {"offset": jax.tree.map(jnp.negative, first)}
    state = state._replace(memory=state.memory._replace(**memory))
    return optax.tree.add(params, first), state


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize(
    "name",
    ["optax", "optax_2samples", "optax_clip", "torch", "torch_2samples", "torch_clip",
     "torch_gradsq"],
)  # fmt: skip
def test_ivon(name, mode, replay, x64):
    meta, golden = load(f"ivon_{name}")
    config = meta["config"]
    recorded = {leaf: golden[f"noise_{leaf}"] for leaf in ("W", "b")}
    replay(ivon, recorded)
    tx = optax_flat.ivon(
        config["lr"], ess=config["ess"], hess_init=config["hess_init"],
        b1=config["beta1"], b2=config["beta2"], weight_decay=config["weight_decay"],
        num_samples=config["samples"], rescale_lr=config["rescale_lr"],
        clip_radius=config["clip_radius"], debias=config.get("debias", True),
        hess_approx=config["hess_approx"],
        mode=mode, key=0,
    )  # fmt: skip
    precision = config["ess"] * (config["hess_init"] + config["weight_decay"])
    params, state = on_first_draw(
        tx, start_of(golden), precision**-0.5, recorded, drawn=jnp.array(True)
    )
    data = [  # all samples of an update on one minibatch
        tuple(jnp.stack([jnp.asarray(x)] * config["samples"]) for x in batch)
        for batch in zip(golden["X"], golden["y"], strict=True)
    ]
    run = train(tx, mode, params, data, state, loss=cross_entropy)
    assert_follows(run, golden)
    for leaf in ("W", "b"):
        memory = run.state.memory
        for ours, theirs in ((memory.hess, "hess"), (memory.mu, "momentum")):
            last = golden[f"{theirs}_{leaf}"][-1]
            np.testing.assert_allclose(ours[leaf], last, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize("name", ["bsam", "bsam_2shards"])
def test_bsam(name, mode, replay, x64):
    meta, golden = load(name)
    config = meta["config"]
    shards = config["batchsplit"]
    recorded = {leaf: golden[f"noise_{leaf}"] for leaf in ("W", "b")}
    replay(bsam, recorded)
    tx = optax_flat.bsam(
        config["lr"], num_data=config["Ndata"], rho=config["rho"],
        b1=config["beta1"], b2=config["beta2"], weight_decay=config["weight_decay"],
        damping=config["damping"], s_init=config["s_init"], num_shards=shards,
        mode=mode, key=0,
    )  # fmt: skip
    deviation = (config["Ndata"] * config["s_init"]) ** -0.5
    params, state = on_first_draw(tx, start_of(golden), deviation, recorded)
    data = [
        tuple(
            jnp.repeat(jnp.reshape(x, (shards, -1, *x.shape[1:])), 2, axis=0)
            for x in batch
        )
        for batch in zip(golden["X"], golden["y"], strict=True)
    ]
    run = train(tx, mode, params, data, state, loss=cross_entropy)
    assert_follows(run, golden)
    for leaf in ("W", "b"):
        last = golden[f"s_{leaf}"][-1]
        ours = run.state.memory.scale[leaf]
        np.testing.assert_allclose(ours, last, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["emcmc", "emcmc_cyclical"])
def test_entropy_mcmc(name, replay, x64):
    meta, golden = load(name)
    config = meta["config"]
    recorded = {
        leaf: np.stack([golden[f"noise_{leaf}"], golden[f"noise_{leaf}_anchor"]], 1)
        for leaf in ("W", "b")
    }
    replay(entropy_mcmc, recorded)
    tx = optax_flat.entropy_mcmc(
        lambda t: jnp.asarray(golden["lr"])[t], config["temperature_over_n"],
        gamma=config["gamma"], weight_decay=config["weight_decay"], key=0,
    )  # fmt: skip
    data = [
        tuple(jnp.asarray(x)[None] for x in batch)
        for batch in zip(golden["X"], golden["y"], strict=True)
    ]
    run = train(tx, "plain", start_of(golden), data, loss=cross_entropy)
    assert_follows(run, golden)
    for leaf in ("W", "b"):
        last = golden[f"{leaf}_anchor"][-1]
        np.testing.assert_allclose(run.state.anchor[leaf], last, rtol=0, atol=1e-10)


def ucla(config, langevin):
    """The authors' arguments in ours."""
    wd, momentum = config["weight_decay"], config["momentum"]
    decay = optax.add_decayed_weights(wd) if wd else optax.identity()
    inner_momentum = optax.trace(momentum, nesterov=config["nesterov"])
    return {
        "outer": optax.chain(
            decay, optax.sgd(config["lr"], momentum or None, config["nesterov"])
        ),
        "inner_transform": optax.chain(decay, inner_momentum) if momentum else decay,
        "num_steps": config["L"],
        "step_size": langevin["lr"],
        "gamma": config["g0"],
        "scoping": 0.0,  # their exponent is never advanced
        "noise": float(np.sqrt(2) * config["eps"]),
        "averaging": 1 - langevin["beta1"],
    }


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize("name", ["plain", "scoping", "nesterov_wd"])
def test_entropy_sgd(name, mode, x64):
    meta, golden = load(f"entropy_sgd_{name}")
    arguments = ucla(meta["config"], meta["langevin"])
    tx = optax_flat.local_entropy(**arguments, mode=mode, key=0)
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    state = tx.init(params)
    if meta["config"]["momentum"]:
        # Their outer buffer starts as the first raw gradient, ours at zero.
        first = {"W": golden["outer_momentum0_W"], "b": golden["outer_momentum0_b"]}
        state = optax.tree.set(state, trace=jax.tree.map(jnp.asarray, first))
    # The first of their 1 + L gradients is thrown away.
    data = [
        (jnp.asarray(X), jnp.asarray(y))
        for X, y in zip(golden["X"][:, 1:], golden["y"][:, 1:], strict=True)
    ]
    run = train(tx, mode, params, data, state, loss=cross_entropy)
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=1e-10)


def cooling(config):
    """The published classes' arguments in ours."""
    if "beta" in config:
        return optax_flat.schedules.exponential_cooling(
            config["momentum"], rate=config["beta"]
        )
    schedule = {
        "coolmomentum_linear": optax_flat.schedules.linear_cooling,
        "coolmomentum_temperature": optax_flat.schedules.temperature_cooling,
    }[config["name"]]
    return schedule(config["rho_0"], config["cool_steps"])


@pytest.mark.parametrize(
    "name", ["exponential", "exponential_wd", "temperature", "linear", "no_cooling"]
)
def test_coolmomentum(name, x64):
    meta, golden = load(f"coolmomentum_{name}")
    config = meta["config"] | {"name": f"coolmomentum_{name}"}
    momentum = cooling(config)
    tx = optax_flat.coolmomentum(
        config["lr"], momentum, weight_decay=config.get("weight_decay", 0.0)
    )
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    data = [
        (jnp.asarray(X)[None], jnp.asarray(y)[None])
        for X, y in zip(golden["X"], golden["y"], strict=True)
    ]
    assert len(data) == 70  # some of them after the end of the cooling
    run = train(tx, "plain", params, data, loss=cross_entropy)
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=1e-10)
    known = ~np.isnan(golden["rho"])  # one class keeps it to itself
    rho = np.array([momentum(t) for t in range(70)])
    np.testing.assert_allclose(rho[known], golden["rho"][known], rtol=0, atol=1e-10)
    if name != "no_cooling":
        assert rho[0] > 0.9
        assert (rho[60:] == 0).all()


def test_ienk_thesis(x64):
    """The thesis' update with its own perturbations, one training sample at a time."""
    meta, golden = load("ienk_thesis")
    rate = meta["config"]["learning_rate"]
    params = {
        name: jnp.asarray(golden[f"{name}_0"]) for name in ("W1", "b1", "W2", "b2")
    }

    @jax.jit
    def step(params, x, y, perturbations):
        def output_fn(p):
            hidden = jax.nn.relu(x @ p["W1"] + p["b1"])
            return jax.nn.softmax(hidden @ p["W2"] + p["b2"])

        def loss_fn(p):  # with the gradient -y / (p + 0.005)
            return -jnp.sum(y * jnp.log(p + 0.005))

        total, _ = optax_flat.perturbed_sum(output_fn, loss_fn, params, perturbations)
        return jax.tree.map(lambda w, t: w - rate * t, params, total)

    for t in range(30):
        drawn = {name: jnp.moveaxis(golden[f"d{name}"][t], -1, 0) for name in params}
        params = step(params, golden["x"][t], golden["y"][t], drawn)
        for name in ("W1", "W2"):
            np.testing.assert_allclose(
                params[name], golden[name][t], rtol=0, atol=1e-10
            )


def base(config):
    """PyTorch's optimizers: weight decay is added to the gradient."""
    decay = optax.add_decayed_weights(config.get("weight_decay", 0.0))
    if config.get("base") == "adam":
        return optax.chain(decay, optax.adam(config["lr"], eps=config["eps"]))
    return optax.chain(decay, optax.sgd(config["lr"], config["momentum"]))


def davda54(config, arrays):
    if not config["adaptive"]:
        return optax_flat.sam(base(config), rho=config["rho"], mode=config["mode"])
    return optax_flat.asam(
        base(config), rho=config["rho"], eta=0.0, weights=True, mode=config["mode"]
    )


def gsam(config, arrays):
    """The learning rate is scheduled too."""
    rate, rho = jnp.asarray(arrays["lr"]), jnp.asarray(arrays["rho"])
    outer = optax.chain(
        optax.add_decayed_weights(config["weight_decay"]),
        optax.sgd(lambda t: rate[t], config["momentum"]),
    )
    rule = optax_flat.ascent.adaptive_unit(0.0, weights=True)
    return optax_flat.sam(
        outer,
        rho=lambda t: rho[t],
        ascent=rule if config["adaptive"] else None,
        descent=optax_flat.descent.surrogate_gap(config["alpha"]),
        mode=config["mode"],
    )


def torch_clip(max_norm):
    """clip_grad_norm_, which adds 1e-6 to the norm."""

    def clip(updates, params):
        factor = jnp.minimum(max_norm / (optax.tree.norm(updates) + 1e-6), 1.0)
        return optax.tree.scale(factor, updates)

    return optax.stateless(clip)


def wsam(config, arrays):
    clip = config["max_norm"]
    return optax_flat.wsam(
        base(config),
        rho=config["rho"],
        gamma=config["gamma"],
        learning_rate=config["lr"] if config["decouple"] else None,
        inner_transform=clip and torch_clip(clip),
        mode=config["mode"],
    )


def gnp(config, arrays):
    """Its L2 penalty is in the loss, its clip behind the interpolation."""
    clip = optax.clip_by_global_norm(config["gradient_clipping"])
    return optax_flat.gradient_norm_penalty(
        optax.chain(clip, base(config)),
        rho=config["r"],
        alpha=config["alpha"],
        inner_transform=optax.add_decayed_weights(config["l2_regularization"]),
        mode=config["mode"],
    )


SAM_FAMILY = {
    "sam_davda54_sgd": davda54,
    "sam_davda54_sgd_wd": davda54,
    "sam_davda54_adam": davda54,
    "sam_davda54_adaptive": davda54,
    "sam_samsung": lambda c, _: optax_flat.sam(
        base(c), rho=c["rho"], mode=c["mode"]
    ),
    "asam_samsung": lambda c, _: optax_flat.asam(
        base(c), rho=c["rho"], eta=c["eta"], mode=c["mode"]
    ),
    "gsam_juntang": gsam,
    "gsam_juntang_wd": gsam,
    "gsam_juntang_adaptive": gsam,
    "gsam_juntang_linear_scheduler": gsam,
    "fsam_nblt": lambda c, _: optax_flat.friendly_sam(
        base(c), rho=c["rho"], sigma=c["sigma"], decay=c["lmbda"], mode=c["mode"]
    ),
    "looksam_leminhbinh_seeded": lambda c, _: optax_flat.looksam(
        base(c), rho=c["rho"], alpha=c["alpha"], period=c["k"], mode=c["mode"]
    ),
    "wsam_decoupled": wsam,
    "wsam_decoupled_wd": wsam,
    "wsam_decoupled_adam": wsam,
    "wsam_coupled": wsam,
    "wsam_coupled_wd": wsam,
    "wsam_coupled_clip": wsam,
    "gnp": gnp,
    "gnp_l2": gnp,
    "gnp_clip": gnp,
}  # fmt: skip
for name in ("asam_samsung", "fsam_nblt", "looksam_leminhbinh_seeded"):
    SAM_FAMILY[f"{name}_wd"] = SAM_FAMILY[name]


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize("name", SAM_FAMILY)
def test_sharpness_aware(name, mode, x64):
    """Two gradients per update, both on the same minibatch."""
    meta, golden = load(name)
    tx = SAM_FAMILY[name](meta["config"] | {"mode": mode}, golden)
    follow(tx, mode, golden, repeats=2, atol=5e-11 if "looksam" in name else 1e-11)


def follow(tx, mode, golden, *, repeats, atol, start=None):
    """All steps of a file, `repeats` gradients each."""
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    data = [
        tuple(jnp.stack([jnp.asarray(x)] * repeats) for x in batch)
        for batch in zip(golden["X"], golden["y"], strict=True)
    ]
    assert len(data) == 40
    run = train(tx, mode, params, data, start, loss=cross_entropy)
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=atol)
    return run


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize("name", ["msam_becker", "msam_becker_wd"])
def test_momentum_sam(name, mode, x64):
    """Weight decay at the perturbed point, on which the params stand."""
    meta, golden = load(name)
    config = meta["config"]
    tx = optax_flat.momentum_sam(
        optax.sgd(config["lr"], config["momentum"]),
        rho=config["rho"],
        inner_transform=optax.add_decayed_weights(config["weight_decay"]),
        mode=mode,
    )
    run = follow(tx, mode, golden, repeats=1, atol=1e-11)
    for leaf in ("W", "b"):
        # Their perturbation at the end of a step is that of the next one's gradient.
        last = golden[f"{leaf}_stored"][-1]
        np.testing.assert_allclose(run.params[leaf], last, rtol=0, atol=1e-11)


def test_momentum_sam_with_adamw(x64):
    """The authors' class decays after the Adam step."""
    meta, golden = load("msam_becker_adamw")
    config = meta["config"]
    rate, shrink = config["lr"], 1 - config["lr"] * config["weight_decay"]

    def decay_behind(updates, state, params):
        return jax.tree.map(lambda u, w: shrink * (w + u) - w, updates, params), state

    decay = optax.GradientTransformation(lambda params: (), decay_behind)
    outer = optax.chain(optax.adam(rate, *config["betas"], config["eps"]), decay)
    tx = optax_flat.momentum_sam(outer, rho=config["rho"])
    follow(tx, "scanned", golden, repeats=1, atol=1e-11)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize("name", ["sampa_lions", "sampa_lions_wd"])
def test_sampa(name, mode, x64):
    """The gradient ahead on the present minibatch, the perturbed one on the last."""
    meta, golden = load(name)
    config = meta["config"]
    tx = optax_flat.sampa(base(config), rho=config["rho"], lam=config["lam"], mode=mode)
    params = {"W": jnp.asarray(golden["W0"]), "b": jnp.asarray(golden["b0"])}
    data = [
        tuple(jnp.stack([golden[key][t], golden[key][max(t - 1, 0)]]) for key in "Xy")
        for t in range(40)
    ]
    run = train(tx, mode, params, data, loss=cross_entropy)
    for leaf in ("W", "b"):
        ours = np.stack([params[leaf] for params in run.path])
        np.testing.assert_allclose(ours, golden[leaf], rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["scanned", "transparent"])
@pytest.mark.parametrize(
    "name", ["lookbehind_sam", "lookbehind_asam", "lookbehind_sam_adaptive"]
)
def test_lookbehind(name, mode, x64):
    """Their 2 k gradients are k + 1 different ones."""
    meta, golden = load(name)
    config = meta["config"]
    rule = None
    if "eta" in config:
        rule = optax_flat.ascent.adaptive_unit(config["eta"])
    tx = optax_flat.lookbehind_sam(
        base(config), rho=config["rho"], alpha=max(config["alpha"], 0.1),
        adaptive=config["alpha"] == -1, num_steps=config["k"], ascent=rule, mode=mode,
    )  # fmt: skip
    follow(tx, mode, golden, repeats=1 + config["k"], atol=1e-11)


@pytest.mark.parametrize("name", ["ssam_fisher", "ssam_dynamic"])
def test_sparse_sam_by_a_rule_of_ones_own(name, x64):
    """A recorded mask of the entries, behind a norm of all of them."""
    meta, golden = load(name)
    masks = {leaf: jnp.asarray(golden[f"mask_{leaf}"]) for leaf in ("W", "b")}

    def update(grads, count, params=None):
        size = optax.tree.norm(grads) + 1e-7
        kept = jax.tree.map(lambda g, m: m[count] * g / size, grads, masks)
        return kept, count + 1

    rule = optax.GradientTransformation(lambda params: jnp.int32(0), update)
    tx = optax_flat.sam(base(meta["config"]), rho=meta["config"]["rho"], ascent=rule)
    follow(tx, "scanned", golden, repeats=2, atol=1e-11)


def test_default_of_gnp_by_a_rule_of_ones_own(x64):
    """It interpolates with g / ||g||, which is not the paper's."""
    meta, golden = load("gnp_normed")
    alpha = meta["config"]["alpha"]

    def combine(state, grads, count):
        factor = (1 - alpha) / optax.tree.norm(grads.first)
        d = jax.tree.map(lambda g, r: factor * g + alpha * r, grads[0], grads[1])
        return optax_flat.descent.Combined(d, None, state)

    rule = optax_flat.descent.Descent(lambda params: (), combine)
    tx = optax_flat.sam(base(meta["config"]), rho=meta["config"]["r"], descent=rule)
    follow(tx, "scanned", golden, repeats=2, atol=1e-11)
