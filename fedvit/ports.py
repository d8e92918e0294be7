"""Ports: narrow protocols between the library and what runs it, implemented on Ray, in simulations and by test doubles.

The docstrings here hold for every implementation, which states only what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.types import (
    BudgetReport,
    Cohort,
    Evaluation,
    FloatArray,
    Operation,
    TrainingProgress,
    TrainTask,
    Variant,
    Weights,
)
from fedvit.updates import ClientFailures, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec

if TYPE_CHECKING:
    from fedvit.config import Settings


@dataclass(frozen=True, slots=True)
class Charge:
    """The privacy cost of one output for one unit, identified so that a repeated charge is harmless.

    Attributes:
        output_id: SHA-256 of everything that determines the released value (task, client, data).
        unit_id: the client, or :data:`POPULATION`, whose charges count for every client.
        steps: so many Poisson-sampled Gaussian steps are charged, unless ``event`` is given.
        event: canonical JSON of an event of :mod:`fedvit.privacy.events`; the three numbers are then a summary.
    """

    run_id: str
    round_index: int
    unit_id: str
    output_id: str
    noise_multiplier: float
    sampling_prob: float
    steps: int
    privacy_unit: str = "record"
    event: str | None = None


POPULATION = "*"
"""The unit of a charge that counts for every client. No client can have this id."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A line of the privacy ledger."""

    sequence: int
    at: datetime
    charge: Charge


class AccountantPort(Protocol):
    """The privacy accountant: one writer of one ledger."""

    def charge(self, charges: Sequence[Charge]) -> BudgetReport | None:
        """Write the charges, all or none, before anything is released; charges already written are skipped.

        Raises:
            BudgetExhaustedError: the charges would exceed the budget; nothing was written.
            LedgerFrozenError: an incident froze the ledger; nothing was written.
        """

    def check(self, charges: Sequence[Charge]) -> None:
        """Raise what :meth:`charge` would raise now; write nothing."""

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """The units whose own charge alone would fit into the budget now; nothing is written.

        Raises:
            LedgerFrozenError: an incident froze the ledger.
        """

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        """Begin a new budget period in which ``new_epsilon`` may be spent. The ledger keeps all earlier charges.

        A repetition with an equal ``call_key`` grants once.
        """

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        """The spent and the remaining budget; with ``outlook`` also the cost of the next round and the rounds left."""

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries from ``since`` on, oldest first, at most ``limit``."""


@dataclass(frozen=True, slots=True)
class ProxyReport:
    """Which client proxies answer, by name. ``stranded`` clients were last trained on a proxy that does not."""

    alive: Mapping[str, bool]
    stranded: frozenset[str] = frozenset()

    @property
    def reaches_all(self) -> bool:
        """Whether every virtual client has a proxy that would train it."""
        return not self.stranded and any(self.alive.values())

    def reaches(self, client_id: str) -> bool:
        """Whether a proxy would train this client; a client that was never trained goes to any proxy that answers."""
        return client_id not in self.stranded and any(self.alive.values())


class FleetPort(Protocol):
    """The clients of a system, in whatever process they run."""

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        """Send the task to the cohort and yield answers as they arrive, late ones to earlier tasks included.

        Ends when no client is in flight, or after ``timeout_s`` without an answer. Until then it also yields None, once
        the task is sent and from time to time, so that the caller can act. Clients that have not answered when it ends,
        or when the caller stops iterating, stay in flight. A client that failed is an outcome with an error, not an
        exception.
        """

    def in_flight(self) -> frozenset[str]:
        """The clients that were sent a task and have not answered; they may not be sent another one."""

    def give_up(self, reason: str) -> list[ClientFailures]:
        """Stop waiting: a client in flight becomes an outcome with the error ``reason``, and its answer is lost."""

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        """Send one phase of a session, other than ``mask``, to these clients; yield their answers as they arrive.

        Ends when all have answered, or after ``timeout_s`` in all; a client that has not answered then is out of the
        session. Until then it also yields None, from time to time. The phase ``mask`` is :meth:`train` with
        ``Cohort.secure``, in the session that was exchanged last.
        """

    def end_session(self, session: SecureSession) -> None:
        """The session is over, however it ended: its messages are deleted, and no answer to it is taken any more."""

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now, also during training; takes a few seconds at most."""

    def request_histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> None:
        """Ask these clients for a histogram of their data, without waiting for the answers."""

    def histograms(self) -> list[ClientHistogram]:
        """The histograms that have arrived since the last call; a client that cannot give one sends none."""


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """One variant of a version as ONNX bytes, measured on the server's held-out images.

    ``agreement`` is the share of images on which it predicts what the fp32 torch model predicts; ``complexity`` has
    ``parameters``, ``blocks`` and ``multiply_adds`` of one image, where they are known.
    """

    content: bytes
    agreement: float
    accuracy: float
    complexity: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelBenchmark:
    """Predictions and latency of an ONNX model on held-out images: one image at a time, one thread."""

    predicted: tuple[int, ...]
    p50_ms: float
    p95_ms: float


