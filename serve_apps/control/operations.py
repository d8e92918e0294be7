"""Long operations: how they are asked for, watched and ended."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import FastAPI, Query, Response
from pydantic import BaseModel

from fedvit.types import Operation, OperationStatus, TrainingProgress
from serve_apps.control.access import OPERATOR, VIEWER, AuditNote, Note
from serve_apps.control.schemas import Offset
from serve_apps.control.services import Services
from serve_apps.problems import documented


class OperationView(BaseModel):
    """A long operation; ``progress`` runs from 0 to 1."""

    operation_id: str
    kind: str
    status: OperationStatus
    progress: float
    stage: str
    params: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    cancel_requested: bool

    @classmethod
    def of(cls, operation: Operation) -> OperationView:
        """The view of an operation."""
        return cls(**{name: getattr(operation, name) for name in cls.model_fields})


def accepted(operation: Operation, response: Response, note: AuditNote) -> OperationView:
    """The answer 202: the operation, and in ``Location`` where to watch it."""
    note.after = _facts(operation)
    response.status_code = 202
    response.headers["Location"] = f"/api/operations/{operation.operation_id}"
    return OperationView.of(operation)


def standing_of(progress: TrainingProgress) -> dict[str, Any]:
    """What the audit trail keeps of where training stands."""
    return {name: getattr(progress, name) for name in ("run_id", "status", "phase", "rounds_done")}


def _facts(operation: Operation) -> dict[str, Any]:
    return {name: getattr(operation, name) for name in ("operation_id", "kind", "status", "cancel_requested")}


def add_operation_routes(api: FastAPI, services: Services) -> None:
    """PeriodicTasks and end long operations."""
    store = services.store

    @api.get("/api/operations", tags=["operations"], dependencies=VIEWER)
    def operations(
        status: Annotated[list[OperationStatus] | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        offset: Offset = 0,
    ) -> list[OperationView]:
        """Operations, newest first; ``status`` may be given several times."""
        return [OperationView.of(found) for found in store.operations(*(status or ()), offset=offset, limit=limit)]

    @api.get("/api/operations/{operation_id}", tags=["operations"], dependencies=VIEWER, responses=documented(404))
    def operation(operation_id: str) -> OperationView:
        """One operation."""
        return OperationView.of(store.operation(operation_id))

    @api.delete(
        "/api/operations/{operation_id}",
        tags=["operations"],
        status_code=202,
        dependencies=OPERATOR,
        responses=documented(404, 503),
    )
    def cancel(operation_id: str, note: Note) -> OperationView:
        """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
        note.before = _facts(store.operation(operation_id))
        cancelled = services.aggregator().cancel_operation(operation_id)
        note.after = _facts(cancelled)
        return OperationView.of(cancelled)
