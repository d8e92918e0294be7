"""Secure aggregation sessions of remote clients, exchanged through the state folder as their tasks and updates are.

There is one session at a time. The aggregator leaves one request a phase for each client; the control API sends it to
the client and stores the answer; the aggregator reads it. A client has one answer a phase, the first. All messages are
deleted when the session ends. Nothing here is secret from the server: shares of keys travel encrypted between clients,
and vectors masked.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedvit.api.clients import ReceiptStatus
from fedvit.atomic_write import create_atomically
from fedvit.errors import ConflictError, UpdateRejectedError
from fedvit.secagg.parameters import Parameters
from fedvit.secure_session import MASK, PHASES, SecureAnswer, SecureSession
from fedvit.store.store import Store
from fedvit.types import Client, ClientOutcome, RunStatus, TrainTask
from fedvit.updates import ClientFailures, RingSum
from fedvit.wire.ring import packed_bytes, unpack_ring
from fedvit.wire.untrusted import MAX_REASON

_LOG = logging.getLogger(__name__)
_SESSION_KEY = "secure_session"
_REQUEST_KEY = "secure_request/"
_MESSAGE_BYTES, _MESSAGE_BYTES_A_NEIGHBOUR = 16_384, 1_024


@dataclass(frozen=True, slots=True)
class PhaseRequest:
    """One phase of a session, as it was left for one client.

    ``closed`` is the reason why no answer to it is taken any more.
    """

    session: SecureSession
    phase: str
    client_id: str
    request: bytes
    num_examples: int
    closed: str | None = None

    @property
    def task(self) -> TrainTask:
        """The task of the session."""
        return self.session.task

    @property
    def parameters(self) -> Parameters:
        """The parameters of the session."""
        return Parameters.from_json(self.session.parameters)

    def to_json(self) -> dict[str, Any]:
        """As stored, without the session itself."""
        return {
            "session": self.session.session,
            "phase": self.phase,
            "client_id": self.client_id,
            "request": base64.b64encode(self.request).decode(),
            "num_examples": self.num_examples,
            "closed": self.closed,
        }


@dataclass(frozen=True, slots=True)
class PhaseReceipt:
    """Receipt of a client's answer to one phase of a session."""

    client_id: str
    session: str
    phase: str
    status: ReceiptStatus
    reason: str | None = None

    def check(self) -> None:
        """Check that the answer waits for the server, or was taken.

        Raises:
            UpdateRejectedError: it is not valid.
            ConflictError: nobody waits for it, or the client answered this phase before with other bytes.
        """
        message = f"The answer of {self.client_id} to the phase {self.phase} is {self.status.value}: {self.reason}."
        if self.status is ReceiptStatus.REFUSED:
            raise UpdateRejectedError(message, cure="Do not send it again.")
        if self.status is not ReceiptStatus.RECEIVED:
            raise ConflictError(message, cure="Ask for the next task.")


