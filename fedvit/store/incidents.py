"""The incident log: alerts as they fire and end, the incidents that they make, and their history.

An alert that fires while an incident of its name is open joins it; with the end of its last alert an incident is
resolved; one that fires soon after reopens it. A firing is identified by fingerprint and start, so that a repeated
message changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.api.incidents import RemediationOutcome
from fedvit.store.records import FiredAlert, Incident, IncidentEvent, LoggedAlert, Remediation, RemediationState
from fedvit.store.repository import Repository, columns_of, get_row, insert_row, next_number, record_of
from fedvit.store.tables import ClientRow, IncidentAlertRow, IncidentEventRow, IncidentRow, RemediationRow
from fedvit.types import RemediationAction, Severity

MONITORING = "monitoring"
"""The actor of an event that no person caused: an alert fired, or ended."""
_FIRING = IncidentAlertRow.ends_at.is_(None)


class Incidents(Repository):
    """Incidents, their alerts and their events."""

    def record_alerts(self, alerts: Iterable[FiredAlert], *, reopen_within: timedelta, at: datetime) -> list[str]:
        """Record alerts that fire or have ended, each once however often it is sent; return the incidents concerned.

        Each incident is returned once, in the order of the alerts.
        """
        # First those that fire: an incident that one alert leaves and another joins has not ended in between.
        ordered = sorted(alerts, key=lambda alert: (alert.ends_at is not None, alert.starts_at))
        with self._write() as session:
            return list(dict.fromkeys(_record(session, alert, reopen_within, at) for alert in ordered))

    def end_alerts(self, fingerprint: str, at: datetime) -> list[str]:
        """End every alert that fires under a fingerprint; return the incidents concerned."""
        firing = select(IncidentAlertRow).where(IncidentAlertRow.fingerprint == fingerprint, _FIRING)
        with self._write() as session:
            rows = list(session.scalars(firing))
            for row in rows:
                _end(session, row, at, at)
            return [row.incident_id for row in rows]

    def add_event(self, incident_id: str, event: IncidentEvent) -> None:
        """Add a line to an incident's history. Raises NotFoundError where there is no such incident."""
        with self._write() as session:
            get_row(session, IncidentRow, incident_id)
            _add_event(session, incident_id, event)

    def get(self, incident_id: str) -> Incident:
        """One incident; raises NotFoundError where there is none."""
        with self._read() as session:
            return _to_incident(session, get_row(session, IncidentRow, incident_id))

    def all(self, *, is_open: bool | None = None, offset: int = 0, limit: int | None = None) -> list[Incident]:
        """Incidents, newest first; None filters nothing."""
        query = select(IncidentRow).order_by(IncidentRow.ordinal.desc()).offset(offset).limit(limit)
        if is_open is not None:
            query = query.where(IncidentRow.resolved_at.is_(None) if is_open else IncidentRow.resolved_at.is_not(None))
        with self._read() as session:
            return [_to_incident(session, row) for row in session.scalars(query)]

    def count_open(self) -> dict[Severity, int]:
        """How many incidents are open, for every severity."""
        query = select(IncidentRow.severity, func.count()).where(IncidentRow.resolved_at.is_(None))
        with self._read() as session:
            counts = dict(session.execute(query.group_by(IncidentRow.severity)).tuples().all())
        return {severity: counts.get(severity.value, 0) for severity in Severity}

    def alerts(self, incident_id: str) -> list[LoggedAlert]:
        """The alerts of an incident, in the order in which they began."""
        query = select(IncidentAlertRow).where(IncidentAlertRow.incident_id == incident_id)
        with self._read() as session:
            rows = session.scalars(query.order_by(IncidentAlertRow.starts_at))
            return [LoggedAlert(row.incident_id, row.received_at, record_of(FiredAlert, row)) for row in rows]

    def events(self, incident_id: str) -> list[IncidentEvent]:
        """The history of an incident, in the order of recording."""
        query = select(IncidentEventRow).where(IncidentEventRow.incident_id == incident_id)
        return self._records(IncidentEvent, query.order_by(IncidentEventRow.sequence))


