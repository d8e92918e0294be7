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
            events = [*_of_training(session, since, until), *_of_privacy(session, since, until, freeze)]
        return sorted(events, key=lambda event: event.at)


def _of_training(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    """Runs, releases and operations."""
    for run in session.scalars(select(RunRow).where(RunRow.started_at.between(since, until))):
        yield TimelineEvent(run.started_at, f"{run.run_id} began")
    for run in session.scalars(select(RunRow).where(RunRow.ended_at.between(since, until))):
        assert run.ended_at is not None
        why = f": {run.reason}" if run.reason else ""
        text = f"{run.run_id} {run.status.replace('_', ' ')} after {run.rounds_done} of {run.rounds_total} rounds{why}"
        yield TimelineEvent(run.ended_at, text)
    for release in session.scalars(select(ReleaseRow).where(ReleaseRow.at.between(since, until))):
        variant = f" as {release.serve_variant}" if release.serve_variant else ""
        yield TimelineEvent(release.at, f"{release.version} released{variant} ({release.reason})")
    for row in session.scalars(select(OperationRow).where(OperationRow.ended_at.between(since, until))):
        assert row.ended_at is not None
        why = f": {row.error['message']}" if row.error else ""
        yield TimelineEvent(row.ended_at, f"operation {row.operation_id} ({row.kind}) {row.status}{why}")


def _of_privacy(
    session: Session, since: datetime, until: datetime, freeze: LedgerFreeze | None
) -> Iterator[TimelineEvent]:
    """Budgets, the freeze of the ledger, and quarantines."""
    for row in session.scalars(select(BudgetPeriodRow).where(BudgetPeriodRow.at.between(since, until))):
        text = f"a new privacy budget of epsilon {row.target_epsilon:g} was granted to {row.requested_by}"
        yield TimelineEvent(row.at, text)
    if freeze is not None and since <= freeze.at <= until:
        yield TimelineEvent(freeze.at, f"the privacy ledger was frozen by {freeze.incident_id}: {freeze.reason}")
    cause = (ClientRow.quarantined_at, ClientRow.quarantine_reason)
    query = select(*cause, func.count(), func.min(ClientRow.client_id)).group_by(*cause)
    for at, reason, count, first in session.execute(query.where(ClientRow.quarantined_at.between(since, until))):
        assert at is not None
        yield TimelineEvent(at, f"{first if count == 1 else f'{count} clients'} came into quarantine: {reason}")
