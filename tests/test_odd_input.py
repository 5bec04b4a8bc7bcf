"""Odd params and odd arguments: an update, or an error of ours."""

import generated
import pytest
from catalogue import METHODS
from hypothesis import HealthCheck, given, settings


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_finite_or_refused(method):
    @settings(
        max_examples=8, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(generated.examples(method, method.modes[-1:]))
    def check(example):
        assert generated.outcome(method, example) in {"finite", "refused"}

    check()
