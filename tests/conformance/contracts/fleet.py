"""The promises of the fleet port."""

from __future__ import annotations

import itertools
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from fedvit.clients.secure import identity_of, public_hex, public_keys
from fedvit.ports import FleetPort
from fedvit.secagg.parameters import parameters_for
from fedvit.secagg.server import Phase, SecureServer
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import UpdateMessage
from fedvit.wire.tensors import weights_digest

ROUNDS = itertools.count(1)
TIMEOUT_S = 60.0


def task_for(weights: Weights, round_index: int) -> TrainTask:
    """A task of a run in which clients are the privacy unit."""
    base = weights_digest(weights)
    return TrainTask("run-conformance", round_index, base, "d" * 64, 1.0, 1.0, 1.0, 1, 0.1, privacy_unit="client")


def asked(messages: Iterable[UpdateMessage | None]) -> Counter[tuple[int, str]]:
    """How often each client answered, by round."""
    answered = [message for message in messages if message is not None]
    return Counter((message.round_index, outcome.client_id) for message in answered for outcome in message.outcomes)


def session_of(clients: tuple[str, ...], root_secret: bytes) -> tuple[SecureSession, SecureServer]:
    """A new session of these virtual clients, and its server."""
    keys = {client_id: public_hex(identity_of(root_secret, client_id)) for client_id in clients}
    task, session = task_for({"point": np.zeros(2, np.float32)}, next(ROUNDS)), secrets.token_hex(32)
    parameters = parameters_for(session, clients, min_survivors=4, max_colluding=0, dropout_rate=0.3, bits=16, length=2)
    return SecureSession(session, task, parameters.to_json(), keys), SecureServer(parameters, public_keys(keys))


def exchanged(
    fleet: FleetPort, session: SecureSession, phase: Phase, requests: Mapping[str, bytes]
) -> dict[str, SecureAnswer]:
    """The answers to a phase, by client; none answers twice."""
    answers = [a for a in fleet.exchange(session, phase.value, requests, timeout_s=TIMEOUT_S) if a is not None]
    assert len({answer.client_id for answer in answers}) == len(answers)
    return {answer.client_id: answer for answer in answers}


class FleetContract:
    """Needs the fixtures ``fleet`` and ``weights``, and six ``clients``, which do not answer in one message.

    ``root_secret`` is that of the clients; ``has_keys`` is false where they take part in no secure aggregation.
    """

    clients: tuple[str, ...]
    root_secret = bytes(32)
    has_keys = True

    def test_every_client_answers_once(self, fleet: FleetPort, weights: Weights) -> None:
        cohort = Cohort(next(ROUNDS), self.clients)
        task = task_for(weights, cohort.round_index)
        messages = list(fleet.train(task, weights, cohort, timeout_s=TIMEOUT_S))
        assert asked(messages) == {(task.round_index, client_id): 1 for client_id in self.clients}
        assert fleet.in_flight() == frozenset()

    def test_clients_that_have_not_answered_stay_in_flight_and_answer_with_the_next_task(
        self, fleet: FleetPort, weights: Weights
    ) -> None:
        first, second = Cohort(next(ROUNDS), self.clients[:4]), Cohort(next(ROUNDS), self.clients[4:])
        early = self.begun(fleet, weights, first)
        assert fleet.in_flight() == set(first.client_ids) - {client_id for _, client_id in early}
        assert fleet.in_flight()
        late = list(fleet.train(task_for(weights, second.round_index), weights, second, timeout_s=TIMEOUT_S))
        expected = {(cohort.round_index, c): 1 for cohort in (first, second) for c in cohort.client_ids}
        assert early + asked(late) == expected
        assert fleet.in_flight() == frozenset()

    def test_given_up_clients_are_failures_with_the_reason(self, fleet: FleetPort, weights: Weights) -> None:
        cohort = Cohort(next(ROUNDS), self.clients)
        self.begun(fleet, weights, cohort)
        waiting = fleet.in_flight()
        assert waiting
        failures = fleet.give_up("no patience")
        outcomes = [outcome for failure in failures for outcome in failure.outcomes]
        assert {outcome.client_id for outcome in outcomes} == waiting
        assert {outcome.error for outcome in outcomes} == {"no patience"}
        assert {failure.round_index for failure in failures} == {cohort.round_index}
        assert fleet.in_flight() == frozenset()
        assert fleet.give_up("again") == []

    def test_the_proxies_answer(self, fleet: FleetPort) -> None:
        report = fleet.proxies_alive()
        assert report.alive
        assert report.reaches_all
        assert report.reaches("a client that was never trained")

    def test_histograms_that_nobody_requested_do_not_arrive(self, fleet: FleetPort) -> None:
        assert fleet.histograms() == []

    def test_a_phase_is_answered_once_by_every_client_that_has_keys(self, fleet: FleetPort) -> None:
        session, server = session_of(self.clients, self.root_secret)
        for phase in (Phase.ADVERTISE, Phase.SHARE):
            answers = exchanged(fleet, session, phase, server.requests())
            assert sorted(answers) == sorted(self.clients)
            if not self.has_keys:
                assert all(answer.error for answer in answers.values())
                return
            for client_id, answer in answers.items():
                assert answer.error is None, answer
                server.receive(client_id, answer.content)
            assert exchanged(fleet, session, phase, server.requests()) == answers
            server.advance()
        fleet.end_session(session)

    def test_a_client_has_no_keys_of_a_session_that_it_was_not_in_from_the_beginning(self, fleet: FleetPort) -> None:
        session, server = session_of(self.clients, self.root_secret)
        answers = exchanged(fleet, session, Phase.SHARE, server.requests())
        assert sorted(answers) == sorted(self.clients)
        assert all(answer.error for answer in answers.values())

    def begun(self, fleet: FleetPort, weights: Weights, cohort: Cohort) -> Counter[tuple[int, str]]:
        """Send a task and leave after the first message or None; who answered."""
        messages = fleet.train(task_for(weights, cohort.round_index), weights, cohort, timeout_s=TIMEOUT_S)
        return asked([next(messages)])
