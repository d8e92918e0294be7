"""Virtual clients in a secure aggregation session: their keys, held in memory, and their answers by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedvit.errors import FedvitError, SecureAggregationError
from fedvit.privacy.randomness import derive_secret
from fedvit.secagg.client import SecureClient
from fedvit.secagg.parameters import Parameters
from fedvit.secure_session import ADVERTISE, CONFIRM, SHARE, UNMASK, SecureAnswer, SecureSession
from fedvit.types import TrainTask
from fedvit.updates import ClientFailures, RingSum

NO_KEYS = "it has no keys of this session: the process that held them was restarted, or another session began"


def identity_of(root_secret: bytes, client_id: str) -> Ed25519PrivateKey:
    """The identity key of a virtual client."""
    return Ed25519PrivateKey.from_private_bytes(derive_secret(root_secret, f"secagg-identity/{client_id}"))


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half of an identity key, hex, as sessions name it."""
    return key.public_key().public_bytes_raw().hex()


def public_keys(identities: Mapping[str, str]) -> dict[str, Ed25519PublicKey]:
    """The identity keys of a session's participants, by client id.

    Raises:
        ValueError: one is not 32 bytes, hex.
    """
    return {c: Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)) for c, key in identities.items()}


def answer_to(client: SecureClient, phase: str, request: bytes) -> bytes:
    """The client's message of a phase other than ``mask``.

    Raises:
        SecureAggregationError: the client refuses the request, or there is no such phase.
    """
    if phase == ADVERTISE:
        return client.advertise()
    answers = {SHARE: client.share, CONFIRM: client.confirm, UNMASK: client.unmask}
    if phase not in answers:
        raise SecureAggregationError(f"There is no phase {phase!r:.40} of messages.")
    return answers[phase](request)


class SecureClients:
    """The sessions of a host's virtual clients: one at a time, and the next one ends it.

    Keys and shares are random and exist in memory alone. They are not made again: a client that lost them is out of the
    session.
    """

    def __init__(self, root_secret: bytes) -> None:
        self._root_secret = root_secret
        self._session: SecureSession | None = None
        self._clients: dict[str, SecureClient] = {}

    def exchange(self, session: SecureSession, phase: str, requests: Mapping[str, bytes]) -> list[SecureAnswer]:
        """See :meth:`fedvit.ports.ClientHostPort.exchange`."""
        if phase == ADVERTISE:
            self._begin(session, requests)
        here = self._session is not None and self._session.session == session.session
        clients = self._clients if here else {}
        return [_answer(c, clients.get(c), phase, request) for c, request in sorted(requests.items())]

    def under_masks(
        self, task: TrainTask, own: RingSum | ClientFailures, requests: Mapping[str, bytes]
    ) -> RingSum | ClientFailures:
        """One client's contribution under its masks; a failure where it has no keys of a session for this task."""
        if isinstance(own, ClientFailures):
            return own
        (outcome,) = own.outcomes
        client, request = self._clients.get(outcome.client_id), requests.get(outcome.client_id)
        if client is None or request is None or self._session is None or self._session.task != task:
            return ClientFailures.of(task.round_index, [outcome.client_id], NO_KEYS)
        try:
            return replace(own, vector=client.mask(request, own.vector))
        except FedvitError as error:
            return ClientFailures.of(task.round_index, [outcome.client_id], error.message)

    def _begin(self, session: SecureSession, requests: Mapping[str, bytes]) -> None:
        if self._session is None or self._session.session != session.session:
            self._session = session
            self._clients = {}
        parameters, peers = Parameters.from_json(session.parameters), public_keys(session.identities)
        for client_id in requests.keys() - self._clients.keys():
            identity = identity_of(self._root_secret, client_id)
            self._clients[client_id] = SecureClient(parameters, client_id, identity, peers)


def _answer(client_id: str, client: SecureClient | None, phase: str, request: bytes) -> SecureAnswer:
    if client is None:
        return SecureAnswer(client_id, error=NO_KEYS)
    try:
        return SecureAnswer(client_id, answer_to(client, phase, request))
    except FedvitError as error:
        return SecureAnswer(client_id, error=error.message)
