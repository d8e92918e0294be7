"""Who takes part."""

from __future__ import annotations

import pytest

from fedvit.cohort.select import draw_cohort, eligible
from fedvit.config import CohortConfig
from fedvit.types import Client, ClientKind, Cohort, utc_now

SECRET = bytes(32)


def client(name: str, **changes: object) -> Client:
    return Client(name, ClientKind.VIRTUAL, **{"num_examples": 10, **changes})  # type: ignore[arg-type]


def test_only_active_clients_with_data_are_eligible() -> None:
    kept_out = client("e", quarantined_at=utc_now())
    clients = [client("c"), client("b", active=False), client("a"), client("d", num_examples=0), kept_out]
    assert eligible(clients, CohortConfig()) == ("a", "c")


def test_validated_only_leaves_the_others_out() -> None:
    clients = [client("a"), client("b", validated=False)]
    assert eligible(clients, CohortConfig(client_selection="validated_only")) == ("a",)
    assert eligible(clients, CohortConfig()) == ("a", "b")


def test_a_draw_is_repeatable_and_changes_with_round_and_secret() -> None:
    config = CohortConfig(selection="uniform", size=5)
    ids = [f"v{i:02d}" for i in range(30)]

    def draw(round_index: int, secret: bytes = SECRET) -> Cohort:
        return draw_cohort(config, ids, run_id="run-0001", round_index=round_index, secret=secret)

    assert draw(1) == draw(1)
    assert len(draw(1).client_ids) == 5
    assert draw(1).client_ids != draw(2).client_ids
    assert draw(1).client_ids != draw(1, bytes([1] * 32)).client_ids


def test_every_client_is_drawn_about_equally_often() -> None:
    config = CohortConfig(selection="uniform", size=5)
    ids = [f"v{i}" for i in range(20)]
    draws = [draw_cohort(config, ids, run_id="r", round_index=i, secret=SECRET) for i in range(1000)]
    counts = [sum(name in cohort.client_ids for cohort in draws) for name in ids]
    # Expected 250, standard deviation 13.7.
    assert 180 < min(counts) <= max(counts) < 320


def test_a_cohort_larger_than_the_population_is_everybody() -> None:
    config = CohortConfig(selection="uniform", size=50)
    assert draw_cohort(config, ["b", "a"], run_id="r", round_index=1, secret=SECRET).client_ids == ("a", "b")


def test_a_client_cannot_be_in_a_cohort_twice() -> None:
    with pytest.raises(ValueError, match="appears twice"):
        Cohort(1, ("a", "b", "a"))
