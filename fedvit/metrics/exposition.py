"""Prometheus counters, gauges and histograms of the :mod:`~fedvit.metrics.catalogue`, and their exposition.

On the server every actor and replica of a node writes into ``PROMETHEUS_MULTIPROC_DIR``, and any of them renders the
sum. That variable must be set before ``prometheus_client`` is imported. An edge process does not use it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fedvit.metrics.catalogue import BY_NAME, CATALOGUE, Metric
from fedvit.metrics.node import NodeCollector

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_Instrument = TypeVar("_Instrument", Counter, Gauge, Histogram)
# A registry accepts a name once; later calls return the same object.
_registered: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()
_lock = threading.RLock()


def counter(name: str, registry: CollectorRegistry | None = REGISTRY) -> Counter:
    """The counter of that name in the catalogue, with all series whose labels are known.

    Raises:
        ValueError: the catalogue has none. So do :func:`gauge` and :func:`histogram`.
    """
    return _instrument(Counter, name, registry)


def gauge(name: str, registry: CollectorRegistry | None = REGISTRY) -> Gauge:
    """The gauge of that name in the catalogue. Without labels it exports 0 until it is set: create it with a value."""
    return _instrument(Gauge, name, registry)


def histogram(name: str, registry: CollectorRegistry | None = REGISTRY) -> Histogram:
    """The histogram of that name in the catalogue."""
    return _instrument(Histogram, name, registry)


def render(multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY) -> tuple[bytes, str]:
    """Exposition text and its content type, of all processes that write to the folder, or of ``registry``.

    Raises:
        ValueError: ``multiprocess_dir`` is not a folder.
    """
    return generate_latest(_source(multiprocess_dir, registry)), CONTENT_TYPE_LATEST


def predictions_by_class(
    model_version: str, multiprocess_dir: Path | None = None, registry: CollectorRegistry = REGISTRY
) -> dict[int, int]:
    """Predictions of each class by this node's replicas since that release serves."""
    name = BY_NAME["predictions_total"].full_name
    return {
        int(sample.labels["label"]): int(sample.value)
        for family in _source(multiprocess_dir, registry).collect()
        for sample in family.samples
        if sample.name == name and sample.labels["model_version"] == model_version
    }


def lasting_figures(multiprocess_dir: Path) -> Iterator[tuple[Metric, dict[str, str], float]]:
    """Counters and gauges of a node with labels and values, except those that end with a release."""
    lasting = {metric.full_name: metric for metric in CATALOGUE if metric.kind != "histogram" and not metric.of_release}
    for family in _source(multiprocess_dir, REGISTRY).collect():
        for sample in family.samples:
            if sample.name in lasting:
                yield lasting[sample.name], dict(sample.labels), sample.value


def _source(multiprocess_dir: Path | None, registry: CollectorRegistry) -> CollectorRegistry:
    if multiprocess_dir is not None:
        registry = CollectorRegistry()
        registry.register(NodeCollector(multiprocess_dir))
    return registry


def _instrument(kind: type[_Instrument], name: str, registry: CollectorRegistry | None) -> _Instrument:
    metric, wanted = BY_NAME.get(name), kind.__name__.lower()
    if metric is None or metric.kind != wanted:
        raise ValueError(f"the catalogue has no {wanted} {name!r}")
    with _lock:
        known = {} if registry is None else _registered.setdefault(registry, {})
        if name not in known:
            known[name] = _created(kind, metric, registry)
        return known[name]  # type: ignore[no-any-return]


def _created(kind: type[_Instrument], metric: Metric, registry: CollectorRegistry | None) -> _Instrument:
    options: dict[str, dict[str, Any]] = {
        "gauge": {"multiprocess_mode": metric.over_processes},
        "histogram": {"buckets": metric.buckets},
    }
    labels = [label.name for label in metric.labels]
    instrument = kind(metric.full_name, metric.meaning, labels, registry=registry, **options.get(metric.kind, {}))
    if metric.kind == "counter" and labels:
        # A series that begins with its first event hides that event from rate().
        for values in product(*(label.values for label in metric.labels)):
            instrument.labels(*values)
    return instrument
