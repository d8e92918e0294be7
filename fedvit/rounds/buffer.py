"""What a round makes of the answers that came in: which count, with what weight, in what order. Pure.

An answer is late when it belongs to an earlier round's task. Its staleness is the number of versions committed since
the one it started from, and it is the difference to that one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType

from fedvit.aggregation.staleness import DEFAULT, discounted
from fedvit.config import StalenessConfig
from fedvit.types import ClientOutcome
from fedvit.updates import ClientFailures, ClientUpdate, DecodedUpdate, WeightedUpdate


@dataclass(frozen=True, slots=True)
class Admission:
    """What a round goes by when it judges an answer."""

    round_index: int
    mode: str
    staleness_tolerance: int
    quarantined: frozenset[str]
    fault_of: Callable[[WeightedUpdate], str | None] = lambda update: None
    """Why an update must not be folded, whoever sent it."""
    weighing: StalenessConfig = DEFAULT
    """What an old update counts."""

    def refusals(self, answer: DecodedUpdate) -> dict[str, str]:
        """Why each client's update in it must not count; empty where all of them do.

        A partial sum cannot be taken apart: what is refused of one client is refused of all that it was summed with.
        """
        contributors = [o.client_id for o in answer.outcomes if o.error is None]
        staleness = self.round_index - answer.round_index
        if staleness > self.staleness_tolerance:
            reason = f"its update is {staleness} versions old; at most {self.staleness_tolerance} are tolerated"
            return dict.fromkeys(contributors, reason)
        if staleness < 0:
            return dict.fromkeys(contributors, f"it answers round {answer.round_index}, which has not begun")
        kept_out = [client_id for client_id in contributors if client_id in self.quarantined]
        if not kept_out:
            fault = None if isinstance(answer, ClientFailures) else self.fault_of(answer)
            return dict.fromkeys(contributors, fault) if fault else {}
        summed = f"its update is summed with that of {kept_out[0]}, which is in quarantine"
        return dict.fromkeys(contributors, summed) | dict.fromkeys(kept_out, "an incident keeps it in quarantine")


@dataclass(frozen=True)
class RoundBuffer:
    """The answers of one round, judged. ``refused`` says by client why its update does not count.

    ``rejected_answers`` says it of those who have no outcome in this round: strangers, and who has answered already.
    """

    admission: Admission
    answers: tuple[DecodedUpdate, ...]
    refused: Mapping[str, str]
    rejected_answers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def outcomes(self) -> tuple[ClientOutcome, ...]:
        """How every client fared, by id."""
        return tuple(sorted((o for a in self.answers for o in a.outcomes), key=lambda o: o.client_id))

    @property
    def accepted(self) -> int:
        """How many clients' updates count."""
        return sum(outcome.error is None for outcome in self.outcomes)

    def lineage(self) -> dict[str, object]:
        """What a version is made of. A synchronous round without late answers has nothing to add to its clients."""
        staleness = {o.client_id: o.staleness for o in self.outcomes if o.error is None}
        made_of: dict[str, object] = {"clients": list(staleness)}
        refused = {o.client_id: str(o.error) for o in self.outcomes if o.refused}
        late = any(o.staleness for o in self.outcomes)
        if self.admission.mode == "asynchronous" or late or refused or self.rejected_answers:
            made_of["aggregation"] = {
                "mode": self.admission.mode,
                "staleness": staleness,
                "refused": {**self.refused, **refused},
                **({"rejected_answers": dict(self.rejected_answers)} if self.rejected_answers else {}),
            }
        sent = {o.client_id: {"bytes": o.sent_bytes, "encoding": o.encoding} for o in self.outcomes if o.sent_bytes}
        return made_of | ({"sent": sent} if sent else {})

    def updates(self) -> list[WeightedUpdate]:
        """What is folded, in a fixed order of summation: the result must not depend on who answered first."""
        updates = [answer for answer in self.answers if not isinstance(answer, ClientFailures)]
        ordered = sorted(updates, key=lambda update: min(o.client_id for o in update.outcomes))
        now, weighing = self.admission.round_index, self.admission.weighing
        return [discounted(update, now - update.round_index, weighing) for update in ordered]


def judged(
    answers: Iterable[DecodedUpdate], admission: Admission, rejected_answers: Mapping[str, str] = MappingProxyType({})
) -> RoundBuffer:
    """The buffer that these answers make; an answer that is refused keeps its outcomes and loses its sum."""
    kept, refused = [], dict[str, str]()
    for answer in answers:
        refusals = admission.refusals(answer)
        refused |= refusals
        kept.append(_with_staleness(_without(answer, refusals), admission.round_index - answer.round_index))
    return RoundBuffer(admission, tuple(kept), refused, rejected_answers)


def _without(answer: DecodedUpdate, refusals: Mapping[str, str]) -> DecodedUpdate:
    if not refusals:
        return answer
    outcomes = tuple(replace(o, error=refusals.get(o.client_id, o.error)) for o in answer.outcomes)
    return ClientFailures(answer.round_index, outcomes)


def _with_staleness(answer: DecodedUpdate, staleness: int) -> DecodedUpdate:
    if all(o.staleness == staleness for o in answer.outcomes):
        return answer
    outcomes = tuple(replace(o, staleness=staleness) for o in answer.outcomes)
    return with_outcomes(answer, outcomes)


def with_outcomes(answer: DecodedUpdate, outcomes: tuple[ClientOutcome, ...]) -> DecodedUpdate:
    """The same answer with other outcomes."""
    if isinstance(answer, ClientUpdate):
        (outcome,) = outcomes
        return replace(answer, outcome=outcome)
    return replace(answer, outcomes=outcomes)
