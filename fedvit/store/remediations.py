"""What the system did about alerts by itself, as rows: at most once a firing. Functions of an open session."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.api.incidents import RemediationOutcome
from fedvit.store.fleet import count_clients
from fedvit.store.records import Remediation, Standing
from fedvit.store.tables import ClientRow, RemediationRow
from fedvit.types import RemediationAction

Check: TypeAlias = Callable[[Standing], str | None]


def claim(session: Session, wish: Remediation, check: Check) -> Remediation | None:
    """Take a remediation on, unless ``check`` names a reason to withhold it; None where it was taken on before.

    One that is withheld may be claimed again: the reason may have passed.
    """
    row = session.get(RemediationRow, (wish.fingerprint, wish.starts_at, wish.action.value))
    if row is not None and row.outcome != RemediationOutcome.WITHHELD:
        return None
    reason = check(_standing(session, wish))
    if row is None:
        row = _new_row(wish)
        session.add(row)
    elif row.detail == reason:
        return _to_remediation(row)
    row.at, row.target, row.detail = wish.at, wish.target, reason or ""
    row.outcome = (RemediationOutcome.BEGUN if reason is None else RemediationOutcome.WITHHELD).value
    session.flush()
    return _to_remediation(row)


def finish(session: Session, claimed: Remediation, outcome: RemediationOutcome, detail: str) -> Remediation:
    """Say what came of a remediation that was taken on."""
    row = session.get_one(RemediationRow, (claimed.fingerprint, claimed.starts_at, claimed.action.value))
    row.outcome, row.detail = outcome.value, detail
    session.flush()
    return _to_remediation(row)


def remediations(session: Session, incident_id: str) -> list[Remediation]:
    """Those of an incident, in order."""
    query = select(RemediationRow).where(RemediationRow.incident_id == incident_id).order_by(RemediationRow.at)
    return [_to_remediation(row) for row in session.scalars(query)]


def _standing(session: Session, wish: Remediation) -> Standing:
    query = select(RemediationRow).where(RemediationRow.outcome != RemediationOutcome.WITHHELD.value)
    attempted = tuple(_to_remediation(row) for row in session.scalars(query))
    active = count_clients(session, True, None)
    gone, going = _removed(session, attempted)
    target = None if wish.target is None else session.get(ClientRow, wish.target)
    return Standing(
        attempted=attempted,
        active=active,
        unvalidated=active - count_clients(session, True, True),
        target_active=target is not None and target.active,
        removed=len(gone) + len(going),
        fleet=active + len(gone),
    )


def _removed(session: Session, attempted: tuple[Remediation, ...]) -> tuple[set[str], set[str]]:
    """The clients that were taken out by remediation and never came back, and those that are about to be."""
    gone, going = set(), set()
    for one in attempted:
        row = session.get(ClientRow, one.target) if one.action is RemediationAction.REMOVE_CLIENT else None
        if row is not None and not row.active:
            gone.add(row.client_id)
        elif row is not None and one.outcome is RemediationOutcome.BEGUN:
            going.add(row.client_id)
    return gone, going


def _new_row(wish: Remediation) -> RemediationRow:
    return RemediationRow(
        fingerprint=wish.fingerprint,
        starts_at=wish.starts_at,
        action=wish.action.value,
        incident_id=wish.incident_id,
    )


def _to_remediation(row: RemediationRow) -> Remediation:
    return Remediation(
        incident_id=row.incident_id,
        fingerprint=row.fingerprint,
        starts_at=row.starts_at,
        action=RemediationAction(row.action),
        target=row.target,
        at=row.at,
        outcome=RemediationOutcome(row.outcome),
        detail=row.detail,
    )
