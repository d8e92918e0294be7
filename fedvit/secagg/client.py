"""A client's side of secure aggregation, pure: requests of the server in, answers out.

What protects the client does not depend on the server: it checks the signatures of its neighbours' keys, confirms one
set of survivors, and of each neighbour gives the one share that follows from that set, never the other one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedvit.errors import SecureAggregationError
from fedvit.secagg import messages
from fedvit.secagg.masks import Ring, agreed_secret, apply_masks, derived_key, public_key
from fedvit.secagg.messages import Keys
from fedvit.secagg.parameters import Parameters
from fedvit.secagg.shamir import random_secret, split

_NONCE_BYTES = 12


def pair_purpose(parameters: Parameters, one: str, other: str) -> str:
    """Purpose of the mask that two clients share."""
    first, second = sorted((one, other))
    return f"fedvit-secagg-pair/{parameters.digest}/{first}/{second}"


def own_purpose(parameters: Parameters, client_id: str) -> str:
    """Purpose of the mask of a client alone."""
    return f"fedvit-secagg-own/{parameters.digest}/{client_id}"


def commitment_to(parameters: Parameters, client_id: str, seed: bytes) -> bytes:
    """What a client advertises about the seed of its own mask, so that wrong shares of it are found."""
    return hashlib.sha256(own_purpose(parameters, client_id).encode() + seed).digest()


class SecureClient:
    """One participant of one secure sum.

    Every phase is answered once. The same request again gets the same answer; another one is an error. All secrets are
    fresh random numbers of this object, so no two sums share one.

    Args:
        identity: the client's long-lived key.
        peers: public identity keys that the client trusts, by client id; others' keys are refused.
        entropy: returns that many secret random bytes.

    Every method raises SecureAggregationError where the server asks for what would break the protocol.
    """

    def __init__(
        self,
        parameters: Parameters,
        client_id: str,
        identity: Ed25519PrivateKey,
        peers: Mapping[str, Ed25519PublicKey],
        entropy: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        if client_id not in parameters.index:
            raise SecureAggregationError(f"{client_id} does not take part in this session.")
        if unknown := sorted(parameters.index.keys() - peers.keys() - {client_id}):
            raise SecureAggregationError(
                f"{unknown[0]} takes part in this session, and {client_id} knows no identity key of it.",
                cure="Name its key in the policy of the vehicle's owner.",
            )
        self.parameters, self.client_id = parameters, client_id
        self._identity, self._peers, self._entropy = identity, peers, entropy
        self._neighbours = parameters.neighbours_of(client_id)
        self._mask_private, self._share_private = random_secret(entropy), random_secret(entropy)
        self._seed = random_secret(entropy)
        # By phase: the SHA-256 of the request, and the answer.
        self._answered: dict[str, tuple[str, bytes]] = {}
        self._keys: dict[str, Keys] = {}
        self._ciphers: dict[str, AESGCM] = {}
        self._shares: dict[str, tuple[bytes, bytes]] = {}
        self._survivors: tuple[str, ...] | None = None
        self._masked: tuple[str, str] | None = None

    def advertise(self) -> bytes:
        """The client's public keys, signed."""
        return self._once("advertise", b"", lambda _: messages.encode("keys", self._own_keys().to_json()))

    def share(self, request: bytes) -> bytes:
        """Shares of the client's two secrets, encrypted for each neighbour that advertised keys.

        Args:
            request: the neighbours' keys.
        """
        return self._once("share", request, self._share)

    def mask(self, request: bytes, vector: Ring) -> Ring:
        """The masked vector.

        Args:
            request: the shares that neighbours made for this client.
            vector: [length], uint32 below ``2^bits``.
        """
        _check_vector(self.parameters, vector)
        of = hashlib.sha256(request).hexdigest(), hashlib.sha256(np.ascontiguousarray(vector).data).hexdigest()
        if self._masked not in (None, of):
            raise SecureAggregationError(f"{self.client_id} has masked a vector, and one of a session is all it masks.")
        if self._masked is None:
            self._take_shares(request)
            self._masked = of
        keys = [(derived_key(self._seed, own_purpose(self.parameters, self.client_id)), 1)]
        for neighbour in self._shares:
            if neighbour != self.client_id:
                secret = agreed_secret(self._mask_private, self._keys[neighbour].mask_key)
                key = derived_key(secret, pair_purpose(self.parameters, self.client_id, neighbour))
                keys.append((key, 1 if self.client_id < neighbour else -1))
        masked = vector.copy()
        apply_masks(masked, self.parameters.bits, keys)
        return masked

    def confirm(self, request: bytes) -> bytes:
        """The client's signature of the set of clients whose masked vectors have arrived."""
        return self._once("confirm", request, self._confirm)

    def unmask(self, request: bytes) -> bytes:
        """One share of each neighbour: of its own mask if it survived, of its key if it did not.

        Args:
            request: confirmations of the same set by :attr:`Parameters.confirmers`.
        """
        return self._once("unmask", request, self._unmask)

    def to_bytes(self) -> bytes:
        """The secret state, to continue after a restart; see :meth:`from_bytes`."""
        facts = {
            "private": [self._mask_private.hex(), self._share_private.hex(), self._seed.hex()],
            "answered": {phase: [of, answer.hex()] for phase, (of, answer) in self._answered.items()},
            "keys": {client_id: keys.to_json() for client_id, keys in self._keys.items()},
            "shares": {client_id: [share.hex() for share in pair] for client_id, pair in self._shares.items()},
            "survivors": self._survivors,
            "masked": self._masked,
        }
        return json.dumps(facts).encode()

    @classmethod
    def from_bytes(
        cls,
        content: bytes,
        parameters: Parameters,
        client_id: str,
        identity: Ed25519PrivateKey,
        peers: Mapping[str, Ed25519PublicKey],
    ) -> SecureClient:
        """The client in the state that its :meth:`to_bytes` gave, of the same parameters."""
        facts: dict[str, Any] = json.loads(content)
        client = cls(parameters, client_id, identity, peers)
        client._mask_private, client._share_private, client._seed = map(bytes.fromhex, facts["private"])
        client._answered = {phase: (of, bytes.fromhex(answer)) for phase, (of, answer) in facts["answered"].items()}
        client._keys = {c: Keys.from_json(keys) for c, keys in facts["keys"].items()}
        client._shares = {c: (bytes.fromhex(a), bytes.fromhex(b)) for c, (a, b) in facts["shares"].items()}
        client._survivors = None if facts["survivors"] is None else tuple(facts["survivors"])
        client._masked = None if facts["masked"] is None else (facts["masked"][0], facts["masked"][1])
        return client

    def _own_keys(self) -> Keys:
        commitment = commitment_to(self.parameters, self.client_id, self._seed)
        keys = Keys(public_key(self._mask_private), public_key(self._share_private), commitment, b"")
        signature = self._identity.sign(keys.signed(self.parameters, self.client_id))
        return Keys(keys.mask_key, keys.share_key, keys.commitment, signature)

    def _share(self, request: bytes) -> bytes:
        value = messages.decode(request, "keys", self.parameters)
        self._keys = messages.by_client(value, Keys.from_json, self._neighbours)
        seen = {self._own_keys().mask_key: self.client_id, self._own_keys().share_key: self.client_id}
        for neighbour, keys in self._keys.items():
            if not messages.is_signed(self._peers, neighbour, keys.signature, keys.signed(self.parameters, neighbour)):
                raise SecureAggregationError(f"The keys of {neighbour} are not signed with its known identity key.")
            for key in (keys.mask_key, keys.share_key):
                if key in seen:
                    raise SecureAggregationError(f"{neighbour} and {seen[key]} have an equal key.")
                seen[key] = neighbour
        holders = [self.client_id, *self._keys]
        if len(holders) < self.parameters.threshold:
            raise SecureAggregationError(
                f"{len(self._keys)} neighbours of {self.client_id} advertised keys: too few to share a secret with."
            )
        place = {holder: self.parameters.index[holder] + 1 for holder in holders}
        threshold, places = self.parameters.threshold, list(place.values())
        of_key = split(self._mask_private, threshold, places, self._entropy)
        of_seed = split(self._seed, threshold, places, self._entropy)
        self._shares = {self.client_id: (of_key[place[self.client_id]], of_seed[place[self.client_id]])}
        sealed = {c: messages.written(self._seal(c, of_key[place[c]] + of_seed[place[c]])) for c in self._keys}
        return messages.encode("shares", sealed)

    def _seal(self, receiver: str, content: bytes) -> bytes:
        nonce = self._entropy(_NONCE_BYTES)
        return nonce + self._cipher(receiver).encrypt(nonce, content, self._binding(self.client_id, receiver))

    def _open(self, sender: str, sealed: bytes) -> tuple[bytes, bytes]:
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        try:
            opened = self._cipher(sender).decrypt(nonce, content, self._binding(sender, self.client_id))
        except InvalidTag:
            raise SecureAggregationError(f"The shares of {sender} were not made for {self.client_id}.") from None
        return opened[: messages.SHARE_BYTES], opened[messages.SHARE_BYTES :]

    def _cipher(self, other: str) -> AESGCM:
        if other not in self._ciphers:
            try:
                secret = agreed_secret(self._share_private, self._keys[other].share_key)
            except ValueError:
                raise SecureAggregationError(f"The keys of {other} are of no use: they have a small order.") from None
            purpose = f"{pair_purpose(self.parameters, self.client_id, other)}/shares"
            self._ciphers[other] = AESGCM(derived_key(secret, purpose))
        return self._ciphers[other]

    def _binding(self, sender: str, receiver: str) -> bytes:
        return f"{self.parameters.digest}/{sender}/{receiver}".encode()

    def _take_shares(self, request: bytes) -> None:
        if "share" not in self._answered:
            raise SecureAggregationError(f"{self.client_id} has shared no secrets yet.")
        value = messages.decode(request, "shares", self.parameters)
        sealed = messages.by_client(value, messages.of_size(messages.SEALED_BYTES), list(self._keys))
        if len(sealed) + 1 < self.parameters.threshold:
            raise SecureAggregationError(
                f"{len(sealed)} neighbours of {self.client_id} shared their secrets; with {self.client_id} itself "
                f"{self.parameters.threshold} are needed."
            )
        opened = {sender: self._open(sender, content) for sender, content in sorted(sealed.items())}
        self._shares = {self.client_id: self._shares[self.client_id], **opened}

    def _confirm(self, request: bytes) -> bytes:
        if self._masked is None:
            raise SecureAggregationError(f"{self.client_id} has sent no masked vector.")
        survivors = messages.survivors_of(self.parameters, messages.decode(request, "survivors", self.parameters))
        if self.client_id not in survivors or len(survivors) < self.parameters.min_survivors:
            raise SecureAggregationError(
                f"A sum of {len(survivors)} vectors, {'with' if self.client_id in survivors else 'without'} that of "
                f"{self.client_id}, is not revealed: it has to have {self.parameters.min_survivors}, and this one."
            )
        if invented := [n for n in self._neighbours if n in survivors and n not in self._shares]:
            raise SecureAggregationError(f"{invented[0]} is said to have survived, and has shared no secrets.")
        self._survivors = survivors
        signature = self._identity.sign(messages.confirmed(self.parameters, self.client_id, survivors))
        return messages.encode("signature", messages.written(signature))

    def _unmask(self, request: bytes) -> bytes:
        survivors = self._survivors
        if survivors is None:
            raise SecureAggregationError(f"{self.client_id} has confirmed no set of survivors.")
        value = messages.decode(request, "confirmations", self.parameters)
        kept = frozenset(survivors)
        confirmers = [c for c in self.parameters.confirmers if c in kept]
        signatures = messages.by_client(value, messages.of_size(messages.SIGNATURE_BYTES), confirmers)
        peers = {**self._peers, self.client_id: self._identity.public_key()}
        for client_id, signature in signatures.items():
            content = messages.confirmed(self.parameters, client_id, survivors)
            if not messages.is_signed(peers, client_id, signature, content):
                raise SecureAggregationError(f"{client_id} has not confirmed the same set of survivors.")
        if len(signatures) < self.parameters.threshold:
            raise SecureAggregationError(
                f"{len(signatures)} clients have confirmed the survivors; {self.parameters.threshold} are needed."
            )
        given = {c: messages.written(of_seed if c in kept else of_key) for c, (of_key, of_seed) in self._shares.items()}
        return messages.encode("shares", given)

    def _once(self, phase: str, request: bytes, answer: Callable[[bytes], bytes]) -> bytes:
        of = hashlib.sha256(request).hexdigest()
        if phase not in self._answered:
            self._answered[phase] = of, answer(request)
        before, content = self._answered[phase]
        if before != of:
            what = (
                "another set of survivors: it would learn both secrets of a client"
                if phase == "confirm"
                else ("other content")
            )
            raise SecureAggregationError(f"The server asks {self.client_id} for the phase {phase} again, with {what}.")
        return content


def _check_vector(parameters: Parameters, vector: Ring) -> None:
    if vector.dtype != np.uint32 or vector.shape != (parameters.length,):
        raise SecureAggregationError(
            f"A vector of {vector.shape} numbers of type {vector.dtype}.",
            cure=f"It has {parameters.length} numbers of type uint32.",
        )
    if parameters.bits < 32 and int(vector.max()) >> parameters.bits:
        raise SecureAggregationError(f"A vector has numbers of more than {parameters.bits} bits.")