class ClientHostPort(Protocol):
    """The clients of one client proxy, and their training."""

    def train(
        self,
        task: TrainTask,
        weights: Weights,
        client_ids: Sequence[str],
        max_weight: int | None = None,
        num_examples: Mapping[str, int] | None = None,
        secure: Mapping[str, bytes] | None = None,
    ) -> UpdateMessage:
        """Train these clients from ``weights``; return one message. A repeated call returns the same message.

        A client that fails is an outcome with an error, not an exception. Where weights are numbers of examples, none
        is above ``max_weight``. A client with more examples than ``num_examples``, with which it is registered, is
        rejected alone: the aggregator would have to reject the whole sum. With ``secure``, each client's request of
        the phase ``mask``, the message is the sum of their masked vectors.

        Raises:
            IntegrityError: the task names other weights.
        """

    def exchange(self, session: SecureSession, phase: str, requests: Mapping[str, bytes]) -> list[SecureAnswer]:
        """The answers of these clients to one phase, other than ``mask``, of a secure aggregation session.

        A client takes part in one session at a time. One whose keys are lost, because the process was restarted, has
        an error: its keys are not made again.
        """

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """Noised histograms of those clients' data that can be counted. A repeated call returns the same ones."""


class ServerModelPort(Protocol):
    """The global model on the server: initial weights, evaluation, export."""

    exports: bool
    """Whether the model can be exported; without it nothing is released."""
    head: str | None
    """Name of the linear head's trained weight [classes, width]; None if there is none."""

    def initial_weights(self) -> Weights:
        """The trainable weights that a run starts from; equal settings give equal weights."""

    def frozen_weights(self) -> Weights:
        """The weights that are not trained and never sent."""

    def head_basis(self, weights: Weights, directions: int) -> FloatArray | None:
        """Orthonormal [directions, width]: principal directions of the head's inputs, over the server's own images.

        None where there is no head, where these are all directions, or where images are too few. No label is used.
        """

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """Evaluate the model with these weights on held-out data; None where there is no such data."""

    def histogram_spec(self) -> HistogramSpec | None:
        """What clients shall count of their data; None where there are no images to choose the bins by."""

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        """ONNX bytes of one variant, checked against torch."""

    def benchmark(self, content: bytes, limit: int | None = None) -> ModelBenchmark:
        """Run an exported model on the first ``limit`` held-out images, or on all."""


