"""Routes of the incident log: alerts received, incidents, notes and reports."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import FastAPI, Response
from starlette.concurrency import run_in_threadpool

from fedvit.access.identity import Scope
from fedvit.api.choices import IncidentStatus
from fedvit.api.incidents import (
    AlertmanagerAlert,
    AlertmanagerMessage,
    IncidentDetail,
    IncidentSummary,
    NoteRequest,
    ProposalView,
    ReceivedView,
    RemediationOutcome,
    TimelineEntry,
)
from fedvit.errors import StateError, StateUnavailableError
from fedvit.incidents.log import timeline
from fedvit.incidents.playbook import RUNBOOK, play_of
from fedvit.incidents.remediation import Order, Proposal, orders, proposals
from fedvit.incidents.report import collect, report
from fedvit.store.records import FiredAlert, Incident, IncidentEvent
from fedvit.store.store import Store
from fedvit.types import Severity
from serve_apps.control.http.access import VIEWER, CurrentIdentity, Note, requires
from serve_apps.control.http.route import Limit, Offset, route
from serve_apps.control.services import Services
from serve_apps.control.system.in_process_client import REMEDIATION, call_as

LOG = logging.getLogger("fedvit.control")
# Telemetry: Alertmanager repeats it every few minutes. The actions that follow are on the audit trail.
_ALERTS = [requires(Scope.ALERTS, Scope.OPERATOR, audited=False)]
# A timeline shows what others asked for, and their words.
_ON_CALL = [requires(Scope.OPERATOR, Scope.EMERGENCY)]


def add_incident_routes(api: FastAPI, services: Services) -> None:
    """Add the routes of the incident log."""
    store, settings = services.store, services.settings
    window = timedelta(seconds=settings.incidents.reopen_within_s)

    def record(message: AlertmanagerMessage) -> tuple[list[str], list[Order]]:
        now = services.clock.now()
        try:
            incident_ids = store.incidents.record_alerts(_to_alerts(message, now), reopen_within=window, at=now)
            return incident_ids, [order for name in incident_ids for order in orders(store, settings, name, now)]
        except StateError as error:
            # Alertmanager tries again what was answered with 5xx, and nothing else.
            raise StateUnavailableError(str(error)) from error

    @route(api, "POST /api/incidents/alerts", "incidents", _ALERTS, 503)
    async def receive(message: AlertmanagerMessage) -> ReceivedView:
        """Alertmanager's webhook. A firing is known by fingerprint and start; to tell it again changes nothing.

        Where ``remediation.allow`` says so, the runbook's action follows, once a firing.
        """
        if message.truncatedAlerts:
            LOG.warning("Alertmanager left alerts out", extra={"truncated": message.truncatedAlerts})
        incident_ids, due = await run_in_threadpool(record, message)
        for order in due:
            await _carry_out(api, store, order)
        return ReceivedView(incidents=tuple(incident_ids))

    # After the fixed path: the first route that matches a path answers for methods that are not allowed.
    _add_log(api, services)


def _add_log(api: FastAPI, services: Services) -> None:
    store = services.store

    @route(api, "GET /api/incidents", "incidents", VIEWER)
    def incidents(status: IncidentStatus | None = None, limit: Limit = 50, offset: Offset = 0) -> list[IncidentSummary]:
        """Incidents, newest first."""
        is_open = None if status is None else status == "open"
        return [_summary(incident) for incident in store.incidents.all(is_open=is_open, offset=offset, limit=limit)]

    @route(api, "GET /api/incidents/{incident_id}", "incidents", _ON_CALL, 404)
    def incident(incident_id: str) -> IncidentDetail:
        """One incident: alerts, commands and changes of state in order, and what the runbook says to do."""
        return _detail(services, store.incidents.get(incident_id))

    @route(api, "POST /api/incidents/{incident_id}/notes", "incidents", _ON_CALL, 404)
    def add_note(incident_id: str, request: NoteRequest, who: CurrentIdentity, note: Note) -> IncidentDetail:
        """Write down what only people know; notes are added, never changed."""
        event = IncidentEvent(services.clock.now(), request.section.value, who.actor, request.text)
        store.incidents.add_event(incident_id, event)
        note.after = {"section": request.section.value}
        return _detail(services, store.incidents.get(incident_id))

    @route(api, "GET /api/incidents/{incident_id}/report", "incidents", _ON_CALL, 404, media_type="text/markdown")
    def write_report(incident_id: str) -> Response:
        """The runbook's template in Markdown, filled with what is known and blank where only people know."""
        facts = collect(store, services.settings, incident_id, services.clock.now())
        return Response(report(facts), media_type="text/markdown")


