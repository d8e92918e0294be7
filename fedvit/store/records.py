"""Frozen records that the store takes and returns, beyond those of :mod:`fedvit.types`."""

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
class ClientValidation:
    """Whether a client's data is trusted: an operator's decision, or an ``automatic`` one from measurements.

    ``admitted_examples`` is the largest number of examples that an operator admits the client with; None stands for the
    number that it is registered with.
    """

    validated: bool
    reason: str | None
    at: datetime
    automatic: bool = False
    admitted_examples: int | None = None


@dataclass(frozen=True, slots=True)
class RegistrationQuota:
    """How many vehicles devices may register in all, and how often a day each may change its registration."""

    max_clients: int
    changes_per_day: int


@dataclass(frozen=True, slots=True)
class ClientPage:
    """A page of clients with the decisions on their data, and the totals over all clients."""

    total: int
    active: int
    validated: int
    clients: tuple[Client, ...]
    validations: Mapping[str, ClientValidation]


@dataclass(frozen=True, slots=True)
class RoundCommit:
    """The results of a finished round. Values that are not finite are stored as absent: JSON cannot express them.

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
    """A model version that replicas and vehicles run from ``at`` on; a roll-back is a new release.

    ``artifacts`` maps a variant to the digest of its blob, ``envelopes`` a variant to its signed manifest, JSON text.
    ``serve_variant`` is what the fleet runs unless it is pinned; None in releases older than that choice.
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
    """A version that is derived from another without training. ``lineage`` is added to the origin's."""

    origin: str
    lineage: Mapping[str, Any]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BudgetPeriod:
    """A privacy budget that was granted. Only charges after ``ledger_sequence`` count against it.

    ``approved_by`` is None where no second person was needed.
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
        """Its number in reports: the first period is that of the settings and has no line."""
        return self.sequence + 1


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """A request for a privacy budget, which a second person has to approve."""

    request_id: str
    new_epsilon: float
    justification: str
    requested_by: str
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Token:
    """A stored bearer token: ``secret_hash`` is the SHA-256 of its secret, hex.

    ``client_id`` is the one client that a vehicle's token authenticates; None where it names no client.
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
    """A mutating call, as the audit trail records it. ``params``, ``before`` and ``after`` hold JSON types only.

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
    """A mutating request with an idempotency key; ``request_hash`` is the SHA-256 of its whole content, hex."""

    actor: str
    route: str
    key: str
    request_hash: str


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """The response that a repeated request gets again. ``body`` is text."""

    status: int
    body: str
    media_type: str | None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FiredAlert:
    """One firing of one alert: ``fingerprint`` names the alert, ``starts_at`` the firing.

    Without ``ends_at`` it still fires. ``labels`` and ``annotations`` are those of the rule that fired.
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
    """An alert of an incident, and when the log received it."""

    incident_id: str
    received_at: datetime
    alert: FiredAlert


@dataclass(frozen=True, slots=True)
class Incident:
    """A problem, from the first alert of a name to the end of the last; open while ``resolved_at`` is None.

    ``severity`` is the worst of its alerts; ``firing`` of its ``alerts`` have not ended.
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
    """An action that was taken, or withheld, for one firing. ``target`` is the client that it concerns, if any."""

    incident_id: str
    fingerprint: str
    starts_at: datetime
    action: RemediationAction
    target: str | None
    at: datetime
    outcome: RemediationOutcome = RemediationOutcome.BEGUN
    detail: str = ""


@dataclass(frozen=True, slots=True)
class RemediationState:
    """The facts that decide whether a remediation may be taken on, as of one moment.

    ``attempted`` remediations were taken on before, whatever their outcome. ``removed`` of the ``fleet`` clients were
    removed by them and have not come back, or are about to be removed. ``active`` clients include the ``unvalidated``.
    """

    attempted: tuple[Remediation, ...]
    active: int
    unvalidated: int
    target_active: bool
    removed: int
    fleet: int


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """One recorded event, in words."""

    at: datetime
    text: str


@dataclass(frozen=True, slots=True)
class RoundTally:
    """The number of rounds of a span of time by their end; ``lost`` ones began and will never be committed.

    A round ``under_way`` continues, also after a crash or a stop. ``answers`` are those of clients to the committed
    rounds, of which ``refused`` do not count. The table has one row for a client and round, so none counts twice.
    """

    committed: int
    under_way: int
    lost: int
    answers: int
    refused: int
