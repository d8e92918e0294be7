"""A vehicle that takes part in training: asks for a task, trains on its own disk, and brings what may leave it.

What it sends is noised here, with a key that never leaves this machine, and stands on two ledgers before: the server's,
which is charged before anybody is asked, and the vehicle's own, which ends it when the owner's budget is spent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from edge_runtime.mailbox import MailboxSender
from edge_runtime.training.records import OwnRecords, count_images
from fedvit.api.clients import HistogramRequestView, TaskView
from fedvit.client import FedvitClient
from fedvit.clients.host import ClientHost, vision_host
from fedvit.config import LEAST_NOISE_MULTIPLIER, Settings
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
from fedvit.models.models import build_model
from fedvit.models.trainable import frozen_weights
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.events import Gaussian
from fedvit.privacy.outputs import output_id
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
# What passes by itself.
_LATER = (ControlUnreachableError, ControlApiError, RateLimitedError)
_MAX_WEIGHTS_BYTES = 8 * 2**30
_TASK_FIELDS = tuple(field.name for field in fields(TrainTask))


@dataclass(frozen=True, slots=True)
class Policy:
    """What the owner of a vehicle allows: the most that its records may lose, over all rounds and runs together."""

    target_epsilon: float = 8.0
    target_delta: float = 1e-5


@dataclass(frozen=True, slots=True)
class Step:
    """What came of asking once. ``status`` is the server's word for the update, ``mailbox``, or None without a task."""

    poll_after_s: float
    round_index: int | None = None
    status: str | None = None
    reason: str | None = None


class Vehicle:
    """One remote client.

    Args:
        client: speaks to the control server, with the vehicle's own token.
        client_id: as whom it takes part.
        data: its images; see :mod:`edge_runtime.training.records`.
        home: where its key, its ledger, and what it keeps from round to round lie.
        checkpoint: pretrained weights, where there is no network for them.
        mailbox: where updates are left when the server does not answer.
    """

    def __init__(
        self,
        client: FedvitClient,
        client_id: str,
        data: Path,
        home: Path,
        *,
        policy: Policy | None = None,
        checkpoint: Path | None = None,
        mailbox: MailboxSender | None = None,
    ) -> None:
        self._client, self._client_id, self._data, self._home = client, client_id, data, home
        self._policy, self._checkpoint, self._mailbox = policy or Policy(), checkpoint, mailbox
        self._store = Store.open(home)
        self._trainer: _Trainer | None = None
        self._made: tuple[str, bytes] | None = None
        self._kept_to_itself: set[str] = set()

    def close(self) -> None:
        """Give the ledger back."""
        self._store.close()

    def register(self) -> None:
        """Offer to take part, with as many images as there are now.

        Raises:
            DataError: there are none.
        """
        count = count_images(self._data)
        if not count:
            raise DataError(f"{self._data} holds no image.", cure="A vehicle without data has nothing to train on.")
        able = {"training": {"encodings": [encoding.value for encoding in Encoding]}}
        self._client.clients.register(self._client_id, num_examples=count, capabilities=able)

    def run(self, stop: threading.Event, told: Callable[[Step], None], rounds: int | None = None) -> None:
        """Take part until told to stop, or in so many rounds."""
        done = 0
        while not stop.is_set() and done != rounds:
            step = self._patiently()
            if step.status is None:
                stop.wait(step.poll_after_s)
                continue
            done += 1
            told(step)

    def step(self) -> Step:
        """Ask once, and do what there is to do.

        Raises:
            FedvitError: the server does not answer, or not as it should.
        """
        found = self._client.clients.task(self._client_id)
        if found.task is None:
            self._tell(found.histogram)
            return Step(found.poll_after_s)
        # The same task again: what was made of it got lost on the way.
        if self._made is None or self._made[0] != found.task.output_id:
            self._made = found.task.output_id, self._content(found.task)
        status, reason = self._send(found.task, self._made[1])
        self._tell(found.histogram)
        return Step(found.poll_after_s, found.task.round_index, status, reason)

    def _patiently(self) -> Step:
        try:
            return self.step()
        except _LATER as error:
            _LOG.warning("%s", error)
            return Step(RETRY_S)

    def _content(self, told: TaskView) -> bytes:
        """The update, or, where there must be none, the reason why."""
        try:
            return self._trained(told)
        except _LATER:
            raise
        except FedvitError as error:
            _LOG.error("round %d of %s: %s", told.round_index, told.run_id, error)
            return encode_update(ClientFailures.of(told.round_index, [self._client_id], error.message))

    def _tell(self, wanted: HistogramRequestView | None) -> None:
        """Send the histogram that is asked for, once a task has said what model it is of; a refusal is final."""
        if wanted is None or self._trainer is None or wanted.output_id in self._kept_to_itself:
            return
        try:
            order = HistogramRequest.from_json(wanted.order)
            counts = self._trainer.histogram(order, wanted, self._store)
            self._client.clients.histogram(self._client_id, order.run_id, order.round_index, counts)
        except _LATER as error:
            _LOG.warning("%s", error)
        except FedvitError as error:
            _LOG.error("no histogram is sent: %s", error)
            self._kept_to_itself.add(wanted.output_id)

    def _trained(self, told: TaskView) -> bytes:
        task = TrainTask(**{name: getattr(told, name) for name in _TASK_FIELDS})
        trainer = self._trainer_for(told)
        trainer.check(task, told)
        content = self._client.clients.task_weights(self._client_id)
        weights = decode_weights(content, max_bytes=_MAX_WEIGHTS_BYTES)
        trainer.charge(task, self._store)
        return trainer.host.train_encoded(task, weights, self._client_id, Encoding(told.encoding)).content

    def _trainer_for(self, told: TaskView) -> _Trainer:
        wanted = (told.settings, told.image_size, told.classes)
        if self._trainer is None or self._trainer.made_for != wanted:
            settings = self._settings(told)
            records = OwnRecords.open(self._data, told.classes)
            model = build_model(settings.model, len(told.classes), told.image_size)
            host = vision_host(settings, records=records, model=model)
            digest = weights_digest(frozen_weights(model))
            self._trainer = _Trainer(wanted, settings, self._client_id, records, host, digest)
        return self._trainer

    def _settings(self, told: TaskView) -> Settings:
        """The run's settings, with this vehicle's paths and its owner's budget."""
        parts: dict[str, Any] = {name: dict(told.settings[name]) for name in ("model", "training", "privacy")}
        parts["model"]["checkpoint"] = self._checkpoint
        parts["privacy"] |= {
            "target_epsilon": self._policy.target_epsilon,
            "target_delta": self._policy.target_delta,
        }
        return load_settings(
            environ={}, overrides={"home": self._home, "data": {"image_size": told.image_size}, **parts}
        )

    def _send(self, told: TaskView, content: bytes) -> tuple[str, str | None]:
        try:
            receipt = self._client.clients.upload(self._client_id, told.run_id, told.round_index, content)
        except (ConflictError, UpdateRejectedError) as error:
            return error.code, error.message
        except _LATER:
            if self._mailbox is None or not self._mailbox.update(told.run_id, told.round_index, content):
                raise
            return "mailbox", None
        return receipt.status, receipt.reason


