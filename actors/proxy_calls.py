"""Training calls of client proxies, and the search for a client that ends the process of its proxy.

This module does not import Ray.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedvit.types import ClientOutcome, TrainTask
from fedvit.updates import ClientFailures

MOST_CRASHES = 64
"""After so many ends of a proxy's process within one search, the clients that are left in it fail."""
_ALONE = 2
"""So often a client ends the process while it is trained alone, before that is counted against it."""


@dataclass(frozen=True, slots=True)
class ProxyCall:
    """A call of a proxy's ``train``.

    ``weights`` is the argument that the proxy gets. ``alone`` is set if the proxy has no other call meanwhile;
    ``crashes`` is how often such a call for this single client ended the process.
    """

    proxy: int
    task: TrainTask
    weights: Any
    client_ids: tuple[str, ...]
    max_weight: int | None = None
    num_examples: Mapping[str, int] | None = None
    secure: Mapping[str, bytes] | None = None
    alone: bool = False
    crashes: int = 0

    @property
    def secure_of_its_clients(self) -> dict[str, bytes] | None:
        """The requests of the phase ``mask`` of this call's clients."""
        return None if self.secure is None else {c: self.secure[c] for c in self.client_ids}

    def failed(self, reason: str, *, counted: bool = False) -> ClientFailures:
        """The answer of all its clients, if there is no other."""
        outcomes = (ClientOutcome(c, 0, reason, counted_against_client=counted) for c in self.client_ids)
        return ClientFailures(self.task.round_index, tuple(outcomes))

    def halves(self) -> tuple[ProxyCall, ...]:
        """Two calls for half of the clients each; the call itself for a single client."""
        middle = len(self.client_ids) // 2
        parts = (self.client_ids[:middle], self.client_ids[middle:])
        return tuple(replace(self, client_ids=part) for part in parts if part)


class ProxyCalls:
    """The calls that run and those that wait.

    A proxy may have several calls. When its process ends, it is not known which client did it: all calls that were lost
    are repeated one after another, in halves, until a single client ends the process again and again. That client fails
    alone, and it is counted against it. In later rounds it is trained alone, after the others.

    Args:
        start: makes a call; returns a reference to its answer.
    """

    def __init__(self, start: Callable[[ProxyCall], Any]) -> None:
        self._start = start
        self.running: dict[Any, ProxyCall] = {}
        self._waiting: dict[int, deque[ProxyCall]] = {}
        self._crashes, self._suspects = Counter[int](), set[str]()

    def all(self) -> list[ProxyCall]:
        """All calls without an answer."""
        return [*self.running.values(), *(call for queue in self._waiting.values() for call in queue)]

    def add(self, call: ProxyCall) -> None:
        """Make a call, at once unless the proxy is searched."""
        suspects = [client_id for client_id in call.client_ids if client_id in self._suspects]
        others = tuple(client_id for client_id in call.client_ids if client_id not in self._suspects)
        queue = self._waiting.setdefault(call.proxy, deque())
        if others and queue:
            queue.append(replace(call, client_ids=others))
        elif others:
            self._run(replace(call, client_ids=others))
        queue.extend(replace(call, client_ids=(client_id,)) for client_id in suspects)
        self._run_next(call.proxy)

    def answered(self, reference: Any) -> ProxyCall:
        """Take a call off the list that was answered, by whatever; return it."""
        call = self.running.pop(reference)
        if call.alone:
            self._suspects.difference_update(call.client_ids)
        self._run_next(call.proxy)
        return call

    def crashed(self, reference: Any, detail: str) -> ClientFailures | None:
        """The process ended during a call: repeat it in parts, or return the failure of its clients.

        Args:
            detail: what is known of the end of the process.
        """
        call = self.running.pop(reference)
        queue = self._waiting.setdefault(call.proxy, deque())
        self._crashes[call.proxy] += 1
        failures = None
        if self._crashes[call.proxy] > MOST_CRASHES:
            reason = f"the process of its proxy ended {MOST_CRASHES} times in a row: {detail}"
            failures = call.failed(reason)
        elif call.alone and len(call.client_ids) == 1:
            call = replace(call, crashes=call.crashes + 1)
            self._suspects.update(call.client_ids)
            if call.crashes >= _ALONE:
                reason = f"it ended the process of its proxy {call.crashes} times while it was trained alone: {detail}"
                failures = call.failed(reason, counted=True)
            else:
                queue.appendleft(call)
        else:
            queue.extendleft(reversed(call.halves()))
        self._run_next(call.proxy)
        return failures

    def clear(self) -> list[ProxyCall]:
        """Give all calls up; return them."""
        calls = self.all()
        self.running.clear()
        self._waiting.clear()
        return calls

    def _run_next(self, proxy: int) -> None:
        queue = self._waiting.get(proxy)
        if any(call.proxy == proxy for call in self.running.values()):
            return
        if queue:
            self._run(replace(queue.popleft(), alone=True))
        else:
            self._crashes[proxy] = 0

    def _run(self, call: ProxyCall) -> None:
        self.running[self._start(call)] = call
