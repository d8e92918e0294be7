"""The doors between the library and what runs it: narrow protocols, implemented by Ray handles and by test doubles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from fedvit.config import Settings
from fedvit.types import (
    BudgetReport,
    Cohort,
    Evaluation,
    Operation,
    TrainingProgress,
    TrainTask,
    Variant,
    Weights,
)
from fedvit.updates import ClientFailures, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec


@dataclass(frozen=True, slots=True)
class Charge:
    """One privacy spend of one unit's data, identified so that a retry is harmless.

    ``output_id`` is the SHA-256 of everything that determines the released value (task, client, data). The spend is
    ``steps`` Poisson-sampled Gaussian steps, unless ``event`` says otherwise: the canonical JSON of a
    :mod:`fedvit.privacy.events`, of which the three numbers are then a summary. The unit :data:`POPULATION` is
    everybody: such a charge counts for every unit.
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
"""The unit of a charge that every client bears. No client can be called that."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A line of the privacy ledger, as history shows it."""

    sequence: int
    at: datetime
    charge: Charge


class AccountantPort(Protocol):
    """The privacy accountant: one writer of one ledger."""

    def charge(self, charges: Sequence[Charge]) -> BudgetReport | None:
        """Write the charges, all or none, before anything is released; those already written are skipped.

        Raises:
            BudgetExhaustedError: with them the budget would be exceeded; nothing was written.
            LedgerFrozenError: nothing may be charged at all; nothing was written.
        """
        ...

    def check(self, charges: Sequence[Charge]) -> None:
        """Whether the charges could be written now; nothing is.

        Raises:
            LedgerFrozenError: an incident froze the ledger.
            BudgetExhaustedError: with them the budget would be exceeded.
            LedgerFrozenError: nothing may be charged at all.
        """
        ...

    def within_budget(self, charges: Sequence[Charge]) -> frozenset[str]:
        """The units that each could bear its own of the charges now; nothing is written.

        Raises:
            LedgerFrozenError: nothing may be charged at all.
        """
        ...

    def reset_budget(
        self,
        new_epsilon: float,
        justification: str,
        requested_by: str,
        approved_by: str | None = None,
        *,
        call_key: str | None = None,
    ) -> BudgetReport:
        """Begin a new budget period: from now on ``new_epsilon`` may be spent. What was spent stays on the ledger.

        A repetition with an equal ``call_key`` grants once.
        """
        ...

    def budget(self, *, outlook: bool = False) -> BudgetReport:
        """What was spent and what is left; with ``outlook``, also what the next round costs and how many are left."""
        ...

    def history(self, since: datetime | None = None, limit: int = 1000) -> Sequence[LedgerEntry]:
        """Ledger entries from ``since`` on, oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class ProxyReport:
    """Which client proxies answer, by name. ``stranded`` are the clients that live on one that does not."""

    alive: Mapping[str, bool]
    stranded: frozenset[str] = frozenset()

    @property
    def reaches_all(self) -> bool:
        """Whether every virtual client has a proxy that would train it."""
        return not self.stranded and any(self.alive.values())

    def reaches(self, client_id: str) -> bool:
        """Whether a proxy would train this client; one that trained nowhere yet goes to any that answers."""
        return client_id not in self.stranded and any(self.alive.values())


class FleetPort(Protocol):
    """The clients, wherever they run."""

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        """Hand the task to the cohort and yield one message a proxy and task, as they arrive, late ones as well.

        Ends when nobody is in flight any more, or after ``timeout_s`` of silence; until then None comes now and then,
        so that the caller can think again, and may come as soon as the task is handed out. Whoever has not answered
        when the caller leaves, or when it ends, stays in flight. A client that failed is an outcome with an error, not
        an exception.
        """
        ...

    def in_flight(self) -> frozenset[str]:
        """The clients that were handed a task and have not answered; they may not be handed another."""
        ...

    def give_up(self, reason: str) -> list[ClientFailures]:
        """Wait for nobody any more: each in flight is an outcome with the error ``reason``; later answers are lost."""
        ...

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now, also in the middle of training; takes seconds at most."""
        ...

    def request_histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> None:
        """Ask these clients for a histogram of their data, and do not wait for it."""
        ...

    def histograms(self) -> list[ClientHistogram]:
        """The histograms that have arrived since the last time; who has none to give stays silent."""
        ...


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
class Trial:
    """An ONNX file on held-out images, one at a time, ONNX Runtime on one thread: answers, and time an image."""

    predicted: tuple[int, ...]
    p50_ms: float
    p95_ms: float