@dataclass(frozen=True, slots=True)
class _Trainer:
    """A model that is ready, for the tasks of one run."""

    made_for: tuple[Mapping[str, Any], int, tuple[str, ...]]
    settings: Settings
    client_id: str
    records: OwnRecords
    host: ClientHost
    frozen_digest: str

    def check(self, task: TrainTask, told: TaskView) -> None:
        """Make sure that what would be released is what was charged, and is protected here.

        Raises:
            ForbiddenError: the update would leave without noise.
            IntegrityError: the task contradicts itself, or the model here is another.
            DataError: there are more or fewer images than were charged.
        """
        if task.privacy_unit != "record":
            raise ForbiddenError("This vehicle releases nothing without noise of its own.")
        count = len(self.records.records(self.client_id))
        if count != told.num_examples:
            raise DataError(f"This vehicle holds {count} images, and was asked for {told.num_examples}.")
        training, privacy = self.settings.training, self.settings.privacy
        said = (task.local_steps, task.learning_rate, task.sampling_prob, task.privacy_unit)
        if said != (training.local_steps, training.learning_rate, privacy.sampling_prob, privacy.privacy_unit):
            raise IntegrityError("The task is not of the run whose settings came with it.")
        if output_id(task, self.client_id, count) != told.output_id:
            raise IntegrityError("The task is not the one that was charged.")
        if self.frozen_digest != told.frozen_digest:
            raise IntegrityError("The weights that never travel are others here than on the server.")

    def charge(self, task: TrainTask, store: Store) -> None:
        """Write on the vehicle's own ledger what is about to be released; a repetition is written once.

        Raises:
            BudgetExhaustedError: the owner's budget does not admit it.
        """
        event = round_event(self.settings, task.noise_multiplier)
        charge = charge_of(
            event,
            run_id=task.run_id,
            round_index=task.round_index,
            unit_id=self.client_id,
            output_id=output_id(task, self.client_id, len(self.records.records(self.client_id))),
            unit=task.privacy_unit,
        )
        PrivacyAccountant(store, self.settings).charge([charge])

    def histogram(self, order: HistogramRequest, wanted: HistogramRequestView, store: Store) -> tuple[int, ...]:
        """The counts that were ordered, noised, after they were charged to the vehicle's own ledger.

        Raises:
            ForbiddenError: they would leave with less noise than a charge of this kind is for.
            IntegrityError: the order is not the one that was charged.
            DataError: there are more or fewer images than were charged, or they cannot be counted.
            BudgetExhaustedError: the owner's budget does not admit it.
        """
        if order.privacy_unit != "record" or not order.noise_multiplier >= LEAST_NOISE_MULTIPLIER:
            raise ForbiddenError("This vehicle histograms records, and not without noise of its own.")
        count = len(self.records.records(self.client_id))
        if count != wanted.num_examples:
            raise DataError(f"This vehicle holds {count} images, and was asked to histogram {wanted.num_examples}.")
        if order.output_id(self.client_id, count) != wanted.output_id:
            raise IntegrityError("The histogram is not the one that was charged.")
        charge = charge_of(
            Gaussian(order.noise_multiplier),
            run_id=order.run_id,
            round_index=order.round_index,
            unit_id=self.client_id,
            output_id=wanted.output_id,
            unit=order.privacy_unit,
        )
        PrivacyAccountant(store, self.settings).charge([charge])
        found = self.host.histograms(order, [self.client_id])
        if not found:
            raise DataError("The images of this vehicle cannot be counted.")
        return found[0].counts
