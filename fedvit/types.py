"""Value types of the domain, frozen. No behaviour beyond what follows from their own fields.

Arrays are NumPy, so that this module (which a vehicle imports) loads neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    FloatArray: TypeAlias = npt.NDArray[np.float32]
    ImageArray: TypeAlias = npt.NDArray[np.uint8]
    LabelArray: TypeAlias = npt.NDArray[np.int64]
else:
    # Annotations only: NumPy's import is a tenth of a second that `fedvit --help` need not pay.
    FloatArray = ImageArray = LabelArray = Any
# ImageArray: one image (H, W, 3) or a batch of them (B, H, W, 3), RGB.
Weights = Mapping[str, FloatArray]
"""Trainable parameters by name. The frozen ones never travel: server and clients build them from the settings."""


MAX_EXAMPLES = 10_000_000
"""Most examples that a client may have; the sum over a fleet stays far below the largest integer of a database."""
CLIENT_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Pattern of client ids, safe as path segments and file names."""
RUN_ID = CLIENT_ID
"""Pattern of run ids, which are path segments and parts of file names, too."""
DIGEST = r"^[0-9a-f]{64}$"
"""Pattern of a SHA-256 in hex."""
MAX_ROUND = 99_999_999
"""The largest round index: it has eight digits in the names of files, which sort by it."""
MAX_STEPS = 1_000_000
"""The most local steps of one round."""
MAX_FACTOR = 1e6
"""The largest noise multiplier, clipping norm and learning rate; their product is a finite float32."""
MAX_INTERVAL_S = 86_400.0
"""The longest interval between two polls of a client, in seconds."""


def default_noise_place(privacy_unit: str) -> str:
    """Where noise is added unless ``privacy.noise_at`` says otherwise."""
    return "client" if privacy_unit == "record" else "server"


def utc_now() -> datetime:
    """The present moment, timezone-aware."""
    return datetime.now(UTC)


class ClientKind(StrEnum):
    """Where a client trains: on a proxy, on a vehicle, or in a depot's own training job."""

    VIRTUAL = "virtual"
    REMOTE = "remote"
    SILO = "silo"


class RunStatus(StrEnum):
    """Status of a training run."""

    RUNNING = "running"
    STOPPED = "stopped"
    COMPLETED = "completed"
    BUDGET_EXHAUSTED = "budget_exhausted"
    FAILED = "failed"
    SUPERSEDED = "superseded"

    @property
    def resumable(self) -> bool:
        """Whether a start continues this run instead of beginning another."""
        return self not in (RunStatus.COMPLETED, RunStatus.SUPERSEDED)


class Variant(StrEnum):
    """Variants in which one model version is published: all blocks or every other one, in fp32 or in int8."""

    STANDARD = "standard"
    STANDARD_INT8 = "standard_int8"
    EDGE_OPTIMIZED = "edge_optimized"
    """Every other block, matrix products in int8."""
    EDGE_OPTIMIZED_FP32 = "edge_optimized_fp32"


class Severity(StrEnum):
    """Severity of an incident: the runbook's levels, the worst first."""

    P0 = "P0"
    P1 = "P1"
    P2 = "P2"
    P3 = "P3"


class RemediationAction(StrEnum):
    """Actions that may follow an alert automatically, where ``remediation.allow`` names them."""

    RESTART_VALIDATED_ONLY = "restart_validated_only"
    FULL_RETRAIN = "full_retrain"
    REMOVE_CLIENT = "remove_client"
    STOP_TRAINING = "stop_training"
    OPTIMIZE_EDGE = "optimize_edge"
    SWITCH_TO_EDGE_OPTIMIZED = "switch_to_edge_optimized"
    ASYNCHRONOUS_MODE = "asynchronous_mode"
    FEWER_CLIENTS = "fewer_clients"
    ENABLE_BACKUP_CHANNEL = "enable_backup_channel"


NEVER_AUTOMATIC = ("privacy_reset", "privacy_breach")
"""Actions of the runbook that only a person may start."""


class Encoding(StrEnum):
    """Encodings of an update on the wire; see :mod:`fedvit.wire.encoding`."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    TOP_K = "top_k"


class OperationStatus(StrEnum):
    """Status of a long operation."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self in (OperationStatus.SUCCEEDED, OperationStatus.FAILED, OperationStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class LastContact:
    """A client as far as its whereabouts go."""

    client_id: str
    kind: ClientKind
    last_seen_at: datetime | None


