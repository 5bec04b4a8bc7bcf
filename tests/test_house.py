"""The import graph, the public names and the extras."""

import ast
import graphlib
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import optax_flat

PACKAGE = Path(optax_flat.__file__).parent
# What each part may import of ours. `training` holds the helpers that run methods.
ALLOWED = {
    "_core": {"_core"},
    "schedules": {"_core"},
    "problems": {"_core"},
    "ascent": {"_core"},
    "descent": {"_core"},
    # Each other's not, see below.
    "_methods": {"_core", "_methods", "ascent", "descent", "schedules"},
    "training": {"_core", "training"},
    "flatness": {"_core", "flatness"},
    "plotting": {"_core", "flatness", "plotting", "problems", "training"},
}
ALLOWED["__init__"] = {*ALLOWED, "__init__"} - {"__init__"}
VARIANTS = {"parle", "sam_variants"}  # methods made of other methods
RUN_TIME = {"jax", "optax", "numpy", "optax_flat"}
EXTRAS = {"PIL", "flax", "matfree", "matplotlib", "tqdm"}


def imports(tree):
    """(module, whether it is imported when the file is)."""
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in top


def part(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def test_imports_run_one_way():
    methods = {path.stem for path in (PACKAGE / "_methods").glob("*.py")}
    for path in PACKAGE.rglob("*.py"):
        for module, at_top in imports(ast.parse(path.read_text())):
            names = module.split(".")
            assert names[:2] != ["optax", "_src"], path
            if names[0] == "optax_flat":
                assert names[1] in ALLOWED[part(path)], f"{path}: {module}"
                if part(path) == "_methods" and path.stem not in VARIANTS:
                    assert names[-1] not in methods, f"{path}: {module}"
            elif names[0] not in sys.stdlib_module_names:
                lazy = not at_top or path.stem == "train_state"
                assert names[0] in RUN_TIME or (names[0] in EXTRAS and lazy), path


def test_no_two_parts_import_each_other():
    """A circle among the parts would leave none to sort first."""
    graph = {name: below - {name} for name, below in ALLOWED.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())[-1] == "__init__"


def test_core_install_imports_without_extras():
    blocked = [
        "flax",
        "tqdm",
        "matplotlib",
        "matfree",
        "orbax",
        "sklearn",
        "chex",
        "equinox",
        "tensorboardX",
    ]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
import optax_flat, optax_flat.training
assert optax_flat.entropy_sgd(0.1, key=0)
assert "TrainState" in dir(optax_flat.training)
try:
    optax_flat.training.TrainState
except ImportError as error:
    assert "'.[flax]' in a checkout" in str(error), error
    assert "'optax_flat[flax]' elsewhere" in str(error), error
else:
    raise AssertionError("TrainState without Flax")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [DeprecationWarning, RuntimeWarning])
def test_warnings_of_our_lines_are_errors(kind):
    """The filter in pyproject.toml knows every module; a test's has no package."""
    root = Path(__file__).parents[1]
    folders = "optax_flat", "benchmarks", "examples", "tests"
    paths = [path for name in folders for path in (root / name).rglob("*.py")]
    for path in paths:
        names = path.relative_to(root).with_suffix("").parts
        module = ".".join(names).removeprefix("tests.")
        with pytest.raises(kind):
            warnings.warn_explicit("", kind, str(path), 1, module)


def test_readme_is_one_screen_with_the_two_commands():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert text.count("\n") <= 90
    assert "\nmake demo  " in text and "\nmake test  " in text
    # Who stops after 40 lines has installed it and seen it work.
    assert "pip install .  " in text and "\n>>> tx = " in "\n".join(
        text.split("\n")[:40]
    )


def test_naming_rules():
    """Settings are keyword-only and annotated; docstrings follow the template."""
    for name, value in vars(optax_flat).items():
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        parameters = list(inspect.signature(value).parameters.values())
        # A learning rate and a momentum may go without their names, nothing after them.
        optional = [p for p in parameters[2:] if p.default is not p.empty]
        assert all(p.kind is p.KEYWORD_ONLY for p in optional), name
        assert all(p.annotation is not p.empty for p in parameters), name
        text = inspect.getdoc(value)
        for section in ("Args:", "Returns:", "Example:", ">>> "):
            assert section in text, f"{name}: {section}"
        for parameter in parameters:
            assert f"\n  {parameter.name}: " in text, (name, parameter.name)
        if hasattr(value, "static_args"):
            for section in ("Cost:", "Raises:", "References:", "Differs from"):
                assert section in text, f"{name}: {section}"


def test_version():
    assert optax_flat.__version__.count(".") >= 2
