"""Timelines of incidents, compiled from alerts, audit trail, remediations and state changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from fedvit.api.incidents import RemediationOutcome
from fedvit.incidents.playbook import BREACH_ALERT, client_of
from fedvit.store.records import AuditEntry, FiredAlert, Incident, LoggedAlert, Remediation
from fedvit.store.store import Store
from fedvit.types import Severity

AFTERMATH = timedelta(minutes=1)
"""Time after the last alert in which calls still belong to the incident."""
MAX_COMMANDS = 1000
_LATE = timedelta(minutes=2)
_MAX_TEXT = 300
_REMEDIATION = "remediation"
_NOTE = "POST /api/incidents/{incident_id}/notes"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a timeline. ``kind`` is alert, incident, command, remediation, state or note."""

    at: datetime
    kind: str
    actor: str | None
    text: str


def span(incident: Incident, now: datetime) -> tuple[datetime, datetime]:
    """The beginning and the end of the time that belongs to an incident."""
    return incident.opened_at, now if incident.resolved_at is None else min(incident.resolved_at + AFTERMATH, now)


def timeline(store: Store, incident: Incident, now: datetime) -> list[Entry]:
    """The entries of an incident in order; those of an open one up to ``now``."""
    since, until = span(incident, now)
    lines = [
        *_alert_lines(store.incidents.alerts(incident.incident_id)),
        *_own_lines(store, incident.incident_id),
        *_command_lines(store.audit.between(since, until, MAX_COMMANDS)),
        *_remediation_lines(store.remediations.of_incident(incident.incident_id)),
        *(Entry(event.at, "state", None, event.text) for event in store.timeline.events(since, until)),
    ]
    return sorted(lines, key=lambda entry: entry.at)


def log_breach(
    store: Store,
    breach_id: str,
    *,
    reported_by: str,
    breach_type: str,
    clients: int,
    at: datetime,
    reopen_within: timedelta,
) -> str:
    """Log a breach in a new or in the open incident; return the incident's id. Repeating it is harmless.

    A breach lasts until :func:`log_stand_down`.
    """
    fingerprint = _fingerprint(breach_id)
    for known in store.incidents.all(is_open=True):
        alerts = store.incidents.alerts(known.incident_id)
        if any(one.alert.fingerprint == fingerprint and one.alert.ends_at is None for one in alerts):
            return known.incident_id
    summary = f"{breach_id} ({breach_type}), reported by {reported_by}: {clients} clients affected"
    labels = {"alertname": BREACH_ALERT, "severity": Severity.P0.value, "incident_id": breach_id[:200]}
    alert = FiredAlert(BREACH_ALERT, Severity.P0, fingerprint, at, None, labels, {"summary": summary})
    return store.incidents.record_alerts([alert], reopen_within=reopen_within, at=at)[0]


def log_stand_down(store: Store, breach_id: str, at: datetime) -> list[str]:
    """End a breach; return the ids of its incidents."""
    return store.incidents.end_alerts(_fingerprint(breach_id), at)


def describe_call(entry: AuditEntry) -> str:
    """An entry of the audit trail as one line: method, path, body, response status and changes."""
    params = entry.facts.params
    action = entry.facts.action
    for name, value in dict(params.get("path") or {}).items():
        action = action.replace(f"{{{name}}}", str(value))
    body = f" {json.dumps(params['body'], ensure_ascii=False)}" if params.get("body") else ""
    change = "; ".join(_changes(entry.facts.before, entry.facts.after))
    call = f"{action}{body}"[:_MAX_TEXT]
    return f"{call} → {entry.facts.status}{f' ({change})' if change else ''}"


# --- entries ---------------------------------------------------------------------------------------------------------


def _alert_lines(alerts: list[LoggedAlert]) -> Iterator[Entry]:
    for logged in alerts:
        alert = logged.alert
        about = alert.annotations.get("summary") or ", ".join(f"{k}={v}" for k, v in sorted(alert.labels.items()))
        origin = client_of(alert.labels) or alert.labels.get("instance")
        name = f"{alert.alertname} ({origin})" if origin else alert.alertname
        yield Entry(alert.starts_at, "alert", None, f"{name} fired, {alert.severity}: {about}"[:_MAX_TEXT])
        if logged.received_at - alert.starts_at > _LATE:
            yield Entry(logged.received_at, "alert", None, f"{name} reached the incident log")
        if alert.ends_at is not None:
            yield Entry(alert.ends_at, "alert", None, f"{name} cleared")


def _own_lines(store: Store, incident_id: str) -> Iterator[Entry]:
    for event in store.incidents.events(incident_id):
        if event.kind == "opened":
            continue  # The entry of its first alert says the same.
        if event.kind in ("reopened", "resolved"):
            yield Entry(event.at, "incident", None, f"incident {event.kind}: {event.text}")
        else:
            yield Entry(event.at, "note", event.actor, f"{event.kind.replace('_', ' ')}: {event.text}")


def _command_lines(entries: list[AuditEntry]) -> Iterator[Entry]:
    for entry in entries:
        if entry.facts.action == _NOTE:
            continue  # The note itself has an entry.
        kind = _REMEDIATION if entry.facts.actor == _REMEDIATION else "command"
        yield Entry(entry.at, kind, entry.facts.actor, describe_call(entry))
    if len(entries) == MAX_COMMANDS:
        yield Entry(entries[-1].at, "command", None, "and more: see `fedvit audit-log show`")


def _remediation_lines(remediations: list[Remediation]) -> Iterator[Entry]:
    for one in remediations:
        if one.outcome is RemediationOutcome.DONE:
            continue  # The audit trail has the call.
        about = f" {one.target}" if one.target else ""
        detail = f": {one.detail}" if one.detail else ""
        yield Entry(one.at, _REMEDIATION, _REMEDIATION, f"{one.action}{about} {one.outcome}{detail}")


def _changes(before: Any, after: Any) -> Iterator[str]:
    """The differences between the states before and after a call, if they have the same fields."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping) or set(before) != set(after):
        return
    for name, value in list(after.items())[:20]:
        if before[name] != value and not isinstance(value, Mapping | list):
            yield f"{name}: {before[name]} → {value}"[:100]


def _fingerprint(breach_id: str) -> str:
    return hashlib.sha256(breach_id.encode()).hexdigest()[:16]
