"""Metric names, and the one place that makes and renders them.

On the server every actor and replica of a node writes into ``PROMETHEUS_MULTIPROC_DIR`` and any of them renders the
sum. That variable must be in the environment before ``prometheus_client`` is imported. An edge process does without.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

PREFIX = "fed_vit_autorl_"
INFERENCE_DURATION = f"{PREFIX}inference_duration_seconds"
INFERENCE_REQUESTS = f"{PREFIX}inference_requests_total"
PREDICTIONS = f"{PREFIX}predictions_total"
TRAINING_LOSS = f"{PREFIX}training_loss"
TRAINING_ACCURACY = f"{PREFIX}training_accuracy"
TRAINING_ROUNDS = f"{PREFIX}training_rounds_total"
ACTIVE_CLIENTS = f"{PREFIX}active_clients"
CONNECTED_CLIENTS = f"{PREFIX}connected_clients"
TOTAL_CLIENTS = f"{PREFIX}total_clients"
HEARTBEATS = f"{PREFIX}heartbeats_total"
UPDATE_BYTES = f"{PREFIX}update_bytes_total"
UNAUTHORIZED_REQUESTS = f"{PREFIX}unauthorized_requests_total"
EPSILON_REMAINING = f"{PREFIX}privacy_epsilon_remaining"
EPSILON_SPENT = f"{PREFIX}privacy_epsilon_spent"

# Dense around the alert's 100 ms, so that histogram_quantile interpolates little there.
DURATION_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)


def inference_duration(registry: CollectorRegistry = REGISTRY) -> Histogram:
    """Seconds from image bytes to prediction, by ``model_version``."""
    return Histogram(
        INFERENCE_DURATION,
        "Seconds from image bytes to prediction.",
        ["model_version"],
        buckets=DURATION_BUCKETS_S,
        registry=registry,
    )


def inference_requests(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Inference requests by ``outcome``: ok, rejected (the caller's fault), unavailable or failed."""
    return Counter(INFERENCE_REQUESTS, "Inference requests by outcome.", ["outcome"], registry=registry)


def predictions(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Answers by ``model_version`` and ``label``, the index of the class.

    For the server's inference replicas alone: what vehicles see, they keep.
    """
    return Counter(PREDICTIONS, "Answers by class index.", ["model_version", "label"], registry=registry)


def predictions_by_class(
    model_version: str, multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY
) -> dict[int, int]:
    """How often the replicas of this node answered each class, since the system was started."""
    source = registry if multiprocess_dir is None else _merged(multiprocess_dir)
    return {
        int(sample.labels["label"]): int(sample.value)
        for family in source.collect()
        for sample in family.samples
        if sample.name == PREDICTIONS and sample.labels["model_version"] == model_version
    }


def training_loss(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Loss of the global model on the held-out images."""
    return _gauge(TRAINING_LOSS, "Loss of the global model on the held-out images.", registry)


def training_accuracy(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Accuracy of the global model on the held-out images, 0 to 1."""
    return _gauge(TRAINING_ACCURACY, "Accuracy of the global model on the held-out images.", registry)


def training_rounds(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Rounds committed since the process began."""
    return Counter(TRAINING_ROUNDS, "Rounds committed since the process began.", registry=registry)


def active_clients(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Clients that may take part in rounds."""
    return _gauge(ACTIVE_CLIENTS, "Clients that may take part in rounds.", registry)


def connected_clients(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Active clients that are connected: hosted by a proxy that answers, or heard lately."""
    return _gauge(CONNECTED_CLIENTS, "Active clients that are connected.", registry)


def total_clients(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Clients ever registered."""
    return _gauge(TOTAL_CLIENTS, "Clients ever registered.", registry)


def heartbeats(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Heartbeats heard, by ``status``: what the vehicle says of itself, ok or degraded."""
    return Counter(HEARTBEATS, "Heartbeats heard, by what the vehicle says of itself.", ["status"], registry=registry)


def update_bytes(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Bytes of updates that came to the door as bytes, by ``encoding``."""
    return Counter(UPDATE_BYTES, "Bytes of updates that came as bytes.", ["encoding"], registry=registry)


def unauthorized_requests(registry: CollectorRegistry = REGISTRY) -> Counter:
    """Requests refused for who asked, by ``reason``: one of a fixed few, never what the caller sent."""
    return Counter(UNAUTHORIZED_REQUESTS, "Requests refused for who asked, by reason.", ["reason"], registry=registry)


def privacy_epsilon_remaining(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Epsilon left to the most exposed unit."""
    return _gauge(EPSILON_REMAINING, "Epsilon left to the most exposed unit.", registry)


def privacy_epsilon_spent(registry: CollectorRegistry = REGISTRY) -> Gauge:
    """Epsilon spent by the most exposed unit."""
    return _gauge(EPSILON_SPENT, "Epsilon spent by the most exposed unit.", registry)


def _gauge(name: str, help_text: str, registry: CollectorRegistry) -> Gauge:
    # After a restart the new process's value holds, not the sum with the dead one's.
    return Gauge(name, help_text, registry=registry, multiprocess_mode="mostrecent")


def drop_version(histogram: Histogram, version: str) -> None:
    """Stop exporting the series of a retired model version; harmless if there is none.

    In multiprocess mode a series lives as long as its file, and only ``rate()`` tells it from a live one.
    """
    if MULTIPROCESS_VARIABLE not in os.environ:
        with contextlib.suppress(KeyError):
            histogram.remove(version)


def render(multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Exposition text and its content type: of all processes that write to the folder, else of ``registry``.

    Raises:
        ValueError: ``multiprocess_dir`` is not a folder.
    """
    if multiprocess_dir is None:
        return generate_latest(registry), CONTENT_TYPE_LATEST
    return generate_latest(_merged(multiprocess_dir)), CONTENT_TYPE_LATEST


def _merged(multiprocess_dir: Path) -> CollectorRegistry:
    merged = CollectorRegistry()
    MultiProcessCollector(merged, path=str(multiprocess_dir))  # type: ignore[no-untyped-call]
    return merged
