"""The one door at the aggregator: who may answer at all, and what becomes of an answer that must not count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from fedvit.aggregation.validation import UpdateValidator
from fedvit.errors import UpdateRejectedError
from fedvit.metrics.metrics import counter
from fedvit.store.store import Store
from fedvit.types import ClientOutcome, PartialUpdate, utc_now

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

    def expect(self, admitted: Iterable[PartialUpdate]) -> None:
        """Read who was asked; and these have passed in an earlier round and are in this one's buffer."""
        self._awaited(self.round_index)
        self._seen.update(outcome.client_id for answer in admitted for outcome in answer.outcomes)

    def admit(self, message: PartialUpdate) -> list[PartialUpdate]:
        """What of a message may go into the buffer: nothing, itself, its parts, or outcomes that say what was wrong."""
        passed = (self._admit_one(answer) for answer in message.parts or (message,))
        return [answer for answer in passed if answer is not None]

    def _admit_one(self, answer: PartialUpdate) -> PartialUpdate | None:
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
        answer = replace(answer, outcomes=tuple(outcomes))
        if strangers:
            return _refused(answer, f"its update is summed with that of {strangers[0]}, which may not answer", False)
        try:
            answer = self.validator.opened(answer)
        except UpdateRejectedError as error:
            return _refused(answer, f"its update is refused: {error.message}", True)
        outcomes = list(answer.outcomes)
        _count_bytes(outcomes)
        fault = self.validator.fault_of(answer)
        if fault is None:
            return answer if any(o.error is None for o in outcomes) else _emptied(answer)
        # Of several, nobody knows whose fault it is: it is held against none of them.
        return _refused(answer, f"its update is refused: {fault}", sum(o.error is None for o in outcomes) == 1)

    def _stranger(self, client_id: str, started: int) -> str | None:
        if started > self.round_index:
            return f"it answers round {started}, which has not begun"
        awaited, answered = self._awaited(started)
        if client_id in self._seen or client_id in answered:
            return f"it has answered already; its answer to round {started} changes nothing"
        return None if client_id in awaited else f"it was not asked in round {started}"

    def _awaited(self, started: int) -> tuple[set[str], set[str]]:
        if started not in self._asked:
            self._asked[started] = self.store.awaited(self.run_id, started, self.round_index)
        return self._asked[started]


def _refused(answer: PartialUpdate, reason: str, guilty: bool) -> PartialUpdate:
    outcomes = tuple(o if o.error else replace(o, error=reason, refused=guilty) for o in answer.outcomes)
    return _emptied(replace(answer, outcomes=outcomes))


def _emptied(answer: PartialUpdate) -> PartialUpdate:
    return replace(answer, weighted_sum={}, total_weight=0.0, within_clip=0, content=None)


def _count_bytes(outcomes: Iterable[ClientOutcome]) -> None:
    for outcome in outcomes:
        if outcome.sent_bytes is not None:
            _BYTES.labels(str(outcome.encoding)).inc(outcome.sent_bytes)


def count_refusals(
    store: Store, run_id: str, round_index: int, outcomes: Iterable[ClientOutcome], quarantine_after: int | None
) -> list[str]:
    """Count what was refused of each client, once a round however often it is tried; who comes into quarantine.

    The count begins anew with the quarantine, so that a client that is reinstated is given another chance.
    """
    caught = []
    for outcome in outcomes:
        if not outcome.refused:
            continue
        count = _counted(store, run_id, round_index, outcome.client_id)
        if quarantine_after is not None and count >= quarantine_after:
            reason = (
                f"{count} of its updates were refused; the last in round {round_index} of {run_id}: {outcome.error}"
            )
            caught += store.quarantine_clients([outcome.client_id], reason, utc_now())
            store.set_meta(_KEY + outcome.client_id, {"count": 0, "last": [run_id, round_index]})
    return caught


def _counted(store: Store, run_id: str, round_index: int, client_id: str) -> int:
    def change(found: dict[str, object] | None) -> dict[str, object]:
        before = found or {"count": 0, "last": None}
        if before["last"] == [run_id, round_index]:
            return before
        return {"count": int(str(before["count"])) + 1, "last": [run_id, round_index]}

    return int(store.change_meta(_KEY + client_id, change)["count"])
