"""Metrics of budget, rounds, data quality and training, set by the aggregator."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable
from functools import cached_property

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from fedvit.metrics.catalogue import PHASES
from fedvit.metrics.exposition import counter, gauge, histogram
from fedvit.types import BudgetReport, ClientOutcome, TrainingProgress


class BudgetMetrics:
    """The privacy budget, which is exported without a running training, too."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry

    # Created with their first value: a process without one must not export a budget of 0.
    @cached_property
    def _spent(self) -> Gauge:
        return gauge("privacy_epsilon_spent", self._registry)

    @cached_property
    def _remaining(self) -> Gauge:
        return gauge("privacy_epsilon_remaining", self._registry)

    def publish(self, budget: BudgetReport) -> None:
        """Set spent and remaining epsilon from one report."""
        self._spent.labels(budget.privacy_unit).set(budget.epsilon_spent)
        self._remaining.labels(budget.privacy_unit).set(budget.epsilon_remaining)


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

    def committed(self, outcomes: Iterable[ClientOutcome], quarantined: int = 0, rejected_answers: int = 0) -> None:
        """Count a committed round.

        Args:
            outcomes: of the clients that got a task.
            quarantined: clients of the cohort that were in quarantine and got none.
            rejected_answers: answers of clients that were not expected.
        """
        self._rounds.inc()
        tally = Tally({"quarantined": quarantined, "rejected_answers": rejected_answers})
        for outcome in outcomes:
            if outcome.error is None:
                self._staleness.observe(outcome.staleness)
            tally["accepted" if outcome.error is None else "refused" if outcome.refused else "failed"] += 1
        for kind, count in tally.items():
            self._updates.labels(kind).inc(count)


class DataMetrics:
    """Scores of the quality and the drift of the fleet's data."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry

    # Created with their first value: an unset gauge would export 0, the worst quality.
    @cached_property
    def _quality(self) -> Gauge:
        return gauge("data_quality_score", self._registry)

    @cached_property
    def _drift(self) -> Gauge:
        return gauge("data_drift_score", self._registry)

    def publish(self, quality: float | None, drift: float | None) -> None:
        """Set the scores that are known."""
        if quality is not None:
            self._quality.set(quality)
        if drift is not None:
            self._drift.set(drift)


class TrainingMetrics:
    """State of the training loop."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._active_clients = gauge("active_clients", registry)
        self._total_clients = gauge("total_clients", registry)
        self._budget = BudgetMetrics(registry)

    # Created with their first value: an unset gauge would export 0, a perfect loss or no connected client.
    @cached_property
    def _loss(self) -> Gauge:
        return gauge("training_loss", self._registry)

    @cached_property
    def _accuracy(self) -> Gauge:
        return gauge("training_accuracy", self._registry)

    @cached_property
    def _connected_clients(self) -> Gauge:
        return gauge("connected_clients", self._registry)

    def publish_connected(self, connected: int) -> None:
        """Set the number of connected clients."""
        self._connected_clients.set(connected)

    def publish(self, progress: TrainingProgress, budget: BudgetReport, *, active: int, total: int) -> None:
        """Set all of them from one progress report and one budget report."""
        if progress.loss is not None:
            self._loss.set(progress.loss)
        if progress.accuracy is not None:
            self._accuracy.set(progress.accuracy)
        self._active_clients.set(active)
        self._total_clients.set(total)
        self._budget.publish(budget)
