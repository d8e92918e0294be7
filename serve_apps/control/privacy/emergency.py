"""Routes of a privacy breach: containment, and the end of the incident."""

from __future__ import annotations

import contextlib
import logging
from datetime import datetime, timedelta
from typing import Any

from fastapi import FastAPI

from fedvit.api.choices import ImmediateAction
from fedvit.api.emergency import BreachRequest, BreachView, EmergencyView, IncidentView, StandDownRequest, StandDownView
from fedvit.errors import FedvitError
from fedvit.incidents.breach import Breach, BreachReport, BreachResponse
from fedvit.incidents.log import log_breach, log_stand_down
from fedvit.store.store import Store
from fedvit.types import LedgerFreeze
from serve_apps.control.http.access import EMERGENCY, VIEWER, CurrentIdentity, Note
from serve_apps.control.http.route import route
from serve_apps.control.services import Services

LOG = logging.getLogger("fedvit.control")
# The response has to be sent within the time limit, too.
_TIME_SHARE = 0.8


def add_emergency_routes(api: FastAPI, services: Services) -> None:
    """Add the routes that contain a privacy breach and end its incident."""
    store, settings = services.store, services.settings

    @route(api, "GET /api/emergency", "emergency", VIEWER)
    def emergency() -> EmergencyView:
        """The incident in force (the first, where there are several), and the clients in quarantine."""
        freeze = store.ledger.current_freeze()
        incident = None if freeze is None else IncidentView.of(freeze)
        return EmergencyView(incident=incident, quarantined=tuple(store.clients.quarantined()))

    @route(api, "POST /api/emergency/privacy-breach", "emergency", EMERGENCY)
    def privacy_breach(request: BreachRequest, identity: CurrentIdentity, note: Note) -> BreachView:
        """Contain a privacy breach. Answers 200 whatever could be done, and says of each action whether it was.

        Always, in this order: freeze the privacy ledger, stop training, quarantine the clients, revoke the tokens bound
        to them, write a forensic bundle. Only when asked for, before the bundle: roll back to the last release that
        none of them contributed to. Repeating is harmless and makes another bundle.
        """
        with contextlib.suppress(FedvitError):
            note.before = _state_facts(store)
        breach = _breach_of(request, identity.actor, services.clock.now())
        limit_s, aggregator = _TIME_SHARE * settings.access.request_timeout_s, services.aggregator
        report = BreachResponse(breach, store=store, settings=settings, aggregator=aggregator, limit_s=limit_s).run()
        note.after = _report_facts(report)
        _log_incident(services, breach)
        return BreachView.of(report, incident_id=request.incident_id, forensic_bundle=str(report.forensic_bundle))

    @route(api, "POST /api/emergency/stand-down", "emergency", EMERGENCY)
    def stand_down(request: StandDownRequest, note: Note) -> StandDownView:
        """Lift an incident's freeze of the ledger. Nobody's quarantine ends by it, and no training begins."""
        note.before = _state_facts(store)
        left = store.ledger.unfreeze(request.incident_id)
        log_stand_down(store, request.incident_id, services.clock.now())
        note.after = _state_facts(store)
        quarantined, name = tuple(store.clients.quarantined()), request.incident_id
        return StandDownView(incident_id=name, ledger_frozen=left is not None, still_quarantined=quarantined)


def _breach_of(request: BreachRequest, reported_by: str, at: datetime) -> Breach:
    return Breach(
        incident_id=request.incident_id,
        breach_type=request.breach_type,
        affected_clients=tuple(dict.fromkeys(request.affected_clients)),
        reported_by=reported_by,
        at=at,
        roll_back=ImmediateAction.ROLLBACK_MODEL in request.immediate_actions,
        description=request.description,
    )


def _log_incident(services: Services, breach: Breach) -> None:
    """The breach is contained by now, logged or not: nothing that fails here may make it look otherwise."""
    try:
        log_breach(
            services.store,
            breach.incident_id,
            reported_by=breach.reported_by,
            breach_type=breach.breach_type,
            clients=len(breach.affected_clients),
            at=breach.at,
            reopen_within=timedelta(seconds=services.settings.incidents.reopen_within_s),
        )
    except Exception:
        LOG.exception("breach %s is not in the incident log", breach.incident_id)


def _state_facts(store: Store) -> dict[str, Any]:
    freeze: LedgerFreeze | None = store.ledger.current_freeze()
    return {"frozen_by": freeze.incident_id if freeze else None, "quarantined": store.clients.quarantined()}


def _report_facts(report: BreachReport) -> dict[str, Any]:
    return {
        "done": {taken.action: taken.done for taken in report.actions},
        "quarantined": report.quarantined,
        "unknown_clients": report.unknown_clients,
        "revoked": report.revoked_tokens,
        "rolled_back_to": report.rolled_back_to,
        "bundle": report.forensic_bundle,
        "sha256": report.forensic_sha256,
    }
