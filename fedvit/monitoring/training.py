"""The training side's metrics, set from the one place that knows: the aggregator."""

from __future__ import annotations

import threading
from functools import cached_property

from prometheus_client import REGISTRY, CollectorRegistry, Gauge

from fedvit.monitoring import metrics
from fedvit.types import BudgetReport, TrainingProgress


class BudgetMetrics:
    """The privacy budget, for whoever is asked for it: also where no training goes on that would tell."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry

    # Made at their first value: a process that never tells must not export a budget of 0.
    @cached_property
    def _spent(self) -> Gauge:
        return metrics.privacy_epsilon_spent(self._registry)

    @cached_property
    def _remaining(self) -> Gauge:
        return metrics.privacy_epsilon_remaining(self._registry)

    def publish(self, budget: BudgetReport) -> None:
        """Set both from one consistent view."""
        self._spent.set(budget.epsilon_spent)
        self._remaining.set(budget.epsilon_remaining)


class TrainingMetrics:
    """What the training loop exports. Counters count this process's own rounds; gauges say how things stand."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._registry = registry
        self._rounds = metrics.training_rounds(registry)
        self._active_clients = metrics.active_clients(registry)
        self._total_clients = metrics.total_clients(registry)
        self._budget = BudgetMetrics(registry)
        self._lock = threading.Lock()
        self._counted: tuple[str | None, int] | None = None

    # Made at their first value: an unset gauge would export 0, a perfect loss or a fleet that is gone.
    @cached_property
    def _loss(self) -> Gauge:
        return metrics.training_loss(self._registry)

    @cached_property
    def _accuracy(self) -> Gauge:
        return metrics.training_accuracy(self._registry)

    @cached_property
    def _connected_clients(self) -> Gauge:
        return metrics.connected_clients(self._registry)

    def publish_connected(self, connected: int) -> None:
        """Set how many clients are connected."""
        self._connected_clients.set(connected)

    def publish(self, progress: TrainingProgress, budget: BudgetReport, *, active: int, total: int) -> None:
        """Set everything from one consistent view; the first call counts no rounds, they are an earlier process's."""
        with self._lock:
            self._count_rounds(progress)
        if progress.loss is not None:
            self._loss.set(progress.loss)
        if progress.accuracy is not None:
            self._accuracy.set(progress.accuracy)
        self._active_clients.set(active)
        self._total_clients.set(total)
        self._budget.publish(budget)

    def _count_rounds(self, progress: TrainingProgress) -> None:
        run_id, done = progress.run_id, progress.rounds_done
        before = self._counted
        if before is not None:
            self._rounds.inc(max(0, done - (before[1] if before[0] == run_id else 0)))
        self._counted = run_id, done
