"""The search for a client that ends the process of its proxy, without Ray."""

from __future__ import annotations

from itertools import count

import pytest

from actors.proxy_calls import MOST_CRASHES, ProxyCall, ProxyCalls
from fedvit.types import ClientOutcome, TrainTask

TASK = TrainTask("run-0001", 1, "b" * 64, "d" * 64, 1.0, 0.5, 1.0, 1, 1.0)
CLIENTS = tuple(f"c{i:03d}" for i in range(100))


class Proxies:
    """Proxies whose processes end when they train one of ``killers``: all calls of the proxy are lost then."""

    def __init__(self, *killers: str) -> None:
        self.killers = set(killers)
        self.calls = ProxyCalls(self._start)
        self._numbers = count()
        self.trained: list[str] = []
        self.failed: dict[str, ClientOutcome] = {}
        self.crashes = 0

    def _start(self, call: ProxyCall) -> int:
        return next(self._numbers)

    def round(self, clients: tuple[str, ...] = CLIENTS, proxies: int = 2, *, kill: int = 0) -> None:
        """Train these clients; ``kill`` ends the first so many calls from outside."""
        self.trained, self.failed, self.crashes = [], {}, 0
        for index in range(proxies):
            if part := clients[index::proxies]:
                self.calls.add(ProxyCall(index, TASK, None, part))
        while self.calls.running:
            reference, call = next(iter(self.calls.running.items()))
            if kill or not self.killers.isdisjoint(call.client_ids):
                self._end(call.proxy)
                kill = max(0, kill - 1)
            else:
                self.trained += self.calls.answered(reference).client_ids

    def _end(self, proxy: int) -> None:
        self.crashes += 1
        for lost in [r for r, call in self.calls.running.items() if call.proxy == proxy]:
            failures = self.calls.crashed(lost, "exit code 1")
            self.failed |= {o.client_id: o for o in failures.outcomes} if failures else {}


@pytest.mark.parametrize("killers", [(CLIENTS[7],), (CLIENTS[0], CLIENTS[1], CLIENTS[99])])
def test_clients_that_end_their_process_fail_alone_and_that_is_counted(killers: tuple[str, ...]) -> None:
    proxies = Proxies(*killers)
    proxies.round()
    assert sorted(proxies.failed) == sorted(killers)
    assert all(outcome.counted_against_client for outcome in proxies.failed.values())
    assert sorted(proxies.trained) == sorted(set(CLIENTS) - set(killers))
    assert proxies.calls.all() == []


def test_a_client_that_is_known_for_it_is_trained_alone_after_the_others() -> None:
    proxies = Proxies(CLIENTS[7])
    proxies.round()
    searched = proxies.crashes
    proxies.round()
    assert (proxies.crashes, sorted(proxies.failed)) == (2, [CLIENTS[7]])
    assert searched > 2
    proxies.killers.clear()
    proxies.round()
    assert sorted(proxies.trained) == sorted(CLIENTS)


@pytest.mark.parametrize("kill", [1, 3])
def test_a_process_that_is_ended_from_outside_is_counted_against_nobody(kill: int) -> None:
    proxies = Proxies()
    proxies.round(kill=kill)
    assert (proxies.failed, sorted(proxies.trained)) == ({}, sorted(CLIENTS))
    proxies.round(CLIENTS[:1], kill=1)
    assert (proxies.failed, proxies.trained) == ({}, [CLIENTS[0]])


def test_a_call_beside_that_of_a_killer_is_repeated_and_not_blamed() -> None:
    proxies = Proxies("bad")
    for client_id in ("bad", "good"):
        proxies.calls.add(ProxyCall(0, TASK, None, (client_id,)))
    proxies.round(CLIENTS[:4], proxies=1)
    assert sorted(proxies.failed) == ["bad"]
    assert sorted(proxies.trained) == sorted([*CLIENTS[:4], "good"])


def test_a_search_without_end_is_given_up_and_counted_against_few() -> None:
    proxies = Proxies(*CLIENTS)
    proxies.round(proxies=1)
    assert proxies.failed.keys() == set(CLIENTS)
    assert sum(o.counted_against_client for o in proxies.failed.values()) <= MOST_CRASHES // 2
    assert proxies.crashes <= MOST_CRASHES + len(CLIENTS)


def test_calls_that_are_given_up_leave_nothing() -> None:
    proxies = Proxies(CLIENTS[0])
    proxies.calls.add(ProxyCall(0, TASK, None, CLIENTS))
    (reference,) = proxies.calls.running
    proxies.calls.crashed(reference, "exit code 1")
    assert sum(len(call.client_ids) for call in proxies.calls.clear()) == len(CLIENTS)
    assert proxies.calls.all() == []
