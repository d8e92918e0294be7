"""The incident log: what Alertmanager tells, what was done about it, and what is to be written down afterwards."""

from __future__ import annotations

from datetime import timedelta

from fastapi import FastAPI
from pydantic import BaseModel

from fedvit.access.identity import Scope
from fedvit.errors import StateError
from fedvit.types import utc_now
from serve_apps.control.access import requires
from serve_apps.control.alerts import AlertmanagerMessage
from serve_apps.control.services import Services
from serve_apps.problems import ProblemError, documented

# Telemetry: Alertmanager repeats it every few minutes. What is done about it is on the audit trail.
_ALERTS = [requires(Scope.ALERTS, Scope.OPERATOR, audited=False)]


class ReceivedView(BaseModel):
    """The incidents that a message concerned."""

    incidents: list[str]


def add_incident_routes(api: FastAPI, services: Services) -> None:
    """Take alerts in, and show what came of them."""
    store, settings = services.store, services.settings

    @api.post("/api/incidents/alerts", tags=["incidents"], dependencies=_ALERTS, responses=documented(503))
    def receive(message: AlertmanagerMessage) -> ReceivedView:
        """Alertmanager's webhook. A firing is known by fingerprint and start; to tell it again changes nothing."""
        now, window = utc_now(), timedelta(seconds=settings.incidents.reopen_within_s)
        alerts = [alert.to_alert(now) for alert in message.alerts]
        try:
            return ReceivedView(incidents=store.record_alerts(alerts, reopen_within=window, at=now))
        except StateError as error:
            # Alertmanager tries again what was answered with 5xx, and nothing else.
            raise ProblemError(503, error.code, "State unavailable", str(error)) from error
