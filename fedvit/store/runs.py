"""Training runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError, NotFoundError
from fedvit.store.database import Repository
from fedvit.store.tables import RunRow, record_of
from fedvit.types import Run, RunStatus

RESUMABLE = [status.value for status in RunStatus if status.resumable]


class Runs(Repository):
    """Training runs. At most one of them can be continued."""

    def create(
        self,
        *,
        rounds_total: int,
        noise_multiplier: float,
        config: Mapping[str, Any],
        config_digest: str,
        data_digest: str,
    ) -> Run:
        """Begin the next run, ``run-0001`` and so on. ``config`` holds JSON types only.

        Raises:
            ConflictError: another run can still be continued.
        """
        with self._write() as session:
            _check_none_resumable(session, except_for=None)
            ordinal = 1 + (session.scalar(select(func.max(RunRow.ordinal))) or 0)
            row = RunRow(
                run_id=f"run-{ordinal:04d}",
                ordinal=ordinal,
                status=RunStatus.RUNNING.value,
                rounds_total=rounds_total,
                rounds_done=0,
                noise_multiplier=noise_multiplier,
                config=dict(config),
                config_digest=config_digest,
                data_digest=data_digest,
                started_at=self._now(),
            )
            session.add(row)
            session.flush()
            return _to_run(row)

    def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFoundError: no such run.
        """
        with self._read() as session:
            return _to_run(run_row(session, run_id))

    def all(self) -> list[Run]:
        """All runs, oldest first."""
        with self._read() as session:
            return [_to_run(row) for row in session.scalars(select(RunRow).order_by(RunRow.ordinal))]

    def latest(self) -> Run | None:
        """The run begun last, or None."""
        with self._read() as session:
            row = session.scalar(select(RunRow).order_by(RunRow.ordinal.desc()).limit(1))
            return None if row is None else _to_run(row)

    def set_status(self, run_id: str, status: RunStatus, reason: str | None = None) -> Run:
        """Move a run to ``status``; every status but RUNNING sets ``ended_at``, RUNNING clears it.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``status`` is resumable, and another run is so already.
        """
        with self._write() as session:
            row = run_row(session, run_id)
            if status.resumable:
                _check_none_resumable(session, except_for=run_id)
            row.status = status.value
            row.reason = reason
            row.ended_at = None if status is RunStatus.RUNNING else self._now()
            return _to_run(row)


def run_row(session: Session, run_id: str) -> RunRow:
    """The row of one run.

    Raises:
        NotFoundError: no such run.
    """
    row = session.get(RunRow, run_id)
    if row is None:
        raise NotFoundError(f"There is no run {run_id!r}.", cure="Runs are named like run-0001.")
    return row


def _check_none_resumable(session: Session, *, except_for: str | None) -> None:
    others = session.scalars(select(RunRow.run_id).where(RunRow.status.in_(RESUMABLE)))
    for run_id in others:
        if run_id != except_for:
            raise ConflictError(f"{run_id} is not finished.", cure="Continue it, or end it before another run goes on.")


def _to_run(row: RunRow) -> Run:
    return record_of(Run, row, status=RunStatus(row.status))
