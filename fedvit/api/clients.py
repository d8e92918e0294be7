"""Models of clients: registration, heartbeats, tasks and updates of remote clients, connectivity, the mailbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from fedvit.api.base import RequestBody, View
from fedvit.api.choices import HeartbeatStatus, RemoteKind
from fedvit.types import (
    CLIENT_ID,
    DIGEST,
    MAX_EXAMPLES,
    MAX_FACTOR,
    MAX_INTERVAL_S,
    MAX_ROUND,
    MAX_STEPS,
    RUN_ID,
    Encoding,
)
from fedvit.wire.histograms import CELL_LIMIT, MAX_CELLS, MAX_CLASSES, RISK_VOTES


def _different(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return names


ClientId = Annotated[str, Field(pattern=CLIENT_ID)]
RunId = Annotated[str, Field(pattern=RUN_ID)]
Digest = Annotated[str, Field(pattern=DIGEST)]
PrivacyUnit = Literal["record", "client"]
RoundIndex = Annotated[int, Field(ge=1, le=MAX_ROUND)]
Factor = Annotated[float, Field(gt=0, le=MAX_FACTOR, allow_inf_nan=False)]
ImageCount = Annotated[int, Field(ge=0, le=MAX_EXAMPLES)]
ClassName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]
ClassNames = Annotated[tuple[ClassName, ...], Field(min_length=1, max_length=MAX_CLASSES), AfterValidator(_different)]
FeatureName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Edge = Annotated[float, Field(allow_inf_nan=False)]
RiskVote = Annotated[int, Field(ge=-RISK_VOTES, le=RISK_VOTES)]

MAX_CAPABILITIES = 4096
MAX_PARTICIPANTS = 10_000
"""The most participants of a secure aggregation session with vehicles."""
MAX_MESSAGE = 4 * 2**20
"""The most characters of a message to a participant."""


class RegisterClient(RequestBody):
    """A vehicle that offers to take part."""

    device_id: str = Field(pattern=CLIENT_ID, examples=["truck-7"])
    kind: RemoteKind = "remote"
    num_examples: int = Field(default=0, ge=0, le=MAX_EXAMPLES)
    capabilities: dict[str, Any] = Field(default_factory=dict, examples=[{"camera": "front"}])

    @field_validator("capabilities")
    @classmethod
    def _is_small(cls, capabilities: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(capabilities)) > MAX_CAPABILITIES:
            raise ValueError(f"longer than {MAX_CAPABILITIES} characters of JSON")
        return capabilities


class ReinstateRequest(RequestBody):
    """Why the quarantine may end."""

    justification: str = Field(min_length=1, max_length=1000, examples=["The camera was replaced and checked."])


class ValidateRequest(RequestBody):
    """Whether the client's data can be trusted, and why.

    ``num_examples`` is the largest number of examples to admit the client with; by default as many as it registered.
    """

    validated: bool
    num_examples: int | None = Field(default=None, ge=1, le=MAX_EXAMPLES)
    reason: str | None = Field(default=None, max_length=1000, examples=["Labels checked by hand."])


class ConditionView(View):
    """One thing that holds of a client or of training, or does not; ``reason`` is a word for programs."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_at: datetime | None


class ClientView(View):
    """A client as the API shows it; ``admitted_examples`` is null while it waits for its admission."""

    client_id: str
    kind: str
    num_examples: int
    admitted_examples: int | None
    validated: bool
    active: bool
    registered_at: datetime
    last_seen_at: datetime | None
    quarantined_at: datetime | None
    quarantine_reason: str | None
    conditions: tuple[ConditionView, ...]


class ClientsStatus(View):
    """A page of clients, with totals."""

    total: int
    active: int
    validated: int
    clients: tuple[ClientView, ...]


class HeartbeatRequest(RequestBody):
    """How the vehicle fares, and which model version it serves."""

    status: HeartbeatStatus = "ok"
    model_version: Annotated[str, Field(max_length=64)] | None = Field(default=None, examples=["v1.1.10"])


class MailboxAccess(View):
    """Where a vehicle writes messages when it cannot reach the API, and the key, hex, that it signs them with."""

    url: str
    key: str


class HeartbeatView(View):
    """The response to a heartbeat: when it was received, the interval to the next one in seconds, and the mailbox.

    ``backup_channel`` says whether messages in the mailbox are taken now. ``mailbox`` is for a token that is bound to
    this client; it is given before it is needed, since later it could not be.
    """

    client_id: str
    received_at: datetime
    interval_s: float
    backup_channel: bool
    mailbox: MailboxAccess | None


class TaskView(View):
    """What the client shall do, and all that identifies what it will release.

    The ledger holds the charge of ``output_id``, which is for ``num_examples`` records: a client that holds another
    number of them must not release anything, and registers again. ``encoding`` is the form to send, ``frozen_digest``
    the SHA-256 of the weights that never travel. ``settings`` has model, training and privacy of the run;
    ``context_digest`` is the SHA-256 of these, of ``frozen_digest``, ``image_size`` and ``classes``.
    """

    run_id: RunId
    round_index: RoundIndex
    base_digest: Digest
    data_digest: Digest
    noise_multiplier: Factor
    sampling_prob: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
    l2_clip_norm: Factor
    local_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)]
    learning_rate: Factor
    privacy_unit: PrivacyUnit
    context_digest: Digest
    noise_at: Literal["", "client", "distributed", "server"] = ""
    attempt: ImageCount = 0
    participants: ImageCount = 0
    sum_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    num_examples: ImageCount
    output_id: Digest
    encoding: Encoding
    frozen_digest: Digest
    image_size: Annotated[int, Field(ge=16, le=1024)]
    classes: ClassNames
    settings: Mapping[str, Mapping[str, Any]]


