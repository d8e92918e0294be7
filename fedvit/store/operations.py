"""Long operations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.database import Repository
from fedvit.store.tables import OperationRow, record_of
from fedvit.types import Operation, OperationStatus


class Operations(Repository):
    """Long operations, from their request to their end. The first end of an operation stays."""

    def create(self, kind: str, params: Mapping[str, Any], *, call_key: str | None = None) -> tuple[Operation, bool]:
        """A queued operation and True; or the one that was created under the same key, and False.

        Raises:
            ConflictError: the key was used for another request.
        """
        with self._write() as session:
            known = _with_key(session, call_key)
            if known is not None:
                if (known.kind, known.params) != (kind, dict(params)):
                    raise ConflictError(
                        f"The call key of {known.operation_id} was used for another request.", cure="Choose a new key."
                    )
                return _to_operation(known), False
            row = OperationRow(
                operation_id=f"op-{self._sessions.new_id(8)}",
                ordinal=1 + (session.scalar(select(func.max(OperationRow.ordinal))) or 0),
                kind=kind,
                status=OperationStatus.QUEUED.value,
                progress=0.0,
                stage="queued",
                params=dict(params),
                created_at=self._now(),
                cancel_requested=False,
                call_key=call_key,
            )
            session.add(row)
            session.flush()
            return _to_operation(row), True

    def key_exists(self, call_key: str) -> bool:
        """Whether an operation was created under that key."""
        with self._read() as session:
            return _with_key(session, call_key) is not None

    def get(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            NotFoundError: no such operation.
        """
        with self._read() as session:
            return _to_operation(_row(session, operation_id))

    def all(self, *statuses: OperationStatus, offset: int = 0, limit: int | None = None) -> list[Operation]:
        """Operations, newest first; no statuses filter nothing."""
        query = select(OperationRow).order_by(OperationRow.ordinal.desc()).offset(offset).limit(limit)
        if statuses:
            query = query.where(OperationRow.status.in_([status.value for status in statuses]))
        with self._read() as session:
            return [_to_operation(row) for row in session.scalars(query)]

    def begin(self, operation_id: str) -> Operation:
        """Move an operation to RUNNING, unless it has ended or is to be cancelled."""
        with self._write() as session:
            row = _row(session, operation_id)
            if not _has_ended(row) and not row.cancel_requested:
                row.status = OperationStatus.RUNNING.value
                row.started_at = row.started_at or self._now()
                row.progress, row.stage = 0.0, "started"
            return _to_operation(row)

    def advance(self, operation_id: str, progress: float, stage: str) -> Operation:
        """Record how far an operation has come; ``progress`` from 0 to 1."""
        with self._write() as session:
            row = _row(session, operation_id)
            if not _has_ended(row):
                row.progress, row.stage = min(max(progress, 0.0), 1.0), stage
            return _to_operation(row)

    def end(
        self,
        operation_id: str,
        status: OperationStatus,
        *,
        result: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
    ) -> Operation:
        """Give an operation its end, unless it has one."""
        with self._write() as session:
            row = _row(session, operation_id)
            if not _has_ended(row):
                _end(row, status, self._now())
                row.result = None if result is None else dict(result)
                row.error = None if error is None else dict(error)
            return _to_operation(row)

    def cancel(self, operation_id: str) -> Operation:
        """Cancel a queued operation at once, ask a running one to end, leave an ended one as it is.

        Raises:
            NotFoundError: no such operation.
        """
        with self._write() as session:
            row = _row(session, operation_id)
            if not _has_ended(row):
                row.cancel_requested = True
            if row.status == OperationStatus.QUEUED.value:
                _end(row, OperationStatus.CANCELLED, self._now())
            return _to_operation(row)


def _has_ended(row: OperationRow) -> bool:
    return OperationStatus(row.status).ended


def _end(row: OperationRow, status: OperationStatus, at: datetime) -> None:
    row.status = row.stage = status.value
    row.ended_at = at
    if status is OperationStatus.SUCCEEDED:
        row.progress = 1.0


def _with_key(session: Session, call_key: str | None) -> OperationRow | None:
    if call_key is None:
        return None
    return session.scalar(select(OperationRow).where(OperationRow.call_key == call_key))


def _row(session: Session, operation_id: str) -> OperationRow:
    row = session.get(OperationRow, operation_id)
    if row is None:
        raise NotFoundError(f"There is no operation {operation_id!r}.", cure="See GET /api/operations.")
    return row


def _to_operation(row: OperationRow) -> Operation:
    return record_of(Operation, row, status=OperationStatus(row.status))
