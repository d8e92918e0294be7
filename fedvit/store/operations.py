"""Long operations."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.repository import Repository, get_row, insert_row, next_number, record_of
from fedvit.store.tables import OperationRow
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
                return record_of(Operation, known), False
            row = OperationRow(
                operation_id=f"op-{self._sessions.new_id(8)}",
                ordinal=next_number(session, OperationRow.ordinal),
                kind=kind,
                status=OperationStatus.QUEUED.value,
                progress=0.0,
                stage="queued",
                params=dict(params),
                created_at=self._now(),
                cancel_requested=False,
                call_key=call_key,
            )
            return record_of(Operation, insert_row(session, row)), True

    def key_exists(self, call_key: str) -> bool:
        """Whether an operation was created under that key."""
        with self._read() as session:
            return _with_key(session, call_key) is not None

    def get(self, operation_id: str) -> Operation:
        """One operation; raises NotFoundError where there is none."""
        return self._get(Operation, OperationRow, operation_id)

    def all(self, *statuses: OperationStatus, offset: int = 0, limit: int | None = None) -> list[Operation]:
        """Operations, newest first; no statuses filter nothing."""
        query = select(OperationRow).order_by(OperationRow.ordinal.desc()).offset(offset).limit(limit)
        if statuses:
            query = query.where(OperationRow.status.in_([status.value for status in statuses]))
        return self._records(Operation, query)

    def begin(self, operation_id: str) -> Operation:
        """Move an operation to RUNNING, unless it has ended or is to be cancelled."""
        with self._write() as session:
            row = get_row(session, OperationRow, operation_id)
            if not _has_ended(row) and not row.cancel_requested:
                row.status = OperationStatus.RUNNING.value
                row.started_at = row.started_at or self._now()
                row.progress, row.stage = 0.0, "started"
            return record_of(Operation, row)

    def advance(self, operation_id: str, progress: float, stage: str) -> Operation:
        """Record how far an operation has come; ``progress`` from 0 to 1."""
        with self._write() as session:
            row = get_row(session, OperationRow, operation_id)
            if not _has_ended(row):
                row.progress, row.stage = min(max(progress, 0.0), 1.0), stage
            return record_of(Operation, row)

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
            row = get_row(session, OperationRow, operation_id)
            if not _has_ended(row):
                _end(row, status, self._now())
                row.result = None if result is None else dict(result)
                row.error = None if error is None else dict(error)
            return record_of(Operation, row)

    def cancel(self, operation_id: str) -> Operation:
        """Cancel a queued operation at once, ask a running one to end, leave an ended one as it is.

        Raises:
            NotFoundError: no such operation.
        """
        with self._write() as session:
            row = get_row(session, OperationRow, operation_id)
            if not _has_ended(row):
                row.cancel_requested = True
            if row.status == OperationStatus.QUEUED.value:
                _end(row, OperationStatus.CANCELLED, self._now())
            return record_of(Operation, row)


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
