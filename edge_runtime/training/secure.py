"""A vehicle's part in secure aggregation sessions: identity key, peers, durable keys and shares, one answer a phase.

The state of a session is written before its answer is sent, so a vehicle that is restarted goes on where it was. It is
deleted when the server's next answer names another session or none. Keys of a session are never made twice.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.training.policy import VehiclePolicy
from fedvit.api.clients import PhaseRequestView, SecureSessionView
from fedvit.atomic_write import create_atomically, write_atomically
from fedvit.clients.secure import answer_to, public_hex, public_keys
from fedvit.errors import ConflictError, ForbiddenError, IntegrityError, StateError
from fedvit.private_files import FILE_MODE, ensure_private, open_private_folder
from fedvit.secagg.client import SecureClient
from fedvit.secagg.parameters import Parameters
from fedvit.secure_session import ADVERTISE, MASK, SecureAnswer
from fedvit.store.store import Store
from fedvit.wire.ring import pack_ring

_PEERS_KEY = "secagg_peers"
_SEED_BYTES = 32


def load_or_create_identity(home: Path) -> Ed25519PrivateKey:
    """The vehicle's identity key in its home folder, made by the first call.

    Raises:
        StateError: the file has the wrong length, or belongs to another user and others can read it.
    """
    path = home / "keys" / "identity.key"
    open_private_folder(path.parent)
    if not path.exists():
        create_atomically(path, Ed25519PrivateKey.generate().private_bytes_raw(), mode=FILE_MODE)
    ensure_private([path])
    seed = path.read_bytes()
    if len(seed) != _SEED_BYTES:
        raise StateError(
            f"The key file {path} holds {len(seed)} bytes instead of {_SEED_BYTES}.",
            cure="Restore it from a backup, or delete it: other vehicles that know its key then refuse this vehicle.",
        )
    return Ed25519PrivateKey.from_private_bytes(seed)


@dataclass(frozen=True, slots=True)
class Work:
    """What the vehicle does for a session beside the protocol; each raises FedvitError where the vehicle refuses.

    Attributes:
        check: checks task and parameters against what this vehicle has and may do; nothing is computed.
        contribute: charges the vehicle's ledger; the ring vector, with its share of the noise.
    """

    check: Callable[[PhaseRequestView, Parameters], object]
    contribute: Callable[[PhaseRequestView, Parameters], npt.NDArray[np.uint32]]


@dataclass(frozen=True, slots=True)
class _State:
    """What a session needs to go on: the client's keys and shares, and a digest of the session's public facts."""

    facts: str
    client: bytes

    def to_bytes(self) -> bytes:
        return json.dumps({"facts": self.facts, "client": base64.b64encode(self.client).decode()}).encode()

    @classmethod
    def from_bytes(cls, stored: bytes) -> _State:
        value = json.loads(stored)
        return cls(value["facts"], base64.b64decode(value["client"]))


class SecureParticipant:
    """One vehicle in secure aggregation sessions.

    Args:
        home: folder of the identity key and of the states of sessions.
        store: of the vehicle; it holds the pinned identity keys of peers.
    """

    def __init__(self, client_id: str, home: Path, store: Store, policy: VehiclePolicy) -> None:
        self._client_id, self._store, self._policy = client_id, store, policy
        self._identity, self._folder = load_or_create_identity(home), home / "secagg"

    @property
    def public_key(self) -> str:
        """The public identity key, hex."""
        return public_hex(self._identity)

    def answer(self, view: SecureSessionView, asked: PhaseRequestView, work: Work) -> bytes:
        """The vehicle's answer to the present phase, as it is sent; the same one to the same request.

        Raises:
            FedvitError: the vehicle refuses the session or the request.
        """
        path, facts, parameters = self._folder / f"{view.session}.state", _facts_of(asked), _parameters_of(asked)
        client = self._resumed(path, facts, asked, parameters)
        if client is None:
            if view.phase != ADVERTISE:
                raise ConflictError("This vehicle has no keys of the session: it was not in it from the beginning.")
            work.check(asked, parameters)
            client = self._new_client(view, asked, parameters)
        request = _decoded(asked.request)
        if view.phase == MASK:
            content = pack_ring(client.mask(request, work.contribute(asked, parameters)), parameters.bits)
        else:
            content = answer_to(client, view.phase, request)
        open_private_folder(self._folder)
        write_atomically(path, _State(facts, client.to_bytes()).to_bytes(), mode=FILE_MODE)
        return SecureAnswer(self._client_id, content).to_bytes()

    def refusal(self, reason: str) -> bytes:
        """The answer that the vehicle takes no further part in the session, as it is sent."""
        return SecureAnswer(self._client_id, error=reason).to_bytes()

    def keep_only(self, session: str | None) -> None:
        """Delete the states of all sessions but this one: they have ended."""
        if not self._folder.exists():
            return
        for path in self._folder.iterdir():
            if session is None or not path.name.startswith(session):
                path.unlink(missing_ok=True)

    def _resumed(self, path: Path, facts: str, asked: PhaseRequestView, parameters: Parameters) -> SecureClient | None:
        if not path.exists():
            return None
        ensure_private([path])
        try:
            state = _State.from_bytes(path.read_bytes())
            peers = public_keys(asked.identities)
            client = SecureClient.from_bytes(state.client, parameters, self._client_id, self._identity, peers)
        except (ValueError, KeyError, TypeError):
            raise StateError(f"The state of a session in {path} cannot be read; the vehicle is out of it.") from None
        if state.facts != facts:
            raise IntegrityError("The session came with other participants, parameters or tasks than when it began.")
        return client

    def _new_client(self, view: SecureSessionView, asked: PhaseRequestView, parameters: Parameters) -> SecureClient:
        if parameters.session != view.session or set(parameters.participants) != asked.identities.keys():
            raise IntegrityError("The parameters, the identity keys and the name of the session do not fit together.")
        if asked.identities.get(self._client_id) != self.public_key:
            raise IntegrityError("The session names another identity key for this vehicle.")
        self._check_peers(asked.identities)
        return SecureClient(parameters, self._client_id, self._identity, public_keys(asked.identities))

    def _check_peers(self, identities: Mapping[str, str]) -> None:
        """Accept the peers' keys by the owner's policy, or by what was seen first.

        Raises:
            ForbiddenError: a key is not the one that is known.
        """
        known, pins = self._policy.participants, {}
        if known is None:
            pins = dict(self._store.metadata.get(_PEERS_KEY) or {})
        for client_id, key in identities.items():
            expected = pins.setdefault(client_id, key) if known is None else known.get(client_id)
            if client_id != self._client_id and key != expected:
                what = "is not in the owner's policy" if expected is None else "is another one than this vehicle knows"
                raise ForbiddenError(f"The identity key of {client_id} {what}.")
        if known is None:
            self._store.metadata.set(_PEERS_KEY, pins)


def _parameters_of(asked: PhaseRequestView) -> Parameters:
    try:
        return Parameters.from_json(asked.parameters)
    except ValueError as error:
        raise IntegrityError(f"The parameters of a session cannot be used: {error}.") from None


def _decoded(request: str) -> bytes:
    try:
        return base64.b64decode(request, validate=True)
    except ValueError:
        raise IntegrityError("The request of a phase is not base64.") from None


def _facts_of(asked: PhaseRequestView) -> str:
    facts = asked.model_dump(mode="json", exclude={"request"})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
