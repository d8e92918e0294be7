"""Which proxy trains whom: where a client's data is warm, as long as all have as much to do."""

from __future__ import annotations

import pytest

from actors import client_affinity
from actors.client_affinity import ClientAffinity

V = [f"v{i:02d}" for i in range(12)]


def test_clients_are_dealt_evenly_and_stay_where_they_are_warm() -> None:
    dealt = ClientAffinity(2)
    first = dealt.assign(V[:10], {})
    assert [len(group) for group in first.values()] == [5, 5]
    assert dealt.assign(V[:10], {}) == first


def test_a_cohort_that_lives_on_one_proxy_is_shared_out_all_the_same() -> None:
    dealt = ClientAffinity(2)
    crowded = dealt.assign(V[:12], {})[0]
    groups = dealt.assign(crowded, {})
    assert sorted(len(group) for group in groups.values()) == [3, 3]
    assert set(groups[0]) < set(crowded)
    # Who moved is warm there now.
    assert dealt.assign(crowded, {}) == groups


def test_a_proxy_that_still_has_work_is_given_so_much_less() -> None:
    dealt = ClientAffinity(2)
    groups = dealt.assign(V[:6], {0: 4})
    assert {index: len(group) for index, group in groups.items()} == {0: 1, 1: 5}
    assert dealt.assign(V[6:8], {1: 20}) == {0: V[6:8]}


def test_who_is_stranded_with_a_silent_proxy() -> None:
    dealt = ClientAffinity(3)
    groups = dealt.assign(V[:6], {})
    assert dealt.at([1]) == frozenset(groups[1])
    assert dealt.at([]) == frozenset()


def test_the_longest_unseen_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_affinity, "REMEMBERED", 4)
    dealt = ClientAffinity(1)
    dealt.assign(V[:3], {})
    dealt.assign(V[3:6], {})
    assert dealt.at([0]) == frozenset(V[2:6])
