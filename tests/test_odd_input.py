"""Odd params and odd arguments: an update, or an error of ours."""

import json

import generated
import pytest
from catalogue import METHODS
from hypothesis import HealthCheck, given, settings

from benchmarks.faults import odd_input


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, id=m.name, marks=pytest.mark.slow if m.shares_engine else [])
        for m in METHODS
    ],
)
def test_finite_or_refused(method):
    @settings(
        max_examples=5, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(generated.examples(method, method.modes[-1:]))
    def check(example):
        assert generated.outcome(method, example) in {"finite", "refused"}

    check()


def test_slow_script(monkeypatch, tmp_path, capsys):
    """It counts what became of each example, in a table."""
    options = ["--smoke", "--seeds", "1", "--methods", "adagrad", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["odd_input.py", *map(str, options)])
    odd_input.main()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["examples"] == row["refused"] + row["finite"] == 3
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert f"| adagrad | 3 | {row['refused']} | {row['finite']} | 0 |" in text
