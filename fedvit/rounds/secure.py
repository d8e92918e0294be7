"""Secure aggregation of a round: runs the server's side of the protocol over the fleet, phase by phase.

A phase ends when every client has answered, or after ``secure_aggregation.phase_timeout_s``; a client that is silent,
refuses, or sends what the protocol rejects is out of the session and named. Too few clients end the session:
nothing is revealed, and the round may be repeated as another attempt, which has other keys, other noise and another
charge. The server learns the sum of the survivors' contributions and nothing else, so nothing here is secret, and
nothing of it is stored but the messages to and from remote clients.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedvit.clients.secure import identity_of, public_hex, public_keys
from fedvit.errors import SecureAggregationError, UpdateRejectedError
from fedvit.metrics.training import SecureAggregationMetrics
from fedvit.ports import ClockPort, FleetPort
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.rounds.attempts import Attempts
from fedvit.rounds.context import RoundContext
from fedvit.rounds.update_admission import RoundUpdates
from fedvit.secagg.noise import Plan
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.server import Phase, SecureServer
from fedvit.secure_session import SecureSession
from fedvit.types import Client, Cohort, TrainTask
from fedvit.updates import ClientFailures, DecodedUpdate, RingSum

_LOG = logging.getLogger(__name__)
METRICS = SecureAggregationMetrics()
MOST_ATTEMPTS = 3
"""So often a round is tried by one process before the run fails."""
NO_IDENTITY = "it has registered no identity key for secure aggregation"


def identity_key_of(client: Client) -> str | None:
    """The public identity key, hex, that a remote client has registered: ``{"training": {"identity": "ab..."}}``."""
    training = client.capabilities.get("training")
    key = training.get("identity") if isinstance(training, Mapping) else None
    try:
        return key if isinstance(key, str) and len(bytes.fromhex(key)) == 32 else None
    except ValueError:
        return None


class MaskedSums:
    """Sums under masks; implements :class:`fedvit.rounds.secure_sums.SecureSums`."""

    def __init__(self, context: RoundContext) -> None:
        self._context, self._store, self._attempts = context, context.store, Attempts(context.store)
        self._failed: tuple[str, int, int] = ("", 0, 0)

    def attempt(self, run_id: str, round_index: int) -> int:
        return self._attempts.number(run_id, round_index)

    def may_repeat(self, task: TrainTask) -> bool:
        """Count a failed attempt; whether this process tries the round again."""
        run_id, round_index, failed = self._failed
        failed = failed + 1 if (run_id, round_index) == (task.run_id, task.round_index) else 1
        self._failed = task.run_id, task.round_index, failed
        return failed < MOST_ATTEMPTS

    def begin(self, task: TrainTask, cohort: Cohort, plan: Plan, min_survivors: int) -> SecureRound:
        """Exchange keys and shares with the cohort; from then on this attempt of the round is used up.

        Raises:
            ConfigError: no graph of so few clients is secure.
            SecureAggregationError: too few clients took part.
        """
        identities, without = self._identities(cohort.client_ids)
        config = self._context.settings.secure_aggregation
        session = _session_id(task)
        parameters = parameters_for(
            session,
            sorted(identities),
            min_survivors=min_survivors,
            max_colluding=config.max_colluding,
            dropout_rate=config.dropout_rate,
            bits=plan.bits,
            length=plan.padded,
        )
        # Before a key is asked for: whatever happens afterwards, this attempt is not begun again.
        self._attempts.begin(task)
        facts = SecureSession(session, task, parameters.to_json(), identities)
        fleet, clock = self._context.fleet, self._context.clock
        secure = SecureRound(fleet, facts, parameters, cohort, config.phase_timeout_s, without, clock)
        try:
            secure.agree()
        except SecureAggregationError:
            secure.end()
            raise
        return secure

    def _identities(self, client_ids: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The participants' public keys, and the clients that have none with the reason."""
        root_secret = load_or_create_root_secret(self._store.home)
        remote = {client.client_id: client for client in self._store.clients.remote(client_ids)}
        keys = {c: identity_key_of(remote[c]) for c in remote}
        virtual = {c: public_hex(identity_of(root_secret, c)) for c in client_ids if c not in remote}
        known = {c: key for c, key in keys.items() if key is not None}
        return virtual | known, dict.fromkeys(keys.keys() - known.keys(), NO_IDENTITY)


