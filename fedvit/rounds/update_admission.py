"""Admission of client updates to a round: each answer is judged once, when it arrives.

An answer is *rejected* with a reason code if its update must not count. The answer of an *unexpected client* (one that
was not asked, or has answered already) leaves no outcome in the round at all. An answer is late if it belongs to the
task of an earlier round; its staleness is the number of versions committed since the one it started from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Literal

from fedvit.aggregation.client_share import NO_LIMIT, ShareLimit
from fedvit.aggregation.staleness import DEFAULT, discounted
from fedvit.aggregation.validation import UpdateValidator
from fedvit.config import StalenessConfig
from fedvit.errors import UpdateRejectedError
from fedvit.metrics.exposition import counter
from fedvit.types import ClientOutcome
from fedvit.updates import (
    ClientFailures,
    ClientUpdate,
    DecodedUpdate,
    EncodedUpdate,
    SingleMessage,
    Summand,
    UpdateBundle,
    UpdateMessage,
)
from fedvit.wire.untrusted import MAX_REASON, errors_as_rejection

# One in the process, for all rounds.
_BYTES = counter("update_bytes_total")


class RejectionCode(StrEnum):
    """Why an update does not count."""

    UNEXPECTED_CLIENT = "unexpected_client"
    ALREADY_ANSWERED = "already_answered"
    FUTURE_ROUND = "future_round"
    SUMMED_WITH_REJECTED = "summed_with_rejected"
    """It cannot be taken out of the sum with an update that is rejected."""
    INVALID_UPDATE = "invalid_update"
    STALE_UPDATE = "stale_update"
    QUARANTINED_CLIENT = "quarantined_client"
    NOT_CLIPPED = "not_clipped"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why the update of a client does not count."""

    client_id: str
    code: RejectionCode
    reason: str


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """What may change while a round is under way.

    ``enough`` is the number of accepted updates that completes the round; None waits for all clients.
    """

    mode: Literal["synchronous", "asynchronous"]
    staleness_tolerance: int
    quarantined: frozenset[str] = frozenset()
    enough: int | None = None


@dataclass(slots=True)
class ValidAnswer:
    """An answer that passed validation, or failed by itself; ``rejections`` follow from the policy in force.

    ``fault`` says what is wrong with its norm, if anything is.
    """

    update: DecodedUpdate
    fault: str | None = None
    rejections: tuple[Rejection, ...] = ()

    @property
    def accepted(self) -> int:
        """How many clients' updates in it count."""
        return 0 if self.rejections else sum(o.error is None for o in self.update.outcomes)

    def judge(self, policy: AdmissionPolicy, round_index: int) -> None:
        """Bring the rejections in line with the policy. A sum cannot be taken apart: all its clients share a fate."""
        contributors = [o.client_id for o in self.update.outcomes if o.error is None]
        staleness = round_index - self.update.round_index
        quarantined = [client_id for client_id in contributors if client_id in policy.quarantined]
        code, reason = RejectionCode.NOT_CLIPPED, self.fault
        if staleness > policy.staleness_tolerance:
            tolerated = f"at most {policy.staleness_tolerance} are tolerated"
            code, reason = RejectionCode.STALE_UPDATE, f"its update is {staleness} versions old; {tolerated}"
        elif quarantined:
            code = RejectionCode.SUMMED_WITH_REJECTED
            reason = f"its update is summed with that of {quarantined[0]}, which is in quarantine"
        rejections = {c: Rejection(c, code, reason) for c in contributors} if reason else {}
        if code is RejectionCode.SUMMED_WITH_REJECTED:
            own = "an incident keeps it in quarantine"
            rejections |= {c: Rejection(c, RejectionCode.QUARANTINED_CLIENT, own) for c in quarantined}
        self.rejections = tuple(rejections.values())

    def outcome(self, round_index: int) -> DecodedUpdate:
        """The answer as the round records it: its staleness in every outcome, and no arrays if it is rejected."""
        update, staleness = self.update, round_index - self.update.round_index
        reasons = {rejection.client_id: rejection.reason for rejection in self.rejections}
        own = update.outcomes
        if not reasons and all(outcome.staleness == staleness for outcome in own):
            return update
        outcomes = tuple(replace(o, error=reasons.get(o.client_id, o.error), staleness=staleness) for o in own)
        if reasons or isinstance(update, ClientFailures):
            return ClientFailures(update.round_index, outcomes)
        if isinstance(update, ClientUpdate):
            return replace(update, outcome=outcomes[0])
        return replace(update, outcomes=outcomes)


