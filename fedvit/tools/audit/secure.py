"""Checks of secure sums: rounding and noise of contributions, and what clients give to a server that cheats."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.stats import chi2, hypergeom

from fedvit.errors import FedvitError
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg import messages
from fedvit.secagg.client import SecureClient
from fedvit.secagg.masks import derived_key
from fedvit.secagg.noise import Plan, Vector, decode, encode, plan_for
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.rotation import rotate
from fedvit.secagg.server import Phase, SecureServer
from fedvit.secagg.shamir import random_secret
from fedvit.tools.audit.findings import ALPHA, Finding, Scope
from fedvit.tools.audit.released import Scores, release_finding

NOISE_CHECK, PROTOCOL_CHECK, RELEASED_CHECK = "distributed noise", "secure aggregation", "released secure sum"
_SECRET = bytes(range(32))
_HONEST, _LENGTH = 4, 3_000
# Of 300,000 seeds of 32 bits, two are equal except with a probability of 3e-5.
_SEEDS = 300_000


def check_noise(scope: Scope) -> Iterator[Finding]:
    """Neighbouring sums after rounding, and the noise that the least number of honest clients adds."""
    for each in scope.at_norms():
        subject = f"rounding, norm {each.l2_clip_norm:g}"
        yield Finding.of(NOISE_CHECK, subject, *_rounding_faults(each))
    yield Finding.of(NOISE_CHECK, "rounding that went too far", list(_repeated_faults(scope)), "is repeated")
    yield Finding.of(NOISE_CHECK, "noise of the least survivors", *_noise_faults(scope))


def check_protocol(scope: Scope) -> Iterator[Finding]:
    """Keys, thresholds and shares, with a server that cheats."""
    yield Finding.of(PROTOCOL_CHECK, "keys", list(_key_faults()), "signed, fresh and of 256 bits")
    yield Finding.of(PROTOCOL_CHECK, "thresholds", list(_threshold_faults()), "two sets are never confirmed")
    yield Finding.of(PROTOCOL_CHECK, "parts of a sum", list(_part_faults()), "are never unmasked alone")
    yield Finding.of(PROTOCOL_CHECK, "shares", list(_share_faults()), "one of each secret holder")


def check_released(scope: Scope) -> Iterator[Finding]:
    """One secure sum of clipped updates by the least number of honest clients, decoded."""
    plan = _plan(scope, bounded=True, length=4)
    canary = np.array([0.0, 0.0, 0.0, scope.l2_clip_norm])

    def draw(present: bool, first: int, count: int) -> Scores:
        scores = np.empty(count)
        for number in range(count):
            total = np.zeros(plan.padded, np.uint32)
            for client in range(_HONEST):
                own = canary if present and not client else np.zeros(4)
                total += encode(plan, own, _stream(f"{present}/{first + number}/{client}"))
            scores[number] = _decoded(plan, total) @ canary / scope.l2_clip_norm**2
        return scores

    yield release_finding(RELEASED_CHECK, scope, draw)


def _plan(scope: Scope, *, bounded: bool, length: int = _LENGTH, participants: int = 2 * _HONEST) -> Plan:
    norm = scope.l2_clip_norm
    return plan_for(
        length=length,
        sensitivity=norm,
        largest_norm=norm if bounded else 50 * norm,
        total_norm=100 * norm,
        participants=participants,
        honest=_HONEST,
        noise_multiplier=scope.noise_multiplier,
        max_bits=32,
        rotation=_SECRET,
    )


def _rounding_faults(scope: Scope) -> tuple[list[str], str]:
    """Pairs of contributions at the distance of one unit, encoded with the same coins and the same noise."""
    faults, furthest, draw = [], 0.0, np.random.default_rng(0)
    for bounded in (True, False):
        plan = _plan(scope, bounded=bounded)
        for trial in range(10):
            change = _of_norm(draw, scope.l2_clip_norm * (1 - 1e-9))
            before = np.zeros(_LENGTH) if bounded else _of_norm(draw, 40 * scope.l2_clip_norm)
            one, other = (encode(plan, x, _stream(f"{bounded}/{trial}")) for x in (before, before + change))
            moved = float(np.linalg.norm(_centred(plan, other - one))) / plan.sensitivity
            furthest = max(furthest, moved)
            if not moved <= 1:
                faults.append(f"one unit moves the rounded sum by {moved:.4f} of its sensitivity")
    if furthest < 0.9:
        faults.append(f"no unit moves the rounded sum by more than {furthest:.3f} of its sensitivity: nothing is shown")
    return faults, f"one unit moves the rounded sum by {furthest:.4f} of its sensitivity at most"


class _Outwards(SecretStream):
    """A stream whose first coins round every value away from 0."""

    def __init__(self, rotated: Vector) -> None:
        super().__init__(_SECRET, "audit", {})
        coins = np.where(rotated > 0, 2**32 - 1, 0).astype("<u4")
        self._first: npt.NDArray[np.uint64] | None = np.append(coins, np.zeros(len(coins) % 2, "<u4")).view("<u8")

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        first, self._first = self._first, None
        return super().words(count) if first is None else first[:count]


def _repeated_faults(scope: Scope) -> Iterator[str]:
    plan = _plan(scope, bounded=True)
    contribution = _of_norm(np.random.default_rng(1), scope.l2_clip_norm * (1 - 1e-9))
    vector = encode(plan, contribution, _Outwards(rotate(contribution, plan.rotation)))
    # The first coins drew nothing from the stream: the same values, if others were drawn in their place.
    again = encode(plan, contribution, SecretStream(_SECRET, "audit", {}))
    if not np.array_equal(vector, again):
        yield "a contribution that rounding makes longer than its sensitivity is sent"


def _noise_faults(scope: Scope) -> tuple[list[str], str]:
    plan, values = _plan(scope, bounded=True), list[Vector]()
    for trial in range(4):
        total = np.zeros(plan.padded, np.uint32)
        for client in range(_HONEST):
            total += encode(plan, np.zeros(_LENGTH), _stream(f"noise/{trial}/{client}"))
        values.append(_decoded(plan, total))
    noise = np.concatenate(values)
    share = float(np.mean(noise**2)) / (scope.noise_multiplier * scope.l2_clip_norm) ** 2
    low, high = (chi2.ppf(p, len(noise)) / len(noise) for p in (ALPHA, 1 - ALPHA))
    faults = []
    # Rounding may cost 2% of the variance.
    if not low <= share <= 1.02 * high:
        faults.append(f"the noise of {_HONEST} clients has {share:.4f} of the charged variance")
    return faults, f"{_HONEST} of {2 * _HONEST} clients add {share:.4f} of the charged variance"


def _key_faults() -> Iterator[str]:
    one = _Session("a" * 64)
    unregistered = SecureClient(one.parameters, "a", Ed25519PrivateKey.generate(), one.peers)
    with suppress(FedvitError):
        one.server.receive("a", unregistered.advertise())
        yield "the server takes keys that no known identity signed"
    value = messages.decode(unregistered.advertise(), "keys", one.parameters)
    with suppress(FedvitError):
        one.clients["b"].share(messages.encode("keys", {"a": value, **one.keys_of("c", "d", "e")}))
        yield "a client takes keys that no known identity signed"
    masked = [_Session(session, one.identities).masked("a") for session in ("b" * 64, "c" * 64)]
    if np.mean(masked[0] == masked[1]) > 0.5:
        yield "the masks of two sessions are equal"
    for what, keys in (
        ("secrets", (random_secret() for _ in range(_SEEDS))),
        ("keys of masks", (derived_key(i.to_bytes(32, "big"), "audit") for i in range(_SEEDS))),
    ):
        if len(set(keys)) < _SEEDS:
            yield f"of {_SEEDS} {what}, two are equal"


def _threshold_faults() -> Iterator[str]:
    for count, colluding in ((3, 0), (5, 0), (6, 1), (40, 0), (40, 4), (300, 10)):
        parameters = _parameters("c" * 64, count, colluding)
        near, half = parameters.neighbours, parameters.neighbours // 2
        counted = 2 * parameters.threshold - 1 - count if near == count - 1 else parameters.threshold - half - 2
        # So many of a few clients drawn by a server that may try 2^40 graphs.
        in_a_row = colluding if near == count - 1 else int(hypergeom.isf(2.0**-80 / count, count, colluding, half))
        if counted < in_a_row:
            of = f"{parameters.threshold} of {near + 1} clients"
            yield f"{of} allow for {counted} colluding ones in a row, and {in_a_row} may be there"
    session = _Session("d" * 64)
    session.run(Phase.CONFIRM)
    request = session.server.requests()["a"]
    signed = messages.decode(request, "confirmations", session.parameters)
    few = dict(list(signed.items())[: session.parameters.threshold - 1])
    with suppress(FedvitError):
        session.clients["a"].unmask(messages.encode("confirmations", few))
        yield f"a client gives shares when {len(few)} of {session.parameters.threshold} have confirmed the survivors"


def _part_faults() -> Iterator[str]:
    session = _Session("f" * 64, count=40)
    ring, half = session.parameters.ring, session.parameters.neighbours // 2
    gap = {*ring[15 : 15 + half], *ring[20 + half : 20 + 2 * half]}
    with suppress(FedvitError):
        session.run(Phase.UNMASK, silent=gap)
        yield "clients between two gaps on the ring are left to the server: it has all keys of the clients in the gaps"
    session = _Session("9" * 64, count=40)
    session.run(Phase.MASK)
    parameters, everybody = session.parameters, session.server.survivors
    unmasking = []
    for part in (parameters.ring[:20], parameters.ring[20:]):
        shown = sorted({*everybody} - {part[8], part[10]})
        request = messages.encode("survivors", messages.survivors_to_json(parameters, shown))
        answers = {c: session.clients[c].confirm(request) for c in part if c in shown}
        signed = {c: messages.decode(answer, "signature", parameters) for c, answer in answers.items()}
        unmasking.append(sum(session.unmasks(c, signed) for c in signed))
    if all(unmasking):
        yield "two parts of the ring unmask two sets of survivors: the sum has fewer clients than either set"


def _share_faults() -> Iterator[str]:
    session = _Session("e" * 64)
    session.run(Phase.MASK)
    client, survivors = session.clients["a"], session.server.survivors
    client.confirm(session.server.requests()["a"])
    with suppress(FedvitError):
        fewer = messages.survivors_to_json(session.parameters, survivors[:-1])
        client.confirm(messages.encode("survivors", fewer))
        yield "a client confirms two sets of survivors, and so gives both secrets of a client"
    with suppress(FedvitError):
        two = messages.survivors_to_json(session.parameters, ["b", "c"])
        session.clients["b"].confirm(messages.encode("survivors", two))
        yield "a client confirms fewer survivors than the noise is made for"


class _Session:
    """Clients and a server."""

    def __init__(self, session: str, identities: dict[str, Ed25519PrivateKey] | None = None, *, count: int = 5) -> None:
        self.parameters = _parameters(session, count, 0)
        self.identities = identities or {c: Ed25519PrivateKey.generate() for c in self.parameters.participants}
        self.peers = {c: key.public_key() for c, key in self.identities.items()}
        self.clients = {c: SecureClient(self.parameters, c, self.identities[c], self.peers) for c in self.identities}
        self.server = SecureServer(self.parameters, self.peers)

    def keys_of(self, *client_ids: str) -> dict[str, Any]:
        return {c: messages.decode(self.clients[c].advertise(), "keys", self.parameters) for c in client_ids}

    def run(self, last: Phase, silent: Collection[str] = ()) -> None:
        """All phases up to and with this one.

        Args:
            silent: clients that drop out after they have shared their secrets.
        """
        done = False
        while not done:
            done = self.server.phase is last
            for client_id, request in self.server.requests().items():
                if client_id not in silent or self.server.phase in (Phase.ADVERTISE, Phase.SHARE):
                    self._answer(client_id, request)
            self.server.advance()

    def unmasks(self, client_id: str, signed: Mapping[str, Any]) -> bool:
        """Whether the client gives shares for these confirmations, of all or of those near it."""
        for some in (self.parameters.confirmers, (client_id, *self.parameters.neighbours_of(client_id))):
            forwarded = {c: signed[c] for c in some if c in signed}
            with suppress(FedvitError):
                self.clients[client_id].unmask(messages.encode("confirmations", forwarded))
                return True
        return False

    def masked(self, client_id: str) -> npt.NDArray[np.uint32]:
        """The masked vector of zeros of a client."""
        self.run(Phase.SHARE)
        zeros = np.zeros(self.parameters.length, np.uint32)
        return self.clients[client_id].mask(self.server.requests()[client_id], zeros)

    def _answer(self, client_id: str, request: bytes) -> None:
        client, phase = self.clients[client_id], self.server.phase
        if phase is Phase.MASK:
            zeros = np.zeros(self.parameters.length, np.uint32)
            self.server.receive_masked([client_id], client.mask(request, zeros))
        elif phase is Phase.ADVERTISE:
            self.server.receive(client_id, client.advertise())
        else:
            answers = {Phase.SHARE: client.share, Phase.CONFIRM: client.confirm, Phase.UNMASK: client.unmask}
            self.server.receive(client_id, answers[phase](request))


def _parameters(session: str, count: int, colluding: int) -> Parameters:
    names = [chr(ord("a") + i) if count <= 26 else f"c{i}" for i in range(count)]
    return parameters_for(
        session,
        names,
        min_survivors=max(2, math.ceil((0.8 if count < 10 else 0.5) * count)),
        max_colluding=colluding,
        dropout_rate=0.1,
        bits=16,
        length=64,
    )


def _stream(name: str) -> SecretStream:
    return SecretStream(_SECRET, "audit", {"name": name})


def _of_norm(draw: np.random.Generator, norm: float) -> Vector:
    vector = draw.normal(size=_LENGTH)
    return np.asarray(norm * vector / np.linalg.norm(vector))


def _centred(plan: Plan, vector: npt.NDArray[np.uint32]) -> Vector:
    half = 1 << (plan.bits - 1)
    return ((vector.astype(np.int64) + half) % (2 * half) - half).astype(np.float64)


def _decoded(plan: Plan, total: npt.NDArray[np.uint32]) -> Vector:
    return decode(plan, total & np.uint32((1 << plan.bits) - 1))
