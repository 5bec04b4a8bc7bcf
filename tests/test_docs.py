"""Every Python block of the documentation runs.

The blocks of a page run in order, in one namespace. A block after the line
`<!-- not run -->` is left out.
"""

import pathlib
import re

import pytest

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


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages may write files
    namespace = {"__name__": "__main__"}
    for line, code in blocks(PAGES[page].read_text()):
        # Empty lines in front make tracebacks show the line of the page.
        exec(compile("\n" * line + code, str(PAGES[page]), "exec"), namespace)


def test_tables_are_those_of_the_results():
    """What the docs quote is what the scripts wrote, line by line."""
    root = DOCS.parent
    pages = [root / "README.md", DOCS / "benchmarks.md", DOCS / "flat_study.md"]
    quoted = "".join(page.read_text() for page in pages)
    tables = sorted((root / "results").rglob("*.md"))
    assert len(tables) >= 3
    for path in tables:
        assert path.read_text().strip() in quoted, path
        assert (path.parent / "rows.json").is_file()
