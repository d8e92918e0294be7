"""The server's side of secure aggregation, pure: answers of clients in, requests out, and at the end the sum.

Every phase may lose clients. Where too few are left the session fails, and nothing of any client is revealed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedvit.errors import SecureAggregationError, UpdateRejectedError
from fedvit.secagg import messages
from fedvit.secagg.client import commitment_to, own_purpose, pair_purpose
from fedvit.secagg.masks import Ring, agreed_secret, apply_masks, derived_key, public_key
from fedvit.secagg.messages import Keys
from fedvit.secagg.parameters import Parameters
from fedvit.secagg.shamir import combine


class Phase(StrEnum):
    """The phases of a session, in their order."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    CONFIRM = "confirm"
    UNMASK = "unmask"
    DONE = "done"
    FAILED = "failed"


_ORDER = list(Phase)


class SecureServer:
    """The aggregator of one secure sum.

    Args:
        peers: public identity keys of the participants, by client id.

    Attributes:
        phase: the present one.
        dropped: clients that are out of the session, with the reason.
    """

    def __init__(self, parameters: Parameters, peers: Mapping[str, Ed25519PublicKey]) -> None:
        self.parameters, self.phase, self.dropped = parameters, Phase.ADVERTISE, dict[str, str]()
        self._peers = peers
        self._present = set(parameters.participants)
        self._answers: dict[str, bytes] = {}
        self._keys: dict[str, Keys] = {}
        self._owner_of_key: dict[bytes, str] = {}
        # By sender, the sealed shares for each receiver; later, by owner, the shares that holders gave.
        self._sealed: dict[str, dict[str, str]] = {}
        self._given: dict[str, dict[str, bytes]] = {}
        self._confirmations: dict[str, str] = {}
        self._wrong: set[str] = set()
        self._sum = np.zeros(parameters.length, np.uint32)
        self._summed: set[str] = set()
        self._total: Ring | None = None

    @property
    def survivors(self) -> tuple[str, ...]:
        """The clients whose masked vectors are in the sum, sorted."""
        return tuple(sorted(self._summed))

    def requests(self) -> dict[str, bytes]:
        """The request of the present phase for each client that is to answer it."""
        near, expected = self.parameters.neighbours_of, sorted(self._present)
        match self.phase:
            case Phase.ADVERTISE:
                return dict.fromkeys(expected, b"")
            case Phase.SHARE:
                keys = {client_id: keys.to_json() for client_id, keys in self._keys.items()}
                return {c: messages.encode("keys", {n: keys[n] for n in near(c) if n in keys}) for c in expected}
            case Phase.MASK:
                sealed = self._sealed
                return {
                    c: messages.encode("shares", {n: sealed[n][c] for n in near(c) if c in sealed.get(n, {})})
                    for c in expected
                }
            case Phase.CONFIRM:
                request = messages.encode("survivors", messages.survivors_to_json(self.parameters, self.survivors))
                return dict.fromkeys(expected, request)
            case Phase.UNMASK:
                signed = {c: self._confirmations[c] for c in self.parameters.confirmers if c in self._confirmations}
                return dict.fromkeys(expected, messages.encode("confirmations", signed))
        return {}

    def receive(self, client_id: str, response: bytes) -> None:
        """Take a client's answer to the present phase; the same one again changes nothing.

        Raises:
            UpdateRejectedError: it is not valid, or another one than before; the client is out of the session.
        """
        if client_id not in self._present or self.phase in (Phase.MASK, Phase.DONE, Phase.FAILED):
            raise UpdateRejectedError(f"{client_id} is not asked in the phase {self.phase.value}.")
        if self._answers.setdefault(client_id, response) != response:
            raise self._out(client_id, f"{client_id} answered the phase {self.phase.value} in two ways.")
        try:
            {
                Phase.ADVERTISE: self._take_keys,
                Phase.SHARE: self._take_shares,
                Phase.CONFIRM: self._take_confirmation,
                Phase.UNMASK: self._take_unmasking,
            }[self.phase](client_id, response)
        except UpdateRejectedError as error:
            raise self._out(client_id, error.message) from None

    def receive_masked(self, client_ids: Sequence[str], vector: Ring) -> None:
        """Take the sum, modulo ``2^bits``, of these clients' masked vectors.

        Raises:
            UpdateRejectedError: it is not such a vector, or a client is not asked or is in the sum already.
        """
        wrong = [c for c in client_ids if c not in self._present or c in self._summed]
        if self.phase is not Phase.MASK or wrong or not client_ids or len(set(client_ids)) != len(client_ids):
            raise UpdateRejectedError(f"{', '.join(wrong) or 'Nobody'} may add a masked vector to the sum now.")
        length, bits = self.parameters.length, self.parameters.bits
        if vector.dtype != np.uint32 or vector.shape != (length,) or (bits < 32 and int(vector.max()) >> bits):
            reason = f"A masked vector is not {length} numbers of {bits} bits."
            for client_id in client_ids:
                self._out(client_id, reason)
            raise UpdateRejectedError(reason)
        self._summed.update(client_ids)
        self._sum += vector

    def advance(self) -> Phase:
        """Close the present phase: who has not answered is out.

        Raises:
            SecureAggregationError: too few are left; nothing is revealed.
        """
        if self.phase in (Phase.DONE, Phase.FAILED):
            raise SecureAggregationError(f"The session is {self.phase.value}.")
        answered = self._summed if self.phase is Phase.MASK else self._answers.keys()
        for client_id in self._present - answered:
            self._out(client_id, f"it did not answer the phase {self.phase.value}")
        needed = self.parameters.min_survivors
        if self.phase in (Phase.CONFIRM, Phase.UNMASK):
            # The sum is there: what counts is whether its masks can be taken off.
            needed = 1
        if len(self._present) < needed:
            raise self._failed(f"{len(self._present)} clients answered, and {needed} have to")
        if self.phase is Phase.UNMASK:
            self._unmask()
        self.phase, self._answers = _ORDER[_ORDER.index(self.phase) + 1], {}
        return self.phase

    def total(self) -> Ring:
        """The sum of the survivors' vectors, modulo ``2^bits``.

        Raises:
            SecureAggregationError: the session has not ended well.
        """
        if self._total is None:
            raise SecureAggregationError(f"The session has no sum: its phase is {self.phase.value}.")
        return self._total

    def _take_keys(self, client_id: str, response: bytes) -> None:
        value = messages.decode(response, "keys", self.parameters)
        keys: Keys = messages.by_client({client_id: value}, Keys.from_json, [client_id])[client_id]
        if not messages.is_signed(self._peers, client_id, keys.signature, keys.signed(self.parameters, client_id)):
            raise UpdateRejectedError(f"The keys of {client_id} are not signed with its known identity key.")
        for key in (keys.mask_key, keys.share_key):
            if (owner := self._owner_of_key.setdefault(key, client_id)) != client_id or keys.mask_key == keys.share_key:
                raise UpdateRejectedError(f"{client_id} and {owner} have an equal key.")
        self._keys[client_id] = keys

    def _take_shares(self, client_id: str, response: bytes) -> None:
        receivers = [n for n in self.parameters.neighbours_of(client_id) if n in self._keys]
        value = messages.decode(response, "shares", self.parameters)
        sealed = messages.by_client(value, messages.of_size(messages.SEALED_BYTES), receivers)
        if len(sealed) < len(receivers):
            raise UpdateRejectedError(f"{client_id} has shared its secrets with {len(sealed)} of {len(receivers)}.")
        self._sealed[client_id] = {receiver: messages.written(content) for receiver, content in sealed.items()}

    def _take_confirmation(self, client_id: str, response: bytes) -> None:
        value = messages.decode(response, "signature", self.parameters)
        read = messages.of_size(messages.SIGNATURE_BYTES)
        signature: bytes = messages.by_client({client_id: value}, read, [client_id])[client_id]
        content = messages.confirmed(self.parameters, client_id, self.survivors)
        if not messages.is_signed(self._peers, client_id, signature, content):
            raise UpdateRejectedError(f"{client_id} has confirmed another set of survivors.")
        self._confirmations[client_id] = messages.written(signature)

    def _take_unmasking(self, client_id: str, response: bytes) -> None:
        owners = [c for c in (client_id, *self.parameters.neighbours_of(client_id)) if c in self._sealed]
        value = messages.decode(response, "shares", self.parameters)
        shares = messages.by_client(value, messages.of_size(messages.SHARE_BYTES), owners)
        for owner, share in shares.items():
            self._given.setdefault(owner, {})[client_id] = share

    def _unmask(self) -> None:
        parameters, keys = self.parameters, list[tuple[bytes, int]]()
        for client_id in self.survivors:
            seed = self._secret_of(client_id, partial(commitment_to, parameters, client_id), "commitment")
            keys.append((derived_key(seed, own_purpose(parameters, client_id)), -1))
        for client_id in sorted(self._sealed.keys() - self._summed):
            left = [n for n in parameters.neighbours_of(client_id) if n in self._summed]
            if not left:
                continue
            private = self._secret_of(client_id, public_key, "mask_key")
            for neighbour in left:
                secret = agreed_secret(private, self._keys[neighbour].mask_key)
                key = derived_key(secret, pair_purpose(parameters, client_id, neighbour))
                # The neighbour added it with the other sign.
                keys.append((key, 1 if client_id < neighbour else -1))
        apply_masks(self._sum, parameters.bits, keys)
        self._total = self._sum

    def _secret_of(self, owner: str, public: Callable[[bytes], bytes], advertised: str) -> bytes:
        """A client's secret, rebuilt from shares and compared with what the client advertised.

        Where shares are wrong, other ones are tried, and the clients that gave wrong ones are out.
        """
        given, threshold = self._given.get(owner, {}), self.parameters.threshold
        # Clients that gave wrong shares before are asked last.
        holders = sorted(given, key=lambda holder: (holder in self._wrong, holder))
        if len(holders) < threshold:
            raise self._failed(f"{len(holders)} clients gave a share of a secret of {owner}, and {threshold} have to")

        def rebuilt(some: Sequence[str]) -> bytes | None:
            try:
                secret = combine({self.parameters.index[holder] + 1: given[holder] for holder in some})
                return secret if public(secret) == getattr(self._keys[owner], advertised) else None
            except ValueError:
                return None

        for start in range(len(holders) - threshold + 1):
            used = holders[start : start + threshold]
            secret = rebuilt(used)
            if secret is not None:
                for holder in holders[:start]:
                    if rebuilt([holder, *used[1:]]) is None:
                        self._wrong.add(holder)
                        self.dropped.setdefault(holder, f"it gave a wrong share of a secret of {owner}")
                return secret
        raise self._failed(f"the shares of a secret of {owner} do not combine")

    def _out(self, client_id: str, reason: str) -> UpdateRejectedError:
        self._present.discard(client_id)
        self._answers.pop(client_id, None)
        self._confirmations.pop(client_id, None)
        if self.phase is Phase.SHARE:
            self._sealed.pop(client_id, None)
        if self.phase is Phase.ADVERTISE:
            self._keys.pop(client_id, None)
        for shares in self._given.values():
            shares.pop(client_id, None)
        self.dropped.setdefault(client_id, reason)
        return UpdateRejectedError(reason)

    def _failed(self, reason: str) -> SecureAggregationError:
        phase, self.phase, self._total = self.phase, Phase.FAILED, None
        return SecureAggregationError(
            f"Secure aggregation failed in the phase {phase.value}: {reason}.",
            cure="Nothing of any client was revealed; the round may be repeated.",
        )
