"""Remote client of training: polls the server for tasks, trains on the vehicle's own records and sends noised updates.

Noise is added here with a key that never leaves this machine. Every output is charged to two ledgers before it is
sent: the server's, before the vehicle is asked, and the vehicle's own, which enforces the owner's budget.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edge_runtime.mailbox import MailboxSender
from fedvit.api.clients import HistogramRequestView, TaskView
from fedvit.client import FedvitClient
from fedvit.clients.host import ClientHost, vision_host
from fedvit.config import LEAST_NOISE_MULTIPLIER, Settings
from fedvit.data.folder import class_records, images_below, subfolders
from fedvit.data.records import Record, TreeSource
from fedvit.data.trees import FileTree, open_tree
from fedvit.errors import (
    ConflictError,
    ControlApiError,
    ControlUnreachableError,
    DataError,
    FedvitError,
    ForbiddenError,
    IntegrityError,
    RateLimitedError,
    UpdateRejectedError,
)
from fedvit.models.build import build_model
from fedvit.models.trainable import frozen_weights
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.events import Event, Gaussian
from fedvit.privacy.randomness import output_id
from fedvit.privacy.round_cost import charge_of, round_event
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import Encoding, TrainTask
from fedvit.updates import ClientFailures
from fedvit.wire.histograms import HistogramRequest
from fedvit.wire.tensors import decode_weights, weights_digest
from fedvit.wire.updates import encode_update

_LOG = logging.getLogger(__name__)
RETRY_S = 5.0
_TEMPORARY = (ControlUnreachableError, ControlApiError, RateLimitedError)
_MAX_WEIGHTS_BYTES = 8 * 2**30
_TASK_FIELDS = tuple(field.name for field in fields(TrainTask))


@dataclass(frozen=True, slots=True)
class OwnRecords:
    """One vehicle's data set; implements :class:`fedvit.clients.host.ClientRecords`."""

    source: TreeSource

    @classmethod
    def open(cls, path: Path, classes: Sequence[str]) -> OwnRecords:
        """The images of the fleet's ``classes``, which define the labels; a vehicle need not have all classes.

        Raises:
            DataError: there is no image, or a folder is not named like one of the classes.
        """
        tree = open_tree(path)
        parent = _parent(tree)
        if unknown := sorted(set(subfolders(tree, parent)) - set(classes)):
            raise DataError(f"{path} has a folder {unknown[0]!r}.", cure=f"The fleet's classes: {', '.join(classes)}.")
        train = class_records(tree, parent, classes)
        if not train:
            raise DataError(f"{path} holds no image.", cure="Put images into folders named like the fleet's classes.")
        return cls(TreeSource("own", tuple(classes), train, (), tree))

    def records(self, client_id: str) -> tuple[Record, ...]:
        """All records: there is one client."""
        return self.source.train


def count_images(path: Path) -> int:
    """The number of images in folders of any name; raises DataError where there is no such folder."""
    tree = open_tree(path)
    parent = _parent(tree)
    return sum(len(images_below(tree, f"{parent}{name}/")) for name in subfolders(tree, parent))


def _parent(tree: FileTree) -> str:
    return "train/" if "train/" in tree.names else ""


@dataclass(frozen=True, slots=True)
class OwnerBudget:
    """The owner's privacy budget for the vehicle's records, over all rounds and runs together."""

    target_epsilon: float = 8.0
    target_delta: float = 1e-5


@dataclass(frozen=True, slots=True)
class PollResult:
    """The result of one poll. ``status`` is the server's status of the update, ``mailbox``, or None without a task."""

    poll_after_s: float
    round_index: int | None = None
    status: str | None = None
    reason: str | None = None


