"""Models of a privacy breach, its end, and the shutdown of the system."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field, field_validator

from fedvit.api.base import RequestBody, View
from fedvit.api.choices import ImmediateAction, ShutdownMode

POLICY = (
    "Always: freeze_ledger, stop_training, isolate_data, revoke_credentials, forensic_bundle. "
    "Only when asked for: rollback_model."
)
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


class ActionView(View):
    """One action: whether it was done, and what came of it or stood in its way."""

    action: str
    done: bool
    detail: str


class BreachView(View):
    """What was done about a breach.

    ``rolled_back_to`` is the version whose content serves again, as a new version; ``forensic_sha256`` is null where
    the bundle could not be finished. ``policy`` says which actions happen always, and which only when asked for.
    """

    incident_id: str
    actions: tuple[ActionView, ...]
    quarantined: tuple[str, ...]
    unknown_clients: tuple[str, ...]
    revoked_tokens: tuple[str, ...]
    rolled_back_to: str | None
    ledger_frozen: bool
    forensic_bundle: str
    forensic_sha256: str | None
    policy: str = POLICY


class StandDownRequest(RequestBody):
    """Which incident is over, and why."""

    incident_id: _IncidentId
    justification: str = Field(min_length=1, max_length=2000, examples=["The leak is closed; legal was told."])


class StandDownView(View):
    """``ledger_frozen`` stays true while another incident freezes it; clients are reinstated one by one."""

    incident_id: str
    ledger_frozen: bool
    still_quarantined: tuple[str, ...]


class IncidentView(View):
    """The incident that freezes the ledger."""

    incident_id: str
    reason: str
    by: str
    at: datetime


class EmergencyView(View):
    """Whether an incident is in force, and who is in quarantine."""

    incident: IncidentView | None
    quarantined: tuple[str, ...]


class ShutdownRequest(RequestBody):
    """``graceful`` lets the round under way end, ``force`` does not.

    ``save_state`` writes a backup archive before a graceful end; what is committed is safe either way.
    """

    mode: ShutdownMode
    save_state: bool = True
