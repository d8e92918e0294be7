"""Routes of long operations."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Response

from fedvit.api.system import OperationView
from fedvit.types import Operation, OperationStatus, TrainingProgress
from serve_apps.control.http.access import OPERATOR, VIEWER, AuditNote, Note
from serve_apps.control.http.route import Limit, Offset, route
from serve_apps.control.services import Services


def accepted(operation: Operation, response: Response, note: AuditNote) -> OperationView:
    """The answer 202: the operation, and in ``Location`` where to watch it."""
    note.after = _facts(operation)
    response.status_code = 202
    response.headers["Location"] = f"/api/operations/{operation.operation_id}"
    return OperationView.of(operation)


def progress_facts(progress: TrainingProgress) -> dict[str, Any]:
    """The training progress as the audit trail keeps it."""
    return {name: getattr(progress, name) for name in ("run_id", "status", "phase", "rounds_done")}


def _facts(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in ("operation_id", "kind", "status", "cancel_requested")}


def add_operation_routes(api: FastAPI, services: Services) -> None:
    """Add the routes that list, show and cancel long operations."""
    store = services.store

    @route(api, "GET /api/operations", "operations", VIEWER)
    def operations(
        status: Annotated[list[OperationStatus] | None, Query()] = None,
        limit: Limit = 50,
        offset: Offset = 0,
    ) -> list[OperationView]:
        """Operations, newest first; ``status`` may be given several times."""
        return [OperationView.of(row) for row in store.operations.all(*(status or ()), offset=offset, limit=limit)]

    @route(api, "GET /api/operations/{operation_id}", "operations", VIEWER, 404)
    def operation(operation_id: str) -> OperationView:
        """One operation."""
        return OperationView.of(store.operations.get(operation_id))

    @route(api, "DELETE /api/operations/{operation_id}", "operations", OPERATOR, 404, 503, status_code=202)
    def cancel(operation_id: str, note: Note) -> OperationView:
        """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
        note.before = _facts(store.operations.get(operation_id))
        cancelled = services.aggregator().cancel_operation(operation_id)
        note.after = _facts(cancelled)
        return OperationView.of(cancelled)
