"""What the control API takes and answers."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from fedvit.ports import LedgerEntry
from fedvit.store.store import AuditEntry
from fedvit.types import CLIENT_ID, BudgetReport, Client, LedgerFreeze, ModelVersion

# What every reader of JSON keeps exactly (RFC 8259, section 6).
MAX_INTEGER = 2**53 - 1
Offset = Annotated[int, Query(ge=0, le=MAX_INTEGER)]


class RequestBody(BaseModel):
    """What a caller sends; fields that nobody knows are refused, and so is a value of another JSON type."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _is_of_the_documented_types(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        made = handler(value)
        for name, given in value.items() if isinstance(value, dict) else ():
            wanted, found = _json_type(getattr(made, name)), _json_type(given)
            if wanted and found and wanted != found:
                raise ValueError(f"{name} is {wanted}, and was sent as {found}")
        return made


def _json_type(value: Any) -> str | None:
    """What pydantic would translate into another: true into 1, and "1" into either."""
    match value:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
    return None


class RegisterClient(RequestBody):
    """A vehicle that offers to take part."""

    device_id: str = Field(pattern=CLIENT_ID, examples=["truck-7"])
    kind: Literal["remote", "silo"] = "remote"
    num_examples: int = Field(default=0, ge=0, le=MAX_INTEGER)
    capabilities: dict[str, Any] = Field(default_factory=dict, examples=[{"camera": "front"}])


class ConditionView(BaseModel):
    """One thing that holds of a client or of training, or does not; ``reason`` is a word for programs."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_at: datetime | None


class ClientView(BaseModel):
    """A client as the API shows it."""

    client_id: str
    kind: str
    num_examples: int
    validated: bool
    active: bool
    registered_at: datetime
    last_seen_at: datetime | None
    quarantined_at: datetime | None
    quarantine_reason: str | None
    conditions: list[ConditionView]

    @classmethod
    def of(cls, client: Client, conditions: list[ConditionView]) -> ClientView:
        """The view of a client of which ``conditions`` are said."""
        return cls(
            client_id=client.client_id,
            kind=client.kind.value,
            num_examples=client.num_examples,
            validated=client.validated,
            active=client.active,
            registered_at=client.registered_at,
            last_seen_at=client.last_seen_at,
            quarantined_at=client.quarantined_at,
            quarantine_reason=client.quarantine_reason,
            conditions=conditions,
        )


class ClientsStatus(BaseModel):
    """A page of clients, with totals."""

    total: int
    active: int
    validated: int
    clients: list[ClientView]


class ModelView(BaseModel):
    """A model version as the API shows it."""

    version: str
    run_id: str
    round_index: int
    created_at: datetime
    epsilon: float
    metrics: dict[str, float]
    lineage: dict[str, Any]
    released: bool
    artifacts: dict[str, str]
    derived_from: str | None
    refusal: str | None

    @classmethod
    def of(cls, version: ModelVersion) -> ModelView:
        """The view of a version."""
        return cls(
            version=version.version,
            run_id=version.run_id,
            round_index=version.round_index,
            created_at=version.created_at,
            epsilon=version.epsilon,
            metrics=dict(version.metrics),
            lineage=dict(version.lineage),
            released=version.released,
            artifacts=dict(version.artifacts),
            derived_from=version.derived_from,
            refusal=version.refusal,
        )


class ModelInfo(BaseModel):
    """The model that is served now; ``size`` in bytes and ``complexity`` are what the runbook reads."""

    name: str
    version: str
    variant: str
    size: dict[str, int]
    complexity: dict[str, Any]
    classes: list[str]
    image_size: int


class FreezeView(BaseModel):
    """Why nothing may be charged to the privacy ledger."""

    incident_id: str
    reason: str
    at: datetime


class BudgetView(BaseModel):
    """The privacy budget of the present period; ``lifetime_epsilon`` composes everything ever charged.

    ``period_started_at`` is absent in the first period; while the ledger is ``frozen`` nothing remains to be spent.
    ``next_round_epsilon`` is what one round more would make of the most exposed client's, and ``rounds_left`` how many
    more the budget admits (of one above 50: at least); both are told with the budget alone, and where it is known what
    a round costs.
    """

    privacy_unit: str
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    epsilon_remaining: float
    epsilon_spent_rdp: float
    lifetime_epsilon: float
    rounds_charged: int
    clients_charged: int
    period: int
    period_started_at: datetime | None
    frozen: FreezeView | None
    next_round_epsilon: float | None = None
    rounds_left: int | None = None

    @classmethod
    def of(cls, report: BudgetReport) -> BudgetView:
        """The view of a report."""
        return cls(
            privacy_unit=report.privacy_unit,
            target_epsilon=report.target_epsilon,
            target_delta=report.target_delta,
            epsilon_spent=report.epsilon_spent,
            epsilon_remaining=report.epsilon_remaining,
            epsilon_spent_rdp=report.epsilon_spent_rdp,
            lifetime_epsilon=report.lifetime_epsilon,
            rounds_charged=report.rounds_charged,
            clients_charged=report.clients_charged,
            period=report.period,
            period_started_at=report.period_started_at,
            frozen=_freeze_view(report.frozen),
            next_round_epsilon=report.next_round_epsilon,
            rounds_left=report.rounds_left,
        )


def _freeze_view(freeze: LedgerFreeze | None) -> FreezeView | None:
    return FreezeView(incident_id=freeze.incident_id, reason=freeze.reason, at=freeze.at) if freeze else None


class SpendView(BaseModel):
    """One line of the privacy ledger. The client ``*`` is everybody: a charge that each client bears.

    ``event`` is what was done where it was more than Poisson-sampled Gaussian steps; the numbers sum it up.
    """

    sequence: int
    at: datetime
    run_id: str
    round_index: int
    client_id: str
    noise_multiplier: float
    sampling_prob: float
    steps: int
    privacy_unit: str
    event: dict[str, Any] | None

    @classmethod
    def of(cls, entry: LedgerEntry) -> SpendView:
        """The view of a ledger entry."""
        charge = entry.charge
        return cls(
            sequence=entry.sequence,
            at=entry.at,
            run_id=charge.run_id,
            round_index=charge.round_index,
            client_id=charge.unit_id,
            noise_multiplier=charge.noise_multiplier,
            sampling_prob=charge.sampling_prob,
            steps=charge.steps,
            privacy_unit=charge.privacy_unit,
            event=None if charge.event is None else json.loads(charge.event),
        )


class ProgressView(BaseModel):
    """The training loop."""

    run_id: str | None
    status: str | None
    phase: str
    rounds_total: int
    rounds_done: int
    loss: float | None
    accuracy: float | None
    epsilon: float
    version: str | None
    message: str | None
    conditions: list[ConditionView]


class HealthView(BaseModel):
    """The system's parts, each ``ok`` or what ails it."""

    status: Literal["ok", "degraded"]
    parts: dict[str, str]
    training: ProgressView | None
    release: str | None


class AuditView(BaseModel):
    """One line of the audit trail."""

    sequence: int
    at: datetime
    actor: str
    scopes: list[str]
    source: str
    request_id: str
    action: str
    params: dict[str, Any]
    before: Any
    after: Any
    status: int

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditView:
        """The view of an entry."""
        return cls(sequence=entry.sequence, at=entry.at, **dataclasses.asdict(entry.facts))
