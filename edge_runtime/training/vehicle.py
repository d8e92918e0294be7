"""Remote client of training: polls the server for tasks, trains on the vehicle's own records and sends noised updates.

Noise is added here with a key that never leaves this machine. Every output is charged to two ledgers before it is
sent: the server's, before the vehicle is asked, and the vehicle's own, within the limits of its owner's policy. Nothing
that a server sends ends the loop: what is not valid, or not allowed, is refused with a reason.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_runtime.mailbox import MailboxSender
from edge_runtime.training.outputs import OutputLedger
from edge_runtime.training.policy import Purpose, VehiclePolicy
from edge_runtime.training.records import count_images
from edge_runtime.training.run_trainer import RunTrainer, run_key, run_settings
from edge_runtime.training.secure import SecureParticipant, Work
from fedvit.api.clients import HistogramRequestView, PhaseRequestView, SecureSessionView, TaskView
from fedvit.client import FedvitClient
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import (
    ConflictError,
    ControlApiError,
    ControlUnreachableError,
    DataError,
    FedvitError,
    ForbiddenError,
    IntegrityError,
    OverloadedError,
    RateLimitedError,
    UpdateRejectedError,
)
from fedvit.ports import ClockPort
from fedvit.secagg.parameters import Parameters
from fedvit.secure_session import UNMASK
from fedvit.store.store import Store
from fedvit.types import Encoding, TrainTask, Weights
from fedvit.updates import ClientFailures
from fedvit.wire.histograms import HistogramRequest
from fedvit.wire.tensors import decode_weights
from fedvit.wire.updates import encode_update

_LOG = logging.getLogger(__name__)
RETRY_S = 5.0
DISTRIBUTED, REFUSED = "distributed", "refused"
_TEMPORARY = (ControlUnreachableError, ControlApiError, OverloadedError, RateLimitedError)
_MAX_REASON = 500
_TASK_FIELDS = tuple(field.name for field in fields(TrainTask))


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
        data: folder of its images; see :mod:`edge_runtime.training.records`.
        home: folder of its key, its ledger and its client state.
        policy: of its owner; by default the conservative one of :class:`VehiclePolicy`.
        checkpoint: file of pretrained weights, if they cannot be downloaded.
        mailbox: receives updates while the server does not answer.
        clock: dates the ledger, and says which of its charges are of the last 24 hours.
    """

    def __init__(
        self,
        client: FedvitClient,
        client_id: str,
        data: Path,
        home: Path,
        *,
        policy: VehiclePolicy | None = None,
        checkpoint: Path | None = None,
        mailbox: MailboxSender | None = None,
        clock: ClockPort = SYSTEM_CLOCK,
    ) -> None:
        self._client, self._client_id, self._data, self._home = client, client_id, data, home
        self._policy, self._checkpoint, self._mailbox = policy or VehiclePolicy(), checkpoint, mailbox
        self._store = Store.open(home, clock=clock)
        self._outputs = OutputLedger(self._store, self._policy, clock)
        self._secure = SecureParticipant(client_id, home, self._store, self._policy)
        self._trainer: RunTrainer | None = None
        self._latest: tuple[TaskView, bytes] | None = None
        self._refused_histogram: str | None = None

    def close(self) -> None:
        """Close the ledger."""
        self._store.close()

    def register(self) -> None:
        """Register as a client, with the present number of images; raises DataError where there are none."""
        count = count_images(self._data)
        if not count:
            raise DataError(f"{self._data} holds no image.", cure="A vehicle without data has nothing to train on.")
        training: dict[str, object] = {"encodings": [encoding.value for encoding in Encoding]}
        if DISTRIBUTED in self._policy.noise_at:
            training["identity"] = self._secure.public_key
        self._client.clients.register(self._client_id, num_examples=count, capabilities={"training": training})

    def run(self, stop: threading.Event, on_round: Callable[[PollResult], None], rounds: int | None = None) -> None:
        """Take part until ``stop`` is set, or in the given number of rounds; errors are logged, and it goes on."""
        done = 0
        while not stop.is_set() and done != rounds:
            try:
                result = self.poll()
            except FedvitError as error:
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
        self._secure.keep_only(None if response.secure is None else response.secure.session)
        if response.secure is not None:
            return self._answer_phase(response.secure, response.poll_after_s)
        task = response.task
        if task is None:
            self._answer_histogram(response.histogram)
            return PollResult(response.poll_after_s)
        # The same task again: the answer did not reach the server.
        if self._latest is None or self._latest[0] != task:
            self._latest = task, self.answer(task)
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
        except Exception as error:
            reason = _reason(error)
        _LOG.error("round %d of %s: %s", view.round_index, view.run_id, reason)
        return encode_update(ClientFailures.of(view.round_index, [self._client_id], reason))

    def _answer_histogram(self, view: HistogramRequestView | None) -> None:
        """Send a requested histogram. A refusal is final. Before the first task of a run, its model is not known."""
        if view is None or self._trainer is None or view.output_id == self._refused_histogram:
            return
        if view.order.context_digest != self._trainer.host.context_digest:
            return
        try:
            request = HistogramRequest.from_json(view.order.model_dump())
            self._policy.check_histogram(request)
            counts = self._trainer.histogram(request, view)
            self._client.clients.histogram(self._client_id, request.run_id, request.round_index, counts)
        except _TEMPORARY as error:
            _LOG.warning("%s", error)
        except Exception as error:
            _LOG.error("no histogram is sent: %s", _reason(error))
            self._refused_histogram = view.output_id

    def _answer_phase(self, view: SecureSessionView, poll_after_s: float) -> PollResult:
        """Answer the present phase of a session; the last one, a refusal and a rejection end the vehicle's round."""
        asked, refusal = view.asked, None
        if asked is None:
            return PollResult(poll_after_s)
        try:
            content = self._secure.answer(view, asked, Work(self._check_session, self._contribution))
        except _TEMPORARY:
            raise
        except Exception as error:
            refusal = _reason(error)
            _LOG.error("phase %s of round %d: %s", view.phase, asked.task.round_index, refusal)
            content = self._secure.refusal(refusal)
        try:
            receipt = self._client.clients.answer(self._client_id, view.session, view.phase, content)
        except (ConflictError, UpdateRejectedError) as error:
            return PollResult(poll_after_s, asked.task.round_index, error.code, error.message)
        if refusal is None and view.phase != UNMASK:
            return PollResult(poll_after_s)
        status = receipt.status if refusal is None else REFUSED
        return PollResult(poll_after_s, asked.task.round_index, status, refusal)

    def _check_session(self, asked: PhaseRequestView, parameters: Parameters) -> None:
        task, trainer = self._prepared(asked.task)
        self._policy.check_survivors(trainer.check_session(task, parameters).honest)

    def _contribution(self, asked: PhaseRequestView, parameters: Parameters) -> npt.NDArray[np.uint32]:
        task, trainer = self._prepared(asked.task)
        trainer.check_session(task, parameters)
        return trainer.contribution(task, self._weights(trainer), asked.task)

    def _update(self, view: TaskView) -> bytes:
        task, trainer = self._prepared(view)
        if task.noise_place == DISTRIBUTED:
            raise ForbiddenError("This vehicle releases no share of distributed noise but under secure aggregation.")
        return trainer.update(task, self._weights(trainer), view)

    def _weights(self, trainer: RunTrainer) -> Weights:
        max_bytes = trainer.max_weights_bytes
        return decode_weights(self._client.clients.task_weights(self._client_id, max_bytes), max_bytes=max_bytes)

    def _prepared(self, view: TaskView) -> tuple[TrainTask, RunTrainer]:
        """The task, checked against what this vehicle has and may do, and its trainer."""
        task = TrainTask(**{name: getattr(view, name) for name in _TASK_FIELDS})
        settings = run_settings(view, home=self._home, checkpoint=self._checkpoint, policy=self._policy)
        self._policy.check_update(task, settings, view.frozen_digest)
        if settings.context_digest(view.classes, view.frozen_digest) != task.context_digest:
            raise IntegrityError(
                "The settings, image size, classes or frozen weights that came with the task were not charged."
            )
        self._outputs.check(Purpose.UPDATE, task.run_id, task.round_index, view.output_id, task.attempt)
        if self._trainer is None or self._trainer.key != run_key(view):
            self._trainer = RunTrainer.build(view, settings, self._client_id, self._data, self._outputs)
        self._trainer.check(task, view)
        return task, self._trainer

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


def _reason(error: Exception) -> str:
    """Why a server gets no output. What its values cause in torch or timm is told by the type of the error alone."""
    if isinstance(error, FedvitError):
        return error.message[:_MAX_REASON]
    _LOG.debug("the task cannot be carried out", exc_info=error)
    return f"The task cannot be carried out ({type(error).__name__})."