class HistogramSpecView(View):
    """See :class:`fedvit.wire.histograms.HistogramSpec`."""

    edges: Mapping[FeatureName, Annotated[tuple[Edge, ...], Field(max_length=MAX_CELLS)]]
    classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)]
    risk_votes: Annotated[tuple[RiskVote, ...], Field(max_length=MAX_CLASSES)]


class HistogramOrderView(View):
    """See :class:`fedvit.wire.histograms.HistogramRequest`."""

    run_id: RunId
    round_index: RoundIndex
    noise_multiplier: Factor
    privacy_unit: PrivacyUnit
    spec: HistogramSpecView
    context_digest: Digest


class HistogramRequestView(View):
    """What the client shall count of its records, see
    docs/explanation/drift.md; the ledger holds the charge of ``output_id``."""

    num_examples: ImageCount
    output_id: Digest
    order: HistogramOrderView


class ReceiptStatus(StrEnum):
    """What became of an update."""

    RECEIVED = "received"
    """It waits for the round."""
    ACCEPTED = "accepted"
    REFUSED = "refused"
    """Update validation failed."""
    DUPLICATE = "duplicate"
    """This client answered this round before with other content; this update changes nothing."""
    REJECTED = "rejected"
    """No round waits for it: the client was not asked, or the round went on without it."""


SecurePhase = Literal["advertise", "share", "mask", "confirm", "unmask"]


class PhaseRequestView(View):
    """What the client shall answer in the present phase of its session.

    ``request`` is base64; ``parameters`` is JSON of :class:`fedvit.secagg.parameters.Parameters`. ``identities`` are
    the participants' Ed25519 public keys, hex. ``task`` is that of the session's round and attempt; its weights are at
    ``task/weights`` in the phase ``mask``.
    """

    request: Annotated[str, Field(max_length=MAX_MESSAGE)]
    parameters: Annotated[str, Field(max_length=MAX_MESSAGE)]
    identities: Annotated[Mapping[ClientId, Digest], Field(max_length=MAX_PARTICIPANTS)]
    task: TaskView


class SecureSessionView(View):
    """The client's secure aggregation session: its present phase, and the request, null once it is answered."""

    session: Digest
    phase: SecurePhase
    asked: PhaseRequestView | None


class PhaseReceiptView(View):
    """What became of an answer to a phase; ``reason`` says why it does not count."""

    client_id: str
    session: str
    phase: str
    status: ReceiptStatus
    reason: str | None


class RemoteTaskView(View):
    """The client's task, histogram and secure aggregation session, if there are any.

    The client asks again after ``poll_after_s``.
    """

    client_id: ClientId
    poll_after_s: Annotated[float, Field(gt=0, le=MAX_INTERVAL_S, allow_inf_nan=False)]
    task: TaskView | None
    histogram: HistogramRequestView | None
    secure: SecureSessionView | None = None


def _whole(given: object) -> object:
    # 3.0 is an integer in JSON, and "3" is none.
    if isinstance(given, bool | str):
        raise ValueError("is no whole number")
    return given


Count = Annotated[int, Field(ge=-CELL_LIMIT, le=CELL_LIMIT), BeforeValidator(_whole)]


class HistogramBody(RequestBody):
    """Noised counts, as many as were asked for, in the order of the histograms."""

    counts: Annotated[list[Count], Field(max_length=MAX_CELLS)]


class HistogramReceipt(View):
    """Whether the histogram was waited for, and is kept."""

    client_id: str
    run_id: str
    round_index: int
    kept: bool


class ReceiptView(View):
    """What became of an update; ``reason`` says why it does not count. ``folded_in`` is the round that took it."""

    client_id: str
    run_id: str
    round_index: int
    status: ReceiptStatus
    reason: str | None
    folded_in: int | None
    version: str | None


class KindView(View):
    """The clients of one kind."""

    total: int
    connected: int


class LostClientView(View):
    """A client that is not connected, or whose connection is unknown; ``reason`` says which, in words."""

    client_id: str
    kind: str
    last_seen_at: datetime | None
    reason: str


class ChannelView(View):
    """The backup channel; ``pending`` is null where the mailbox cannot be read."""

    enabled: bool
    pending: int | None
    delivered: int


class ConnectivityView(View):
    """Which active clients are connected; ``disconnected_clients`` is the page that was asked for, ordered by id."""

    total: int
    connected: int
    disconnected: int
    ratio: float
    partition_suspected: bool
    heartbeat_timeout_s: float
    by_kind: Mapping[str, KindView]
    backup_channel: ChannelView
    disconnected_clients: tuple[LostClientView, ...]


class BackupView(View):
    """``pending`` messages wait in the mailbox; ``not_yet_taken`` of them are updates, which wait for a later release.

    ``delivered`` and ``rejected`` count since the state folder was made.
    """

    enabled: bool
    url: str
    enabled_at: datetime | None
    pending: int
    not_yet_taken: int
    delivered: int
    rejected: int
