from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from edge_runtime.stats import ProcessMeter, RequestStats
from fedvit.metrics import exposition
from fedvit.metrics.catalogue import INFERENCE_BUCKETS_S
from fedvit.wire.manifest import ReleaseManifest

DURATION = "fed_vit_autorl_inference_duration_seconds"
WRITER = """
import sys
from prometheus_client import CollectorRegistry
from fedvit.metrics.exposition import counter, gauge
registry = CollectorRegistry()
gauge("training_loss", registry).set(float(sys.argv[1]))
counter("training_rounds_total", registry).inc()
"""


def manifest(version: str, sequence: int) -> ReleaseManifest:
    """A release, as far as counting goes."""
    return ReleaseManifest(
        sequence=sequence,
        version=version,
        variant="standard",
        artifact_digest="a" * 64,
        artifact_bytes=1,
        classes=("red", "green"),
        image_size=8,
        run_id="run-0001",
        round_index=1,
        data_digest="d" * 64,
        epsilon=1.0,
        delta=1e-5,
        privacy_unit="record",
        created_at="2026-01-01T00:00:00+00:00",
        metrics={},
    )


def samples(text: bytes) -> dict[tuple[str, str], float]:
    """Values by name and label values, the latter in the order of the labels' names."""
    families = text_string_to_metric_families(text.decode())
    return {(s.name, ",".join(v for _, v in sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_the_buckets_straddle_the_alert_limit_and_span_a_millisecond_to_a_second() -> None:
    assert INFERENCE_BUCKETS_S[0] == 0.001
    assert 0.1 in INFERENCE_BUCKETS_S
    assert INFERENCE_BUCKETS_S[-1] == 1.0
    assert list(INFERENCE_BUCKETS_S) == sorted(set(INFERENCE_BUCKETS_S))


def test_only_the_release_that_serves_is_exported() -> None:
    registry = CollectorRegistry()
    stats = RequestStats(registry)
    for sequence in (1, 2):
        stats.serves(manifest(f"v{sequence}", sequence))
        stats.succeeded(sequence, 0.01, 0)
    # An image that was still with the old model.
    stats.succeeded(1, 9.0, 0)
    result = samples(exposition.render(None, registry)[0])
    assert {labels for name, labels in result if name == f"{DURATION}_count"} == {"v2"}
    assert result[f"{DURATION}_count", "v2"] == 1
    assert stats.requests_total == 3


def test_processes_are_merged_counters_as_sums_and_gauges_by_the_latest(tmp_path: Path) -> None:
    environment = {**os.environ, exposition.MULTIPROCESS_VARIABLE: str(tmp_path)}
    for loss in ("0.75", "0.5"):
        subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", WRITER, loss], env=environment, check=True)
    result = samples(exposition.render(tmp_path)[0])
    assert result["fed_vit_autorl_training_loss", ""] == 0.5
    assert result["fed_vit_autorl_training_rounds_total", ""] == 2


def test_a_folder_that_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a directory"):
        exposition.render(tmp_path / "absent")


def test_latency_percentiles_are_of_the_window() -> None:
    stats = RequestStats(CollectorRegistry())
    for _ in range(1000):
        stats.succeeded(1, 9.0, 0)
    for milliseconds in range(1, 1001):
        stats.succeeded(1, milliseconds / 1000, 0)
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