def _detail(services: Services, incident: Incident) -> IncidentDetail:
    store, name = services.store, incident.incident_id
    alerts = [logged.alert for logged in store.incidents.alerts(name)]
    steps = proposals(services.settings.remediation, incident.alertname, alerts, store.remediations.of_incident(name))
    return IncidentDetail.of(
        incident,
        status=_status(incident),
        runbook=_runbook_of(incident.alertname, alerts),
        proposals=[_proposal_view(proposal) for proposal in steps],
        timeline=[TimelineEntry.of(entry) for entry in timeline(store, incident, services.clock.now())],
    )


def _summary(incident: Incident) -> IncidentSummary:
    return IncidentSummary.of(incident, status=_status(incident))


def _status(incident: Incident) -> str:
    return "open" if incident.resolved_at is None else "resolved"


def _proposal_view(proposal: Proposal) -> ProposalView:
    call, taken = proposal.step.call, proposal.taken
    return ProposalView.of(
        proposal,
        name=proposal.step.name,
        method=call.method if call else None,
        path=call.path if call else None,
        body=call.body if call else None,
        outcome=taken.outcome if taken else None,
        detail=taken.detail if taken else None,
    )


def _runbook_of(alertname: str, alerts: list[FiredAlert]) -> str:
    """The section that the rule names, which may be one that this table does not know."""
    url = next((url for alert in alerts if (url := alert.annotations.get("runbook_url"))), None)
    return url or f"{RUNBOOK}#{play_of(alertname).section}"


async def _carry_out(api: FastAPI, store: Store, order: Order) -> None:
    """Call the API as an operator would, and record the outcome; a failure is not retried."""
    try:
        answer = await call_as(api, REMEDIATION, order.call.method, order.path, order.call.body, key=order.key)
        outcome = RemediationOutcome.DONE if answer.is_success else RemediationOutcome.FAILED
        detail = f"{answer.status_code}" if answer.is_success else f"{answer.status_code}: {_problem(answer.json())}"
    except Exception as error:
        LOG.exception("remediation %s", order.claimed.action)
        outcome, detail = RemediationOutcome.FAILED, f"{type(error).__name__}: {error}"
    LOG.warning("remediation", extra={"action": order.claimed.action.value, "outcome": outcome.value})
    await run_in_threadpool(store.remediations.finish, order.claimed, outcome, detail[:500])


def _problem(document: Any) -> str:
    return str(document.get("detail", "")) if isinstance(document, dict) else str(document)


MAX_LABELS = 64
MAX_TEXT = 2000
UNNAMED = "unnamed"
WATCHDOG = "Watchdog"
"""An alert that always fires, so that its absence shows a broken pipeline; it is no incident."""
# Go says "0001-01-01T00:00:00Z" where there is no moment.
_NEVER = datetime(1, 1, 2, tzinfo=UTC)


def _to_alerts(message: AlertmanagerMessage, now: datetime) -> list[FiredAlert]:
    """The alerts as the log keeps them, without the watchdog. What is unknown is passed over, what is too long is cut:
    Alertmanager repeats nothing that was answered with 4xx."""
    alerts = (_to_alert(alert, now) for alert in message.alerts)
    return [alert for alert in alerts if alert.alertname != WATCHDOG]


def _to_alert(alert: AlertmanagerAlert, now: datetime) -> FiredAlert:
    """One alert as the log keeps it; one that is resolved and has no end ended ``now``."""
    labels, annotations = _bounded(alert.labels), _bounded(alert.annotations)
    ended = alert.endsAt if alert.endsAt is not None and alert.endsAt > _NEVER else now
    return FiredAlert(
        alertname=labels.get("alertname", UNNAMED)[:200],
        severity=_severity_of(labels),
        fingerprint=alert.fingerprint,
        starts_at=alert.startsAt,
        ends_at=ended if alert.status == "resolved" else None,
        labels=labels,
        annotations=annotations,
        generator_url=alert.generatorURL[:MAX_TEXT],
    )


def _severity_of(labels: Mapping[str, str]) -> Severity:
    """The severity that the label ``severity`` names; the lowest for any other text."""
    name = labels.get("severity", "").upper()
    return Severity(name) if name in list(Severity) else Severity.P3


def _bounded(texts: Mapping[str, str]) -> dict[str, str]:
    """The first :data:`MAX_LABELS` texts, cut at :data:`MAX_TEXT` characters; nothing in them steers a terminal."""
    return {_plain(name[:200]): _plain(text[:MAX_TEXT]) for name, text in list(texts.items())[:MAX_LABELS]}


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