class Vehicle:
    """One remote client.

    Args:
        client: of the control server's API, with the vehicle's own token.
        client_id: the vehicle's identity.
        data: folder of its images; see :mod:`edge_runtime.training.vehicle`.
        home: folder of its key, its ledger and its client state.
        checkpoint: file of pretrained weights, if they cannot be downloaded.
        mailbox: receives updates while the server does not answer.
    """

    def __init__(
        self,
        client: FedvitClient,
        client_id: str,
        data: Path,
        home: Path,
        *,
        budget: OwnerBudget | None = None,
        checkpoint: Path | None = None,
        mailbox: MailboxSender | None = None,
    ) -> None:
        self._client, self._client_id, self._data, self._home = client, client_id, data, home
        self._budget, self._checkpoint, self._mailbox = budget or OwnerBudget(), checkpoint, mailbox
        self._store = Store.open(home)
        self._trainer: _RunTrainer | None = None
        self._latest: tuple[str, bytes] | None = None
        self._refused_histograms: set[str] = set()

    def close(self) -> None:
        """Close the ledger."""
        self._store.close()

    def register(self) -> None:
        """Register as a client, with the present number of images; raises DataError where there are none."""
        count = count_images(self._data)
        if not count:
            raise DataError(f"{self._data} holds no image.", cure="A vehicle without data has nothing to train on.")
        capabilities = {"training": {"encodings": [encoding.value for encoding in Encoding]}}
        self._client.clients.register(self._client_id, num_examples=count, capabilities=capabilities)

    def run(self, stop: threading.Event, on_round: Callable[[PollResult], None], rounds: int | None = None) -> None:
        """Take part until ``stop`` is set, or in the given number of rounds."""
        done = 0
        while not stop.is_set() and done != rounds:
            try:
                result = self.poll()
            except _TEMPORARY as error:
                _LOG.warning("%s", error)
                result = PollResult(RETRY_S)
            if result.status is None:
                stop.wait(result.poll_after_s)
                continue
            done += 1
            on_round(result)

    def poll(self) -> PollResult:
        """Poll once, and answer the task and the histogram request, if any.

        Raises:
            FedvitError: the server does not answer, or its answer is not valid.
        """
        response = self._client.clients.task(self._client_id)
        task = response.task
        if task is None:
            self._answer_histogram(response.histogram)
            return PollResult(response.poll_after_s)
        # The same task again: the answer did not reach the server.
        if self._latest is None or self._latest[0] != task.output_id:
            self._latest = task.output_id, self.answer(task)
        status, reason = self._send(task, self._latest[1])
        self._answer_histogram(response.histogram)
        return PollResult(response.poll_after_s, task.round_index, status, reason)

    def answer(self, view: TaskView) -> bytes:
        """The encoded update for a task, or the encoded reason why there is none.

        Raises:
            ControlApiError, ControlUnreachableError, RateLimitedError: the server does not answer.
        """
        try:
            return self._update(view)
        except _TEMPORARY:
            raise
        except FedvitError as error:
            _LOG.error("round %d of %s: %s", view.round_index, view.run_id, error)
            return encode_update(ClientFailures.of(view.round_index, [self._client_id], error.message))

    def _answer_histogram(self, view: HistogramRequestView | None) -> None:
        """Send a requested histogram. A refusal is final. Before the first task, the model is not known yet."""
        if view is None or self._trainer is None or view.output_id in self._refused_histograms:
            return
        try:
            request = HistogramRequest.from_json(view.order)
            counts = self._trainer.histogram(request, view)
            self._client.clients.histogram(self._client_id, request.run_id, request.round_index, counts)
        except _TEMPORARY as error:
            _LOG.warning("%s", error)
        except FedvitError as error:
            _LOG.error("no histogram is sent: %s", error)
            self._refused_histograms.add(view.output_id)

    def _update(self, view: TaskView) -> bytes:
        task = TrainTask(**{name: getattr(view, name) for name in _TASK_FIELDS})
        trainer = self._trainer_for(view)
        trainer.check(task, view)
        content = self._client.clients.task_weights(self._client_id)
        weights = decode_weights(content, max_bytes=_MAX_WEIGHTS_BYTES)
        trainer.charge(task)
        return trainer.host.train_encoded(task, weights, self._client_id, Encoding(view.encoding)).content

    def _trainer_for(self, view: TaskView) -> _RunTrainer:
        key = (view.settings, view.image_size, view.classes)
        if self._trainer is None or self._trainer.key != key:
            settings, records = self._settings(view), OwnRecords.open(self._data, view.classes)
            model = build_model(settings.model, len(view.classes), view.image_size)
            host = vision_host(settings, records=records, model=model)
            digest = weights_digest(frozen_weights(model))
            self._trainer = _RunTrainer(key, settings, self._client_id, records, host, digest, self._store)
        return self._trainer

    def _settings(self, view: TaskView) -> Settings:
        """The run's settings, with this vehicle's paths and its owner's budget."""
        parts: dict[str, Any] = {name: dict(view.settings[name]) for name in ("model", "training", "privacy")}
        parts["model"]["checkpoint"] = self._checkpoint
        parts["privacy"] |= asdict(self._budget)
        return load_settings(
            environ={}, overrides={"home": self._home, "data": {"image_size": view.image_size}, **parts}
        )

    def _send(self, view: TaskView, content: bytes) -> tuple[str, str | None]:
        try:
            receipt = self._client.clients.upload(self._client_id, view.run_id, view.round_index, content)
        except (ConflictError, UpdateRejectedError) as error:
            return error.code, error.message
        except _TEMPORARY:
            if self._mailbox is None or not self._mailbox.update(view.run_id, view.round_index, content):
                raise
            return "mailbox", None
        return receipt.status, receipt.reason


