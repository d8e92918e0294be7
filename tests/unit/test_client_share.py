"""The limit on one client's share of an average: a weight that follows from the cohort, and a least divisor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvit.aggregation.client_share import NO_LIMIT, ShareLimit
from fedvit.aggregation.rule import mean
from fedvit.types import ClientOutcome
from fedvit.updates import ClientUpdate

SIZES = st.lists(st.integers(1, 100_000), min_size=1, max_size=60)


@given(sizes=SIZES, share=st.floats(0.01, 1.0), part=st.floats(0.01, 1.0))
def test_no_client_weighs_more_than_its_share_of_average_clients(sizes: list[int], share: float, part: float) -> None:
    updates = max(1, round(part * len(sizes)))
    limit = ShareLimit.of(share, sizes, updates)
    most = max(share, 2 / updates)
    if most >= 1:
        assert limit == NO_LIMIT
        return
    assert limit.max_share == (share if most == share else 1.0)
    weights = [limit.weight_of(size) for size in sizes]
    expected = updates / len(sizes) * sum(weights)
    # A weight of 1 cannot be lowered: weights are whole numbers.
    assert max(weights) <= max(1.0, most * expected * (1 + 1e-9))
    if limit.max_weight is not None:
        larger = [min(size, limit.max_weight + 1) for size in sizes]
        assert limit.max_weight + 1 > most * updates / len(sizes) * sum(larger) * (1 - 1e-9)


def test_a_fleet_of_equals_and_a_very_small_cohort_have_no_limit() -> None:
    assert ShareLimit.of(0.1, [40] * 30, 30).max_weight is None
    assert ShareLimit.of(0.1, [1, 1000], 2) == NO_LIMIT
    assert ShareLimit.of(0.1, [], 0) == NO_LIMIT
    # In a small one a client has two equal shares at most, and no more where others do not answer.
    assert ShareLimit.of(0.1, [100, 10, 10, 10], 4) == ShareLimit(1.0, 30)


def test_a_count_inflated_ten_times_gains_little() -> None:
    sizes = [40] * 29
    honest, inflated = 40 / (29 * 40 + 40), ShareLimit.of(0.1, [*sizes, 4000], 30)
    weight = inflated.weight_of(4000)
    assert weight / (sum(sizes) + weight) <= 0.1 < 4000 / (sum(sizes) + 4000)
    assert honest < 0.1


@pytest.mark.parametrize(("answered", "share"), [(30, 1 / 30), (5, 0.1), (1, 0.1)])
def test_a_round_in_which_few_answered_takes_a_smaller_step(answered: int, share: float) -> None:
    limit = ShareLimit.of(0.1, [40] * 30, 30)
    base = {"w": np.zeros(1, np.float32)}
    updates = [ClientUpdate(1, ClientOutcome(f"c{i}", 40), {"w": np.array([40.0])}, 40.0) for i in range(answered)]
    step = mean(base, updates, limit.least_divisor([40] * answered))["w"][0]
    assert math.isclose(step, answered * share)
    assert mean(base, updates)["w"][0] == 1.0
