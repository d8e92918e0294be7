from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.stats import ProcessMeter, RequestStats
from fedvit.monitoring import metrics

WRITER = """
import sys
from prometheus_client import CollectorRegistry
from fedvit.monitoring.metrics import *
registry = CollectorRegistry()
loss, rounds, durations = training_loss(registry), training_rounds(registry), inference_duration(registry)
loss.set(float(sys.argv[1])); rounds.inc(); durations.labels("v1").observe(0.02)
drop_version(durations, "v1")
"""


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Values by name and label values, the latter in the order of the labels' names."""
    families = text_string_to_metric_families(text.decode())
    return {(s.name, ",".join(v for _, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_every_name_has_the_prefix_and_is_exported() -> None:
    registry = CollectorRegistry()
    makers = [
        metrics.training_loss,
        metrics.training_accuracy,
        metrics.active_clients,
        metrics.total_clients,
        metrics.privacy_epsilon_remaining,
        metrics.privacy_epsilon_spent,
    ]
    for value, make in enumerate(makers):
        make(registry).set(value)
    metrics.training_rounds(registry).inc()
    metrics.inference_requests(registry).labels("ok").inc()
    metrics.inference_duration(registry).labels("v1").observe(0.03)
    text, content_type = metrics.render(None, registry)
    found = samples(text)
    assert content_type.startswith("text/plain")
    assert all(name.startswith("fed_vit_autorl_") for name, _ in found)
    assert found[metrics.EPSILON_REMAINING, ""] == 4
    assert found[metrics.TRAINING_ROUNDS, ""] == 1
    assert found[f"{metrics.INFERENCE_DURATION}_count", "v1"] == 1


def test_the_buckets_straddle_the_alert_limit_and_span_a_millisecond_to_a_second() -> None:
    assert metrics.DURATION_BUCKETS_S[0] == 0.001
    assert 0.1 in metrics.DURATION_BUCKETS_S
    assert metrics.DURATION_BUCKETS_S[-1] == 1.0
    assert list(metrics.DURATION_BUCKETS_S) == sorted(set(metrics.DURATION_BUCKETS_S))


def test_a_dropped_version_is_exported_no_more_and_may_be_dropped_twice() -> None:
    registry = CollectorRegistry()
    durations = metrics.inference_duration(registry)
    for version in ("v1", "v2"):
        durations.labels(version).observe(0.01)
    for _ in range(2):
        metrics.drop_version(durations, "v1")
    found = samples(metrics.render(None, registry)[0])
    assert {labels for name, labels in found if name.endswith("_count")} == {"v2"}


def test_processes_are_merged_counters_as_sums_and_gauges_by_the_latest(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.MULTIPROCESS_VARIABLE: str(tmp_path)}
    for loss in ("0.75", "0.5"):
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", WRITER, loss], env=environment, check=True)
    found = samples(metrics.render(tmp_path)[0])
    assert found[metrics.TRAINING_LOSS, ""] == 0.5
    assert found[metrics.TRAINING_ROUNDS, ""] == 2
    assert found[f"{metrics.INFERENCE_DURATION}_count", "v1"] == 2
    assert found[f"{metrics.INFERENCE_DURATION}_bucket", "0.01,v1"] == 0
    assert found[f"{metrics.INFERENCE_DURATION}_bucket", "0.02,v1"] == 2


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        metrics.render(tmp_path / "absent")


def test_latency_percentiles_are_of_the_window() -> None:
    stats = RequestStats(CollectorRegistry())
    for _ in range(1000):
        stats.succeeded("v1", 9.0, 0)
    for milliseconds in range(1, 1001):
        stats.succeeded("v1", milliseconds / 1000, 0)
    latency = stats.latency_ms()
    assert latency["p50_ms"] == pytest.approx(500.5)
    assert latency["p99_ms"] == pytest.approx(990.01)
    assert stats.requests_total == 2000


def test_the_meter_reads_this_process() -> None:
    meter = ProcessMeter()
    memory = meter.memory_bytes()
    assert memory is not None
    assert 2**20 < memory < 2**40
    assert meter.cpu_percent() >= 0
    assert meter.uptime_s >= 0


ANSWERS = """
from prometheus_client import CollectorRegistry
from edge_runtime.stats import RequestStats
replica, vehicle = RequestStats(CollectorRegistry(), count_answers=True), RequestStats(CollectorRegistry())
for version, label in (("v1", 0), ("v1", 2), ("v1", 2), ("v2", 1)):
    replica.succeeded(version, 0.01, label)
vehicle.succeeded("v1", 0.01, 1)
"""


def test_answers_are_counted_by_class_over_all_replicas_and_on_no_vehicle(tmp_path: Path) -> None:
    environment = {**os.environ, metrics.MULTIPROCESS_VARIABLE: str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", ANSWERS], env=environment, check=True)
    assert metrics.predictions_by_class("v1", tmp_path) == {0: 2, 2: 4}
    assert metrics.predictions_by_class("v3", tmp_path) == {}
    registry = CollectorRegistry()
    RequestStats(registry).succeeded("v1", 0.01, 1)
    assert metrics.predictions_by_class("v1", None, registry) == {}
    assert metrics.PREDICTIONS.encode() not in metrics.render(None, registry)[0]
