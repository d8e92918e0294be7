"""Metrics of the release that serves: series that begin and end with it.

A quantile over a raw histogram covers the time since its beginning, so each release begins one; another variant of the
same version counts as another release. ``prometheus_client`` cannot end a series that several processes write.
Therefore a server's replica keeps the series of its release in files of its own, and removes them when it serves
another.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Protocol

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.registry import Collector
from prometheus_client.utils import INF, floatToGoString

from fedvit.metrics.catalogue import BY_NAME
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE, counter, histogram
from fedvit.metrics.node import locked, release_file

DURATION, ANSWERS = "inference_duration_seconds", "predictions_total"


class ReleaseMetrics(Collector):
    """Latency, and with ``count_answers`` the predicted classes, of the release that this process serves.

    Thread-safe. In multiprocess mode the series are in the folder, otherwise in ``registry``.
    """

    def __init__(self, registry: CollectorRegistry, *, count_answers: bool = False) -> None:
        folder = os.environ.get(MULTIPROCESS_VARIABLE)
        self._folder = Path(folder) if folder else None
        self._count_answers = count_answers
        self._lock = threading.Lock()
        self._served: tuple[str, int] | None = None
        self._series: _Series | None = None
        registry.register(self)

    def serve(self, model_version: str, sequence: int) -> None:
        """Begin the series of this release, if it is another one; ``sequence`` rises with every switch."""
        with self._lock:
            if self._served == (model_version, sequence):
                return
            if self._series is not None:
                self._series.end()
            self._served = model_version, sequence
            if self._folder is None:
                self._series = _InMemory(model_version, self._count_answers)
            else:
                self._series = _InFiles(self._folder, model_version, sequence, self._count_answers)

    def answered(self, sequence: int, duration_s: float, class_index: int) -> None:
        """Count one prediction, unless its release has been replaced meanwhile."""
        with self._lock:
            if self._series is not None and self._served is not None and self._served[1] == sequence:
                self._series.observe(duration_s, class_index)

    def collect(self) -> Iterable[Metric]:
        """Series of this process that are not in files."""
        with self._lock:
            return self._series.collect() if self._series else []


class _Series(Protocol):
    def observe(self, duration_s: float, class_index: int) -> None: ...
    def collect(self) -> Iterable[Metric]: ...
    def end(self) -> None: ...


class _InMemory:
    def __init__(self, model_version: str, count_answers: bool) -> None:
        self._version = model_version
        self._durations = histogram(DURATION, registry=None)
        self._durations.labels(model_version)
        self._answers = counter(ANSWERS, registry=None) if count_answers else None

    def observe(self, duration_s: float, class_index: int) -> None:
        self._durations.labels(self._version).observe(duration_s)
        if self._answers is not None:
            self._answers.labels(self._version, str(class_index)).inc()

    def collect(self) -> Iterable[Metric]:
        return [*self._durations.collect(), *(self._answers.collect() if self._answers else ())]

    def end(self) -> None:
        """Nothing to do: the series go with this object."""


class _InFiles:
    def __init__(self, folder: Path, model_version: str, sequence: int, count_answers: bool) -> None:
        self._folder, self._version = folder, model_version
        self._bounds = (*BY_NAME[DURATION].buckets, INF)
        self._le = {bound: str(floatToGoString(bound)) for bound in self._bounds}  # type: ignore[no-untyped-call]
        owner = secrets.token_hex(8)
        # Under the lock of the folder, so that no process removes a file before it is locked.
        with locked(folder):
            self._durations = _File(folder / release_file("histogram", owner, sequence))
            self._answers = _File(folder / release_file("counter", owner, sequence)) if count_answers else None
        self._durations.add(self._key(DURATION, "_sum"), 0.0)
        for bound in self._bounds:
            self._durations.add(self._key(DURATION, "_bucket", le=self._le[bound]), 0.0)

    def observe(self, duration_s: float, class_index: int) -> None:
        bound = self._bounds[bisect_left(self._bounds, duration_s)]
        self._durations.add(self._key(DURATION, "_sum"), duration_s)
        self._durations.add(self._key(DURATION, "_bucket", le=self._le[bound]), 1.0)
        if self._answers is not None:
            self._answers.add(self._key(ANSWERS, "", label=str(class_index)), 1.0)

    def collect(self) -> Iterable[Metric]:
        return []

    def end(self) -> None:
        with locked(self._folder):
            for file in (self._durations, self._answers):
                if file is not None:
                    file.remove()

    def _key(self, name: str, suffix: str, **labels: str) -> str:
        metric = BY_NAME[name]
        labels = {"model_version": self._version, **labels}
        # As the library writes it: the family of a counter is named without its suffix.
        family = metric.full_name.removesuffix("_total")
        return mmap_key(family, metric.full_name + suffix, list(labels), list(labels.values()), metric.meaning)


class _File:
    """A file of values by key, locked while this process lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values = MmapedDict(str(path))  # type: ignore[no-untyped-call]
        self._locked: IO[bytes] = path.open("rb")
        fcntl.flock(self._locked, fcntl.LOCK_EX)

    def add(self, key: str, amount: float) -> None:
        value, _ = self._values.read_value(key)  # type: ignore[no-untyped-call]
        self._values.write_value(key, value + amount, 0.0)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._values.close()  # type: ignore[no-untyped-call]
        self._locked.close()
