"""Makes the metrics of the :mod:`~fedvit.monitoring.catalogue`, and renders them.

On the server every actor and replica of a node writes into ``PROMETHEUS_MULTIPROC_DIR`` and any of them renders the
sum. That variable must be in the environment before ``prometheus_client`` is imported. An edge process does without.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fedvit.monitoring.catalogue import BY_NAME, Kind, Metric
from fedvit.monitoring.node import NodeCollector

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def counter(name: str, registry: CollectorRegistry | None = REGISTRY) -> Counter:
    """A counter of the catalogue; all its series are there from the beginning, where their labels are known.

    Raises:
        ValueError: the catalogue has no counter of that name.
    """
    metric = _known(name, "counter")
    made = Counter(metric.full_name, metric.meaning, _label_names(metric), registry=registry)
    # A series that begins with its first event hides that event from rate().
    for values in _known_labels(metric):
        made.labels(*values)
    return made


def gauge(name: str, registry: CollectorRegistry | None = REGISTRY) -> Gauge:
    """A gauge of the catalogue. One without labels exports 0 until it is set: make it at its first value.

    Raises:
        ValueError: the catalogue has no gauge of that name.
    """
    metric = _known(name, "gauge")
    return Gauge(
        metric.full_name,
        metric.meaning,
        _label_names(metric),
        registry=registry,
        multiprocess_mode=metric.over_processes,
    )


def histogram(name: str, registry: CollectorRegistry | None = REGISTRY) -> Histogram:
    """A histogram of the catalogue.

    Raises:
        ValueError: the catalogue has no histogram of that name.
    """
    metric = _known(name, "histogram")
    return Histogram(metric.full_name, metric.meaning, _label_names(metric), buckets=metric.buckets, registry=registry)


def render(multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Exposition text and its content type: of all processes that write to the folder, else of ``registry``.

    Raises:
        ValueError: ``multiprocess_dir`` is not a folder.
    """
    return generate_latest(_source(multiprocess_dir, registry)), CONTENT_TYPE_LATEST


def predictions_by_class(
    model_version: str, multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY
) -> dict[int, int]:
    """How often the replicas of this node answered each class, since that release serves."""
    name = BY_NAME["predictions_total"].full_name
    return {
        int(sample.labels["label"]): int(sample.value)
        for family in _source(multiprocess_dir, registry).collect()
        for sample in family.samples
        if sample.name == name and sample.labels["model_version"] == model_version
    }


def _source(multiprocess_dir: Path | None, registry: CollectorRegistry) -> CollectorRegistry:
    if multiprocess_dir is None:
        return registry
    merged = CollectorRegistry()
    merged.register(NodeCollector(multiprocess_dir))
    return merged


def _known(name: str, kind: Kind) -> Metric:
    metric = BY_NAME.get(name)
    if metric is None or metric.kind != kind:
        raise ValueError(f"the catalogue has no {kind} {name!r}")
    return metric


def _label_names(metric: Metric) -> list[str]:
    return [label.name for label in metric.labels]


def _known_labels(metric: Metric) -> list[tuple[str, ...]]:
    if not metric.labels:
        return []
    return list(product(*(label.values for label in metric.labels)))
