"""Request counters, latency percentiles and resource use of an inference process."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from fedvit.clock import SYSTEM_CLOCK
from fedvit.metrics.exposition import counter, gauge
from fedvit.metrics.releases import ReleaseMetrics
from fedvit.ports import ClockPort
from fedvit.wire.manifest import ReleaseManifest

WINDOW = 1000
_MIN_CPU_SPAN_S = 0.2


class RequestStats:
    """Counts requests for health answers and for Prometheus; thread-safe.

    ``count_answers`` counts the predicted classes, too: for drift, on a server; never on a vehicle.
    """

    def __init__(self, registry: CollectorRegistry, *, count_answers: bool = False) -> None:
        self._release = ReleaseMetrics(registry, count_answers=count_answers)
        self._requests = counter("inference_requests_total", registry)
        self._waiting = gauge("queue_depth", registry).labels("images")
        self._lock = threading.Lock()
        self._window_s: deque[float] = deque(maxlen=WINDOW)
        self.requests_total = 0
        self.errors_total = 0

    def serves(self, manifest: ReleaseManifest) -> None:
        """Export the series of this release from now on, and of no other."""
        self._release.serve(manifest.version, manifest.sequence)

    def waiting(self, images: int) -> None:
        """Set the number of images in progress."""
        self._waiting.set(images)

    def succeeded(self, sequence: int, duration_s: float, class_index: int) -> None:
        """Count one request that was answered by the release with this sequence number."""
        self._release.answered(sequence, duration_s, class_index)
        self._requests.labels("ok").inc()
        with self._lock:
            self.requests_total += 1
            self._window_s.append(duration_s)

    def failed(self, outcome: str) -> None:
        """Count one request without a prediction."""
        self._requests.labels(outcome).inc()
        with self._lock:
            self.requests_total += 1
            self.errors_total += 1

    def latency_ms(self) -> dict[str, float | None]:
        """Percentiles of the last ``WINDOW`` answered requests, milliseconds; None before the first."""
        with self._lock:
            window = list(self._window_s)
        names = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
        if not window:
            return dict.fromkeys(names)
        return {name: round(float(np.percentile(window, q)) * 1000, 3) for name, q in names.items()}


class ProcessMeter:
    """CPU and memory of this process."""

    def __init__(self, clock: ClockPort = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._started = clock.monotonic()
        self._last = (self._started, time.process_time())
        self._cpu_percent = 0.0

    @property
    def uptime_s(self) -> float:
        """Seconds since the meter was made."""
        return self._clock.monotonic() - self._started

    def cpu_percent(self) -> float:
        """Share of one core since the last call (100 is one whole core)."""
        now, used = self._clock.monotonic(), time.process_time()
        span = now - self._last[0]
        if span >= _MIN_CPU_SPAN_S:
            self._cpu_percent = round(100 * (used - self._last[1]) / span, 1)
            self._last = (now, used)
        return self._cpu_percent

    @staticmethod
    def memory_bytes() -> int | None:
        """Resident memory; None where there is no /proc."""
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except OSError:
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")
