"""Automatic remediations of incidents: at most once for each firing of an alert."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.api.incidents import RemediationOutcome
from fedvit.store.records import Remediation, RemediationState
from fedvit.store.repository import Repository, record_of
from fedvit.store.tables import ClientRow, RemediationRow
from fedvit.types import RemediationAction


class Remediations(Repository):
    """Remediations that were taken, or withheld, for single firings."""

    def state(self, target: str | None) -> RemediationState:
        """The facts that decide whether a remediation, of a client where there is a ``target``, may be taken now."""
        query = select(RemediationRow).where(RemediationRow.outcome != RemediationOutcome.WITHHELD.value)
        counts = select(func.count()).select_from(ClientRow).where(ClientRow.active.is_(True))
        with self._read() as session:
            attempted = tuple(record_of(Remediation, row) for row in session.scalars(query))
            active = session.scalar(counts) or 0
            validated = session.scalar(counts.where(ClientRow.validated.is_(True))) or 0
            gone, leaving = _removed(session, attempted)
            client = None if target is None else session.get(ClientRow, target)
            return RemediationState(
                attempted=attempted,
                active=active,
                unvalidated=active - validated,
                target_active=client is not None and client.active,
                removed=len(gone) + len(leaving),
                fleet=active + len(gone),
            )

    def claim(self, remediation: Remediation, withheld_for: str | None) -> Remediation | None:
        """Take a remediation on, or withhold it for a reason; None where it was taken on before.

        One that is withheld may be claimed again: the reason may have passed. The caller decides on the reason in the
        same transaction.
        """
        with self._write() as session:
            key = (remediation.fingerprint, remediation.starts_at, remediation.action.value)
            row = session.get(RemediationRow, key)
            if row is not None and row.outcome != RemediationOutcome.WITHHELD:
                return None
            if row is None:
                names = ("fingerprint", "starts_at", "action")
                row = RemediationRow(**dict(zip(names, key, strict=True)), incident_id=remediation.incident_id)
                session.add(row)
            elif row.detail == withheld_for:
                return record_of(Remediation, row)
            row.at, row.target, row.detail = remediation.at, remediation.target, withheld_for or ""
            row.outcome = (RemediationOutcome.BEGUN if withheld_for is None else RemediationOutcome.WITHHELD).value
            session.flush()
            return record_of(Remediation, row)

    def finish(self, claimed: Remediation, outcome: RemediationOutcome, detail: str) -> Remediation:
        """Record the outcome of a remediation that was taken on."""
        with self._write() as session:
            row = session.get_one(RemediationRow, (claimed.fingerprint, claimed.starts_at, claimed.action.value))
            row.outcome, row.detail = outcome.value, detail
            session.flush()
            return record_of(Remediation, row)

    def of_incident(self, incident_id: str) -> list[Remediation]:
        """The remediations of an incident that were taken or withheld, in order."""
        query = select(RemediationRow).where(RemediationRow.incident_id == incident_id).order_by(RemediationRow.at)
        return self._records(Remediation, query)


def _removed(session: Session, attempted: tuple[Remediation, ...]) -> tuple[set[str], set[str]]:
    """The clients that remediations removed and that have not come back, and those that are about to be removed."""
    gone, leaving = set(), set()
    for remediation in attempted:
        removes = remediation.action is RemediationAction.REMOVE_CLIENT
        row = session.get(ClientRow, remediation.target) if removes else None
        if row is not None and not row.active:
            gone.add(row.client_id)
        elif row is not None and remediation.outcome is RemediationOutcome.BEGUN:
            leaving.add(row.client_id)
    return gone, leaving
