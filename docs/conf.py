"""Sphinx configuration. `make docs` builds with warnings as errors."""

import pathlib
import re
from importlib import metadata

project = "optax_flat"
author = "The optax_flat authors"
copyright = author
release = version = metadata.version("optax_flat")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "optax_flat"

# Docstrings are in Google style; `x` is code in them, as it is in Markdown.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_custom_sections = ["Differs from the paper"]
napoleon_use_ivar = True
napoleon_use_rtype = False

# Markdown as GitHub renders it: $x$, ```math and links to headings.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^][]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def relink(app, path, parent, content):
    """Makes links of included files, which start at the root, start at docs/.

    Pages link to pages, images to images, other files become downloads; a directory
    cannot be linked to and leaves only its text. What does not exist is left as it is,
    for Sphinx to complain about.
    """

    def replace(match):
        image, text, target, anchor = match.groups(default="")
        if not (ROOT / target).exists():
            return match[0]
        if target in PAGES:
            return f"[{text}]({PAGES[target]}{anchor})"
        if target.startswith("docs/") and (image or target.endswith(".md")):
            return f"{image}[{text}]({target.removeprefix('docs/')}{anchor})"
        if image:
            return f"![{text}](../{target})"
        if (ROOT / target).is_dir():
            return text
        return f"[{text}](path:../{target})"

    content[0] = LINK.sub(replace, content[0])


def setup(app):
    app.connect("include-read", relink)