class AggregatorPort(Protocol):
    """The training loop, long operations and model changes, for the control API and the command line."""

    def start_training(self) -> TrainingProgress:
        """Begin or continue the run that the settings describe; harmless while it is under way.

        Raises:
            ConflictError: the system is shutting down, or the fleet is larger than the settings allow.
        """

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""

    def progress(self) -> TrainingProgress:
        """The state of the training loop.

        Raises:
            Exception: the unexpected error that ended the loop.
        """

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop has ended, or after ``timeout_s``."""

    def proxies_alive(self) -> ProxyReport:
        """See :meth:`FleetPort.proxies_alive`."""

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        """Queue a long operation: ``optimize``, ``retrain`` or ``restart``; ``shutdown`` begins at once.

        A repetition with an equal ``call_key`` returns the same operation.

        Raises:
            NotFoundError: no such kind.
            ConflictError, BudgetExhaustedError: the operation would have no effect in the present state.
        """

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early; harmless when it has ended.

        Raises:
            NotFoundError: no such operation.
        """

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until a ``shutdown`` of this running system has succeeded; its mode, or None after ``timeout_s``.

        A shutdown of an earlier system on the same state folder does not count.
        """

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        """Make an older version's content current again, as a new version; return its name.

        Raises:
            NotFoundError: no such version.
            ConflictError: it is the current version, or the release gate refuses it and ``force`` is not given.
        """

    def switch_variant(self, variant: Variant) -> str:
        """Let the fleet serve another variant of the current version; return the version's name.

        Raises:
            ConflictError: the current version has no such variant.
        """


@dataclass(frozen=True, slots=True)
class SystemUrls:
    """The URLs of a running system; ``edges`` in the order of the configured ports.

    ``ca_file`` is the certificate (PEM) of control and inference servers that use TLS.
    """

    control: str
    inference: str
    edges: tuple[str, ...]
    dashboard: str | None = None
    ca_file: str | None = None


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """The result of ``fedvit finetune``.

    Attributes:
        job: its name on the ledger and in ``finetune`` of the state folder; other data or settings are another job.
        steps: so many of ``steps_total`` were taken and charged.
        images_per_s: expected images a second, over all ranks; None where no step was left to take.
        epsilon: the cost of the job's steps together, at ``target_delta``.
        epsilon_spent: the spent budget of the whole state folder.
        weights: the file of the trained weights; None before the first checkpoint.
        stopped: why the job ended before its last step.
    """

    job: str
    steps: int
    steps_total: int
    ranks: int
    device: str
    images_per_s: float | None
    accuracy: float
    loss: float
    recall_by_class: Mapping[str, float]
    noise_multiplier: float
    epsilon: float
    epsilon_spent: float
    target_delta: float
    seconds: float
    weights: str | None
    stopped: str | None = None


class SystemPort(Protocol):
    """A whole system; the command line finds it through the entry point group ``fedvit.system``."""

    def __init__(self, settings: Settings) -> None: ...

    def running(
        self, on_step: Callable[[str], None], on_shutdown: Callable[[], None], *, train: bool
    ) -> AbstractContextManager[SystemUrls]:
        """Start the system, yield its URLs, and stop it gracefully when the block ends.

        Args:
            on_step: called with the description of each step.
            on_shutdown: called from another thread after a shutdown through the control API; it has to end the block.
            train: begin or continue training.
        """

    def finetune(self, on_step: Callable[[str], None]) -> FinetuneReport:
        """Train one model on the whole data set, on several ranks, from the last checkpoint if there is one.

        Raises:
            UsageError: the settings, the data, the model, the state or the cluster do not allow it.
        """

    def sweep(self, folder: Path, on_trial: Callable[[Any], None]) -> None:
        """Run the planned trials that the journal in ``folder`` does not have yet.

        Args:
            on_trial: called with each :class:`fedvit.tools.sweep.outcome.TrialOutcome` after it is in the journal.

        Raises:
            PlacementError: there is no room for so many trials at a time.
        """


class ClockPort(Protocol):
    """Wall and monotonic time; :data:`fedvit.clock.SYSTEM_CLOCK` is the machine's, tests pass their own."""

    def now(self) -> datetime:
        """The present moment, timezone-aware."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""


class BlobStorePort(Protocol):
    """Content-addressed bytes. Every read of an unknown digest raises :class:`fedvit.errors.NotFoundError`."""

    def put(self, content: bytes) -> str:
        """Store ``content``; return its SHA-256, hex. Idempotent."""

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        """Store large pieces, in their order, as one blob without joining them first."""

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, verified.

        Raises:
            IntegrityError: the stored bytes no longer match.
        """

    def get_range(self, digest: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop``, not verified; fewer where the blob ends before."""

    def size(self, digest: str) -> int:
        """The length in bytes of a blob, whose content is not verified."""
