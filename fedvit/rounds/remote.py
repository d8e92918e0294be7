"""Tasks of remote clients and their answers, exchanged through the state folder.

The aggregator stores a task for each client; the control API sends it to the client and stores the answer; the
aggregator reads it. Each of these processes may restart, and there may be several of the control API. A task is stored
after its charge, so that the ledger holds everything that a client releases. An answer belongs to one client and one
round. The first one counts, and it stays until the client has another task, so that a repeated round finds it. An
answer is validated before it is stored: of an invalid one, its SHA-256 and the fault are stored in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import BROADCAST
from fedvit.aggregation.validation import UpdateValidator
from fedvit.api.clients import ReceiptStatus
from fedvit.atomic_write import create_atomically
from fedvit.config import Settings
from fedvit.errors import ConflictError, NotFoundError, UpdateRejectedError
from fedvit.ports import POPULATION
from fedvit.privacy.randomness import output_id
from fedvit.store.store import Store
from fedvit.types import Client, ClientOutcome, Encoding, RunStatus, TrainTask
from fedvit.updates import ClientFailures, EncodedUpdate
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, checked_counts
from fedvit.wire.tensors import shapes_of
from fedvit.wire.untrusted import MAX_REASON, errors_as_rejection, fields_of, one_line, parse_json, text
from fedvit.wire.updates import largest_update

FROZEN_DIGEST = "frozen_digest"
"""Metadata key of the SHA-256 of the weights that never travel, as the aggregator built them."""
_TASK_KEY = "remote_task/"
_HISTOGRAM_KEY = "remote_histogram/"
# An invalid answer begins with it. No safetensors file does: it would be the length of its header.
_INVALID = b"\xff" * 8
_MAX_INVALID_BYTES = 8_192


@dataclass(frozen=True, slots=True)
class Receipt:
    """Receipt of a client's update to a round; ``folded_in`` is the round that took it, once one has."""

    client_id: str
    run_id: str
    round_index: int
    status: ReceiptStatus
    reason: str | None = None
    folded_in: int | None = None
    version: str | None = None

    def check(self) -> None:
        """Check that the update waits for its round, or was taken.

        Raises:
            UpdateRejectedError: update validation failed.
            ConflictError: no round waits for it, or the client answered before.
        """
        reason = str(self.reason).rstrip(".")
        message = f"The update of {self.client_id} to round {self.round_index} is {self.status.value}: {reason}."
        if self.status is ReceiptStatus.REFUSED:
            raise UpdateRejectedError(message, cure="Do not send it again.")
        if self.status in (ReceiptStatus.REJECTED, ReceiptStatus.DUPLICATE):
            raise ConflictError(message, cure="Ask for the next task.")


