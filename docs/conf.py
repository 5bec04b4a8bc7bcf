"""Sphinx configuration. `make docs` builds with warnings as errors."""

import os
import re
import sys
import zlib
from importlib import metadata
from pathlib import Path

from docutils import nodes

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

# Modules beside this file, which is not a package.
import choices  # noqa: E402
import evidence  # noqa: E402
import notebooks  # noqa: E402
import pictures  # noqa: E402

project = "optax_flat"
author = "The optax_flat authors"
copyright = author
release = version = metadata.version("optax_flat")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # the formulas need no network
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

# The pictures that are drawn: the icon, the one for links, the one of choose.md.
pictures.draw(HERE / "_build" / "pictures")

# Colab opens the notebooks that lie beside the pages.
notebooks.write(HERE / "_build" / "extra" / "notebooks")
html_extra_path = ["_build/extra"]

html_domain_indices = False  # the reference is by task
html_theme = "furo"
html_title = "optax_flat"
html_favicon = "_build/pictures/favicon.svg"
html_static_path = ["_static", "_build/pictures"]
html_css_files = ["site.css"]
templates_path = ["_templates"]
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/versions.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
# DOCS_VERSIONS="latest=/latest/ 0.1=/0.1/" puts a choice of versions into the sidebar.
html_context = {
    "versions": [v.split("=", 1) for v in os.environ.get("DOCS_VERSIONS", "").split()]
}

# Docstrings are in Google style; `x` links to what has that name, ours or another
# project's, and is code if nothing has, as it is in Markdown.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_custom_sections = ["Cost", "Differs from the paper"]
napoleon_use_ivar = True
napoleon_use_rtype = False

# Markdown as GitHub renders it: $x$, ```math and links to headings.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# Other projects move their pages, so each is asked where they are. Without a network an
# empty inventory stands in, and their names are code without links.
NOTHING = "_build/empty.inv"
(HERE / NOTHING).write_bytes(
    b"# Sphinx inventory version 2\n# Project: none\n# Version: 0\n"
    b"# The remainder of this file is compressed using zlib.\n" + zlib.compress(b"")
)
intersphinx_mapping = {
    "flax": ("https://flax.readthedocs.io/en/latest/", (None, NOTHING)),
    "jax": ("https://docs.jax.dev/en/latest/", (None, NOTHING)),
    "optax": ("https://optax.readthedocs.io/en/latest/", (None, NOTHING)),
}
intersphinx_timeout = 5  # seconds

# Tutorials run when the site is built, and again only where they have changed.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / "executed")
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

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


def numbers(app, docname, content):
    """Puts the numbers of results/ into the pages that ask for them."""
    if docname.startswith("results/") or content[0].startswith(evidence.MARK):
        text = content[0].removeprefix(evidence.MARK)
        content[0] = evidence.render(text, table=choices.table(), calls=choices.calls())


def colab(app, docname, content):
    """Puts a link to Colab under the title of a tutorial."""
    name = docname.removeprefix("tutorials/")
    if name in notebooks.names():
        link = f"[Open in Colab]({notebooks.colab(name)})"
        content[0] = re.sub(
            r"^# .*\n", rf"\g<0>\n{link}\n", content[0], count=1, flags=re.M
        )


def code(app, env, node, shown):
    """Shows a name that links to nothing as plain code."""
    if node["reftype"] == "obj":
        return nodes.literal(text=shown.astext())
    return None


def setup(app):
    # Behind intersphinx.
    app.connect("missing-reference", code, priority=900)
    app.connect("include-read", relink)
    app.connect("source-read", numbers)
    app.connect("source-read", colab)
