"""A fleet in virtual time: the clients' work is real, the time that it takes is drawn. Implements ``FleetPort``.

What a round makes of it is the business of the loop that also runs the real fleet; nothing here aggregates.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol

from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ProxyReport
from fedvit.tools.simulation.delays import Delays
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import ClientFailures, SingleMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest

SILENT = "it fell silent"


class VirtualClock:
    """A clock that the simulated fleet moves. Implements :class:`fedvit.ports.ClockPort`."""

    def __init__(self) -> None:
        self._start, self._now_s = SYSTEM_CLOCK.now(), 0.0

    def now(self) -> datetime:
        """The start of the simulation and the virtual seconds since."""
        return self._start + timedelta(seconds=self._now_s)

    def monotonic(self) -> float:
        """Virtual seconds since the start."""
        return self._now_s

    def advance_to(self, at_s: float) -> None:
        """Let time pass; it never goes back."""
        self._now_s = max(self._now_s, at_s)


class Learners(Protocol):
    """The work that clients do."""

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> SingleMessage:
        """One client's own answer, never a sum of several; a client that fails is an outcome with an error."""
        ...


@dataclass(order=True, frozen=True, slots=True)
class _Errand:
    """A task with a client, by the time at which the server hears of it."""

    due_s: float
    client_id: str
    answers: bool = field(compare=False)
    task: TrainTask = field(compare=False)
    weights: Weights = field(compare=False)

    def failed(self, reason: str) -> ClientFailures:
        return ClientFailures.of(self.task.round_index, [self.client_id], reason)


class SimulatedFleet:
    """Hands out tasks, lets time pass to the next answer, and only then does the work behind it.

    So nothing is computed for a client that drops out or is given up. One that is given up works on all the same, and
    begins its next task when it is done, unless the delays say that it stops.

    Args:
        learners: who does the work.
        delays: how long it takes.
        clock: moved by nobody else.
        look_s: how often the caller may think again while nothing arrives, in virtual seconds.

    Attributes:
        counts: tasks ``handed`` out; what became of them: ``answered`` (of these ``failed``), ``silent``, ``given_up``.
    """

    def __init__(self, learners: Learners, delays: Delays, clock: VirtualClock, *, look_s: float) -> None:
        self._learners = learners
        self._delays = delays
        self._clock = clock
        self._look_s = look_s
        self._errands: list[_Errand] = []
        self._busy_until_s: dict[str, float] = {}
        self.counts: Counter[str] = Counter()

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[SingleMessage | None]:
        """See :meth:`fedvit.ports.FleetPort.train`; one message a client, in the order of their virtual arrival."""
        for client_id in cohort.client_ids:
            self._hand_out(task, weights, client_id)
        began_s = heard_s = self._clock.monotonic()
        looks = 1
        while self._errands:
            silent_at_s = float("inf") if timeout_s is None else heard_s + timeout_s
            due_s, look_at_s = self._errands[0].due_s, began_s + looks * self._look_s
            if due_s <= min(silent_at_s, look_at_s):
                self._clock.advance_to(due_s)
                heard_s = self._clock.monotonic()
                yield self._arrived(heapq.heappop(self._errands))
            elif silent_at_s <= look_at_s:
                self._clock.advance_to(silent_at_s)
                return
            else:
                self._clock.advance_to(look_at_s)
                looks += 1
                yield None

    def in_flight(self) -> frozenset[str]:
        """The clients that have not answered."""
        return frozenset(errand.client_id for errand in self._errands)

    def give_up(self, reason: str) -> list[ClientFailures]:
        """Wait for nobody any more."""
        given_up = [errand.failed(reason) for errand in sorted(self._errands)]
        if not self._delays.stop_on_cancel:
            self._busy_until_s |= {errand.client_id: errand.due_s for errand in self._errands}
        self._errands.clear()
        self.counts["given_up"] += len(given_up)
        return given_up

    def proxies_alive(self) -> ProxyReport:
        """There is but this process."""
        return ProxyReport({"simulation": True})

    def request_histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> None:
        """Nobody is asked: a simulation looks at rounds."""

    def histograms(self) -> list[ClientHistogram]:
        """None ever arrive."""
        return []

    def _hand_out(self, task: TrainTask, weights: Weights, client_id: str) -> None:
        trip = self._delays.trip(client_id, task.round_index)
        due_s = max(self._clock.monotonic(), self._busy_until_s.get(client_id, 0.0)) + trip.duration_s
        heapq.heappush(self._errands, _Errand(due_s, client_id, trip.answers, task, weights))
        self.counts["handed"] += 1

    def _arrived(self, errand: _Errand) -> SingleMessage:
        if not errand.answers:
            self.counts["silent"] += 1
            return errand.failed(SILENT)
        answer = self._learners.answer(errand.task, errand.weights, errand.client_id)
        self.counts["answered"] += 1
        self.counts["failed"] += all(
            outcome.error and not outcome.counted_against_client for outcome in answer.outcomes
        )
        return answer
