"""What the state records of a span of time: runs, releases, operations, quarantines. Functions of an open session."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.store.ledger import frozen
from fedvit.store.records import RoundTally, TimelineEvent
from fedvit.store.runs import RESUMABLE
from fedvit.store.tables import (
    BudgetPeriodRow,
    ClientRoundRow,
    ClientRow,
    OperationRow,
    ReleaseRow,
    RoundRow,
    RunRow,
)


def timeline_events(session: Session, since: datetime, until: datetime) -> list[TimelineEvent]:
    """Everything from ``since`` to ``until``, both included, in order."""
    found = [
        *_runs(session, since, until),
        *_releases(session, since, until),
        *_operations(session, since, until),
        *_privacy(session, since, until),
        *_quarantines(session, since, until),
    ]
    return sorted(found, key=lambda happening: happening.at)


def round_tally(session: Session, since: datetime, until: datetime) -> RoundTally:
    """What became of the rounds that began, or were committed, from ``since`` to ``until``."""
    committed = RoundRow.committed_at.between(since, until)
    rounds = select(func.count()).select_from(RoundRow)
    open_ = (
        rounds.join(RunRow, RunRow.run_id == RoundRow.run_id)
        .where(RoundRow.opened_at.between(since, until), RoundRow.committed_at.is_(None))
        .where
    )
    answers = (
        select(func.count(), func.count(ClientRoundRow.error))
        .join_from(
            ClientRoundRow,
            RoundRow,
            (ClientRoundRow.run_id == RoundRow.run_id) & (ClientRoundRow.round_index == RoundRow.round_index),
        )
        .where(committed)
    )
    given, refused = session.execute(answers).one()
    return RoundTally(
        committed=session.scalar(rounds.where(committed)) or 0,
        under_way=session.scalar(open_(RunRow.status.in_(RESUMABLE))) or 0,
        lost=session.scalar(open_(RunRow.status.not_in(RESUMABLE))) or 0,
        answers=given,
        refused=refused,
    )


def quarantined_between(session: Session, since: datetime, until: datetime) -> list[str]:
    """The clients that came into quarantine then, sorted; those that are out of it again are not on record."""
    query = select(ClientRow.client_id).where(ClientRow.quarantined_at.between(since, until))
    return list(session.scalars(query.order_by(ClientRow.client_id)))


def _runs(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(RunRow).where(RunRow.started_at.between(since, until))):
        yield TimelineEvent(row.started_at, f"{row.run_id} began")
    for row in session.scalars(select(RunRow).where(RunRow.ended_at.between(since, until))):
        assert row.ended_at is not None
        why = f": {row.reason}" if row.reason else ""
        told = f"{row.run_id} {row.status.replace('_', ' ')} after {row.rounds_done} of {row.rounds_total} rounds{why}"
        yield TimelineEvent(row.ended_at, told)


def _releases(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(ReleaseRow).where(ReleaseRow.at.between(since, until))):
        variant = f" as {row.serve_variant}" if row.serve_variant else ""
        yield TimelineEvent(row.at, f"{row.version} released{variant} ({row.reason})")


def _operations(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(OperationRow).where(OperationRow.ended_at.between(since, until))):
        assert row.ended_at is not None
        why = f": {row.error['message']}" if row.error else ""
        yield TimelineEvent(row.ended_at, f"operation {row.operation_id} ({row.kind}) {row.status}{why}")


def _privacy(session: Session, since: datetime, until: datetime) -> Iterator[TimelineEvent]:
    for row in session.scalars(select(BudgetPeriodRow).where(BudgetPeriodRow.at.between(since, until))):
        told = f"a new privacy budget of epsilon {row.target_epsilon:g} was granted to {row.requested_by}"
        yield TimelineEvent(row.at, told)
    freeze = frozen(session)
    if freeze is not None and since <= freeze.at <= until:
        yield TimelineEvent(freeze.at, f"the privacy ledger was frozen by {freeze.incident_id}: {freeze.reason}")


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
