"""Fleet in virtual time: clients train for real, their delays are drawn at random. Implements ``FleetPort``."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ProxyReport
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.tools.simulation.delays import Delays
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import ClientFailures, SingleMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest

SILENT = "it fell silent"
"""The error of a client that does not answer."""
NO_MASKS = "a simulation leaves the masks of secure aggregation out"


class VirtualClock:
    """A clock that only the simulated fleet advances. Implements :class:`fedvit.ports.ClockPort`."""

    def __init__(self) -> None:
        self._start, self._now_s = SYSTEM_CLOCK.now(), 0.0

    def now(self) -> datetime:
        return self._start + timedelta(seconds=self._now_s)

    def monotonic(self) -> float:
        return self._now_s

    def advance_to(self, at_s: float) -> None:
        """Advance to ``at_s`` virtual seconds after the start; never go back."""
        self._now_s = max(self._now_s, at_s)


class TrainingClients(Protocol):
    """The clients of a simulation."""

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> SingleMessage:
        """One client's own answer, never a sum of several; a client that fails is an outcome with an error."""


@dataclass(order=True, frozen=True, slots=True)
class _PendingTask:
    """A client's task, ordered by the time of its answer."""

    due_s: float
    client_id: str
    answers: bool = field(compare=False)
    task: TrainTask = field(compare=False)
    weights: Weights = field(compare=False)

    def failed(self, reason: str) -> ClientFailures:
        return ClientFailures.of(self.task.round_index, [self.client_id], reason)


class SimulatedFleet:
    """A fleet that advances the clock to the next answer, and only then trains the client that answers.

    Nothing is computed for a client that drops out or is given up. A client that is given up continues to work and
    begins its next task afterwards, unless ``delays.stop_on_cancel`` is set.

    Args:
        clients: the clients that train.
        delays: the delays of their tasks.
        clock: the clock of the simulation; only this object advances it.
        poll_s: virtual seconds after which ``train`` yields None while nothing arrives.
        on_training: called before each client trains.

    Attributes:
        counts: tasks by state: ``sent``; ``answered`` (of these ``failed``), ``silent`` and ``given_up``.
    """

    def __init__(
        self,
        clients: TrainingClients,
        delays: Delays,
        clock: VirtualClock,
        *,
        poll_s: float,
        on_training: Callable[[], None] = lambda: None,
    ) -> None:
        self._clients, self._delays, self._clock, self._poll_s = clients, delays, clock, poll_s
        self._on_training = on_training
        self._pending: list[_PendingTask] = []
        self._busy_until_s: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[SingleMessage | None]:
        """See :meth:`fedvit.ports.FleetPort.train`; one message a client, in the order of their virtual arrival."""
        for client_id in cohort.client_ids:
            delay = self._delays.of_task(client_id, task.round_index)
            due_s = max(self._clock.monotonic(), self._busy_until_s.get(client_id, 0.0)) + delay.duration_s
            heapq.heappush(self._pending, _PendingTask(due_s, client_id, delay.answers, task, weights))
            self.counts["sent"] += 1
        began_s = last_answer_s = self._clock.monotonic()
        polls = 1
        while self._pending:
            timeout_at_s = float("inf") if timeout_s is None else last_answer_s + timeout_s
            due_s, poll_at_s = self._pending[0].due_s, began_s + polls * self._poll_s
            if due_s <= min(timeout_at_s, poll_at_s):
                self._clock.advance_to(due_s)
                last_answer_s = self._clock.monotonic()
                yield self._answer(heapq.heappop(self._pending))
            elif timeout_at_s <= poll_at_s:
                self._clock.advance_to(timeout_at_s)
                return
            else:
                self._clock.advance_to(poll_at_s)
                polls += 1
                yield None

    def in_flight(self) -> frozenset[str]:
        return frozenset(pending.client_id for pending in self._pending)

    def give_up(self, reason: str) -> list[ClientFailures]:
        given_up = [pending.failed(reason) for pending in sorted(self._pending)]
        if not self._delays.stop_on_cancel:
            self._busy_until_s |= {pending.client_id: pending.due_s for pending in self._pending}
        self._pending.clear()
        self.counts["given_up"] += len(given_up)
        return given_up

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        """A simulation leaves the masks out: no client has keys."""
        return iter([SecureAnswer(client_id, error=NO_MASKS) for client_id in sorted(requests)])

    def end_session(self, session: SecureSession) -> None:
        """Nothing was begun."""

    def proxies_alive(self) -> ProxyReport:
        return ProxyReport({"simulation": True})

    def request_histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> None:
        """Ignore the request: a simulation computes no histograms."""

    def histograms(self) -> list[ClientHistogram]:
        return []

    def _answer(self, pending: _PendingTask) -> SingleMessage:
        if not pending.answers:
            self.counts["silent"] += 1
            return pending.failed(SILENT)
        self._on_training()
        answer = self._clients.answer(pending.task, pending.weights, pending.client_id)
        self.counts["answered"] += 1
        self.counts["failed"] += all(
            outcome.error and not outcome.counted_against_client for outcome in answer.outcomes
        )
        return answer
