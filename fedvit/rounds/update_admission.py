"""The one door at the aggregator: who may answer at all, and what becomes of an answer that must not count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedvit.aggregation.validation import UpdateValidator
from fedvit.errors import UpdateRejectedError
from fedvit.metrics.exposition import counter
from fedvit.store.store import Store
from fedvit.types import ClientOutcome, utc_now
from fedvit.updates import ClientFailures, DecodedUpdate, EncodedUpdate, SingleMessage, UpdateBundle, UpdateMessage

_KEY = "refused_updates/"
# One a process, however many rounds there are.
_BYTES = counter("update_bytes_total")


@dataclass(slots=True)
class UpdateAdmission:
    """Passes every answer of one round, once.

    An outcome belongs to one client and one round, so a second upload changes nothing: it is turned away, as is whoever
    was not asked. An answer with such a client in it and others beside him is refused: a sum cannot be taken apart.

    Attributes:
        rejected_answers: why, by client.
    """

    validator: UpdateValidator
    store: Store
    run_id: str
    round_index: int
    rejected_answers: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _asked: dict[int, tuple[set[str], set[str]]] = field(default_factory=dict)

    def expect(self, admitted: Iterable[DecodedUpdate]) -> None:
        """Read who was asked; and these have passed in an earlier round and are in this one's buffer."""
        self._awaited(self.round_index)
        self._seen.update(outcome.client_id for answer in admitted for outcome in answer.outcomes)

    def admit(self, message: UpdateMessage) -> list[DecodedUpdate]:
        """What of a message may go into the buffer: nothing, itself, its parts, or outcomes that say what was wrong."""
        passed = (self._admit_one(answer) for answer in _parts(message))
        return [answer for answer in passed if answer is not None]

    def _admit_one(self, answer: SingleMessage) -> DecodedUpdate | None:
        outcomes, strangers = [], []
        for outcome in answer.outcomes:
            fault = self._stranger(outcome.client_id, answer.round_index)
            if fault is None:
                outcomes.append(outcome)
                self._seen.add(outcome.client_id)
            else:
                strangers.append(outcome.client_id)
                self.rejected_answers[outcome.client_id] = fault
        if not outcomes:
            return None
        if strangers:
            reason = f"its update is summed with that of {strangers[0]}, which may not answer"
            return _refused(answer.round_index, outcomes, reason, False)
        try:
            decoded = self.validator.decoded(answer) if isinstance(answer, EncodedUpdate) else answer
        except UpdateRejectedError as error:
            return _refused(answer.round_index, outcomes, f"its update is refused: {error.message}", True)
        outcomes = list(decoded.outcomes)
        _count_bytes(outcomes)
        contributors = sum(outcome.error is None for outcome in outcomes)
        if isinstance(decoded, ClientFailures) or not contributors:
            return ClientFailures(decoded.round_index, decoded.outcomes)
        fault = self.validator.fault_of(decoded)
        if fault is None:
            return decoded
        # Of several, nobody knows whose fault it is: it is held against none of them.
        return _refused(decoded.round_index, outcomes, f"its update is refused: {fault}", contributors == 1)

    def _stranger(self, client_id: str, started: int) -> str | None:
        if started > self.round_index:
            return f"it answers round {started}, which has not begun"
        awaited, answered = self._awaited(started)
        if client_id in self._seen or client_id in answered:
            return f"it has answered already; its answer to round {started} changes nothing"
        return None if client_id in awaited else f"it was not asked in round {started}"

    def _awaited(self, started: int) -> tuple[set[str], set[str]]:
        if started not in self._asked:
            self._asked[started] = self.store.rounds.awaited(self.run_id, started, self.round_index)
        return self._asked[started]


def _parts(message: UpdateMessage) -> tuple[SingleMessage, ...]:
    return message.parts if isinstance(message, UpdateBundle) else (message,)


def _refused(round_index: int, outcomes: Iterable[ClientOutcome], reason: str, guilty: bool) -> ClientFailures:
    failed = tuple(o if o.error else replace(o, error=reason, refused=guilty) for o in outcomes)
    return ClientFailures(round_index, failed)


def _count_bytes(outcomes: Iterable[ClientOutcome]) -> None:
    for outcome in outcomes:
        if outcome.sent_bytes is not None:
            _BYTES.labels(str(outcome.encoding)).inc(outcome.sent_bytes)


def count_refusals(
    store: Store,
    run_id: str,
    round_index: int,
    outcomes: Iterable[ClientOutcome],
    quarantine_after_rejections: int | None,
) -> list[str]:
    """Count what was refused of each client, once a round however often it is tried; who comes into quarantine.

    The count begins anew with the quarantine, so that a client that is reinstated is given another chance.
    """
    caught = []
    for outcome in outcomes:
        if not outcome.refused:
            continue
        count = _counted(store, run_id, round_index, outcome.client_id)
        if quarantine_after_rejections is not None and count >= quarantine_after_rejections:
            reason = (
                f"{count} of its updates were refused; the last in round {round_index} of {run_id}: {outcome.error}"
            )
            caught += store.clients.quarantine([outcome.client_id], reason, utc_now())
            store.metadata.set(_KEY + outcome.client_id, {"count": 0, "last": [run_id, round_index]})
    return caught


def _counted(store: Store, run_id: str, round_index: int, client_id: str) -> int:
    with store.transaction() as transaction:
        counted = transaction.metadata.get(_KEY + client_id) or {"count": 0, "last": None}
        count = int(counted["count"])
        if counted["last"] != [run_id, round_index]:
            count += 1
            transaction.metadata.set(_KEY + client_id, {"count": count, "last": [run_id, round_index]})
        return count
