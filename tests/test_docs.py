"""Every Python block of the documentation runs, and its numbers are those of results/.

The blocks of a page run in order, in one namespace. A block after the line
`<!-- not run -->` is left out.
"""

import functools
import json
import os
import pathlib
import re

import flax.nnx
import jax
import matplotlib.pyplot as plt
import optax
import pytest

import optax_flat

DOCS = pathlib.Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^(<!-- not run -->\n+)?```python\n(.*?)^```$", re.M | re.S)


def blocks(text):
    """Pairs of line number and code."""
    return [
        (text.count("\n", 0, match.start(2)), match[2])
        for match in BLOCK.finditer(text)
        if not match[1]
    ]


PAGES = {
    str(path.relative_to(DOCS)): path
    for path in sorted(DOCS.rglob("*.md"))
    if "_build" not in path.parts and blocks(path.read_text())
}


def test_blocks_are_found():
    text = "```python\nx = 1\n```\n<!-- not run -->\n```python\n1 / 0\n```\n"
    text += "```python\ny = 2\n```\n"
    assert blocks(text) == [(1, "x = 1\n"), (8, "y = 2\n")]
    assert "composing.md" in PAGES


LONG = ("methods/ensemble_kalman.md",)  # ten seconds of training


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
    ],
)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages may write files
    namespace = {"__name__": "__main__"}
    for line, code in blocks(PAGES[page].read_text()):
        # Empty lines in front make tracebacks show the line of the page.
        exec(compile("\n" * line + code, str(PAGES[page]), "exec"), namespace)


NAME = re.compile(r"(?<!`)`((?:flax|jax|nnx|optax|optax_flat)(?:\.\w+)+)\b")


def test_names_exist():
    """What the pages and docstrings call by its full name, ours and others'."""
    modules = {"flax": flax, "jax": jax, "nnx": flax.nnx, "optax": optax}
    modules["optax_flat"] = optax_flat
    root, missing, seen = DOCS.parent, [], 0
    for path in (
        *root.glob("*.md"),
        *DOCS.rglob("*.md"),
        *root.rglob("optax_flat/*.py"),
    ):
        if "_build" in path.parts or path.name == "CHANGELOG.md":
            continue
        for name in NAME.findall(path.read_text()):
            first, *rest = name.split(".")
            seen += 1
            try:
                functools.reduce(getattr, rest, modules[first])
            except AttributeError:
                missing.append(f"{path.name}: {name}")
    assert seen > 100
    assert missing == []


@pytest.fixture(scope="module")
def modules():
    """What the site is built with: evidence.py, choices.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        import choices
        import evidence

        yield evidence, choices


def test_every_benchmark_has_a_page(modules):
    """With its table; and each number of a page is found in the rows."""
    evidence, choices = modules
    for rows in sorted((DOCS.parent / "results").glob("*/rows.json")):
        page = DOCS / "results" / f"{rows.parent.name}.md"
        text = evidence.render(page.read_text())
        assert (rows.parent / "table.md").read_text().strip() in text, page
        assert f"\n{page.stem}\n" in (page.parent / "index.md").read_text()
    text = (DOCS / "choose.md").read_text()
    names = {"table": choices.table(), "calls": choices.calls()}
    assert "{{" not in evidence.render(text, **names)


def test_commands_of_pages_exist():
    """Those that a page says itself; others are made of the script's place."""
    texts = [path.read_text() for path in DOCS.rglob("*.md")]
    texts.append((DOCS.parent / "results" / "summary" / "rows.json").read_text())
    modules = {m for t in texts for m in re.findall(r"python -m (benchmarks\S*\w)", t)}
    assert modules
    for module in modules:
        assert (DOCS.parent / f"{module.replace('.', '/')}.py").is_file(), module


def test_evidence(modules, tmp_path, monkeypatch):
    """Means, ratios and paired gains of rows that are written here."""
    evidence, _ = modules
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    rows = [
        {"method": f"{data}/{name}", "seed": seed, "x": base + gain * (seed + 1)}
        for data, base in (("a", 1.0), ("b", 3.0))
        for name, gain in (("sgd", 0.0), ("sam", 0.5))
        for seed in (0, 1)
    ]
    (tmp_path / "results" / "made").mkdir(parents=True)
    (tmp_path / "results" / "made" / "rows.json").write_text(json.dumps(rows))
    found = evidence.Results("made")
    assert found.value("a/sgd", "x") == "1"
    assert found.by_seed("*/sam", "x") == {0: 2.5, 1: 3.0}
    assert found.more("a/sam", "x") == "75 %"
    assert found.ratio("b/sgd", "a/sgd", "x") == "3"
    # The gains 0.5 and 1: mean 0.75, standard error 0.25, t of one degree 12.706.
    assert found.ahead("*/sam", "*/sgd", "x", form=".3f") == "0.750\xa0±\xa03.177"
    with pytest.raises(KeyError, match="no y of a/sgd"):
        found.value("a/sgd", "y")


def test_readme_has_the_table_of_the_situations(modules):
    _, choices = modules
    table = choices.table(readme=True)
    assert table in (DOCS.parent / "README.md").read_text(), table


def test_situations_are_calls(modules):
    """What choose.md says to take is an optimizer."""
    names = {"optax": optax, "optax_flat": optax_flat, "outer": optax.sgd(0.1)}
    for situation in modules[1].SITUATIONS:
        tx = eval(situation.take, dict(names))
        assert isinstance(tx, optax.GradientTransformation), situation.take
        assert (DOCS / situation.page).is_file()


QUICK = ("quick_start", "own_method")  # the others take some ten seconds each
TUTORIALS = [
    pytest.param(
        page, id=page.stem, marks=() if page.stem in QUICK else pytest.mark.slow
    )
    for page in sorted((DOCS / "tutorials").glob("*.md"))
    if page.stem != "index"
]
CELL = re.compile(r"^```{code-cell} python\n((?::[^\n]*\n)*)(.*?)^```$", re.M | re.S)


def small(code):
    """The sizes of a tutorial, a twentieth."""
    return re.sub(r"= (\d+)", lambda m: f"= {max(2, int(m[1]) // 20)}", code)


@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorial_runs(page, tmp_path, monkeypatch):
    """At a twentieth of its size; `make docs` runs it whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    text, namespace, sizes = page.read_text(), {"__name__": "__main__"}, 0
    cells = list(CELL.finditer(text))
    assert len(cells) == text.count("{code-cell}")
    for match in cells:
        options, code = match.groups()
        if "parameters" in options:
            code, sizes = small(code), sizes + 1
        code = re.sub(r"^%.*$", "", code, flags=re.M)  # IPython's
        line = text.count("\n", 0, match.start(2))
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    plt.close("all")
    assert sizes == 1
