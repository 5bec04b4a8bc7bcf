"""Odd params and odd arguments: an update, or an error of ours."""

import generated
import pytest
from catalogue import METHODS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_finite_or_refused(method):
    @settings(
        max_examples=12, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(generated.example(method), st.sampled_from(method.modes))
    def check(example, mode):
        assert generated.outcome(method, mode, *example) in {"finite", "refused"}

    check()
