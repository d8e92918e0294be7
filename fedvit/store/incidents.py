"""The incident log: alerts as they fire and end, the incidents that they make, and their history.

An alert that fires while an incident of its name is open joins it; with the end of its last alert an incident is
resolved; one that fires soon after reopens it. A firing is identified by fingerprint and start, so that a repeated
message changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from fedvit.store.records import FiredAlert, Incident, IncidentEvent, LoggedAlert
from fedvit.store.repository import Repository, get_row, insert_row, next_number, record_of
from fedvit.store.tables import IncidentAlertRow, IncidentEventRow, IncidentRow
from fedvit.types import Severity

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
        """Add a line to an incident's history.

        Raises:
            NotFoundError: no such incident.
        """
        with self._write() as session:
            get_row(session, IncidentRow, incident_id)
            _add_event(session, incident_id, event)

    def get(self, incident_id: str) -> Incident:
        """One incident.

        Raises:
            NotFoundError: no such incident.
        """
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
    facts = {field.name: getattr(alert, field.name) for field in fields(alert) if field.name != "ends_at"}
    facts |= {"severity": alert.severity.value, "labels": dict(alert.labels), "annotations": dict(alert.annotations)}
    return insert_row(session, IncidentAlertRow(**facts, incident_id=incident.incident_id, received_at=at))


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
    insert_row(session, IncidentEventRow(incident_id=incident_id, sequence=sequence, **asdict(event)))


def _to_incident(session: Session, row: IncidentRow) -> Incident:
    alerts = select(func.count()).where(IncidentAlertRow.incident_id == row.incident_id)
    firing = session.scalar(alerts.where(_FIRING)) or 0
    return record_of(Incident, row, alerts=session.scalar(alerts) or 0, firing=firing)