@dataclass(frozen=True, slots=True)
class Offer:
    """A task for one client: ``num_examples`` and so ``output_id`` are what was charged.

    ``closed`` is the reason why no round waits for the answer any more.
    """

    client_id: str
    task: TrainTask
    num_examples: int
    encoding: Encoding
    closed: str | None = None

    @property
    def output_id(self) -> str:
        """The identity of the client's output."""
        return output_id(self.task, self.client_id, self.num_examples)

    def is_for(self, run_id: str, round_index: int) -> bool:
        """Whether it is a task of this round."""
        return (self.task.run_id, self.task.round_index) == (run_id, round_index)

    def answer(self, content: bytes) -> EncodedUpdate:
        """The answer as an update message."""
        return EncodedUpdate(self.task.round_index, ClientOutcome(self.client_id, self.num_examples), content)

    def failure(self, reason: str, *, counted: bool) -> ClientFailures:
        """The message that the client contributes nothing, ``counted`` against it or not."""
        outcome = ClientOutcome(self.client_id, self.num_examples, reason, counted_against_client=counted)
        return ClientFailures(self.task.round_index, (outcome,))

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Offer | None:
        """The inverse of :meth:`to_json`; None for None, and for what an earlier version of the program stored."""
        try:
            task, encoding = TrainTask(**value["task"]), Encoding(value["encoding"])
            return cls(**{**value, "task": task, "encoding": encoding})
        except (KeyError, TypeError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class _StoredAnswer:
    """The bytes of a valid answer, or the SHA-256 (hex) of an invalid one and its fault."""

    content: bytes = b""
    sha256: str | None = None
    fault: str | None = None

    def is_of(self, content: bytes) -> bool:
        """Whether these bytes are the answer."""
        return content == self.content if self.sha256 is None else hashlib.sha256(content).hexdigest() == self.sha256

    @classmethod
    def invalid(cls, content: bytes, fault: str) -> _StoredAnswer:
        return cls(b"", hashlib.sha256(content).hexdigest(), one_line(fault))

    def to_bytes(self) -> bytes:
        if self.sha256 is None:
            return self.content
        return _INVALID + json.dumps({"sha256": self.sha256, "fault": self.fault}).encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> _StoredAnswer:
        """The inverse of :meth:`to_bytes`."""
        if not stored.startswith(_INVALID):
            return cls(stored)
        try:
            facts = parse_json(stored.removeprefix(_INVALID), max_bytes=_MAX_INVALID_BYTES)
            facts = fields_of(facts, {"sha256", "fault"})
            return cls(b"", text(facts["sha256"], 64), text(facts["fault"], MAX_REASON))
        except ValueError:
            return cls.invalid(stored, "why it is invalid cannot be read any more")


def encoding_for(client: Client, settings: Settings) -> Encoding:
    """The encoding of the client's update: the first of the run's that it supports, else float32."""
    wanted = settings.training.compression.encodings
    return next((encoding for encoding in wanted if encoding.value in client.encodings), Encoding.FLOAT32)


class RemoteWork:
    """The tasks of remote clients and their answers.

    All methods of the client's side raise NotFoundError for a client that is not registered.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings, self._store = settings, store
        self._folder = store.home / "remote"
        self._shapes = lru_cache(maxsize=2)(self._read_shapes)

    # --- the aggregator's side ---------------------------------------------------------------------------------------

    def leave(self, task: TrainTask, client: Client) -> Offer | None:
        """Store the client's task; its answers to earlier rounds are deleted, one to this round stays.

        None where the ledger does not hold the charge of the client's output: its data has changed since.
        """
        offer = Offer(client.client_id, task, client.num_examples, encoding_for(client, self._settings))
        if not self.is_charged(task, client):
            return None
        # Before old answers are deleted: without them, the old task would seem to be unanswered.
        self._store.metadata.set(_TASK_KEY + client.client_id, offer.to_json())
        keep = self._place(client.client_id, task.run_id, task.round_index)
        for path in keep.parent.glob("*.safetensors"):
            if path != keep:
                path.unlink(missing_ok=True)
        return offer

    def is_charged(self, task: TrainTask, client: Client) -> bool:
        """Whether the ledger holds the charge of what the client would release for the task."""
        by_record = task.privacy_unit == "record"
        units = {client.client_id: client.num_examples} if by_record else {client.client_id: 1, POPULATION: 1}
        outputs = ((unit, output_id(task, unit, size)) for unit, size in units.items())
        return any(self._store.ledger.is_charged(task.run_id, task.round_index, *output) for output in outputs)

    def leave_histogram_request(self, request: HistogramRequest, client: Client) -> None:
        """Request a histogram that is charged; it replaces an earlier request without an answer."""
        value = {"order": request.to_json(), "num_examples": client.num_examples}
        self._store.metadata.set(_HISTOGRAM_KEY + client.client_id, value)

    def close(self, offer: Offer, reason: str) -> None:
        """Stop waiting for this answer."""
        key = _TASK_KEY + offer.client_id
        with self._store.transaction() as transaction:
            stored = Offer.from_json(transaction.metadata.get(key))
            if stored is not None and stored.is_for(offer.task.run_id, offer.task.round_index):
                transaction.metadata.set(key, replace(stored, closed=reason).to_json())

    def answer(self, offer: Offer) -> EncodedUpdate | ClientFailures | None:
        """The client's answer, if there is one; a failure where it was invalid, or cannot be read."""
        try:
            stored = self._stored(offer)
        except OSError as error:
            return offer.failure(f"its stored answer cannot be read: {error}", counted=False)
        if stored is None:
            return None
        if stored.fault is not None:
            return offer.failure(f"its update is refused: {stored.fault}", counted=True)
        return offer.answer(stored.content)

    def forget(self, client_id: str) -> None:
        """Delete the client's task, its requested histogram and its stored answers."""
        for key in (_TASK_KEY, _HISTOGRAM_KEY):
            self._store.metadata.set(key + client_id, None)
        for path in (self._folder / client_id).glob("*"):
            path.unlink(missing_ok=True)

    # --- the client's side -------------------------------------------------------------------------------------------

    def task(self, client_id: str) -> Offer | None:
        """The client's present task; None where it has answered, or may not take part."""
        client, offer, run = self._store.clients.get(client_id), self._offer(client_id), self._store.runs.latest()
        if offer is None or offer.closed or client.quarantined or not client.active or run is None:
            return None
        under_way = run.run_id == offer.task.run_id and run.status is RunStatus.RUNNING
        answered = self._place(client_id, offer.task.run_id, offer.task.round_index).exists()
        if offer != self._offer(client_id):  # A new task came meanwhile, so the answer to this one may be deleted.
            return self.task(client_id)
        return offer if under_way and not answered else None

    def histogram_request(self, client_id: str) -> tuple[HistogramRequest, int] | None:
        """The requested histogram, and the number of records charged for it; None once received."""
        client, value = self._store.clients.get(client_id), self._store.metadata.get(_HISTOGRAM_KEY + client_id)
        if value is None or client.quarantined or not client.active:
            return None
        try:
            return HistogramRequest.from_json(value["order"]), int(value["num_examples"])
        except (UpdateRejectedError, KeyError, TypeError, ValueError):
            # An earlier version of the program stored it.
            return None

    def receive_histogram(self, client_id: str, run_id: str, round_index: int, counts: Sequence[int]) -> bool:
        """Store a client's histogram; whether it was expected. Repeating it does nothing.

        Raises:
            UpdateRejectedError: it is not what was requested.
        """
        requested = self.histogram_request(client_id)
        if requested is None or (requested[0].run_id, requested[0].round_index) != (run_id, round_index):
            return False
        (request, size), counts = requested, checked_counts(requested[0].spec, counts)
        digest, deviation = request.spec.digest, request.deviation
        histogram = ClientHistogram(client_id, run_id, round_index, size, digest, deviation, counts)
        self._store.histograms.add([histogram], request.spec)
        self._store.metadata.set(_HISTOGRAM_KEY + client_id, None)
        return True

    def check_awaited(self, client_id: str, run_id: str, round_index: int) -> int:
        """Check that an answer to this round may come, before it is read; the most bytes that it may have.

        Raises:
            ConflictError: no round waits for it.
        """
        known, offer = self.receipt(client_id, run_id, round_index), self._offer(client_id)
        limit = self._settings.training.validation.max_update_bytes
        if offer is None or not offer.is_for(run_id, round_index) or offer.closed:
            known.check()
            return limit
        return min(limit, largest_update(self._shapes(offer.task.base_digest)))

    def receive(self, client_id: str, run_id: str, round_index: int, content: bytes) -> Receipt:
        """Take an answer, or return the receipt of the one before; repeating it does nothing.

        Of an invalid answer, the fault is stored: the round has to know that this client is done.
        """
        of = (client_id, run_id, round_index)
        known, offer = self.receipt(*of), self._offer(client_id)
        if known.status is not ReceiptStatus.REJECTED or offer is None or not offer.is_for(run_id, round_index):
            return self._compared(known, content)
        if offer.closed:
            return known
        place = self._place(*of)
        answer = self._judged(offer, content)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        created = create_atomically(place, answer.to_bytes())
        if self._offer(client_id) is None:  # The client was removed meanwhile.
            place.unlink(missing_ok=True)
        known = self.receipt(*of)
        return known if created else self._compared(known, content)

    def receipt(self, client_id: str, run_id: str, round_index: int) -> Receipt:
        """The receipt of the client's answer to a round."""
        self._store.clients.get(client_id)
        of, offer = (client_id, run_id, round_index), self._offer(client_id)
        if offer is not None and not offer.is_for(run_id, round_index):
            offer = None
        if offer is not None and offer.closed:
            reason = f"round {round_index} of {run_id} went on without it: {offer.closed}"
            return Receipt(*of, ReceiptStatus.REJECTED, reason)
        taken = self._store.rounds.answer_of(*of)
        if taken is not None:
            folded_in, error = taken
            status = ReceiptStatus.REFUSED if error else ReceiptStatus.ACCEPTED
            return Receipt(*of, status, error, folded_in, self._store.rounds.get(run_id, folded_in).version)
        # Only of a task that was left: the names of other runs come from the client.
        stored = None if offer is None else self._stored(offer, with_content=False)
        if stored is None:
            reason = self._why_not(*of) if offer is None else "it has not answered yet"
            return Receipt(*of, ReceiptStatus.REJECTED, reason)
        return Receipt(*of, ReceiptStatus.REFUSED if stored.fault else ReceiptStatus.RECEIVED, stored.fault)

    def _compared(self, known: Receipt, content: bytes) -> Receipt:
        offer = self._offer(known.client_id)
        if known.status is ReceiptStatus.REJECTED or offer is None or not offer.is_for(known.run_id, known.round_index):
            return known
        first = self._stored(offer)
        if first is None or first.is_of(content):
            return known
        reason = f"it has answered already; another answer to round {known.round_index} changes nothing"
        return Receipt(known.client_id, known.run_id, known.round_index, ReceiptStatus.DUPLICATE, reason)

    def _why_not(self, client_id: str, run_id: str, round_index: int) -> str:
        try:
            asked = client_id in self._store.rounds.get(run_id, round_index).cohort
        except NotFoundError:
            asked = False
        return f"round {round_index} of {run_id} {'went on without it' if asked else 'did not ask it'}"

    def _judged(self, offer: Offer, content: bytes) -> _StoredAnswer:
        """The answer as it is stored: the bytes if they pass update validation, else the fault."""
        rule, sizes = rule_for(self._settings), {offer.client_id: offer.num_examples}
        shapes = self._shapes(offer.task.base_digest)
        weights = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        # What a control variate shifts is not read here: the round checks these updates against the bounds of DP-SGD.
        task = None if rule.client.keeps_state else offer.task
        validator = UpdateValidator.of(self._settings, rule, weights, sizes, task=task)
        try:
            with errors_as_rejection(f"The update of {offer.client_id}"):
                update = validator.decoded(offer.answer(content))
                fault = None
                if not isinstance(update, ClientFailures):
                    fault = validator.fault_of(update) or validator.shape_fault_of(update)
        except UpdateRejectedError as error:
            fault = error.message
        return _StoredAnswer(content) if fault is None else _StoredAnswer.invalid(content, fault)

    def _read_shapes(self, base_digest: str) -> dict[str, tuple[int, ...]]:
        shapes = shapes_of(self._store.blobs.get(base_digest))
        return {name: shape for name, shape in shapes.items() if not name.startswith(BROADCAST)}

    def _offer(self, client_id: str) -> Offer | None:
        return Offer.from_json(self._store.metadata.get(_TASK_KEY + client_id))

    def _stored(self, offer: Offer, *, with_content: bool = True) -> _StoredAnswer | None:
        """The answer to a task, of a valid one its beginning or its whole content; OSError where it cannot be read."""
        try:
            with self._place(offer.client_id, offer.task.run_id, offer.task.round_index).open("rb") as file:
                stored = file.read(len(_INVALID))
                if with_content or stored == _INVALID:
                    stored += file.read()
        except FileNotFoundError:
            return None
        return _StoredAnswer.from_bytes(stored)

    def _place(self, client_id: str, run_id: str, round_index: int) -> Path:
        return self._folder / client_id / f"{run_id}.{round_index:08d}.safetensors"
