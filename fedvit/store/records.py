"""What the store takes and gives beyond the domain's own nouns, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fedvit.api.incidents import RemediationOutcome
from fedvit.types import Client, ClientOutcome, RemediationAction, Severity


@dataclass(frozen=True, slots=True)
class FleetInfo:
    """The fleet that a state folder belongs to. ``classes`` in the order of the model's outputs."""

    data_digest: str
    partition: Mapping[str, Any]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """What an operator decided on a client's data, or, ``automatic``, what follows from what was seen of it."""

    validated: bool
    reason: str | None
    at: datetime
    automatic: bool = False


@dataclass(frozen=True, slots=True)
class ClientPage:
    """Some clients with what operators decided on them, and how many there are in all."""

    total: int
    active: int
    validated: int
    clients: tuple[Client, ...]
    validations: Mapping[str, Validation]


@dataclass(frozen=True, slots=True)
class RoundCommit:
    """What a finished round leaves behind. Values that are not finite are stored as absent: JSON has no word for them.

    ``weights_digest`` and ``frozen_digest`` name blobs; ``outcomes`` has at most one entry a client, of this round's
    cohort or, late, of an earlier one's.
    """

    weights_digest: str
    frozen_digest: str
    epsilon: float
    loss: float | None
    accuracy: float | None
    metrics: Mapping[str, float]
    lineage: Mapping[str, Any]
    outcomes: tuple[ClientOutcome, ...]
    duration_s: float


@dataclass(frozen=True, slots=True)
class Release:
    """One step of what replicas and vehicles are told to run; a roll-back is a new step.

    ``artifacts`` maps a variant to the digest of its blob, ``envelopes`` a variant to its signed manifest, JSON text.
    ``serve_variant`` is what the fleet runs unless it is pinned; None in a state that knew no such choice.
    """

    sequence: int
    version: str
    artifacts: Mapping[str, str]
    envelopes: Mapping[str, str]
    at: datetime
    reason: str
    serve_variant: str | None = None


@dataclass(frozen=True, slots=True)
class Derivation:
    """A version that is made from another one without training. ``lineage`` is added to the origin's."""

    origin: str
    lineage: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BudgetPeriod:
    """A privacy budget that was granted anew. Only charges behind ``ledger_sequence`` count against it.

    ``approved_by`` is None where no second person was asked.
    """

    sequence: int
    at: datetime
    target_epsilon: float
    justification: str
    requested_by: str
    approved_by: str | None
    ledger_sequence: int

    @property
    def period(self) -> int:
        """Its number, as reports name it: the first period is that of the settings and has no line."""
        return self.sequence + 1


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """A privacy budget that somebody asked for and a second person has to approve."""

    request_id: str
    new_epsilon: float
    justification: str
    requested_by: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token as the state knows it: ``secret_hash`` is the SHA-256 of its secret, hex.

    ``client_id`` is the one client that a device token speaks for; None binds it to none.
    """

    token_id: str
    name: str
    secret_hash: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    client_id: str | None = None


@dataclass(frozen=True, slots=True)
class AuditFacts:
    """What the audit trail keeps of one mutating call. ``params``, ``before`` and ``after`` hold JSON types only.

    ``action`` is method and route template, ``source`` the caller's address, ``status`` the HTTP status answered.
    """

    actor: str
    scopes: tuple[str, ...]
    source: str
    request_id: str
    action: str
    params: Mapping[str, Any]
    before: Any
    after: Any
    status: int


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """A line of the audit trail."""

    sequence: int
    at: datetime
    facts: AuditFacts


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A mutating request that names an idempotency key; ``request_hash`` is the SHA-256 of all it asks for, hex."""

    actor: str
    route: str
    key: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """The answer that a repeated request gets again. ``body`` is text, ``headers`` those that belong to the answer."""

    status: int
    body: str
    media_type: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """One firing of one alert: ``fingerprint`` names the alert, ``starts_at`` the firing. ``ends_at`` None fires still.

    ``labels`` and ``annotations`` are those of the rule that fired.
    """

    alertname: str
    severity: Severity
    fingerprint: str
    starts_at: datetime
    ends_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    generator_url: str = ""


@dataclass(frozen=True, slots=True)
class LoggedAlert:
    """An alert of an incident, and when the log learned of it."""

    incident_id: str
    received_at: datetime
    alert: Alert


@dataclass(frozen=True, slots=True)
class Incident:
    """What was wrong from the first alert of a name to the end of the last; ``resolved_at`` None is open.

    ``severity`` is the worst that its alerts had; ``firing`` of its ``alerts`` have not ended.
    """

    incident_id: str
    alertname: str
    severity: Severity
    summary: str
    opened_at: datetime
    resolved_at: datetime | None
    alerts: int
    firing: int


@dataclass(frozen=True, slots=True)
class IncidentEvent:
    """A line of an incident's own history: ``opened``, ``reopened``, ``resolved``, or the section of a note."""

    at: datetime
    kind: str
    actor: str
    text: str


@dataclass(frozen=True, slots=True)
class Remediation:
    """An action that was taken, or withheld, for one firing. ``target`` is the client that it is about, if any."""

    incident_id: str
    fingerprint: str
    starts_at: datetime
    action: RemediationAction
    target: str | None
    at: datetime
    outcome: RemediationOutcome = RemediationOutcome.BEGUN
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What decides whether a remediation may be taken on, as of one moment.

    ``attempted`` are those that were taken on before, whatever came of them; ``removed`` clients were taken out by them
    and have not come back, or are about to be, out of a ``fleet`` of so many. ``active`` clients include those
    ``unvalidated``.
    """

    attempted: tuple[Remediation, ...]
    active: int
    unvalidated: int
    target_active: bool
    removed: int
    fleet: int


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One thing that the state records, in words."""

    at: datetime
    text: str


@dataclass(frozen=True, slots=True)
class RoundTally:
    """What became of the rounds of some span of time; those ``lost`` began and will never be committed.

    A round ``under_way`` goes on, also after a crash or a stop. ``answers`` are what clients answered to the committed
    ones, ``refused`` those that do not count. No answer counts twice: the table has one row for a client and round.
    """

    committed: int
    under_way: int
    lost: int
    answers: int
    refused: int
