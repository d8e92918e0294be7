"""Metrics of budget, rounds, secure sums, data quality and training, and a rate-limited publisher of latest values.

A gauge is created with its first value: an unset one would export 0, such as a budget of 0 or a perfect loss.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from prometheus_client import REGISTRY, CollectorRegistry

from fedvit.metrics.catalogue import PHASES
from fedvit.metrics.exposition import counter, gauge, histogram
from fedvit.types import BudgetReport, ClientOutcome, TrainingProgress

_Value = TypeVar("_Value")
_LOG = logging.getLogger(__name__)


def publish_budget(budget: BudgetReport, registry: CollectorRegistry = REGISTRY) -> None:
    """Set spent and remaining epsilon."""
    gauge("privacy_epsilon_spent", registry).labels(budget.privacy_unit).set(budget.epsilon_spent)
    gauge("privacy_epsilon_remaining", registry).labels(budget.privacy_unit).set(budget.epsilon_remaining)


def publish_training(
    progress: TrainingProgress, budget: BudgetReport, *, active: int, total: int, registry: CollectorRegistry = REGISTRY
) -> None:
    """Set loss and accuracy where known, the numbers of active and registered clients, and the budget."""
    if progress.loss is not None:
        gauge("training_loss", registry).set(progress.loss)
    if progress.accuracy is not None:
        gauge("training_accuracy", registry).set(progress.accuracy)
    gauge("active_clients", registry).set(active)
    gauge("total_clients", registry).set(total)
    publish_budget(budget, registry)


def publish_connected(connected: int, registry: CollectorRegistry = REGISTRY) -> None:
    """Set the number of connected clients."""
    gauge("connected_clients", registry).set(connected)


def publish_data_scores(quality: float | None, drift: float | None, registry: CollectorRegistry = REGISTRY) -> None:
    """Set the known scores of the fleet's data: quality and drift."""
    if quality is not None:
        gauge("data_quality_score", registry).set(quality)
    if drift is not None:
        gauge("data_drift_score", registry).set(drift)


class RoundMetrics:
    """Durations of the phases of rounds, and outcomes of their clients."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._rounds = counter("training_rounds_total", registry)
        self._depth = gauge("queue_depth", registry).labels("clients_in_flight")
        self._phases = histogram("round_duration_seconds", registry)
        self._updates = counter("client_updates_total", registry)
        self._staleness = histogram("update_staleness", registry)

    def in_flight(self, clients: int) -> None:
        """Set the number of clients that have a task and have not answered."""
        self._depth.set(clients)

    def phase_took(self, phase: str, seconds: float) -> None:
        """Record the duration of a phase; other states of the run are ignored."""
        if phase in PHASES:
            self._phases.labels(phase).observe(seconds)

    def committed(self, outcomes: Iterable[ClientOutcome], quarantined: int = 0, unexpected: int = 0) -> None:
        """Count a committed round.

        Args:
            outcomes: of the clients that got a task.
            quarantined: clients of the cohort that were in quarantine and got none.
            unexpected: answers of clients that were not expected.
        """
        self._rounds.inc()
        tally = Tally({"quarantined": quarantined, "unexpected": unexpected})
        for outcome in outcomes:
            if outcome.error is None:
                self._staleness.observe(outcome.staleness)
            failure = "refused" if outcome.counted_against_client else "failed"
            tally["accepted" if outcome.error is None else failure] += 1
        for kind, count in tally.items():
            self._updates.labels(kind).inc(count)


class SecureAggregationMetrics:
    """Sessions of secure aggregation: outcomes, durations of phases, dropouts, and the facts of the latest one.

    Create it before the first session, so that the counters begin at 0.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._sessions = counter("secure_sessions_total", registry)
        self._dropouts = counter("secure_dropouts_total", registry)
        self._phases = histogram("secure_phase_duration_seconds", registry)

    def began(self, *, participants: int, min_survivors: int, ring_bits: int) -> None:
        """Set the facts of a session."""
        gauge("secure_participants", self._registry).set(participants)
        gauge("secure_min_survivors", self._registry).set(min_survivors)
        gauge("secure_ring_bits", self._registry).set(ring_bits)

    def phase_ended(self, phase: str, seconds: float, dropouts: int) -> None:
        """Record a phase, and count the clients that gave no valid answer to it."""
        self._phases.labels(phase).observe(seconds)
        self._dropouts.labels(phase).inc(dropouts)

    def ended(self, survivors: int) -> None:
        """Count a session.

        Args:
            survivors: clients in the revealed sum; 0 if the session failed closed.
        """
        gauge("secure_survivors", self._registry).set(survivors)
        self._sessions.labels("revealed" if survivors else "failed_closed").inc()


class ThrottledPublisher(Generic[_Value]):
    """Calls ``publish`` with the latest value in a thread of its own, at most once in ``interval_s`` seconds.

    The first value is published at once, and the last one always. Exceptions of ``publish`` are logged.
    """

    def __init__(self, publish: Callable[[_Value], None], interval_s: float) -> None:
        self._publish, self._interval_s = publish, interval_s
        self._values: list[_Value] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="throttled-publisher")
        self._thread.start()

    def __call__(self, value: _Value) -> None:
        """Publish this value as soon as the interval allows, in the place of one that still waits."""
        with self._changed:
            self._values = [value]
            self._changed.notify()

    def close(self) -> None:
        """Publish a value that still waits, and end the thread."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (value := self._next()) is not None:
            try:
                self._publish(value[0])
            except Exception as error:
                _LOG.warning("%s: %s", type(error).__name__, error)
            self._closed.wait(self._interval_s)

    def _next(self) -> list[_Value] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._values or self._closed.is_set())
            values, self._values = self._values, []
            return values or None
