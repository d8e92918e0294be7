"""Selection of a cohort, and which clients are eligible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from fedvit.cohort.selection import ListedPool, draw_cohort
from fedvit.config import CohortConfig
from fedvit.store.store import Store
from fedvit.types import Client, ClientKind, Cohort, utc_now

SECRET = bytes(32)


def test_only_active_clients_with_data_are_eligible(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.clients.register(
            [client("c"), client("b", active=False), client("a"), client("d", num_examples=0), client("e")]
        )
        store.clients.quarantine(["e"], "an incident", utc_now())
        assert (
            store.clients.population(),
            store.clients.count_eligible(),
            store.clients.count_eligible(at_most=1),
        ) == (5, 2, 1)
        assert store.clients.eligible_at(range(5)) == {0: "c", 2: "a"}
        assert store.clients.eligible_at([1, 2, 99]) == {2: "a"}


def test_validated_only_leaves_the_others_out(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.clients.register([client("a"), client("b", validated=False)])
        assert store.clients.eligible_at(range(2), validated_only=True) == {0: "a"}
        assert store.clients.eligible_at(range(2)) == {0: "a", 1: "b"}
        assert (store.clients.count_eligible(validated_only=True), store.clients.count_units()) == (
            1,
            (2, 20),
        )


class CountingPool(ListedPool):
    """Remembers how many clients were looked up."""

    looked_up = 0

    def eligible_at(self, positions: Sequence[int]) -> Mapping[int, str]:
        """A third of them may be drawn."""
        self.looked_up += len(positions)
        return {at: name for at, name in super().eligible_at(positions).items() if int(name[1:]) % 3 == 0}


@pytest.mark.parametrize(
    ("config", "most", "drawn"),
    [
        (CohortConfig(selection="uniform", size=20), 90, 20),
        (CohortConfig(selection="poisson", sampling_prob=0.01), 180, None),
    ],
)
def test_of_very_many_clients_few_are_looked_up(config: CohortConfig, most: int, drawn: int | None) -> None:
    pool = CountingPool([f"v{i:05d}" for i in range(10_000)])
    cohort = draw_cohort(config, pool, run_id="r", round_index=1, secret=SECRET)
    assert 0 < pool.looked_up < most
    assert all(int(name[1:]) % 3 == 0 for name in cohort.client_ids)
    assert drawn is None or len(cohort.client_ids) == drawn


def test_where_hardly_anybody_may_be_drawn_all_are_looked_up() -> None:
    pool = CountingPool([f"v{i:05d}" for i in range(90)])
    config = CohortConfig(selection="uniform", size=40)
    cohort = draw_cohort(config, pool, run_id="r", round_index=1, secret=SECRET)
    assert (len(cohort.client_ids), pool.looked_up) == (30, 90)


def client(name: str, **changes: object) -> Client:
    return Client(name, ClientKind.VIRTUAL, **{"num_examples": 10, **changes})  # type: ignore[arg-type]


def test_of_remote_clients_only_those_that_train_and_were_heard_are_eligible(tmp_path: Path) -> None:
    able = {"training": {"encodings": ["int8"]}}
    now = utc_now()
    late = now - timedelta(seconds=1)
    with Store.open(tmp_path) as store:
        store.clients.register(
            [
                Client("heard", ClientKind.REMOTE, 10, capabilities=able),
                Client("silent", ClientKind.REMOTE, 10, capabilities=able),
                Client("never", ClientKind.SILO, 10, capabilities=able),
                Client("edge", ClientKind.REMOTE, 10, capabilities={"training": True}),
                Client("plain", ClientKind.REMOTE, 10),
                client("virtual"),
            ]
        )
        store.clients.set_last_seen({"heard": now, "silent": late, "edge": now, "plain": now})
        results = [set(store.clients.eligible_at(range(6), heard_since=since).values()) for since in (None, now, late)]
        assert results == [{"virtual"}, {"heard", "virtual"}, {"heard", "silent", "virtual"}]
        assert [store.clients.count_eligible(heard_since=since) for since in (None, now, late)] == [1, 2, 3]


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
    with pytest.raises(ValueError):
        Cohort(1, ("a", "b", "a"))