@dataclass(frozen=True)
class RoundUpdates:
    """The answers that a round is made of.

    ``rejected`` says by client why its update does not count, apart from updates that failed validation;
    ``unexpected`` why an answer left no outcome. ``share`` limits the influence of one client; weights are by examples
    where ``by_examples`` is set.
    """

    round_index: int
    mode: Literal["synchronous", "asynchronous"]
    answers: tuple[DecodedUpdate, ...]
    rejected: dict[str, str] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)
    staleness: StalenessConfig = DEFAULT
    share: ShareLimit = NO_LIMIT
    by_examples: bool = True

    @property
    def least_divisor(self) -> float:
        """The smallest divisor of the average with which no client's share is too large."""
        accepted = (outcome for outcome in self.outcomes if outcome.error is None)
        return self.share.least_divisor(
            self.share.weight_of(o.num_examples) if self.by_examples else 1 for o in accepted
        )

    @cached_property
    def outcomes(self) -> tuple[ClientOutcome, ...]:
        """The outcome of every client, by id."""
        return tuple(sorted((o for answer in self.answers for o in answer.outcomes), key=lambda o: o.client_id))

    @property
    def accepted(self) -> int:
        """How many clients' updates count."""
        return sum(outcome.error is None for outcome in self.outcomes)

    def updates(self) -> list[Summand]:
        """What is folded, discounted for its staleness, in an order that does not depend on the order of arrival."""
        updates = [answer for answer in self.answers if not isinstance(answer, ClientFailures)]
        updates.sort(key=lambda update: min(o.client_id for o in update.outcomes))
        return [discounted(update, self.round_index - update.round_index, self.staleness) for update in updates]

    def lineage(self) -> dict[str, object]:
        """The clients of the version, and how they were aggregated if the round was not an ordinary synchronous one."""
        staleness = {o.client_id: o.staleness for o in self.outcomes if o.error is None}
        lineage: dict[str, object] = {"clients": list(staleness)}
        invalid = {o.client_id: str(o.error) for o in self.outcomes if o.counted_against_client}
        late = any(o.staleness for o in self.outcomes)
        if self.mode == "asynchronous" or late or invalid or self.unexpected:
            lineage["aggregation"] = {
                "mode": self.mode,
                "staleness": staleness,
                "refused": {**self.rejected, **invalid},
                **({"unexpected": self.unexpected} if self.unexpected else {}),
            }
        sent = {o.client_id: {"bytes": o.sent_bytes, "encoding": o.encoding} for o in self.outcomes if o.sent_bytes}
        return lineage | ({"sent": sent} if sent else {})


