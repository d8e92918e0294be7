"""Training metrics: what they say, and what they must not say."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client import CollectorRegistry

from fedvit.metrics.catalogue import UPDATE_OUTCOMES
from fedvit.metrics.training import RoundMetrics, SecureAggregationMetrics, publish_training
from fedvit.types import BudgetReport, ClientOutcome, RunStatus, TrainingProgress

REMAINING = "fed_vit_autorl_privacy_epsilon_remaining"
BUDGET = BudgetReport("record", 8.0, 1e-5, 3.0, 3.3, 3.0, 2, 30)
IDLE = TrainingProgress("run-0001", RunStatus.RUNNING, "drawing", 9, 0, None, None, 0.0, None)


def test_no_loss_is_exported_before_there_is_one() -> None:
    registry = CollectorRegistry()
    publish_training(IDLE, BUDGET, active=29, total=30, registry=registry)
    assert registry.get_sample_value("fed_vit_autorl_training_loss") is None
    assert registry.get_sample_value(REMAINING, {"privacy_unit": "record"}) == 5.0
    assert registry.get_sample_value("fed_vit_autorl_active_clients") == 29
    evaluated = replace(IDLE, rounds_done=1, loss=0.5, accuracy=0.9)
    publish_training(evaluated, BUDGET, active=29, total=30, registry=registry)
    assert registry.get_sample_value("fed_vit_autorl_training_loss") == 0.5
    assert registry.get_sample_value("fed_vit_autorl_training_accuracy") == 0.9


def test_what_became_of_the_clients_of_a_round_is_counted() -> None:
    registry = CollectorRegistry()
    metrics = RoundMetrics(registry)
    outcomes = [
        ClientOutcome("a", 4),
        ClientOutcome("b", 4, staleness=2),
        ClientOutcome("c", 0, "no answer"),
        ClientOutcome("d", 4, "not finite", counted_against_client=True),
    ]
    metrics.committed(outcomes, quarantined=1, unexpected=2)
    counted = {
        outcome: registry.get_sample_value("fed_vit_autorl_client_updates_total", {"outcome": outcome})
        for outcome in UPDATE_OUTCOMES
    }
    assert counted == {"accepted": 2, "failed": 1, "refused": 1, "quarantined": 1, "unexpected": 2}
    assert registry.get_sample_value("fed_vit_autorl_training_rounds_total") == 1
    assert registry.get_sample_value("fed_vit_autorl_update_staleness_sum") == 2
    assert registry.get_sample_value("fed_vit_autorl_update_staleness_bucket", {"le": "0.0"}) == 1


def test_only_the_phases_of_a_round_are_timed() -> None:
    registry = CollectorRegistry()
    metrics = RoundMetrics(registry)
    metrics.phase_took("training", 1.5)
    metrics.phase_took("resting", 9.0)
    name = "fed_vit_autorl_round_duration_seconds_count"
    assert registry.get_sample_value(name, {"phase": "training"}) == 1
    assert registry.get_sample_value(name, {"phase": "resting"}) is None


def test_sessions_of_secure_aggregation_are_counted_by_their_end() -> None:
    registry = CollectorRegistry()
    metrics = SecureAggregationMetrics(registry)
    value = registry.get_sample_value
    sessions, dropouts = "fed_vit_autorl_secure_sessions_total", "fed_vit_autorl_secure_dropouts_total"
    assert value(sessions, {"outcome": "failed_closed"}) == 0
    assert value("fed_vit_autorl_secure_survivors") is None
    metrics.began(participants=30, min_survivors=21, ring_bits=18)
    metrics.phase_ended("advertise", 0.5, 2)
    metrics.phase_ended("mask", 3.0, 3)
    metrics.ended(25)
    assert value(sessions, {"outcome": "revealed"}) == 1
    assert value(dropouts, {"phase": "mask"}) == 3
    assert value("fed_vit_autorl_secure_phase_duration_seconds_sum", {"phase": "mask"}) == 3.0
    facts = [value(f"fed_vit_autorl_secure_{name}") for name in ("participants", "survivors", "min_survivors")]
    assert facts == [30, 25, 21]
    assert value("fed_vit_autorl_secure_ring_bits") == 18
    metrics.began(participants=30, min_survivors=21, ring_bits=18)
    metrics.ended(0)
    assert value(sessions, {"outcome": "failed_closed"}) == 1
    assert value(sessions, {"outcome": "revealed"}) == 1
    assert value("fed_vit_autorl_secure_survivors") == 0