class RemoteSessions:
    """The phases of remote clients and their answers."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.home / "remote"

    # --- the aggregator's side ---------------------------------------------------------------------------------------

    def begin(self, session: SecureSession) -> None:
        """Make this the present session; the one before has ended."""
        before = self._session()
        if before is not None and before.session != session.session:
            self.end(before)
        self._store.metadata.set(_SESSION_KEY, session.to_json())

    def leave(self, session: SecureSession, phase: str, request: bytes, client: Client) -> PhaseRequest:
        """Store the client's request of a phase; it replaces that of the phase before."""
        left = PhaseRequest(session, phase, client.client_id, request, client.num_examples)
        self._store.metadata.set(_REQUEST_KEY + client.client_id, left.to_json())
        return left

    def answer(self, left: PhaseRequest) -> SecureAnswer | None:
        """The client's answer to a phase, if there is one."""
        try:
            sent = self._place(left.client_id, left.session.session, left.phase).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            return SecureAnswer(left.client_id, error=f"its stored answer cannot be read: {error}")
        return SecureAnswer.from_bytes(left.client_id, sent)

    def masked(self, left: PhaseRequest, weight: float) -> RingSum | ClientFailures | None:
        """The client's answer to the phase ``mask`` as a message of the round, if there is one."""
        answer, parameters = self.answer(left), left.parameters
        if answer is None:
            return None
        outcome = ClientOutcome(left.client_id, left.num_examples)
        try:
            if answer.error is None:
                vector = unpack_ring(answer.content, parameters.length, parameters.bits)
                outcome = replace(outcome, sent_bytes=len(answer.content), encoding="ring")
                return RingSum(left.task.round_index, (outcome,), vector, weight, left.task.attempt)
            outcome = replace(outcome, error=answer.error)
        except UpdateRejectedError as error:
            outcome = replace(outcome, error=f"its update is refused: {error.message}", counted_against_client=True)
        return ClientFailures(left.task.round_index, (outcome,))

    def close(self, left: PhaseRequest, reason: str) -> None:
        """Stop waiting for this answer."""
        key = _REQUEST_KEY + left.client_id
        with self._store.transaction() as transaction:
            stored = transaction.metadata.get(key)
            if stored is not None and (stored["session"], stored["phase"]) == (left.session.session, left.phase):
                transaction.metadata.set(key, replace(left, closed=reason).to_json())

    def end(self, session: SecureSession) -> None:
        """Delete the session and its messages."""
        present = self._session()
        if present is not None and present.session == session.session:
            self._store.metadata.set(_SESSION_KEY, None)
        for client in self._store.clients.remote(list(session.identities)):
            self.forget(client.client_id)

    def forget(self, client_id: str) -> None:
        """Delete the client's request and its answers."""
        self._store.metadata.set(_REQUEST_KEY + client_id, None)
        self._delete(self._answers(client_id))

    # --- the client's side; NotFoundError is raised for a client that is not registered ------------------------------

    def request(self, client_id: str) -> PhaseRequest | None:
        """The phase that the client's session is in; None where it is in no session, or may not take part."""
        client, left, run = self._store.clients.get(client_id), self._left(client_id), self._store.runs.latest()
        if left is None or left.closed or client.quarantined or not client.active or run is None:
            return None
        under_way = run.run_id == left.task.run_id and run.status is RunStatus.RUNNING
        return left if under_way else None

    def has_answered(self, left: PhaseRequest) -> bool:
        """Whether the client's answer to this phase is stored."""
        return self._place(left.client_id, left.session.session, left.phase).exists()

    def check_awaited(self, client_id: str, session: str, phase: str) -> int:
        """Check that an answer to this phase may come, before it is read; the most bytes that it may have.

        Raises:
            ConflictError: nobody waits for it.
        """
        left, reason = self._awaited(client_id, session, phase)
        if left is None or reason is not None:
            PhaseReceipt(client_id, session, phase, ReceiptStatus.REJECTED, reason).check()
        return 0 if left is None else self.most_bytes(left.parameters, phase)

    @staticmethod
    def most_bytes(parameters: Parameters, phase: str) -> int:
        """The most bytes of an answer."""
        if phase == MASK:
            return 1 + max(packed_bytes(parameters.length, parameters.bits), 4 * MAX_REASON)
        return _MESSAGE_BYTES + _MESSAGE_BYTES_A_NEIGHBOUR * parameters.neighbours

    def receive(self, client_id: str, session: str, phase: str, content: bytes) -> PhaseReceipt:
        """Take an answer, or compare it with the one before; repeating it does nothing."""
        of = (client_id, session, phase)
        left, reason = self._awaited(*of)
        if left is None or reason is not None:
            return PhaseReceipt(*of, ReceiptStatus.REJECTED, reason)
        known = self._stored(*of)
        if known is None:
            place = self._place(*of)
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            create_atomically(place, content)
            after = self._left(client_id)
            if after is None or after.session.session != session:  # The session ended meanwhile.
                place.unlink(missing_ok=True)
                return PhaseReceipt(*of, ReceiptStatus.REJECTED, "the session has ended")
            known = self._stored(*of)
        if known != content:
            _LOG.warning("%s answers the phase %s of session %s twice, differently", client_id, phase, session[:12])
            reason = "it has answered already; another answer to this phase changes nothing"
            return PhaseReceipt(*of, ReceiptStatus.DUPLICATE, reason)
        return self._judged(left, phase, content)

    def _awaited(self, client_id: str, session: str, phase: str) -> tuple[PhaseRequest | None, str | None]:
        """The client's present request, if it is of this session, and why no answer to the phase is taken, if so."""
        self._store.clients.get(client_id)
        left = self._left(client_id)
        if left is None or left.session.session != session or phase not in PHASES:
            return None, "it is in no such session and phase"
        if self._place(client_id, session, phase).exists():
            return left, None
        if left.phase != phase:
            return left, f"the session is in the phase {left.phase}"
        return left, left.closed and f"the session went on without it: {left.closed}"

    def _judged(self, left: PhaseRequest, phase: str, content: bytes) -> PhaseReceipt:
        of = (left.client_id, left.session.session, phase)
        answer = SecureAnswer.from_bytes(left.client_id, content)
        try:
            if phase == MASK and answer.error is None:
                unpack_ring(answer.content, left.parameters.length, left.parameters.bits)
        except UpdateRejectedError as error:
            return PhaseReceipt(*of, ReceiptStatus.REFUSED, error.message.rstrip("."))
        return PhaseReceipt(*of, ReceiptStatus.RECEIVED)

    def _session(self) -> SecureSession | None:
        value = self._store.metadata.get(_SESSION_KEY)
        return None if value is None else SecureSession.from_json(value)

    def _left(self, client_id: str) -> PhaseRequest | None:
        stored, session = self._store.metadata.get(_REQUEST_KEY + client_id), self._session()
        if stored is None or session is None or stored["session"] != session.session:
            return None
        return PhaseRequest(**{**stored, "session": session, "request": base64.b64decode(stored["request"])})

    def _stored(self, client_id: str, session: str, phase: str) -> bytes | None:
        try:
            return self._place(client_id, session, phase).read_bytes()
        except FileNotFoundError:
            return None

    def _answers(self, client_id: str) -> Iterable[Path]:
        return (self._folder / client_id).glob("*.secagg")

    @staticmethod
    def _delete(paths: Iterable[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _place(self, client_id: str, session: str, phase: str) -> Path:
        return self._folder / client_id / f"{session}.{phase}.secagg"
