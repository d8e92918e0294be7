"""Assignment of clients to proxies: stable where possible, with an equal load."""

from __future__ import annotations

from actors.fleet import ClientAffinity

V = [f"v{i:02d}" for i in range(12)]


def test_clients_are_assigned_evenly_and_stay_on_their_proxy() -> None:
    affinity = ClientAffinity(2)
    first = affinity.assign(V[:10], {})
    assert [len(group) for group in first.values()] == [5, 5]
    assert affinity.assign(V[:10], {}) == first


def test_a_cohort_whose_clients_were_all_on_one_proxy_is_divided_all_the_same() -> None:
    affinity = ClientAffinity(2)
    crowded = affinity.assign(V[:12], {})[0]
    groups = affinity.assign(crowded, {})
    assert sorted(len(group) for group in groups.values()) == [3, 3]
    assert set(groups[0]) < set(crowded)
    # Clients that moved stay where they are now.
    assert affinity.assign(crowded, {}) == groups


def test_a_proxy_that_is_still_training_is_assigned_fewer_clients() -> None:
    affinity = ClientAffinity(2)
    groups = affinity.assign(V[:6], {0: 4})
    assert {index: len(group) for index, group in groups.items()} == {0: 1, 1: 5}
    assert affinity.assign(V[6:8], {1: 20}) == {0: V[6:8]}


def test_the_clients_of_a_proxy_are_known() -> None:
    affinity = ClientAffinity(3)
    groups = affinity.assign(V[:6], {})
    assert affinity.at([1]) == frozenset(groups[1])
    assert affinity.at([]) == frozenset()


def test_the_clients_that_were_assigned_first_are_forgotten() -> None:
    affinity = ClientAffinity(1, remembered=4)
    affinity.assign(V[:3], {})
    affinity.assign(V[3:6], {})
    assert affinity.at([0]) == frozenset(V[2:6])
