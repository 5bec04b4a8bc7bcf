"""Every method and every tutorial, compiled for TPUs and GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest
from catalogue import METHODS, WALK_MODES
from scripts import ROOT

from benchmarks import hlo
from benchmarks.speed import accelerators

TUTORIALS = sorted(
    path for path in (ROOT / "docs" / "tutorials").glob("*.md") if path.stem != "index"
)


def needs(machine):
    """Skips where there is no compiler of a machine."""
    package = accelerators.MACHINES[machine].package
    return pytest.mark.skipif(
        accelerators.version(package) is None,
        reason=f"needs {package}, of the extra `accelerators`",
    )


def start(*command):
    """A process of its own, without the suite's options for quick compilation."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_", "XLA_"))
    }
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_benchmark_compiles_every_method():
    expected = {
        f"{method.name}_transparent" if mode == "transparent" else method.name
        for method in METHODS
        for mode in (method.modes if method.modes == WALK_MODES else [""])
    }
    known = accelerators.catalogue()
    assert {name for name, method in known.items() if method.is_public} == expected
    assert set(accelerators.SOME) <= known.keys()


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(
        accelerators, "version", {"libtpu": "1.0", "jax-cuda13-plugin": None}.get
    )
    assert accelerators.with_compilers(["v5e-8", "h100-8"]) == ["v5e-8"]
    said = capsys.readouterr().err
    assert "h100-8 is left out: jax-cuda13-plugin is not installed" in said
    assert "optax_flat[accelerators]" in said
    with pytest.raises(SystemExit, match="no compiler"):
        accelerators.with_compilers(["h100-8"])


def faults(rows):
    """What programs need or send beyond their gradients; `rows` by method."""
    gradient, found = rows["gradient"], []
    whole = 4 * gradient["parameters"] / 2**20
    for name, row in rows.items():
        gradients, passes = row["gradient_evaluations"], row["forward_passes"]
        budget = gradients + passes  # a forward pass gathers the params as well
        passes = max(1, passes)  # side by side
        if row["largest_mib"] > passes * gradient["largest_mib"]:
            found.append(f"{name}: an array of {row['largest_mib']} MiB")
        if row["temporaries_mib"] - passes * gradient["temporaries_mib"] > whole:
            found.append(f"{name}: temporaries of {row['temporaries_mib']} MiB")
        if row["collectives"] > budget * gradient["collectives"]:
            found.append(f"{name}: {row['collectives']} collectives")
        if row["collectives"] < 0.9 * gradients * gradient["collectives"]:
            found.append(f"{name}: {row['collectives']} are too few collectives")
        # Norms and quantiles are numbers.
        if row["sent_mib"] > 1.001 * budget * gradient["sent_mib"]:
            found.append(f"{name}: sends {row['sent_mib']} MiB")
    return found


def test_faults_are_found():
    gradient = {
        "gradient_evaluations": 1, "forward_passes": 0, "parameters": 2**18,
        "largest_mib": 0.5, "temporaries_mib": 1.0, "collectives": 10, "sent_mib": 3.0,
    }  # fmt: skip
    two = gradient | {"gradient_evaluations": 2, "collectives": 20, "sent_mib": 6.0}
    assert faults({"gradient": gradient, "sam": two}) == []
    for name, value, said in (
        ("largest_mib", 1.0, "an array of 1.0 MiB"),
        ("temporaries_mib", 2.1, "temporaries of 2.1 MiB"),
        ("collectives", 21, "21 collectives"),
        ("collectives", 10, "10 are too few collectives"),
        ("sent_mib", 6.1, "sends 6.1 MiB"),
    ):
        rows = {"gradient": gradient, "sam": two | {name: value}}
        assert faults(rows) == [f"sam: {said}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine",
    [pytest.param(machine, marks=needs(machine)) for machine in ("v5e-8", "h100-8")],
)
def test_every_method_compiles(machine, tmp_path):
    """It sends what its gradients send and norms; nothing is whole on one chip."""
    command = ["-m", "benchmarks.speed.accelerators", "--smoke"]
    start(*command, "--machines", machine, "--out", tmp_path)
    rows = {
        row["method"].rpartition("/")[2]: row
        for row in json.loads((tmp_path / "rows.json").read_text())
    }
    assert rows.keys() == accelerators.catalogue().keys()
    assert faults(rows) == []


@pytest.mark.slow
@needs("v5e-8")
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorial_compiles_for_tpu(page):
    """Whatever it jits; it may be opened on Colab's TPU."""
    said = start("tests/tutorial_for_tpu.py", page)
    assert int(said.splitlines()[-1]) > 0


LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(5)
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %c), direction=LT
}

%start (x: f32[8]) -> f32[64] {
  %x = f32[8] parameter(0)
  ROOT %gather.1 = f32[64]{0:T(128)} all-gather(%x), channel_id=3, dimensions={0}
}

%done (x: f32[8]) -> f32[64] {
  %x = f32[8] parameter(0)
  ROOT %gather.2 = f32[64]{0:T(128)} all-gather(%x), channel_id=3, dimensions={0}
}

%all-reduce-scatter.1 (x: f32[64]) -> f32[8] {
  %x = f32[64] parameter(0)
  %sum = f32[64] all-reduce(%x), channel_id=4, to_apply=%add
  ROOT %part = f32[8] dynamic-slice(%sum, %x), dynamic_slice_sizes={8}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8] get-tuple-element(%p), index=1
  %one = f32[64] fusion(%x), kind=kCustom, calls=%start
  %two = f32[64] fusion(%x), kind=kCustom, calls=%done
  %three = f32[8] fusion(%two), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], f32[8]) tuple(%x, %three)
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8] parameter(0)
  %begin = s32[] constant(2)
  %copied = s32[] copy(%begin)
  %carry = (s32[], f32[8]) tuple(%copied, %x)
  ROOT %loop = (s32[], f32[8]) while(%carry), condition=%condition, body=%body
}
"""


class Program:
    """What `jax.stages.Compiled` says of itself."""

    def __init__(self, text):
        self.as_text = lambda: text


def test_loops_and_fusions_of_tpus_are_read():
    """The loop runs from 2 to 5; its gather is named in both fusions of its halves."""
    found = hlo.costs(Program(LOOP)).collectives
    gather = hlo.Collective("all-gather", 4 * 64)
    scatter = hlo.Collective("reduce-scatter", 4 * 8)
    assert found == {gather: 3, scatter: 3}
    assert [accelerators.sent(c, 8) for c in (gather, scatter)] == [224, 224]
    assert hlo.largest_array(LOOP) == 4 * 64
    unknown = LOOP.replace("direction=LT", "direction=NE")
    with pytest.raises(ValueError, match=r"no number of runs that is known"):
        hlo.costs(Program(unknown))


def test_collectives_of_some_chips_are_refused():
    for groups in ("{{0,1,2,3}}", "[1,4]<=[4]", "mesh['chips'=4] {'chips'}"):
        accelerators.check_groups(f"all-gather(x), replica_groups={groups}, d={{0}}", 4)
    for groups in ("{{0,1},{2,3}}", "[2,2]<=[4]", "mesh['a'=2,'b'=2] {'a'}"):
        with pytest.raises(ValueError, match="some chips only"):
            accelerators.check_groups(f"all-gather(x), replica_groups={groups}, d", 4)
