"""Reports: the numbers of the single functions, what they cost, text and JSON."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import problem
import pytest

from optax_flat import flatness
from optax_flat.flatness import Report, report
from optax_flat.flatness._measures import LINE_POINTS, MEASURES, measure_key

DATA = problem.batches(1, 4)[0].reshape(-1, problem.FEATURES)  # 20 examples
PARAMS = {"w": jnp.linspace(-0.9, 1.4, 6).reshape(problem.FEATURES, 2)}
KEY = jax.random.key(7)
SETTINGS = {
    "k": 2, "num_matvecs": 5, "num_samples": 3, "num_draws": 2, "rho": 0.2, "m": 5,
    "ascent_steps": 3, "sigma": 0.1, "gamma": 2.0, "temperature": 0.1,
    "entropy_steps": 4, "filter_axis": 0, "batch_size": 2,
}  # fmt: skip
SPENT = []


def model(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["w"]).sum(-1) - batch[:, 0] - 0.4) ** 2)


def loss(params, batch):
    """Notes the share of the examples in every evaluation of a compiled program."""
    value = model(params, batch)
    if isinstance(value, jax.core.Tracer):  # not the check that it is a function
        share = len(batch) / len(DATA)
        jax.debug.callback(lambda value: SPENT.append(share), value)
    return value


measured = functools.partial(report, loss, PARAMS, DATA, key=KEY, **SETTINGS)


@pytest.fixture(scope="module")
def full():
    return measured()


def test_values_are_those_of_the_functions(full):
    def same(name, fn, *args, with_key=True, **settings):
        if with_key:
            settings["key"] = measure_key(KEY, name)
        found = fn(loss, PARAMS, DATA, *args, **settings)
        for got, expected in zip(getattr(full, name), found, strict=True):
            if got is not None:  # eigenvectors
                np.testing.assert_allclose(got, expected, rtol=1e-6, err_msg=name)
        return found

    top = same("top_eigenvalues", flatness.top_eigenvalues, k=2, num_matvecs=5)
    same(
        "smallest_eigenvalue", flatness.top_eigenvalues, which="smallest", num_matvecs=5
    )
    same("trace", flatness.trace, num_samples=3)
    same("frobenius_norm", flatness.frobenius_norm, num_samples=3)
    same("spectral_density", flatness.spectral_density, num_matvecs=5, num_samples=2)
    same("sharpness_one_step", flatness.sharpness, rho=0.2, with_key=False)
    same("sharpness_worst", flatness.sharpness, rho=0.2, num_steps=3)
    same("sharpness_adaptive", flatness.sharpness, rho=0.5, num_steps=3, adaptive=True)
    same(
        "sharpness_average", flatness.sharpness, rho=0.1 * 6**0.5, kind="average",
        num_samples=3, batch_size=2,
    )  # fmt: skip
    same("m_sharpness", flatness.sharpness, rho=0.2, m=5, batch_size=2, with_key=False)
    same("local_energy", flatness.local_energy, sigma=0.1, num_samples=3, batch_size=2)
    same(
        "local_entropy", flatness.local_entropy, gamma=2.0, temperature=0.1,
        num_steps=4, num_chains=3, batch_size=2,
    )  # fmt: skip
    first = jax.tree.map(lambda v: v[0], top.vectors)
    same(
        "eigenvector_line", flatness.line, direction=first, batch_size=2, with_key=False
    )
    same("random_line", flatness.line, batch_size=2, filter_axis=0)
    value, gradient = jax.value_and_grad(model)(PARAMS, DATA)
    expected = value, jnp.linalg.norm(gradient["w"]), jnp.linalg.norm(PARAMS["w"])
    found = full.loss, full.gradient_norm, full.parameter_norm
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert full.num_parameters == 6
    assert list(full.costs) == list(MEASURES)


@pytest.mark.parametrize("name", MEASURES)
def test_costs_are_the_passes_made(full, name):
    """And a measure is the same without the others."""
    SPENT.clear()
    alone = measured(measures=(name,))
    jax.effects_barrier()
    cost = alone.costs[name]
    counts = cost.hvps + cost.gradients + cost.forward_passes
    assert counts == pytest.approx(sum(SPENT) - 1)  # one is the check of the loss
    shared = {"gradient_norm": "loss", "eigenvector_line": "top_eigenvalues"}.get(name)
    before = full.costs[shared].hvps + full.costs[shared].gradients if shared else 0
    together = full.costs[name]
    assert counts == before + sum(together[:3])
    jax.tree.map(
        np.testing.assert_array_equal, getattr(alone, name), getattr(full, name)
    )
    others = [getattr(alone, other) for other in MEASURES if other != name]
    assert others == [None] * len(others)


def test_kinds_of_passes(full):
    def counts(name):
        return tuple(full.costs[name][:3])

    assert counts("top_eigenvalues") == (2 * 6, 0, 0)
    assert counts("trace") == (3, 0, 0)
    assert counts("sharpness_one_step") == (0, 1, 1)
    assert counts("sharpness_worst") == (0, 3, 2)
    assert counts("local_entropy") == (0, 2 * 3 * 5, 6)  # 3 chains, 2 pilots
    assert counts("local_energy") == (0, 0, 7)
    assert counts("random_line") == (0, 0, LINE_POINTS)
    assert full.costs["top_eigenvalues"].gradient_equivalents == 24
    assert all(cost.seconds > 0 for cost in full.costs.values())


def test_table_has_every_measure(full):
    header, *rows = str(full).splitlines()
    titles = "measure value std. error residual gradients seconds"
    assert header.split() == titles.split()
    assert len({len(row) for row in rows}) == 1
    start, stop = header.index("std. error"), header.index("residual")
    with_error = [row[:20].strip() for row in rows if row[start:stop].strip()]
    kinds = {n: m.kind for n, m in MEASURES.items()}
    estimates = [n for n, kind in kinds.items() if kind is flatness.Estimate]
    assert with_error == [n.replace("_", " ") for n in estimates]
    shown = {row[:20].strip(): row[20:].split() for row in rows}
    assert list(shown) == [
        number.replace("_", " ")
        for name in MEASURES
        for number in ([name, "top_eigenvalues_2"] if name[:3] == "top" else [name])
    ]
    value, error, gradients, _ = shown["trace"]
    assert float(value) == pytest.approx(full.trace.value, rel=1e-3)
    assert float(error) == pytest.approx(full.trace.standard_error, rel=0.1)
    assert gradients == "6"
    assert len(shown["loss"]) == 3  # no error
    assert len(shown["top eigenvalues 2"]) == 2  # the price is in the row before
    low, high = map(float, shown["random line"][0].split(".."))
    assert low == pytest.approx(full.random_line.losses.min(), rel=0.1)
    assert high == pytest.approx(full.random_line.losses.max(), rel=0.1)


def test_numbers_have_errors(full):
    numbers = full.numbers()
    assert numbers["trace"] == full.trace
    second = numbers["top_eigenvalues_2"]
    assert second.value == full.top_eigenvalues.values[1]
    assert math.isnan(second.standard_error)  # a residual is none
    assert "random_line" not in numbers and math.isnan(numbers["loss"].standard_error)


def test_json_there_and_back(full, tmp_path):
    path = tmp_path / "new" / "report.json"
    text = full.to_json(path)
    content = json.loads(text)
    assert content["measures"]["trace"]["value"] == full.trace.value
    assert content["settings"]["m"] == 5
    for source in (text, path, str(path)):
        again = Report.from_json(source)
        assert str(again) == str(full) and again.to_json() == text
        np.testing.assert_array_equal(again.random_line.losses, full.random_line.losses)
    in_order = Report.from_json(json.dumps(content, sort_keys=True))
    for name in MEASURES:
        jax.tree.map(
            np.testing.assert_array_equal, getattr(in_order, name), getattr(full, name)
        )
    with pytest.raises(ValueError, match="must be the JSON text of a Report"):
        Report.from_json('{"measures": 1}')


def test_numbers_that_are_none():
    """A diverged run has a report, table and JSON as well."""
    nowhere = jax.tree.map(lambda x: jnp.nan * x, PARAMS)
    names = ("loss", "trace", "random_line", "top_eigenvalues")
    found = report(loss, nowhere, DATA, key=KEY, **SETTINGS | {"measures": names})
    text = found.to_json()
    json.loads(text, parse_constant=pytest.fail)
    again = Report.from_json(text)
    assert math.isnan(again.loss) and np.isnan(again.random_line.losses).all()
    assert "nan" in str(again)


def test_many_batches(full):
    parts = [DATA[:5], DATA[5:]]
    names = ("gradient_norm", "random_line")
    many = report(loss, PARAMS, parts, key=KEY, **SETTINGS | {"measures": names})
    np.testing.assert_allclose(many.gradient_norm, full.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(*(r.random_line.losses for r in (many, full)), rtol=1e-5)
    assert many.costs["random_line"][:3] == full.costs["random_line"][:3]


def test_progress_names_the_measures(capsys):
    measured(measures=("loss", "parameter_norm"), progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "parameter norm" in shown


def test_eigenvalues_of_few_parameters():
    found = report(
        lambda x, batch: batch * x**2 / 2, jnp.array(1.0), jnp.array(3.0), key=0,
        measures=("top_eigenvalues", "smallest_eigenvalue"),
    )  # fmt: skip
    # A vector over its norm is 1 to eps, and stands in the value twice.
    rtol = 4 * jnp.finfo(jnp.float32).eps
    np.testing.assert_allclose(found.top_eigenvalues.values, [3.0], rtol)
    np.testing.assert_allclose(found.smallest_eigenvalue.values, [3.0], rtol)
    assert found.costs["top_eigenvalues"].hvps == 2


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"measures": ("trace", "tarce")}, ValueError, "out of loss, .*, random_line"),
        ({"measures": "trace"}, ValueError, "must be names out of .*got 'trace'"),
        ({"measures": ()}, ValueError, "or None for all, got"),
        ({"measures": ("m_sharpness",), "m": None}, ValueError, "`m` must be given"),
        ({"m": 3}, ValueError, "`m` must divide .* got m=3"),
        ({"filter_axis": 1}, ValueError, "`filter_axis` must be -1"),
        ({"gamma": 0.0}, ValueError, r"`gamma` must lie in \(0, inf\)"),
        ({"num_samples": 1}, ValueError, "`num_samples` must be an int >= 2"),
        ({"k": 1.5}, TypeError, "`k` must be a Python int"),
    ],
)
def test_errors_come_before_the_work(settings, error, words):
    def never(params, batch):
        raise AssertionError

    with pytest.raises(error, match=words):
        report(never, PARAMS, DATA, key=0, **settings)


def test_one_shot_iterators_are_refused():
    with pytest.raises(TypeError, match="gone through several times"):
        report(loss, PARAMS, iter([DATA]), key=0)


def test_no_two_measures_share_a_key():
    keys = [measure_key(KEY, name) for name in MEASURES]
    data = {tuple(jax.random.key_data(key).tolist()) for key in (KEY, *keys)}
    assert len(data) == len(MEASURES) + 1
