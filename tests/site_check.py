"""The built site in a real browser, without a network. `make site-check` runs it.

It needs docs/_build/html (`make docs`) and Chromium (Debian's package `chromium`).
"""

import functools
import http.server
import re
import shutil
import threading
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import optax_flat

ROOT = Path(__file__).parents[1]
SITE = ROOT / "docs" / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# Sources that viewcode copies are left to it, but their links are followed.
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_modules" not in path.parts
)
NARROW = 390  # CSS pixels of a telephone

pytestmark = pytest.mark.skipif(not PAGES, reason="no built site: run `make docs`")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    """The site, served on this machine."""
    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def tab(address):
    """A browser tab to which nothing but the site can be reached."""
    if BROWSER is None:
        pytest.skip("no browser: `apt-get install chromium`")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="pip install playwright"
    )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        tab = browser.new_page(viewport={"width": NARROW, "height": 800})
        tab.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: route.abort(),
        )
        yield tab
        browser.close()


@pytest.mark.parametrize("page", PAGES)
def test_page(page, tab, address):
    faults = []

    def log(message):
        if message.type == "error":
            faults.append(message.text)

    def broken(error):
        faults.append(str(error))

    tab.on("console", log)
    tab.on("pageerror", broken)
    tab.goto(address + page)
    tab.wait_for_load_state("networkidle")
    # Pictures below the window are loaded as one scrolls; formulas come from MathJax.
    tab.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    tab.wait_for_function("[...document.images].every(i => i.complete)")
    tab.evaluate("window.MathJax?.startup?.promise")
    found = tab.evaluate(
        """() => ({
          width: document.documentElement.scrollWidth,
          pictures: [...document.images]
            .filter(i => !i.naturalWidth || !/ /.test(i.alt)).map(i => i.src),  // words
          formulas: [...document.querySelectorAll('.math')]
            .filter(m => !m.querySelector('mjx-container')
                         || m.querySelector('mjx-merror'))
            .map(m => m.textContent),
        })"""
    )
    tab.remove_listener("console", log)
    tab.remove_listener("pageerror", broken)
    assert faults == []
    assert found == {"width": NARROW, "pictures": [], "formulas": []}


def test_search_finds_sam(tab, address):
    tab.goto(address + "search.html?q=SAM")
    tab.wait_for_selector("#search-results li")
    titles = tab.locator("#search-results li a").all_inner_texts()
    assert "optax_flat.sam" in titles


class Anchors(HTMLParser):
    """What a page links to, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.update(filter(None, (given.get("id"), given.get("name"))))
        for name in ("href", "src"):
            if given.get(name):
                self.links.append(given[name])


@functools.cache
def anchors(path):
    return Anchors(path.read_text(encoding="utf-8"))


def test_links_lead_somewhere():
    broken = []
    for path in sorted(SITE.rglob("*.html")):
        for link in anchors(path).links:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            there = (
                (path.parent / unquote(target.path)).resolve() if target.path else path
            )
            there = there / "index.html" if there.is_dir() else there
            html = there.suffix == ".html" and there.is_file()
            if not there.is_file() or (
                html and unquote(target.fragment) not in anchors(there).anchors
            ):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []


def public_names():
    """Functions and classes, under the names that users import."""
    parts = {
        name: part
        for name, part in vars(optax_flat).items()
        if isinstance(part, ModuleType) and not name.startswith("_")
    }
    for part in (optax_flat, *parts.values()):
        # What a package gathers is its own; what a module imports is not.
        home = "optax_flat" if hasattr(part, "__path__") else part.__name__
        for name, value in vars(part).items():
            ours = callable(value) and value.__module__.startswith(home)
            if ours and not name.startswith("_"):
                yield f"{part.__name__}.{name}"


def test_every_public_name_is_on_one_page():
    pages = Counter()
    for path in (SITE / "api").glob("*.html"):
        pages.update(anchors(path).anchors)
    names = list(public_names())
    assert "optax_flat.sam" in names
    assert {name: pages[name] for name in names if pages[name] != 1} == {}


def test_notebooks_open_elsewhere():
    """Those on the site, and those that `make notebooks` has executed, if it has."""
    nbformat = pytest.importorskip("nbformat")
    site = sorted((SITE / "notebooks").glob("*.ipynb"))
    assert site
    for path in (*site, *(ROOT / "dist" / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
        nbformat.validate(notebook)
        assert notebook.nbformat == 4, path
        assert notebook.metadata.accelerator == "GPU", path
        assert notebook.metadata.colab, path
        for cell in notebook.cells:
            errors = [o for o in cell.get("outputs", ()) if o.output_type == "error"]
            assert not errors, path
            links = re.findall(r"\]\(([^)]*)\)", cell.source)
            if cell.cell_type == "markdown":
                assert all(link.startswith("https://") for link in links), (path, links)
            assert str(ROOT) not in str(cell), path