def _record(session: Session, alert: FiredAlert, reopen_within: timedelta, at: datetime) -> str:
    known = session.get(IncidentAlertRow, (alert.fingerprint, alert.starts_at))
    if known is None:
        known = _add(session, alert, _incident_for(session, alert, reopen_within, at), at)
    if alert.ends_at is not None and known.ends_at is None:
        _end(session, known, alert.ends_at, at)
    return known.incident_id


def _incident_for(session: Session, alert: FiredAlert, reopen_within: timedelta, at: datetime) -> IncidentRow:
    """The incident that a firing belongs to: one that is open, one that has just ended, or another."""
    # A sender whose clock runs ahead must not open incidents in the future.
    began = min(alert.starts_at, at)
    newest = select(IncidentRow).where(IncidentRow.alertname == alert.alertname).order_by(IncidentRow.ordinal.desc())
    row = session.scalar(newest.limit(1))
    if row is None or (row.resolved_at is not None and row.resolved_at + reopen_within < began):
        return _open(session, alert, began)
    if row.resolved_at is not None and alert.ends_at is None:
        row.resolved_at = None
        event = IncidentEvent(began, "reopened", MONITORING, f"{alert.alertname} fired again")
        _add_event(session, row.incident_id, event)
    row.opened_at = min(row.opened_at, began)
    row.severity = min(row.severity, alert.severity.value)
    return row


def _open(session: Session, alert: FiredAlert, began: datetime) -> IncidentRow:
    row = IncidentRow(
        incident_id=_new_id(session, began),
        ordinal=next_number(session, IncidentRow.ordinal),
        alertname=alert.alertname,
        severity=alert.severity.value,
        summary=alert.annotations.get("summary", ""),
        opened_at=began,
    )
    insert_row(session, row)
    _add_event(session, row.incident_id, IncidentEvent(began, "opened", MONITORING, f"{alert.alertname} fired"))
    return row


def _new_id(session: Session, began: datetime) -> str:
    """The runbook's form: INC-YYYY-MMDD-XXX, the day in UTC and its incidents counted from 1."""
    prefix = f"INC-{began.year:04d}-{began.month:02d}{began.day:02d}-"
    query = select(func.count()).where(IncidentRow.incident_id.startswith(prefix, autoescape=True))
    return f"{prefix}{1 + (session.scalar(query) or 0):03d}"


def _add(session: Session, alert: FiredAlert, incident: IncidentRow, at: datetime) -> IncidentAlertRow:
    columns = columns_of(alert, ends_at=None)
    return insert_row(session, IncidentAlertRow(**columns, incident_id=incident.incident_id, received_at=at))


def _end(session: Session, row: IncidentAlertRow, ends_at: datetime, at: datetime) -> None:
    row.ends_at = min(ends_at, at)
    session.flush()
    still = select(func.count()).where(IncidentAlertRow.incident_id == row.incident_id, _FIRING)
    incident = get_row(session, IncidentRow, row.incident_id)
    if session.scalar(still) == 0:
        ends = select(func.max(IncidentAlertRow.ends_at)).where(IncidentAlertRow.incident_id == row.incident_id)
        last, was_open = session.scalar(ends) or row.ends_at, incident.resolved_at is None
        incident.resolved_at = last
        if was_open:
            event = IncidentEvent(last, "resolved", MONITORING, "All its alerts have cleared")
            _add_event(session, row.incident_id, event)


def _add_event(session: Session, incident_id: str, event: IncidentEvent) -> None:
    sequence = next_number(session, IncidentEventRow.sequence, IncidentEventRow.incident_id == incident_id)
    insert_row(session, IncidentEventRow(incident_id=incident_id, sequence=sequence, **columns_of(event)))


def _to_incident(session: Session, row: IncidentRow) -> Incident:
    alerts = select(func.count()).where(IncidentAlertRow.incident_id == row.incident_id)
    firing = session.scalar(alerts.where(_FIRING)) or 0
    return record_of(Incident, row, alerts=session.scalar(alerts) or 0, firing=firing)


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
