"""Training metrics: what they say, and what they must not say."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from fedvit.monitoring.training import TrainingMetrics
from fedvit.types import BudgetReport, RunStatus, TrainingProgress

BUDGET = BudgetReport("record", 8.0, 1e-5, 3.0, 3.3, 3.0, 2, 30)
IDLE = TrainingProgress("run-0001", RunStatus.RUNNING, "drawing", 9, 0, None, None, 0.0, None)


def test_no_loss_is_exported_before_there_is_one() -> None:
    registry = CollectorRegistry()
    metrics = TrainingMetrics(registry)
    metrics.publish(IDLE, BUDGET, active=29, total=30)
    assert registry.get_sample_value("fed_vit_autorl_training_loss") is None
    assert registry.get_sample_value("fed_vit_autorl_privacy_epsilon_remaining") == 5.0
    assert registry.get_sample_value("fed_vit_autorl_active_clients") == 29
    metrics.publish(replace(IDLE, rounds_done=1, loss=0.5, accuracy=0.9), BUDGET, active=29, total=30)
    assert registry.get_sample_value("fed_vit_autorl_training_loss") == 0.5
    assert registry.get_sample_value("fed_vit_autorl_training_accuracy") == 0.9


def test_rounds_are_counted_once_and_only_this_process_s_own() -> None:
    registry = CollectorRegistry()
    metrics = TrainingMetrics(registry)
    for run_id, done in [("run-0001", 3), ("run-0001", 3), ("run-0001", 4), ("run-0001", 5), ("run-0002", 1)]:
        metrics.publish(replace(IDLE, run_id=run_id, rounds_done=done), BUDGET, active=1, total=1)
    assert registry.get_sample_value("fed_vit_autorl_training_rounds_total") == 3
