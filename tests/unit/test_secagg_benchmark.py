"""The benchmark of secure aggregation, with a few clients and values."""

from __future__ import annotations

import pytest

from tests.benchmarks import secagg


@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
def test_a_small_case_is_measured(dropout_rate: float) -> None:
    """The sum is checked; its traffic is that of a smaller ring."""
    plan = secagg.plan_of(10, 20_000)
    secure, plain = secagg.secure(secagg.parameters_of(10, plan), plan, dropout_rate), secagg.plain(10, 20_000)
    assert 0 < secure["MB a client"] < 1.2 * plain["MB a client"]
    assert secure["client s"] > 0
    assert secure["server s"] > 0