@dataclass(slots=True)
class _Silence:
    """Clients that gave no valid answer to a phase, with the reason."""

    phase: Phase
    reasons: dict[str, str]


class SecureRound:
    """One session, from the keys to the sum.

    Attributes:
        cohort: after :meth:`agree`, the clients that may send a masked vector, with their requests.
        dropped: clients that are out of the session and contribute nothing, with the reason.
        silent: by phase, clients whose vectors are in the sum and that did not answer afterwards.
    """

    def __init__(
        self,
        fleet: FleetPort,
        session: SecureSession,
        parameters: Parameters,
        cohort: Cohort,
        timeout_s: float,
        dropped: Mapping[str, str],
        clock: ClockPort,
    ) -> None:
        self._fleet, self._session, self._timeout_s = fleet, session, timeout_s
        self._server = SecureServer(parameters, public_keys(session.identities))
        self.cohort, self.dropped = cohort, dict(dropped)
        self.silent: dict[str, dict[str, str]] = {}
        self._clock, self._phase_began_s, self._lost = clock, clock.monotonic(), 0

    def agree(self) -> None:
        """The phases ``advertise`` and ``share``.

        Raises:
            SecureAggregationError: too few clients answered.
        """
        for _ in (Phase.ADVERTISE, Phase.SHARE):
            self.dropped |= self._exchange().reasons
        requests = self._server.requests()
        remaining = tuple(c for c in self.cohort.client_ids if c in requests)
        self.cohort = replace(self.cohort, client_ids=remaining, secure=requests)

    def reveal(self, updates: RoundUpdates) -> RoundUpdates:
        """The phases ``confirm`` and ``unmask``: the round's updates with one sum that has no masks, and all dropouts.

        Raises:
            SecureAggregationError: too few clients sent a vector, or helped to take the masks off.
        """
        failures: list[DecodedUpdate] = [ClientFailures.of(updates.round_index, [c], r) for c, r in self._dropouts()]
        sums = [answer for answer in updates.answers if isinstance(answer, RingSum)]
        failures += [answer for answer in updates.answers if not isinstance(answer, RingSum)]
        for message in sums:
            contributors = [o.client_id for o in message.outcomes if o.error is None]
            if contributors:
                self._server.receive_masked(contributors, message.vector)
        self._advance()
        for _ in (Phase.CONFIRM, Phase.UNMASK):
            silence = self._exchange()
            self.silent[silence.phase.value] = silence.reasons
        outcomes = tuple(o for message in sums for o in message.outcomes)
        weight = sum(message.total_weight for message in sums)
        total = RingSum(updates.round_index, outcomes, self._server.total(), weight, self._session.task.attempt)
        return replace(updates, answers=(*failures, total))

    def end(self) -> None:
        """The session is over, however it ended."""
        self._fleet.end_session(self._session)

    def _dropouts(self) -> list[tuple[str, str]]:
        return sorted(self.dropped.items())

    def _exchange(self) -> _Silence:
        """Send the present phase, take the answers, and go on to the next phase."""
        phase, requests = self._server.phase, self._server.requests()
        reasons = dict.fromkeys(requests, f"no answer to the phase {phase.value} in {self._timeout_s:g} s")
        for answer in self._fleet.exchange(self._session, phase.value, requests, timeout_s=self._timeout_s):
            if answer is None or answer.client_id not in requests:
                continue
            if answer.error is not None:
                reasons[answer.client_id] = f"in the phase {phase.value}: {answer.error}"
                continue
            try:
                self._server.receive(answer.client_id, answer.content)
                reasons.pop(answer.client_id, None)
            except UpdateRejectedError as error:
                reasons[answer.client_id] = error.message
        self._advance()
        if reasons:
            first = min(reasons)
            _LOG.warning("phase %s: %d clients are out; %s: %s", phase.value, len(reasons), first, reasons[first])
        return _Silence(phase, reasons)

    def _advance(self) -> None:
        phase, began_s = self._server.phase, self._phase_began_s
        try:
            self._server.advance()
        finally:
            self._phase_began_s, before = self._clock.monotonic(), self._lost
            self._lost = len(self._server.dropped)
            METRICS.phase_ended(phase.value, self._phase_began_s - began_s, self._lost - before)


def _session_id(task: TrainTask) -> str:
    facts = [task.run_id, task.round_index, task.attempt, secrets.token_hex(32)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
