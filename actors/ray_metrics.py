"""Copies of fedvit's metrics among Ray's own, for users of the Ray dashboard.

Ray's agent exports them with the prefix ``ray_``, and the dashboard draws them from Prometheus. They are read from the
files that the node's processes write for Prometheus, so that both agree. Series that end with a release are left out:
Ray's series do not end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fedvit.metrics.exposition import lasting_figures


class Gauge(Protocol):
    """The part of ``ray.util.metrics.Gauge`` that is used here."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Set the value of one series."""


def ray_gauge(name: str, meaning: str, labels: tuple[str, ...]) -> Gauge:
    """A gauge of Ray."""
    from ray.util.metrics import Gauge as RayGauge

    gauge: Gauge = RayGauge(name, description=meaning, tag_keys=labels)
    return gauge


class RayMirror:
    """Copies the counters and gauges in ``folder`` to Ray; create it in a process of the cluster.

    Args:
        make: makes a gauge from its name, meaning and labels.
    """

    def __init__(self, folder: Path, make: Callable[[str, str, tuple[str, ...]], Gauge] = ray_gauge) -> None:
        self._folder, self._make = folder, make
        self._gauges: dict[str, Gauge] = {}

    def copy(self) -> None:
        """Set Ray's gauges to the present values; a counter becomes a gauge of its total."""
        for metric, labels, value in lasting_figures(self._folder):
            if metric.full_name not in self._gauges:
                names = tuple(label.name for label in metric.labels)
                self._gauges[metric.full_name] = self._make(metric.full_name, metric.meaning, names)
            self._gauges[metric.full_name].set(value, labels)