class UpdateAdmission:
    """Takes the messages of one round and says when the round is complete.

    An outcome belongs to one client and one round: a second answer changes nothing. A message in which an unexpected
    client is summed with others is rejected, since a sum cannot be taken apart.

    Args:
        awaited: by the round that a task belongs to, the clients whose answers this round may take, and those that have
            answered already.
        fault_of: why an update that passed validation must not be folded; see
            :meth:`fedvit.rounds.protection.Protection.fault_of`.
        observe: clips a valid single update, and adds statistics to its outcome, whatever its client says of itself.
        carried_over: answers that an earlier round had no room for.
        staleness: the weights of late updates.
        share: the limit on the influence of one client.
    """

    def __init__(
        self,
        round_index: int,
        policy: AdmissionPolicy,
        validator: UpdateValidator,
        awaited: Callable[[int], tuple[Collection[str], Collection[str]]],
        *,
        fault_of: Callable[[Summand], str | None] = lambda update: None,
        observe: Callable[[ClientUpdate], ClientUpdate] = lambda update: update,
        carried_over: Iterable[ValidAnswer] = (),
        staleness: StalenessConfig = DEFAULT,
        share: ShareLimit = NO_LIMIT,
    ) -> None:
        self._round_index, self._policy, self._validator = round_index, policy, validator
        self._find_awaited, self._fault_of, self._staleness = awaited, fault_of, staleness
        self._observe, self._share = observe, share
        self._awaited = {round_index: awaited(round_index)}
        self._answers = list(carried_over)
        self._answered = {o.client_id for answer in self._answers for o in answer.update.outcomes}
        self._unexpected: dict[str, Rejection] = {}
        self.accepted = self._judge_all()

    @property
    def complete(self) -> bool:
        """Whether enough updates are accepted."""
        return self._policy.enough is not None and self.accepted >= self._policy.enough

    def apply(self, policy: AdmissionPolicy) -> None:
        """Put a policy in force; what arrived before is judged again only if the policy is another one."""
        if policy != self._policy:
            self._policy = policy
            self.accepted = self._judge_all()

    def admit(self, message: UpdateMessage) -> tuple[Rejection, ...]:
        """Take a message; the rejections of those clients in it whose updates do not count."""
        parts = message.parts if isinstance(message, UpdateBundle) else (message,)
        return tuple(rejection for part in parts for rejection in self._admit_part(part))

    def close(self, room: int | None) -> tuple[RoundUpdates, list[ValidAnswer]]:
        """The updates of the round, and the answers that go to the next one.

        Args:
            room: how many answers that count the round may take, in the order of their arrival; None: all.
        """
        counting = [answer for answer in self._answers if answer.accepted]
        left = [] if room is None else counting[room:]
        taken = [answer for answer in self._answers if all(answer is not other for other in left)]
        rejected = {rejection.client_id: rejection.reason for answer in taken for rejection in answer.rejections}
        unexpected = {client_id: rejection.reason for client_id, rejection in self._unexpected.items()}
        answers = tuple(answer.outcome(self._round_index) for answer in taken)
        mode = self._policy.mode
        share, by_examples = self._share, self._validator.by_examples
        return RoundUpdates(
            self._round_index, mode, answers, rejected, unexpected, self._staleness, share, by_examples
        ), left

    def _judge_all(self) -> int:
        for answer in self._answers:
            answer.judge(self._policy, self._round_index)
        return sum(answer.accepted for answer in self._answers)

    def _admit_part(self, part: SingleMessage) -> Iterable[Rejection]:
        checked = [(outcome, self._check_expected(outcome.client_id, part.round_index)) for outcome in part.outcomes]
        expected = tuple(outcome for outcome, rejection in checked if rejection is None)
        unexpected = {rejection.client_id: rejection for _, rejection in checked if rejection is not None}
        self._answered.update(outcome.client_id for outcome in expected)
        self._unexpected |= unexpected
        if not expected:
            return unexpected.values()
        if unexpected:
            reason = f"its update is summed with that of {next(iter(unexpected))}, which may not answer"
            answer, invalid = _rejected(part.round_index, expected, RejectionCode.SUMMED_WITH_REJECTED, reason)
        else:
            answer, invalid = self._validated(part)
        answer.judge(self._policy, self._round_index)
        self._answers.append(answer)
        self.accepted += answer.accepted
        return [*unexpected.values(), *invalid, *answer.rejections]

    def _check_expected(self, client_id: str, started: int) -> Rejection | None:
        if started > self._round_index:
            reason = f"it answers round {started}, which has not begun"
            return Rejection(client_id, RejectionCode.FUTURE_ROUND, reason)
        if started not in self._awaited:
            self._awaited[started] = self._find_awaited(started)
        awaited, answered = self._awaited[started]
        if client_id in self._answered or client_id in answered:
            reason = f"it has answered already; its answer to round {started} changes nothing"
            return Rejection(client_id, RejectionCode.ALREADY_ANSWERED, reason)
        if client_id in awaited:
            return None
        return Rejection(client_id, RejectionCode.UNEXPECTED_CLIENT, f"it was not asked in round {started}")

    def _validated(self, part: SingleMessage) -> tuple[ValidAnswer, list[Rejection]]:
        try:
            # A fault of the program rejects this update, too: the bytes of one client must not end the round.
            with errors_as_rejection(f"The update of {part.outcomes[0].client_id}"):
                return self._checked(part)
        except UpdateRejectedError as error:
            reason = f"its update is refused: {error.message}"
            return _rejected(part.round_index, part.outcomes, RejectionCode.INVALID_UPDATE, reason)

    def _checked(self, part: SingleMessage) -> tuple[ValidAnswer, list[Rejection]]:
        update = self._validator.decoded(part) if isinstance(part, EncodedUpdate) else part
        if isinstance(update, ClientUpdate):
            update = self._validator.limited(update)
        for outcome in update.outcomes:
            if outcome.sent_bytes is not None:
                _BYTES.labels(str(outcome.encoding)).inc(outcome.sent_bytes)
        if isinstance(update, ClientFailures) or all(outcome.error for outcome in update.outcomes):
            return ValidAnswer(ClientFailures(update.round_index, update.outcomes)), []
        fault = self._validator.fault_of(update)
        if fault is None and isinstance(update, ClientUpdate):
            fault, update = self._validator.shape_fault_of(update), self._observe(update)
        if fault is not None:
            reason = f"its update is refused: {fault}"
            return _rejected(update.round_index, update.outcomes, RejectionCode.INVALID_UPDATE, reason)
        return ValidAnswer(update, self._fault_of(update)), []


def _rejected(
    round_index: int, outcomes: tuple[ClientOutcome, ...], code: RejectionCode, reason: str
) -> tuple[ValidAnswer, list[Rejection]]:
    contributors, reason = [outcome.client_id for outcome in outcomes if outcome.error is None], reason[:MAX_REASON]
    # It is not known whose update in a sum is invalid: it is counted against none of the clients.
    counted = code is RejectionCode.INVALID_UPDATE and len(contributors) == 1
    failed = tuple(o if o.error else replace(o, error=reason, counted_against_client=counted) for o in outcomes)
    rejections = [Rejection(client_id, code, reason) for client_id in contributors]
    return ValidAnswer(ClientFailures(round_index, failed)), rejections
