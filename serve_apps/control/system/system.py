"""Routes of the system as a whole: health, metrics, shutdown, and the audit trail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import FastAPI, Query, Response

from fedvit.api.base import MAX_INTEGER
from fedvit.api.emergency import ShutdownRequest
from fedvit.api.operations import OperationView
from fedvit.api.system import AuditView, HealthView
from fedvit.metrics.exposition import render
from serve_apps.control.http.access import ADMIN, OPERATOR, VIEWER, CallKey, Note, public
from serve_apps.control.http.parameters import Limit
from serve_apps.control.http.route import route
from serve_apps.control.services import Services
from serve_apps.control.system.health_metrics import HealthMetrics
from serve_apps.control.training.operations import accepted, progress_facts
from serve_apps.control.training.training import progress_view


def add_system_routes(api: FastAPI, services: Services, health_metrics: HealthMetrics) -> None:
    """Add the routes of the system as a whole."""
    _add_health(api, services, health_metrics)
    _add_shutdown(api, services)
    _add_audit_routes(api, services)


def _add_health(api: FastAPI, services: Services, health_metrics: HealthMetrics) -> None:
    @route(api, "GET /healthz", "system", [public()])
    def healthz() -> dict[str, str]:
        """Whether this replica answers."""
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
