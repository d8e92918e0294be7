"""Timeline events: runs, releases, operations, budgets, freezes and quarantines of a span of time, in words."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.store.ledger import Ledger
from fedvit.store.records import TimelineEvent
from fedvit.store.repository import Repository
from fedvit.store.tables import BudgetPeriodRow, ClientRow, OperationRow, ReleaseRow, RunRow
from fedvit.types import LedgerFreeze


class Timeline(Repository):
    """What happened in a span of time."""

    def events(self, since: datetime, until: datetime) -> list[TimelineEvent]:
        """Everything from ``since`` to ``until``, both included, in order."""
        freeze = Ledger(self._sessions).current_freeze()
        with self._read() as session:
            events = [
                *_runs(session, since, until),
                *_releases(session, since, until),
                *_operations(session, since, until),
                *_budgets(session, since, until),
                *([_frozen(freeze)] if freeze is not None and since <= freeze.at <= until else []),
                *_quarantines(session, since, until),
            ]
        return sorted(events, key=lambda event: event.at)


def _runs(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(RunRow).where(RunRow.started_at.between(since, until))):
        yield TimelineEvent(row.started_at, f"{row.run_id} began")
    for row in session.scalars(select(RunRow).where(RunRow.ended_at.between(since, until))):
        assert row.ended_at is not None
        why = f": {row.reason}" if row.reason else ""
        text = f"{row.run_id} {row.status.replace('_', ' ')} after {row.rounds_done} of {row.rounds_total} rounds{why}"
        yield TimelineEvent(row.ended_at, text)


def _releases(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(ReleaseRow).where(ReleaseRow.at.between(since, until))):
        variant = f" as {row.serve_variant}" if row.serve_variant else ""
        yield TimelineEvent(row.at, f"{row.version} released{variant} ({row.reason})")


def _operations(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(OperationRow).where(OperationRow.ended_at.between(since, until))):
        assert row.ended_at is not None
        why = f": {row.error['message']}" if row.error else ""
        yield TimelineEvent(row.ended_at, f"operation {row.operation_id} ({row.kind}) {row.status}{why}")


def _budgets(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(BudgetPeriodRow).where(BudgetPeriodRow.at.between(since, until))):
        text = f"a new privacy budget of epsilon {row.target_epsilon:g} was granted to {row.requested_by}"
        yield TimelineEvent(row.at, text)


def _frozen(freeze: LedgerFreeze) -> TimelineEvent:
    return TimelineEvent(freeze.at, f"the privacy ledger was frozen by {freeze.incident_id}: {freeze.reason}")


def _quarantines(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    query = (
        select(
            ClientRow.quarantined_at,
            ClientRow.quarantine_reason,
            func.count(),
            func.min(ClientRow.client_id),
        )
        .where(ClientRow.quarantined_at.between(since, until))
        .group_by(ClientRow.quarantined_at, ClientRow.quarantine_reason)
    )
    for at, reason, count, first in session.execute(query):
        assert at is not None
        whom = first if count == 1 else f"{count} clients"
        yield TimelineEvent(at, f"{whom} came into quarantine: {reason}")
