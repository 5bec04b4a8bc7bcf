"""Makes Jupyter notebooks of the tutorials, which are kept as text.

`make notebooks` runs `python docs/notebooks.py dist/notebooks`: every tutorial is
executed in a fresh kernel and written with its outputs.
"""

import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbformat.v4 import new_code_cell

TUTORIALS = Path(__file__).resolve().parent / "tutorials"
REPOSITORY = "optax-flat/optax_flat"  # on GitHub; the site is its branch gh-pages

# What a notebook has and its page has not: on Colab the package must be installed.
INSTALL = f"""\
try:
    import optax_flat
except ImportError:
    %pip install --quiet "optax_flat[examples] @ git+https://github.com/{REPOSITORY}"
"""


def names() -> list[str]:
    """The tutorials."""
    return sorted(path.stem for path in TUTORIALS.glob("*.md") if path.stem != "index")


def colab(name: str) -> str:
    """The address that opens a tutorial in Colab."""
    path = f"{REPOSITORY}/blob/gh-pages/notebooks/{name}.ipynb"
    return f"https://colab.research.google.com/github/{path}"


def notebook(name: str) -> nbformat.NotebookNode:
    """A tutorial as a notebook of format 4, not executed."""
    made = jupytext.read(TUTORIALS / f"{name}.md")
    made.metadata.pop("jupytext", None)
    made.metadata["accelerator"] = (
        "GPU"  # what Colab starts; a CPU or a TPU does as well
    )
    made.metadata["colab"] = {"gpuType": "T4", "provenance": []}
    for cell in made.cells:
        if cell.cell_type == "markdown":  # pages of the site, which lie elsewhere
            cell.source = cell.source.replace("](../", f"]({page()}")
            cell.source = re.sub(
                r"\]\((\w+)\.md", lambda m: f"]({colab(m[1])}", cell.source
            )
    install = new_code_cell(INSTALL.strip(), metadata={"tags": ["remove-cell"]})
    made.cells.insert(1, install)
    for number, cell in enumerate(made.cells):  # the same file from the same text
        cell.id = f"cell-{number}"
    return made


def page() -> str:
    """Where a notebook's links to other pages lead."""
    return f"https://github.com/{REPOSITORY}/blob/main/docs/"


def write(folder: Path) -> None:
    """Writes all notebooks, not executed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names():
        nbformat.write(notebook(name), folder / f"{name}.ipynb")


def execute(folder: Path) -> None:
    """Executes and writes all notebooks; an error in a cell ends it."""
    from nbclient import NotebookClient

    folder.mkdir(parents=True, exist_ok=True)
    for name in names():
        made, start = notebook(name), time.perf_counter()
        NotebookClient(made, timeout=300, kernel_name="python3").execute()
        for cell in made.cells:
            cell.metadata.pop("execution", None)  # the times of this run
        nbformat.write(made, folder / f"{name}.ipynb")
        print(f"{name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