@dataclass(frozen=True, slots=True)
class Participation:
    """How many committed rounds a client took part in, and in how many of them its update did not count."""

    rounds: int
    failures: int


@dataclass(frozen=True, slots=True)
class UpdateStatistics:
    """Statistics of a client's noised updates in its latest rounds; see :class:`ClientOutcome`.

    ``norms`` are the oldest first; ``alignments`` are by round.
    """

    norms: tuple[float, ...] = ()
    alignments: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Client:
    """A vehicle, or a depot, that may take part in rounds.

    ``num_examples`` is what the client claims to hold. It is treated as public: aggregation weights are proportional
    to it. ``admitted_examples`` is the largest number that an operator has admitted the client with; None while the
    client waits for its admission.
    """

    client_id: str
    kind: ClientKind
    num_examples: int
    validated: bool = True
    active: bool = True
    registered_at: datetime = field(default_factory=utc_now)
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    last_seen_at: datetime | None = None
    quarantined_at: datetime | None = None
    quarantine_reason: str | None = None
    admitted_examples: int | None = None

    @property
    def admitted(self) -> bool:
        """Whether an operator has admitted the client with as many examples as it claims."""
        return self.admitted_examples is not None and self.num_examples <= self.admitted_examples

    @property
    def quarantined(self) -> bool:
        """Whether an incident keeps the client out of every round."""
        return self.quarantined_at is not None

    @property
    def trains(self) -> bool:
        """Whether the client has a trainer of its own: the capability ``training`` is an object."""
        return isinstance(self.capabilities.get("training"), Mapping)

    @property
    def encodings(self) -> frozenset[str]:
        """The encodings that the client's trainer supports: ``{"training": {"encodings": [...]}}``."""
        training = self.capabilities.get("training")
        names = training.get("encodings", ()) if isinstance(training, Mapping) else ()
        return frozenset(str(name) for name in names) if isinstance(names, Sequence) else frozenset()

    @property
    def last_contact(self) -> LastContact:
        """When the client was last in contact."""
        return LastContact(self.client_id, self.kind, self.last_seen_at)


@dataclass(frozen=True, slots=True)
class Cohort:
    """The clients drawn for one round, in the fixed order in which their updates are summed.

    ``max_weight`` is the largest weight of one client in the sum; None is no limit. ``num_examples`` are the numbers of
    examples that clients are registered with, by id; None where they are not known. ``secure`` has each client's
    request of the phase ``mask`` under secure aggregation.
    """

    round_index: int
    client_ids: tuple[str, ...]
    max_weight: int | None = None
    num_examples: Mapping[str, int] | None = None
    secure: Mapping[str, bytes] | None = None

    def __post_init__(self) -> None:
        if len(set(self.client_ids)) != len(self.client_ids):
            raise ValueError(f"round {self.round_index}: a client appears twice in the cohort")


@dataclass(frozen=True, slots=True)
class TrainTask:
    """The task of every client of a round: everything that identifies its output, except the weights themselves.

    ``base_digest`` is the SHA-256 of the weights that the round starts from, ``data_digest`` that of the data manifest,
    ``context_digest`` that of :meth:`fedvit.config.Settings.context_digest`; empty in tests of parts without settings.
    With the ``privacy_unit`` client, the client clips its whole update to ``l2_clip_norm``, and ``sampling_prob`` only
    says how much of its data a step reads. ``noise_at`` is where noise is added; empty stands for the default of the
    unit. With distributed noise, ``attempt`` counts the sessions of the round that began before, ``participants`` is
    the size of the cohort and ``sum_weight`` the largest weight of its sum; otherwise they are 0.
    """

    run_id: str
    round_index: int
    base_digest: str
    data_digest: str
    noise_multiplier: float
    sampling_prob: float
    l2_clip_norm: float
    local_steps: int
    learning_rate: float
    privacy_unit: str = "record"
    context_digest: str = ""
    noise_at: str = ""
    attempt: int = 0
    participants: int = 0
    sum_weight: float = 0.0

    @property
    def noise_place(self) -> str:
        """Where noise is added: at the ``client``, ``distributed`` over the clients, or at the ``server``."""
        return self.noise_at or default_noise_place(self.privacy_unit)