@dataclass(frozen=True, slots=True)
class _RunTrainer:
    """Training on this vehicle for the tasks of one run: checks, charges, and the client host."""

    key: tuple[Mapping[str, Any], int, tuple[str, ...]]
    settings: Settings
    client_id: str
    records: OwnRecords
    host: ClientHost
    frozen_digest: str
    store: Store

    @property
    def num_examples(self) -> int:
        """The number of images at the time when the run's first task came."""
        return len(self.records.records(self.client_id))

    def check(self, task: TrainTask, view: TaskView) -> None:
        """Check that the update will be what was charged, and is protected here."""
        if task.privacy_unit != "record":
            raise ForbiddenError("This vehicle releases nothing without noise of its own.")
        if self.num_examples != view.num_examples:
            raise DataError(f"This vehicle holds {self.num_examples} images, and was asked for {view.num_examples}.")
        training, privacy = self.settings.training, self.settings.privacy
        of_task = (task.local_steps, task.learning_rate, task.sampling_prob, task.privacy_unit)
        if of_task != (training.local_steps, training.learning_rate, privacy.sampling_prob, privacy.privacy_unit):
            raise IntegrityError("The task is not of the run whose settings came with it.")
        if output_id(task, self.client_id, self.num_examples) != view.output_id:
            raise IntegrityError("The task is not the one that was charged.")
        if self.frozen_digest != view.frozen_digest:
            raise IntegrityError("The weights that never travel are others here than on the server.")

    def charge(self, task: TrainTask) -> None:
        """Charge an update to the vehicle's own ledger; a repetition is charged once."""
        output = output_id(task, self.client_id, self.num_examples)
        self._charge(round_event(self.settings, task.noise_multiplier), task, output)

    def histogram(self, request: HistogramRequest, view: HistogramRequestView) -> tuple[int, ...]:
        """The requested counts with noise, after they are charged to the vehicle's own ledger."""
        if request.privacy_unit != "record" or not request.noise_multiplier >= LEAST_NOISE_MULTIPLIER:
            raise ForbiddenError("This vehicle histograms records, and not without noise of its own.")
        count = self.num_examples
        if count != view.num_examples:
            raise DataError(f"This vehicle holds {count} images, and was asked to histogram {view.num_examples}.")
        if request.output_id(self.client_id, count) != view.output_id:
            raise IntegrityError("The histogram is not the one that was charged.")
        self._charge(Gaussian(request.noise_multiplier), request, view.output_id)
        histograms = self.host.histograms(request, [self.client_id])
        if not histograms:
            raise DataError("The images of this vehicle cannot be counted.")
        return histograms[0].counts

    def _charge(self, event: Event, task: TrainTask | HistogramRequest, output: str) -> None:
        charge = charge_of(
            event,
            run_id=task.run_id,
            round_index=task.round_index,
            unit_id=self.client_id,
            output_id=output,
            unit=task.privacy_unit,
        )
        PrivacyAccountant(self.store, self.settings).charge([charge])
