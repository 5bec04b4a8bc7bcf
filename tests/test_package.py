"""What a release contains, and what it says of itself."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICTURES = {".png", ".gif", ".jpg", ".svg"}
LIMIT = 300_000  # bytes, of the wheel and of each picture in the sdist
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder with sdist and wheel, built without a network."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return folder


# The tests of an installed wheel run beside no package.
from_a_checkout = pytest.mark.skipif(
    not (ROOT / "optax_flat").is_dir(), reason="there is nothing to build"
)


@from_a_checkout
def test_wheel_is_the_package_alone_and_small(dist):
    (path,) = dist.glob("*.whl")
    assert path.stat().st_size < LIMIT
    names = set(zipfile.ZipFile(path).namelist())
    folders = {name.split("/")[0] for name in names}
    info = f"{PROJECT['name']}-{PROJECT['version']}.dist-info"
    assert folders == {"optax_flat", info}
    source = {
        str(path.relative_to(ROOT)) for path in (ROOT / "optax_flat").rglob("*.py")
    }
    assert names >= source | {"optax_flat/py.typed"}


@from_a_checkout
def test_sdist_has_what_its_tests_need_and_no_large_picture(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        sizes = {
            member.name.partition("/")[2]: member.size
            for member in archive.getmembers()
        }
    large = [n for n, s in sizes.items() if Path(n).suffix in PICTURES and s > LIMIT]
    assert not large, "leave them out by `exclude` in pyproject.toml"
    files = {"Makefile", "CITATION.cff", "SECURITY.md", "tests/golden/README.md"}
    assert sizes.keys() >= files


def test_citation_is_of_this_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\nlicense: {PROJECT['license']}\n" in citation
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == PROJECT["version"]


def test_every_python_of_the_classifiers_is_tested():
    """In the matrix of the hosted tests, the lowest with the lowest of all versions."""
    said = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d", text)
    ]
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    tried = re.findall(r'- python: "(3\.\d+)"\n +versions: (\S+)', workflow)
    assert [python for python, _ in tried] == said
    assert PROJECT["requires-python"] == f">={said[0]}"
    assert tried[0] == (said[0], "lowest-direct")
    assert all(versions == "highest" for _, versions in tried[1:])


@from_a_checkout
def test_pythons_that_are_there(tmp_path):
    """A name that stands for no Python, as pyenv's may, is not one."""
    this, other = sys.version_info.minor, 11 + (sys.version_info.minor == 11)
    for minor, line in {this: f'exec {sys.executable} "$@"', other: "exit 127"}.items():
        path = tmp_path / f"python3.{minor}"
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)
    there = {"PATH": f"{tmp_path}:{os.defpath}", "PYENV_ROOT": str(tmp_path)}
    script = ROOT / ".ci" / "pythons"
    found = subprocess.run([script], env=there, capture_output=True, text=True, check=0)
    lines = found.stdout.splitlines()
    assert f"3.{this} {tmp_path}/python3.{this}" in lines
    assert not any(line.startswith(f"3.{other} {tmp_path}") for line in lines)