@dataclass(frozen=True, slots=True)
class ClientOutcome:
    """The result of one client in one round. It holds nothing computed on private data without noise.

    ``staleness`` counts the versions committed between the one that the client started from and the round that took its
    answer. ``counted_against_client`` marks an error of an update of this client alone that failed validation.
    ``sent_bytes`` and ``encoding`` describe an update that came as bytes. ``update_norm`` and ``alignment`` are
    statistics of the noised update, see :mod:`fedvit.clients.update_statistics`; None where there are none.
    ``traceback`` is that of an error in a virtual client's code, see :mod:`fedvit.clients.tracebacks`.
    """

    client_id: str
    num_examples: int
    error: str | None = None
    staleness: int = 0
    counted_against_client: bool = False
    sent_bytes: int | None = None
    encoding: str | None = None
    update_norm: float | None = None
    alignment: float | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evaluation of a model on the held-out images of the server (never on a client's)."""

    loss: float
    accuracy: float
    recall_by_class: Mapping[str, float]
    confusion: tuple[tuple[int, ...], ...]
    """``confusion[i][j]``: images of class i that were classified as class j."""
    num_examples: int

    def answers(self) -> list[int]:
        """How many images were classified as each class."""
        return [sum(column) for column in zip(*self.confusion, strict=True)]


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: its configuration, its data manifest and its progress."""

    run_id: str
    ordinal: int
    status: RunStatus
    rounds_total: int
    rounds_done: int
    noise_multiplier: float
    config: Mapping[str, Any]
    config_digest: str
    data_digest: str
    started_at: datetime
    ended_at: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """A round as stored. ``version`` is set in the transaction that commits it."""

    run_id: str
    round_index: int
    cohort: tuple[str, ...]
    committed: bool
    version: str | None
    loss: float | None
    accuracy: float | None
    epsilon: float | None
    num_updates: int
    duration_s: float | None


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One immutable model version: content addresses and lineage.

    ``weights_digest`` and ``frozen_digest`` are blobs (safetensors); ``artifacts`` maps a variant to its ONNX blob and
    is empty for a version that was committed but not released to replicas and vehicles. ``derived_from`` names the
    version whose weights it has, where it was not trained (a roll-back, an optimisation); ``refusal`` is the reason of
    the release gate that rejected it.
    """

    version: str
    run_id: str
    round_index: int
    weights_digest: str
    frozen_digest: str
    created_at: datetime
    epsilon: float
    metrics: Mapping[str, float]
    lineage: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    derived_from: str | None = None
    refusal: str | None = None

    @property
    def released(self) -> bool:
        """Whether replicas and vehicles may load it."""
        return bool(self.artifacts)


@dataclass(frozen=True, slots=True)
class LedgerFreeze:
    """A freeze of the privacy ledger: nothing may be charged."""

    incident_id: str
    reason: str
    by: str
    at: datetime


@dataclass(frozen=True, slots=True)
class BudgetReport:
    """The privacy budget; API, metrics and command line all read this value.

    Epsilons are at ``target_delta``, for the most exposed unit. Only charges of the present ``period`` count;
    ``lifetime_epsilon`` composes all charges. The first period has no recorded start. ``next_round_epsilon`` is epsilon
    after one more round, ``rounds_left`` how many more the budget admits (of a budget above 50: at least); None where
    it was not requested, or where the cost of a round is not known.
    """

    privacy_unit: str
    target_epsilon: float
    target_delta: float
    epsilon_spent: float
    epsilon_spent_rdp: float
    lifetime_epsilon: float
    rounds_charged: int
    clients_charged: int
    period: int = 1
    period_started_at: datetime | None = None
    frozen: LedgerFreeze | None = None
    next_round_epsilon: float | None = None
    rounds_left: int | None = None

    @property
    def epsilon_remaining(self) -> float:
        """The epsilon that may be spent now: never below zero, and zero while the ledger is frozen."""
        return 0.0 if self.frozen else max(0.0, self.target_epsilon - self.epsilon_spent)


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """Progress of the training loop, for a progress bar or an API response."""

    run_id: str | None
    status: RunStatus | None
    phase: str
    rounds_total: int
    rounds_done: int
    loss: float | None
    accuracy: float | None
    epsilon: float
    version: str | None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """A piece of work that outlasts a request. ``progress`` runs from 0 to 1; ``stage`` describes the present step.

    ``params`` and ``result`` hold JSON types only; ``error`` has ``code``, ``message`` and ``cure``.
    """

    operation_id: str
    kind: str
    status: OperationStatus
    progress: float
    stage: str
    params: Mapping[str, Any]
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    result: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    cancel_requested: bool = False
