"""What is done when nothing may wait: a privacy breach, its end, and shutting everything down."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field, field_validator

from fedvit.errors import FedvitError
from fedvit.incidents.breach import POLICY, Breach, BreachReport, BreachResponse, ImmediateAction
from fedvit.incidents.log import log_breach, log_stand_down
from fedvit.store.store import LedgerFreeze, Store
from fedvit.types import utc_now
from serve_apps.control.access import EMERGENCY, OPERATOR, VIEWER, CallKey, CurrentIdentity, Note
from serve_apps.control.operations import OperationView, accepted, standing_of
from serve_apps.control.schemas import RequestBody
from serve_apps.control.services import Services
from serve_apps.problems import documented

LOG = logging.getLogger("fedvit.control")
# The answer has to leave the house within the time limit, too.
_TIME_SHARE = 0.8
_IncidentId = Annotated[str, Field(min_length=1, max_length=200, examples=["PB-20260301-031500"])]


class BreachRequest(RequestBody):
    """A breach. Names that are not registered are reported and refuse nothing."""

    incident_id: _IncidentId
    affected_clients: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        max_length=10_000, examples=[["client1", "client2"]]
    )
    breach_type: str = Field(min_length=1, max_length=200, examples=["data_exposure"])
    immediate_actions: list[ImmediateAction] = Field(
        default_factory=list, max_length=20, description=POLICY, examples=[["stop_training", "isolate_data"]]
    )
    description: str | None = Field(default=None, max_length=2000)

    @field_validator("immediate_actions", mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        unknown = [name for name in given if name not in list(ImmediateAction)] if isinstance(given, list) else []
        if unknown:
            raise ValueError(f"{str(unknown[0])[:100]!r} is no action; there are {', '.join(ImmediateAction)}")
        return given


class ActionView(BaseModel):
    """One action: whether it was done, and what came of it or stood in its way."""

    action: str
    done: bool
    detail: str


class BreachView(BaseModel):
    """What was done about a breach.

    ``rolled_back_to`` is the version whose content serves again, as a new version; ``forensic_sha256`` is null where
    the bundle could not be finished. ``policy`` says which actions happen always, and which only when asked for.
    """

    incident_id: str
    actions: list[ActionView]
    quarantined: list[str]
    unknown_clients: list[str]
    revoked_tokens: list[str]
    rolled_back_to: str | None
    ledger_frozen: bool
    forensic_bundle: str
    forensic_sha256: str | None
    policy: str = POLICY

    @classmethod
    def of(cls, incident_id: str, report: BreachReport) -> BreachView:
        """The view of a report."""
        return cls.model_validate(
            {"incident_id": incident_id, **asdict(report), "forensic_bundle": str(report.forensic_bundle)}
        )


class StandDownRequest(RequestBody):
    """Which incident is over, and why."""

    incident_id: _IncidentId
    justification: str = Field(min_length=1, max_length=2000, examples=["The leak is closed; legal was told."])


class StandDownView(BaseModel):
    """``ledger_frozen`` stays true while another incident freezes it; clients are reinstated one by one."""

    incident_id: str
    ledger_frozen: bool
    still_quarantined: list[str]


class IncidentView(BaseModel):
    """The incident that freezes the ledger."""

    incident_id: str
    reason: str
    by: str
    at: datetime


class EmergencyView(BaseModel):
    """Whether an incident is in force, and who is in quarantine."""

    incident: IncidentView | None
    quarantined: list[str]


class ShutdownRequest(RequestBody):
    """``graceful`` lets the round under way end, ``force`` does not.

    ``save_state`` writes a backup archive before a graceful end; what is committed is safe either way.
    """

    mode: Literal["graceful", "force"]
    save_state: bool = True


def add_emergency_routes(api: FastAPI, services: Services) -> None:
    """Contain a breach, end that, end everything."""
    store, settings = services.store, services.settings

    @api.get("/api/emergency", tags=["emergency"], dependencies=VIEWER)
    def emergency() -> EmergencyView:
        """The incident in force (the first, where there are several), and the clients in quarantine."""
        freeze = store.ledger_freeze()
        incident = None if freeze is None else IncidentView(**asdict(freeze))
        return EmergencyView(incident=incident, quarantined=store.quarantined_clients())

    @api.post("/api/emergency/privacy-breach", tags=["emergency"], dependencies=EMERGENCY)
    def privacy_breach(request: BreachRequest, identity: CurrentIdentity, note: Note) -> BreachView:
        """Contain a privacy breach. Answers 200 whatever could be done, and says of each action whether it was.

        Always, in this order: freeze the privacy ledger, stop training, quarantine the clients, revoke the tokens bound
        to them, write a forensic bundle. Only when asked for, before the bundle: roll back to the last release that
        none of them contributed to. Repeating is harmless and makes another bundle.
        """
        with contextlib.suppress(FedvitError):
            note.before = _standing(store)
        breach = Breach(
            incident_id=request.incident_id,
            breach_type=request.breach_type,
            affected_clients=tuple(dict.fromkeys(request.affected_clients)),
            reported_by=identity.actor,
            at=utc_now(),
            roll_back=ImmediateAction.ROLLBACK_MODEL in request.immediate_actions,
            description=request.description,
        )
        response = BreachResponse(
            breach,
            store=store,
            settings=settings,
            aggregator=services.aggregator,
            limit_s=_TIME_SHARE * settings.access.request_timeout_s,
        )
        report = response.run()
        note.after = _told(report)
        _log_incident(services, breach)
        return BreachView.of(request.incident_id, report)

    @api.post("/api/emergency/stand-down", tags=["emergency"], dependencies=EMERGENCY)
    def stand_down(request: StandDownRequest, note: Note) -> StandDownView:
        """Lift an incident's freeze of the ledger. Nobody's quarantine ends by it, and no training begins."""
        note.before = _standing(store)
        left = store.thaw_ledger(request.incident_id)
        log_stand_down(store, request.incident_id, utc_now())
        note.after = _standing(store)
        return StandDownView(
            incident_id=request.incident_id,
            ledger_frozen=left is not None,
            still_quarantined=store.quarantined_clients(),
        )

    @api.post(
        "/api/system/shutdown", tags=["system"], status_code=202, dependencies=OPERATOR, responses=documented(503)
    )
    def shutdown(request: ShutdownRequest, response: Response, note: Note, call_key: CallKey) -> OperationView:
        """End the whole system, as `fedvit down` does. The operation has succeeded when all is safe and the end begins.

        Long operations under way are left to the next start. A graceful one can be cancelled while it waits.
        """
        aggregator = services.aggregator()
        note.before = standing_of(aggregator.progress())
        return accepted(aggregator.submit("shutdown", request.model_dump(), call_key), response, note)


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


def _standing(store: Store) -> dict[str, Any]:
    freeze: LedgerFreeze | None = store.ledger_freeze()
    return {"frozen_by": freeze.incident_id if freeze else None, "quarantined": store.quarantined_clients()}


def _told(report: BreachReport) -> dict[str, Any]:
    return {
        "done": {taken.action: taken.done for taken in report.actions},
        "quarantined": report.quarantined,
        "unknown_clients": report.unknown_clients,
        "revoked": report.revoked_tokens,
        "rolled_back_to": report.rolled_back_to,
        "bundle": report.forensic_bundle,
        "sha256": report.forensic_sha256,
    }
