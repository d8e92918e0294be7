"""Routes of the system as a whole: health, metrics, shutdown, and the audit trail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Annotated

from fastapi import FastAPI, Query, Response

from fedvit.api.base import MAX_INTEGER
from fedvit.api.emergency import ShutdownRequest
from fedvit.api.system import AuditView, HealthView, OperationView
from fedvit.metrics.exposition import gauge, render
from fedvit.metrics.training import publish_budget
from fedvit.store.store import Store
from fedvit.types import OperationStatus
from serve_apps.control.http.access import ADMIN, OPERATOR, VIEWER, CallKey, Note, public
from serve_apps.control.http.route import Limit, route
from serve_apps.control.http.write_behind import WriteBehind
from serve_apps.control.services import Services
from serve_apps.control.training.operations import accepted, progress_facts
from serve_apps.control.training.training import progress_view


def add_system_routes(api: FastAPI, services: Services, health_metrics: HealthMetrics) -> None:
    """Add the routes of the system as a whole."""
    _add_health(api, services, health_metrics)
    _add_shutdown(api, services)
    _add_audit_routes(api, services)


def _add_health(api: FastAPI, services: Services, health_metrics: HealthMetrics) -> None:
    @route(api, "GET /healthz", "system", [public()])
    async def healthz() -> dict[str, str]:
        """Whether this replica answers. It waits for no thread, no store and no other request."""
        return {"status": "ok"}

    @route(api, "GET /api/system/health", "system", VIEWER)
    def health() -> HealthView:
        """Whether each part answers, where training stands, what is released."""
        parts = {
            "store": _ailment(services.store.runs.latest),
            "aggregator": _ailment(lambda: services.aggregator().progress()),
            "accountant": _ailment(lambda: services.accountant().budget()),
        }
        release = services.store.releases.current()
        return HealthView(
            status="ok" if all(part == "ok" for part in parts.values()) else "degraded",
            parts=parts,
            training=progress_view(services, services.aggregator().progress()) if parts["aggregator"] == "ok" else None,
            release=release.version if release else None,
        )

    @route(api, "GET /metrics", "system", VIEWER, media_type="text/plain")
    def metrics() -> Response:
        """Prometheus exposition of every process of this node; the budget as it is now, also while nothing trains."""
        health_metrics.publish()
        body, content_type = render(services.metrics_dir)
        return Response(body, headers={"content-type": content_type})


def _ailment(check: Callable[[], object]) -> str:
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "ok"


def _add_shutdown(api: FastAPI, services: Services) -> None:
    @route(api, "POST /api/system/shutdown", "system", OPERATOR, 503, status_code=202)
    def shutdown(request: ShutdownRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the whole system, as `fedvit down` does. The operation has succeeded when all is safe and the end begins.

        Long operations under way are left to the next start. A graceful one can be cancelled while it waits.
        """
        aggregator = services.aggregator()
        note.before = progress_facts(aggregator.progress())
        return accepted(aggregator.submit("shutdown", request.model_dump(), call_key), response, note)


def _add_audit_routes(api: FastAPI, services: Services) -> None:
    @route(api, "GET /api/audit", "audit", ADMIN)
    def audit(
        limit: Limit = 100,
        after: Annotated[int | None, Query(ge=0, le=MAX_INTEGER)] = None,
    ) -> list[AuditView]:
        """Lines of the audit trail, oldest first: those behind sequence ``after``, else the last ones."""
        store = services.store
        entries = store.audit.latest(limit) if after is None else store.audit.entries(after, limit)
        return [AuditView.of(entry.facts, sequence=entry.sequence, at=entry.at) for entry in entries]


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
