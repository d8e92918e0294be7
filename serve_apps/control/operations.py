"""Long operations: how they are asked for, watched and ended."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Response
from pydantic import BaseModel

from fedvit.types import Operation, OperationStatus
from serve_apps.control.services import Services
from serve_apps.problems import documented

KeyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=200, description="A repeated key starts nothing new."),
]


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


def accepted(operation: Operation, response: Response) -> OperationView:
    """The answer 202: the operation, and in ``Location`` where to watch it."""
    response.status_code = 202
    response.headers["Location"] = f"/api/operations/{operation.operation_id}"
    return OperationView.of(operation)


def add_operation_routes(api: FastAPI, services: Services) -> None:
    """Watch and end long operations."""
    store = services.store

    @api.get("/api/operations", tags=["operations"])
    def operations(
        status: Annotated[list[OperationStatus] | None, Query()] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 50,
        offset: Annotated[int, Query(ge=0)] = 0,
    ) -> list[OperationView]:
        """Operations, newest first; ``status`` may be given several times."""
        return [OperationView.of(found) for found in store.operations(*(status or ()), offset=offset, limit=limit)]

    @api.get("/api/operations/{operation_id}", tags=["operations"], responses=documented(404))
    def operation(operation_id: str) -> OperationView:
        """One operation."""
        return OperationView.of(store.operation(operation_id))

    @api.delete("/api/operations/{operation_id}", tags=["operations"], status_code=202, responses=documented(404, 503))
    def cancel(operation_id: str) -> OperationView:
        """End it early: at once while it is queued, at its next step while it runs; harmless after its end."""
        return OperationView.of(services.aggregator().cancel_operation(operation_id))
