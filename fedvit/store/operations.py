"""Long operations as rows. Functions of an open session."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.tables import OperationRow
from fedvit.types import Operation, OperationStatus, utc_now


def create_operation(
    session: Session, kind: str, params: Mapping[str, Any], call_key: str | None
) -> tuple[Operation, bool]:
    """A queued operation and True; or the one that was created under the same key, and False.

    Raises:
        ConflictError: the key was used for something else.
    """
    if call_key is not None:
        known = session.scalar(select(OperationRow).where(OperationRow.call_key == call_key))
        if known is not None:
            return _same(known, kind, params), False
    row = OperationRow(
        operation_id=f"op-{secrets.token_hex(8)}",
        ordinal=1 + (session.scalar(select(func.max(OperationRow.ordinal))) or 0),
        kind=kind,
        status=OperationStatus.QUEUED.value,
        progress=0.0,
        stage="queued",
        params=dict(params),
        created_at=utc_now(),
        cancel_requested=False,
        call_key=call_key,
    )
    session.add(row)
    session.flush()
    return _to_operation(row), True


def key_exists(session: Session, call_key: str) -> bool:
    """Whether an operation was created under that key."""
    query = select(OperationRow.operation_id).where(OperationRow.call_key == call_key)
    return session.scalar(query) is not None


def operation(session: Session, operation_id: str) -> Operation:
    """One operation.

    Raises:
        NotFoundError: no such operation.
    """
    return _to_operation(_row(session, operation_id))


def operations(
    session: Session, statuses: tuple[OperationStatus, ...], offset: int, limit: int | None
) -> list[Operation]:
    """Operations, newest first; no statuses filter nothing."""
    query = select(OperationRow).order_by(OperationRow.ordinal.desc()).offset(offset).limit(limit)
    if statuses:
        query = query.where(OperationRow.status.in_([status.value for status in statuses]))
    return [_to_operation(row) for row in session.scalars(query)]


def begin_operation(session: Session, operation_id: str) -> Operation:
    """Queued (or interrupted while running) to running; one that has ended, or is to be cancelled, stays as it is."""
    row = _row(session, operation_id)
    if not OperationStatus(row.status).ended and not row.cancel_requested:
        row.status = OperationStatus.RUNNING.value
        row.started_at = row.started_at or utc_now()
        row.progress, row.stage = 0.0, "started"
    return _to_operation(row)


def advance_operation(session: Session, operation_id: str, progress: float, stage: str) -> Operation:
    """Say how far a running operation has come."""
    row = _row(session, operation_id)
    if not OperationStatus(row.status).ended:
        row.progress, row.stage = min(max(progress, 0.0), 1.0), stage
    return _to_operation(row)


def end_operation(
    session: Session,
    operation_id: str,
    status: OperationStatus,
    result: Mapping[str, Any] | None,
    error: Mapping[str, Any] | None,
) -> Operation:
    """Give an operation its end; the first end stays."""
    row = _row(session, operation_id)
    if OperationStatus(row.status).ended:
        return _to_operation(row)
    row.status = status.value
    row.ended_at = utc_now()
    row.result = None if result is None else dict(result)
    row.error = None if error is None else dict(error)
    row.stage = status.value
    if status is OperationStatus.SUCCEEDED:
        row.progress = 1.0
    return _to_operation(row)


def cancel_operation(session: Session, operation_id: str) -> Operation:
    """Cancel a queued operation at once, ask a running one to end, leave an ended one as it is.

    Raises:
        NotFoundError: no such operation.
    """
    row = _row(session, operation_id)
    if not OperationStatus(row.status).ended:
        row.cancel_requested = True
    if row.status == OperationStatus.QUEUED.value:
        return end_operation(session, operation_id, OperationStatus.CANCELLED, None, None)
    return _to_operation(row)


def _same(row: OperationRow, kind: str, params: Mapping[str, Any]) -> Operation:
    if (row.kind, row.params) != (kind, dict(params)):
        raise ConflictError(
            f"The call key of {row.operation_id} was used for another request.", cure="Choose a new key."
        )
    return _to_operation(row)


def _row(session: Session, operation_id: str) -> OperationRow:
    row = session.get(OperationRow, operation_id)
    if row is None:
        raise NotFoundError(f"There is no operation {operation_id!r}.", cure="See GET /api/operations.")
    return row


def _to_operation(row: OperationRow) -> Operation:
    return Operation(
        operation_id=row.operation_id,
        kind=row.kind,
        status=OperationStatus(row.status),
        progress=row.progress,
        stage=row.stage,
        params=row.params,
        created_at=row.created_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        result=row.result,
        error=row.error,
        cancel_requested=row.cancel_requested,
    )
