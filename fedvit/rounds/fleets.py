"""A fleet of virtual and remote clients behind one port."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from fedvit.aggregation.registry import rule_for
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.ports import ClockPort, FleetPort, ProxyReport
from fedvit.rounds.remote import Offer, RemoteWork
from fedvit.rounds.remote_sessions import PhaseRequest, RemoteSessions
from fedvit.secure_session import ADVERTISE, MASK, SecureAnswer, SecureSession
from fedvit.store.store import Store
from fedvit.types import Client, Cohort, TrainTask, Weights
from fedvit.updates import ClientFailures, EncodedUpdate, RingSum, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest
from fedvit.wire.tensors import encode_weights

POLL_S = 0.25
LATE = "no answer to the phase {phase} in {timeout_s:g} s"
NO_SESSION = "it is in no secure aggregation session"
UNCHARGED = "it was not asked: what it holds is not what was charged"


class MixedFleet:
    """Implements :class:`fedvit.ports.FleetPort`; clients that are not virtual get their tasks through the store.

    Args:
        virtual: the fleet of the virtual clients.
        pause: sleeps for that many seconds.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        virtual: FleetPort,
        *,
        clock: ClockPort = SYSTEM_CLOCK,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings, self._store, self._virtual = settings, store, virtual
        self._work = RemoteWork(settings, store)
        self._sessions = RemoteSessions(store)
        self._by_examples = settings.privacy.privacy_unit == "record" and rule_for(settings).weighting == "examples"
        self._clock, self._pause = clock, pause
        self._asked: dict[str, Offer | PhaseRequest] = {}
        self._session: SecureSession | None = None

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        patience_s = self._settings.training.round_timeout_s if timeout_s is None else timeout_s
        remote = self._remote(cohort.client_ids)
        virtual = replace(cohort, client_ids=tuple(c for c in cohort.client_ids if c not in remote))
        if cohort.secure is None:
            uncharged = self._ask(task, weights, remote.values())
        else:
            uncharged = self._ask_masked(task, weights, remote, cohort.secure)
        if uncharged.outcomes:
            yield uncharged
        heard_s = self._clock.monotonic()
        for answer in self._virtual.train(task, weights, virtual, timeout_s=timeout_s):
            yield answer
            yield from self._arrived()
            heard_s = heard_s if answer is None else self._clock.monotonic()
        while self._asked:
            waiting = len(self._asked)
            yield from self._arrived()
            if len(self._asked) < waiting:
                heard_s = self._clock.monotonic()
            elif self._clock.monotonic() - heard_s >= patience_s:
                return
            else:
                yield None
                self._pause(POLL_S)

    def in_flight(self) -> frozenset[str]:
        return self._virtual.in_flight() | self._asked.keys()

    def give_up(self, reason: str) -> list[ClientFailures]:
        """A remote client that answers later gets the reason."""
        given_up = self._virtual.give_up(reason)
        for client_id, offer in self._asked.items():
            if isinstance(offer, PhaseRequest):
                self._sessions.close(offer, reason)
            else:
                self._work.close(offer, reason)
            given_up.append(ClientFailures.of(offer.task.round_index, [client_id], reason))
        self._asked.clear()
        return given_up

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        """A remote client gets the request with its next poll; an answer after the time is refused."""
        ends_s = self._clock.monotonic() + timeout_s
        remote = self._remote(list(requests))
        if phase == ADVERTISE:
            self._session = session
            self._sessions.begin(session)
        waiting = {}
        for client_id, client in remote.items():
            if self._work.is_charged(session.task, client):
                waiting[client_id] = self._sessions.leave(session, phase, requests[client_id], client)
            else:
                yield SecureAnswer(client_id, error=UNCHARGED)
        virtual = {client_id: request for client_id, request in requests.items() if client_id not in remote}
        for answer in self._virtual.exchange(session, phase, virtual, timeout_s=timeout_s) if virtual else ():
            yield answer
            yield from self._phase_answers(waiting)
        while waiting:
            yield from self._phase_answers(waiting)
            if self._clock.monotonic() >= ends_s:
                for left in waiting.values():
                    self._sessions.close(left, LATE.format(phase=phase, timeout_s=timeout_s))
                return
            if waiting:
                yield None
                self._pause(POLL_S)

    def end_session(self, session: SecureSession) -> None:
        self._session = None
        self._sessions.end(session)
        self._virtual.end_session(session)

    def proxies_alive(self) -> ProxyReport:
        """Those of the virtual clients; remote clients send heartbeats."""
        return self._virtual.proxies_alive()

    def request_histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> None:
        """A remote client gets the request with its next poll, and its histogram is stored as it arrives."""
        remote = self._remote(client_ids)
        for client in remote.values():
            self._work.leave_histogram_request(request, client)
        self._virtual.request_histograms(request, [client_id for client_id in client_ids if client_id not in remote])

    def histograms(self) -> list[ClientHistogram]:
        """Of virtual clients."""
        return self._virtual.histograms()

    def _remote(self, client_ids: Sequence[str]) -> dict[str, Client]:
        return {client.client_id: client for client in self._store.clients.remote(client_ids)}

    def _ask(self, task: TrainTask, weights: Weights, clients: Collection[Client]) -> ClientFailures:
        """Store the task for each client; the clients that could not be asked."""
        if clients:
            # Clients fetch the weights by the digest in the task.
            self._store.blobs.put(encode_weights(weights))
        uncharged = []
        for client in clients:
            offer = self._work.leave(task, client)
            if offer is None:
                uncharged.append(client.client_id)
            else:
                self._asked[client.client_id] = offer
        return ClientFailures.of(task.round_index, uncharged, UNCHARGED)

    def _ask_masked(
        self, task: TrainTask, weights: Weights, clients: Mapping[str, Client], requests: Mapping[str, bytes]
    ) -> ClientFailures:
        """Leave the phase ``mask`` for each client in the present session; the clients that could not be asked."""
        if clients:
            self._store.blobs.put(encode_weights(weights))
        asked = {c: client for c, client in clients.items() if c in requests} if self._session is not None else {}
        for client_id, client in asked.items():
            assert self._session is not None
            self._asked[client_id] = self._sessions.leave(self._session, MASK, requests[client_id], client)
        return ClientFailures.of(task.round_index, sorted(clients.keys() - asked.keys()), NO_SESSION)

    def _weight_of(self, left: PhaseRequest) -> float:
        return float(left.num_examples) if self._by_examples else 1.0

    def _phase_answers(self, waiting: dict[str, PhaseRequest]) -> Iterator[SecureAnswer]:
        for client_id, left in sorted(waiting.items()):
            answer = self._sessions.answer(left)
            if answer is not None:
                del waiting[client_id]
                yield answer

    def _arrived(self) -> Iterator[EncodedUpdate | RingSum | ClientFailures]:
        for client_id, offer in sorted(self._asked.items()):
            if isinstance(offer, PhaseRequest):
                answer: EncodedUpdate | RingSum | ClientFailures | None = self._sessions.masked(
                    offer, self._weight_of(offer)
                )
            else:
                answer = self._work.answer(offer)
            if answer is not None:
                # Before the yield: the caller may not resume this generator.
                del self._asked[client_id]
                yield answer