class ClientHostPort(Protocol):
    """What a client proxy hosts: the virtual clients that live behind it."""

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> UpdateMessage:
        """Train these clients from ``weights``; one message. Repeating the call repeats the very same message.

        A client that fails is an outcome with an error, not an exception.

        Raises:
            IntegrityError: these are not the weights that the task was made for.
        """
        ...

    def histograms(self, order: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """Noised histograms of these clients' data, of those that can give one. Repeating the call repeats them."""
        ...


class ServerModelPort(Protocol):
    """The global model, on the server's side: where it starts, how good it is, how it is exported."""

    exports: bool
    """Whether :meth:`export` makes something that replicas and vehicles can run; without it nothing is released."""

    def initial_weights(self) -> Weights:
        """The trainable weights that a run starts from; equal settings give equal weights."""
        ...

    def frozen_weights(self) -> Weights:
        """The weights that never travel."""
        ...

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """The model with these weights on held-out data; None where there are none."""
        ...

    def histogram_spec(self) -> HistogramSpec | None:
        """What clients are asked to count of their data; None where there are no images that could say so."""
        ...

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        """ONNX bytes of one variant, checked against torch."""
        ...

    def try_out(self, content: bytes, limit: int | None = None) -> Trial:
        """Run an exported model on the first ``limit`` held-out images, or on all."""
        ...


class AggregatorPort(Protocol):
    """The training loop, as the control API and the command line see it."""

    def start_training(self) -> TrainingProgress:
        """Begin, or continue, the run that the settings describe; harmless when it is under way.

        Raises:
            ConflictError: the system is shutting down.
        """
        ...

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""
        ...

    def progress(self) -> TrainingProgress:
        """Where the loop stands."""
        ...

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop rests, or after ``timeout_s``."""
        ...

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now."""
        ...

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        """Queue a long operation: ``optimize``, ``retrain`` or ``restart``; ``shutdown`` begins at once.

        An equal ``call_key`` gives the same one.

        Raises:
            ConflictError, BudgetExhaustedError: it could not do anything as things are.
        """
        ...

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early; harmless when it has ended.

        Raises:
            NotFoundError: no such operation.
        """
        ...

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until a ``shutdown`` of this running system has succeeded; its mode, or None after ``timeout_s``.

        One of a system that ran on the same state before does not count.
        """
        ...

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        """Make an older version's content current again, as a new version; return its name.

        Raises:
            NotFoundError: no such version.
            ConflictError: it is the current one, or the gate refuses it and ``force`` is not given.
        """
        ...

    def switch_variant(self, variant: Variant) -> str:
        """Move the fleet to another variant of the current version; return the version's name.

        Raises:
            ConflictError: the current version has no such variant.
        """
        ...


@dataclass(frozen=True, slots=True)
class SystemUrls:
    """Where a running system answers. ``edges`` in the order of the configured ports.

    ``ca_file`` is the certificate (PEM) by which control and inference are known, where they speak TLS.
    """

    control: str
    inference: str
    edges: tuple[str, ...]
    dashboard: str | None = None
    ca_file: str | None = None


@dataclass(frozen=True, slots=True)
class FinetuneReport:
    """What ``fedvit finetune`` made.

    Attributes:
        job: names it on the ledger and in ``finetune`` of the state folder; other data or settings are another job.
        steps: so many of ``steps_total`` were taken and charged.
        images_per_s: expected images a second, over all ranks; None where no step was left to take.
        epsilon: what the job's steps cost together, at ``target_delta``.
        epsilon_spent: what the ledger says of the whole state folder.
        weights: the file of the trained weights; None before the first checkpoint.
        stopped: why it ended before its last step.
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
    """A whole running system, found by the command line through the entry point group ``fedvit.system``."""

    def __init__(self, settings: Settings) -> None: ...

    def running(
        self, on_step: Callable[[str], None], on_shutdown: Callable[[], None], *, train: bool
    ) -> AbstractContextManager[SystemUrls]:
        """Start everything, yield where it answers, stop gracefully what was started.

        Args:
            on_step: told each step.
            on_shutdown: called, from another thread, when the control API was asked to shut the system down and all is
                safe; it makes the block end.
            train: begin or continue training; who starts a system needs no token for that.
        """
        ...

    def finetune(self, on_step: Callable[[str], None]) -> FinetuneReport:
        """Train one model on the whole data set, on several ranks; what was kept before is gone on with.

        Raises:
            UsageError: the settings, the data, the model, the state or the cluster stand in the way.
        """
        ...

    def sweep(self, folder: Path, on_trial: Callable[[Any], None]) -> None:
        """Run the trials that the settings plan and that the journal in ``folder`` does not have yet.

        Args:
            on_trial: told every :class:`fedvit.tools.sweep.outcome.TrialOutcome` after it is in the journal.

        Raises:
            PlacementError: there is no room for so many trials at a time.
        """
        ...


class ClockPort(Protocol):
    """Time as an argument; :data:`fedvit.clock.SYSTEM_CLOCK` is the machine's, tests and simulations pass their own."""

    def now(self) -> datetime:
        """The present moment, timezone-aware."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...


class BlobStorePort(Protocol):
    """Content-addressed bytes."""

    def put(self, content: bytes) -> str:
        """Store ``content``; return its SHA-256, hex. Idempotent."""
        ...

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        """Store large pieces as one blob without joining them first."""
        ...

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, verified.

        Raises:
            NotFoundError: no such blob.
            IntegrityError: the stored bytes no longer match.
        """
        ...

    def path(self, digest: str) -> Path:
        """Where the blob lies on this machine, for a reader that wants a file."""
        ...


JsonObject = dict[str, Any]
