"""Training runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.errors import ConflictError
from fedvit.store.repository import Repository, get_row, insert_row, next_number, record_of
from fedvit.store.tables import RunRow
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
            ordinal = next_number(session, RunRow.ordinal)
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
            return record_of(Run, insert_row(session, row))

    def get(self, run_id: str) -> Run:
        """One run.

        Raises:
            NotFoundError: no such run.
        """
        return self._get(Run, RunRow, run_id)

    def all(self) -> list[Run]:
        """All runs, oldest first."""
        return self._records(Run, select(RunRow).order_by(RunRow.ordinal))

    def latest(self) -> Run | None:
        """The run begun last, or None."""
        return self._first(Run, select(RunRow).order_by(RunRow.ordinal.desc()))

    def set_status(self, run_id: str, status: RunStatus, reason: str | None = None) -> Run:
        """Move a run to ``status``; every status but RUNNING sets ``ended_at``, RUNNING clears it.

        Raises:
            NotFoundError: no such run.
            ConflictError: ``status`` is resumable, and another run is so already.
        """
        with self._write() as session:
            row = get_row(session, RunRow, run_id)
            if status.resumable:
                _check_none_resumable(session, except_for=run_id)
            row.status, row.reason = status.value, reason
            row.ended_at = None if status is RunStatus.RUNNING else self._now()
            return record_of(Run, row)


def _check_none_resumable(session: Session, *, except_for: str | None) -> None:
    for run_id in session.scalars(select(RunRow.run_id).where(RunRow.status.in_(RESUMABLE))):
        if run_id != except_for:
            raise ConflictError(f"{run_id} is not finished.", cure="Continue it, or end it before another run goes on.")
