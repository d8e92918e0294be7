"""Properties of every partition scheme."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raises import raises_naming

from fedvit.config import PartitionConfig
from fedvit.data.partition import partition
from fedvit.data.records import Record
from fedvit.errors import DataError

SCHEMES = ["iid", "dirichlet", "shard", "natural"]


def records_of(labels: list[int], unit_size: int = 2) -> list[Record]:
    return [Record(f"{i}.png", label, f"unit-{i // unit_size}") for i, label in enumerate(labels)]


def config(scheme: str, clients: int, **rest: object) -> PartitionConfig:
    return PartitionConfig.model_validate({"scheme": scheme, "clients": clients, "min_examples": 1, **rest})


@settings(deadline=None, max_examples=60)
@given(
    scheme=st.sampled_from(SCHEMES),
    labels=st.lists(st.integers(0, 3), min_size=24, max_size=150),
    clients=st.integers(1, 6),
    min_examples=st.integers(1, 2),
    alpha=st.sampled_from([0.01, 0.3, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_parts_are_disjoint_cover_everything_and_are_large_enough(
    scheme: str, labels: list[int], clients: int, min_examples: int, alpha: float, seed: int
) -> None:
    records = records_of(labels)
    settings_ = config(scheme, clients, min_examples=min_examples, alpha=alpha, seed=seed)
    parts = partition(records, 4, settings_)
    assert len(parts) == clients
    assert sorted(i for part in parts for i in part) == list(range(len(records)))
    assert min(map(len, parts)) >= min_examples
    assert parts == partition(records, 4, settings_)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=6, max_size=30), clients=st.integers(1, 6), seed=st.integers(0, 2**31)
)
def test_a_unit_is_never_in_two_clients(sizes: list[int], clients: int, seed: int) -> None:
    records = [Record(f"{u}/{i}", 0, f"unit-{u}") for u, size in enumerate(sizes) for i in range(size)]
    parts = partition(records, 1, config("natural", clients, seed=seed))
    owners = Counter(unit for part in parts for unit in {records[i].unit for i in part})
    assert set(owners.values()) == {1}
    assert len(owners) == len(sizes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_deals_differently(scheme: str) -> None:
    records = records_of([i % 3 for i in range(300)])
    assert partition(records, 3, config(scheme, 5, seed=1)) != partition(records, 3, config(scheme, 5, seed=2))


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = [len(part) for part in partition(records_of([0] * 103), 1, config("iid", 10))]
    assert set(sizes) == {10, 11}


def test_small_alpha_skews_labels_and_large_alpha_does_not() -> None:
    records = records_of([i % 4 for i in range(4000)])

    def largest_share(alpha: float) -> float:
        parts = partition(records, 4, config("dirichlet", 10, alpha=alpha))
        shares = [max(Counter(records[i].label for i in part).values()) / len(part) for part in parts]
        return sum(shares) / len(shares)

    assert largest_share(1000.0) < 0.35
    assert largest_share(0.05) > 0.7


def test_dirichlet_reaches_the_minimum_where_no_draw_would() -> None:
    # Ten clients, a hundred records of one class and alpha near zero: every draw gives all to one client.
    parts = partition(records_of([0] * 100), 1, config("dirichlet", 10, alpha=0.001, min_examples=10))
    assert [len(part) for part in parts] == [10] * 10


def test_a_shard_client_sees_few_labels() -> None:
    records = records_of([i % 10 for i in range(1000)])
    parts = partition(records, 10, config("shard", 10, shards_per_client=2))
    assert max(len({records[i].label for i in part}) for part in parts) <= 4
    assert {len(part) for part in parts} == {100}


class TestFaults:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_too_few_records_names_the_numbers(self, scheme: str) -> None:
        with raises_naming(DataError, "19 training records", "5 clients", "4", "(20)"):
            partition(records_of([0] * 19), 1, config(scheme, 5, min_examples=4))

    def test_natural_without_units_names_the_record(self) -> None:
        records = [Record("a.png", 0, "u"), Record("b.png", 0)]
        with raises_naming(DataError, "b.png") as caught:
            partition(records, 1, config("natural", 2))
        assert "gtsrb" in (caught.value.cure or "")

    def test_fewer_units_than_clients(self) -> None:
        with raises_naming(DataError, "2 units", "3 clients"):
            partition(records_of([0] * 8, unit_size=4), 1, config("natural", 3))

    def test_units_too_uneven_for_the_minimum(self) -> None:
        records = [Record(f"{i}", 0, "big" if i < 18 else f"small-{i}") for i in range(20)]
        with raises_naming(DataError, "3 whole units", "2 clients", "5 records", "2)"):
            partition(records, 1, config("natural", 2, min_examples=5))

    def test_more_shards_than_records(self) -> None:
        with raises_naming(DataError, "10 training records", "20 shards"):
            partition(records_of([0] * 10), 1, config("shard", 10))

    def test_negative_seed(self) -> None:
        with raises_naming(DataError, "seed", "-1"):
            partition(records_of([0] * 10), 1, config("iid", 2, seed=-1))
