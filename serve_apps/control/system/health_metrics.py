"""Health metrics of the parts behind the control API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from fedvit.metrics.exposition import gauge
from fedvit.metrics.training import publish_budget
from fedvit.store.store import Store
from fedvit.types import OperationStatus
from serve_apps.control.http.write_behind import WriteBehind
from serve_apps.control.services import Services

# A scrape must not wait for an actor that hangs: what does not answer within it is not healthy.
ANSWER_S = 1.0
# One a process, however many applications it builds.
_HEALTHY = gauge("component_healthy")
_STORE_BYTES = gauge("store_bytes")
_DEPTH = gauge("queue_depth")
_INCIDENTS = gauge("incidents_open")


class HealthMetrics:
    """Checks each part, all at the same time, and exports the results.

    Args:
        buffers: the buffers of telemetry in front of the store.
    """

    def __init__(self, services: Services, buffers: Sequence[WriteBehind], answer_s: float = ANSWER_S) -> None:
        self._buffers, self._store, self._answer_s = buffers, services.store, answer_s
        self._checks: dict[str, Callable[[], object]] = {
            "store": lambda: _publish_store(services.store),
            "registry": lambda: _check_artifacts(services.store),
            "accountant": lambda: publish_budget(services.accountant().budget()),
            "aggregator": lambda: services.aggregator().progress(),
            "client_proxies": lambda: _check_proxies(services),
        }
        self._running: dict[str, Future[object]] = {}
        self._pool = ThreadPoolExecutor(len(self._checks), thread_name_prefix="health-metrics")

    def publish(self) -> None:
        """Export the present health; it takes at most ``answer_s``."""
        # A check that is still running is not started again.
        for name, check in self._checks.items():
            if name not in self._running:
                self._running[name] = self._pool.submit(check)
        wait(self._running.values(), timeout=self._answer_s)
        for name, answer in list(self._running.items()):
            done = answer.done()
            _HEALTHY.labels(name).set(done and answer.exception() is None)
            if done:
                self._running.pop(name, None)
        _DEPTH.labels("telemetry").set(sum(buffer.pending for buffer in self._buffers))


def _publish_store(store: Store) -> None:
    _DEPTH.labels("operations").set(len(store.operations.all(OperationStatus.QUEUED, OperationStatus.RUNNING)))
    for severity, count in store.incidents.count_open().items():
        _INCIDENTS.labels(severity.value).set(count)
    _STORE_BYTES.set(sum(path.stat().st_size for path in store.home.glob("state.db*")))


def _check_artifacts(store: Store) -> None:
    """Raises NotFoundError where an artifact of the release is missing."""
    release = store.releases.current()
    for digest in release.artifacts.values() if release else ():
        store.blobs.size(digest)


def _check_proxies(services: Services) -> None:
    silent = [name for name, alive in services.aggregator().proxies_alive().alive.items() if not alive]
    if silent:
        raise ConnectionError(", ".join(silent))
