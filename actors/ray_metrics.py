"""Our figures among Ray's own metrics, for whoever looks at the cluster through Ray.

Ray's agent exports them with the prefix ``ray_``, and its dashboard draws what Prometheus has of them. They are taken
from what the node's processes wrote, so both say the same. Series that end with a release are left out: Ray's do not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from fedvit.metrics.metrics import lasting_figures


class Gauge(Protocol):
    """As much of ``ray.util.metrics.Gauge`` as is needed."""

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        """Set the value of one series."""


def ray_gauge(name: str, meaning: str, labels: tuple[str, ...]) -> Gauge:
    """A gauge of Ray's."""
    from ray.util.metrics import Gauge as RayGauge

    gauge: Any = RayGauge(name, description=meaning, tag_keys=labels)
    return gauge  # type: ignore[no-any-return]


class RayMirror:
    """Repeats the lasting counters and gauges of ``folder``; make it in a process of the cluster.

    Args:
        make: makes a gauge by name, meaning and labels.
    """

    def __init__(self, folder: Path, make: Callable[[str, str, tuple[str, ...]], Gauge] = ray_gauge) -> None:
        self._folder, self._make = folder, make
        self._gauges: dict[str, Gauge] = {}

    def repeat(self) -> None:
        """Tell Ray how things are now. Counters are told as what they have come to."""
        for metric, labels, value in lasting_figures(self._folder):
            if metric.full_name not in self._gauges:
                names = tuple(label.name for label in metric.labels)
                self._gauges[metric.full_name] = self._make(metric.full_name, metric.meaning, names)
            self._gauges[metric.full_name].set(value, labels)
