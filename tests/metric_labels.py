"""Label sets of the metrics of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

from fedvit.metrics.catalogue import Metric


def sample_labels(metric: Metric) -> Iterator[dict[str, str]]:
    """The label sets of a metric that are known in advance, with "0" for a label whose values are not."""
    sets: list[dict[str, str]] = [{}]
    for label in metric.labels:
        sets = [{**known, label.name: value} for known in sets for value in label.values or ("0",)]
    yield from sets
