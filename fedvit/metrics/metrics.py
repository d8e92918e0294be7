"""Makes the metrics of the :mod:`~fedvit.metrics.catalogue`, and renders them.

On the server every actor and replica of a node writes into ``PROMETHEUS_MULTIPROC_DIR`` and any of them renders the
sum. That variable must be in the environment before ``prometheus_client`` is imported. An edge process does without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from fedvit.metrics.catalogue import BY_NAME, CATALOGUE, Kind, Metric
from fedvit.metrics.node import NodeCollector

MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


_Made = TypeVar("_Made", Counter, Gauge, Histogram)
# A registry takes a name once; whoever asks for it again gets the same.
_made: WeakKeyDictionary[CollectorRegistry, dict[str, Any]] = WeakKeyDictionary()
_lock = threading.RLock()


def counter(name: str, registry: CollectorRegistry | None = REGISTRY) -> Counter:
    """The counter of the catalogue; all its series are there from the beginning, where their labels are known.

    Raises:
        ValueError: the catalogue has no counter of that name.
    """
    metric = _known(name, "counter")

    def make() -> Counter:
        made = Counter(metric.full_name, metric.meaning, _label_names(metric), registry=registry)
        # A series that begins with its first event hides that event from rate().
        for values in _known_labels(metric):
            made.labels(*values)
        return made

    return _once(name, registry, make)


def gauge(name: str, registry: CollectorRegistry | None = REGISTRY) -> Gauge:
    """The gauge of the catalogue. One without labels exports 0 until it is set: ask for it with its first value.

    Raises:
        ValueError: the catalogue has no gauge of that name.
    """
    metric = _known(name, "gauge")
    labels, mode = _label_names(metric), metric.over_processes
    return _once(
        name,
        registry,
        lambda: Gauge(metric.full_name, metric.meaning, labels, registry=registry, multiprocess_mode=mode),
    )


def histogram(name: str, registry: CollectorRegistry | None = REGISTRY) -> Histogram:
    """The histogram of the catalogue.

    Raises:
        ValueError: the catalogue has no histogram of that name.
    """
    metric = _known(name, "histogram")
    labels, buckets = _label_names(metric), metric.buckets
    return _once(
        name,
        registry,
        lambda: Histogram(metric.full_name, metric.meaning, labels, buckets=buckets, registry=registry),
    )


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


def lasting_figures(multiprocess_dir: Path) -> Iterator[tuple[Metric, dict[str, str], float]]:
    """Every counter and gauge of a node, with labels and value, but for those that end with a release."""
    lasting = {metric.full_name: metric for metric in CATALOGUE if metric.kind != "histogram" and not metric.of_release}
    for family in _source(multiprocess_dir, REGISTRY).collect():
        for sample in family.samples:
            if sample.name in lasting:
                yield lasting[sample.name], dict(sample.labels), sample.value


def _source(multiprocess_dir: Path | None, registry: CollectorRegistry) -> CollectorRegistry:
    if multiprocess_dir is None:
        return registry
    merged = CollectorRegistry()
    merged.register(NodeCollector(multiprocess_dir))
    return merged


def _once(name: str, registry: CollectorRegistry | None, make: Callable[[], _Made]) -> _Made:
    if registry is None:
        return make()
    with _lock:
        known = _made.setdefault(registry, {})
        if name not in known:
            known[name] = make()
        made: _Made = known[name]
        return made


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
