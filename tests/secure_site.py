"""The clients and the server of one secure aggregation session, in one process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedvit.errors import SecureAggregationError
from fedvit.secagg.client import SecureClient
from fedvit.secagg.masks import Ring
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.server import Phase, SecureServer

SESSION = "ab" * 32
BEFORE_SUM = (Phase.ADVERTISE, Phase.SHARE)
AFTER_SUM = (Phase.CONFIRM, Phase.UNMASK)


def parameters_of(count: int, *, session: str = SESSION, length: int = 16, bits: int = 20, **more: Any) -> Parameters:
    facts: dict[str, Any] = {"min_survivors": max(2, int(0.4 * count)), "max_colluding": 0, "dropout_rate": 0.3}
    names = [f"vehicle-{i:03d}" for i in range(count)]
    return parameters_for(session, names, bits=bits, length=length, **{**facts, **more})


class Site:
    """The clients and the server of one session, and their vectors."""

    def __init__(self, parameters: Parameters, rng: np.random.Generator) -> None:
        self.parameters = parameters
        self.identities = {c: Ed25519PrivateKey.generate() for c in parameters.participants}
        self.peers = {c: key.public_key() for c, key in self.identities.items()}
        self.clients = {c: SecureClient(parameters, c, self.identities[c], self.peers) for c in self.identities}
        self.server = SecureServer(parameters, self.peers)
        high = 2**parameters.bits
        self.vectors: dict[str, Ring] = {
            c: rng.integers(0, high, parameters.length, dtype=np.uint64).astype(np.uint32) for c in self.clients
        }

    def answer(self, phase: Phase, client_id: str, request: bytes) -> bytes:
        client = self.clients[client_id]
        if phase is Phase.ADVERTISE:
            return client.advertise()
        return {Phase.SHARE: client.share, Phase.CONFIRM: client.confirm, Phase.UNMASK: client.unmask}[phase](request)

    def exchange(self, phase: Phase, silent: Callable[[str], bool] = lambda _: False) -> None:
        """One phase of the session, without the clients that are silent."""
        for client_id, request in self.server.requests().items():
            if not silent(client_id):
                # A client that refuses takes no further part, like one that is silent.
                with suppress(SecureAggregationError):
                    self._one(phase, client_id, request)
        self.server.advance()

    def _one(self, phase: Phase, client_id: str, request: bytes) -> None:
        if phase is Phase.MASK:
            masked = self.clients[client_id].mask(request, self.vectors[client_id])
            self.server.receive_masked([client_id], masked)
        else:
            self.server.receive(client_id, self.answer(phase, client_id, request))

    def run(self, *phases: Phase) -> None:
        for phase in phases or (*BEFORE_SUM, Phase.MASK, *AFTER_SUM):
            self.exchange(phase)

    def plain_sum(self) -> Ring:
        total = sum(self.vectors[c].astype(np.uint64) for c in self.server.survivors)
        return np.asarray(total % 2**self.parameters.bits, np.uint32)


def site_of(count: int = 5, **more: Any) -> Site:
    return Site(parameters_of(count, **more), np.random.default_rng(count))
