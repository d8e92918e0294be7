"""What the control API answers about the fleet: clients, their data, their lines, and incidents."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from fedvit.client.views import Condition, View


class ClientView(View):
    """A client."""

    client_id: str
    kind: str
    num_examples: int
    validated: bool
    active: bool
    registered_at: datetime
    last_seen_at: datetime | None = None
    quarantined_at: datetime | None = None
    quarantine_reason: str | None = None
    conditions: tuple[Condition, ...] = ()


class ClientsStatus(View):
    """A page of clients, with totals."""

    total: int
    active: int
    validated: int
    clients: tuple[ClientView, ...]


class MailboxView(View):
    """Where a vehicle leaves messages when it cannot reach the API, and the key, hex, that it seals them with."""

    url: str
    key: str


class HeartbeatView(View):
    """That a heartbeat arrived, and when the next is due; ``backup_channel``: whether the mailbox is open."""

    client_id: str
    received_at: datetime
    interval_s: float
    backup_channel: bool
    mailbox: MailboxView | None


class TaskView(View):
    """What a remote client shall train; ``settings`` has model, training and privacy of the run."""

    run_id: str
    round_index: int
    base_digest: str
    data_digest: str
    noise_multiplier: float
    sampling_prob: float
    l2_clip_norm: float
    local_steps: int
    learning_rate: float
    privacy_unit: str
    num_examples: int
    output_id: str
    encoding: str
    frozen_digest: str
    image_size: int
    classes: tuple[str, ...]
    settings: Mapping[str, Any]


class HistogramRequestView(View):
    """What a remote client shall count of its ``num_examples`` records; ``order`` is a :class:`HistogramRequest`."""

    num_examples: int
    output_id: str
    order: Mapping[str, Any]


class RemoteTaskView(View):
    """What a remote client shall do, if anything, and after how many seconds to ask again."""

    client_id: str
    poll_after_s: float
    task: TaskView | None
    histogram: HistogramRequestView | None = None


class HistogramReceipt(View):
    """Whether a histogram was waited for, and is kept."""

    client_id: str
    run_id: str
    round_index: int
    kept: bool


class ReceiptView(View):
    """What became of an update: received, accepted, refused, duplicate or rejected_answers, and why."""

    client_id: str
    run_id: str
    round_index: int
    status: str
    reason: str | None
    folded_in: int | None
    version: str | None


class ClientQuality(View):
    """How far one client's contributions can be trusted, from 0 to 1, and why."""

    client_id: str
    score: float | None
    validated: bool
    reasons: tuple[str, ...]
    rounds: int
    failures: int


class DataQualityView(View):
    """How far the fleet's contributions can be trusted, from 0 to 1; below ``threshold`` an alert fires."""

    score: float | None
    threshold: float
    assessed: int
    unvalidated: tuple[str, ...]
    clients: tuple[ClientQuality, ...]


class DriftSignal(View):
    """One figure that drift would move, beside what it was."""

    name: str
    value: float | None
    reference: float | None
    score: float | None
    reason: str


class FeatureShift(View):
    """One histogram of clients' histograms against its reference: by how much it moved, and by how much noise would."""

    feature: str
    psi: float
    js: float
    ks: float
    wasserstein: float
    statistic: float
    threshold: float
    drifts: bool


class ClusterShift(View):
    """Clients with alike label mixes that have moved together."""

    feature: str
    client_ids: tuple[str, ...]
    psi: float


class DriftView(View):
    """Whether what vehicles see has moved away from what the model learned, and at whom."""

    drifting: bool
    score: float | None
    threshold: float
    reference_version: str | None
    signals: tuple[DriftSignal, ...]
    compared: int = 0
    features: tuple[FeatureShift, ...] = ()
    drifting_clients: Mapping[str, tuple[str, ...]] = {}
    drifting_clusters: tuple[ClusterShift, ...] = ()


class KindConnectivity(View):
    """How many clients of one kind there are, and how many of them are connected."""

    total: int
    connected: int


class ChannelLoad(View):
    """What waits in the backup channel (None: it cannot be told), and what came through it."""

    enabled: bool
    pending: int | None
    delivered: int


class DisconnectedClient(View):
    """A client that is not heard, and why that is thought."""

    client_id: str
    kind: str
    last_seen_at: datetime | None
    reason: str


class ConnectivityView(View):
    """Who is heard and who is not."""

    total: int
    connected: int
    disconnected: int
    ratio: float
    partition_suspected: bool
    heartbeat_timeout_s: float
    by_kind: Mapping[str, KindConnectivity]
    backup_channel: ChannelLoad
    disconnected_clients: tuple[DisconnectedClient, ...]


class BackupChannelView(View):
    """The mailbox for vehicles that cannot reach the API."""

    enabled: bool
    url: str
    enabled_at: datetime | None
    pending: int
    not_yet_taken: int
    delivered: int
    rejected: int


class ActionView(View):
    """An immediate action, and what became of it."""

    action: str
    done: bool
    detail: str


class BreachView(View):
    """What was done about a privacy breach; ``policy`` says which actions happen unasked."""

    incident_id: str
    actions: tuple[ActionView, ...]
    quarantined: tuple[str, ...]
    unknown_clients: tuple[str, ...]
    revoked_tokens: tuple[str, ...]
    rolled_back_to: str | None
    ledger_frozen: bool
    forensic_bundle: str
    forensic_sha256: str | None
    policy: str


class StandDownView(View):
    """That an incident is over, and who stays in quarantine until it is lifted for each."""

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
