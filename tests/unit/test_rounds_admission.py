"""Admission of updates to a round: what is accepted, what is rejected and why, and when the round is complete."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from fedvit.aggregation.registry import create_rule
from fedvit.aggregation.staleness import staleness_weight
from fedvit.aggregation.validation import UpdateValidator
from fedvit.config import TrainingConfig
from fedvit.rounds.update_admission import AdmissionPolicy, RejectionCode, RoundUpdates, UpdateAdmission
from fedvit.types import ClientOutcome
from fedvit.updates import ClientFailures, ClientUpdate, PartialSum, UpdateBundle, UpdateMessage


def policy(tolerance: int = 5, quarantined: str = "", enough: int | None = None) -> AdmissionPolicy:
    return AdmissionPolicy("asynchronous", tolerance, frozenset(quarantined), enough)


def admission(round_index: int, in_force: AdmissionPolicy | None = None, size: int = 1) -> UpdateAdmission:
    """Clients are asked by one letter; e has answered already."""
    validator = UpdateValidator({"w": (size,)}, by_examples=True, single=False)
    return UpdateAdmission(round_index, in_force or policy(), validator, lambda _: (set("abcd"), set("e")))


def partial(names: str, started: int, move: float) -> PartialSum:
    """Clients of one example each, summed."""
    total = float(len(names))
    return PartialSum(started, tuple(ClientOutcome(n, 1) for n in names), {"w": np.array([total * move])}, total)


def single(name: str, started: int = 1, move: float = 1.0) -> ClientUpdate:
    return ClientUpdate(started, ClientOutcome(name, 1), {"w": np.array([move])}, 1.0)


def taken(messages: list[UpdateMessage], round_index: int, in_force: AdmissionPolicy | None = None) -> RoundUpdates:
    open_round = admission(round_index, in_force)
    for message in messages:
        open_round.admit(message)
    updates, left = open_round.close(room=None)
    assert left == []
    return updates


def test_staleness_weights_by_hand() -> None:
    assert staleness_weight(0) == 1.0
    assert [staleness_weight(s) for s in (1, 3, 8)] == pytest.approx([0.70710678, 0.5, 1 / 3])
    # Fresh: a, b move by 4. Three versions late: c moves by 12, at half weight. Mean over three: (4 + 4 + 6) / 3.
    updates = taken([partial("ab", 4, 4.0), partial("c", 1, 12.0)], 4)
    folded = create_rule(TrainingConfig()).fold({"w": np.array([1.0], dtype=np.float32)}, updates.updates(), {})
    np.testing.assert_allclose(folded.weights["w"], [1 + 14 / 3], rtol=1e-6)
    assert [(o.client_id, o.staleness) for o in updates.outcomes] == [("a", 0), ("b", 0), ("c", 3)]


def test_the_order_of_arrival_changes_no_bit() -> None:
    draw = np.random.default_rng(0)
    base = {"w": np.zeros(50, dtype=np.float32)}
    answers = [
        ClientUpdate(9 - i, ClientOutcome("abcd"[i], 3), {"w": draw.normal(size=50) * 10.0**i}, 3.0) for i in range(4)
    ]
    folds = set()
    for seed in range(20):
        random.Random(seed).shuffle(answers)
        open_round = admission(9, size=50)
        for answer in answers:
            assert open_round.admit(answer) == ()
        updates, _ = open_round.close(room=None)
        folds.add(create_rule(TrainingConfig()).fold(base, updates.updates(), {}).weights["w"].tobytes())
    assert len(folds) == 1


def test_a_stale_update_is_rejected_by_name_and_a_failure_keeps_its_own_reason() -> None:
    late = partial("ab", 1, 4.0)
    late = replace(late, outcomes=(late.outcomes[0], ClientOutcome("b", 0, "no data")), total_weight=1.0)
    at_limit, beyond = taken([late], 6), taken([late], 7)
    assert (at_limit.accepted, at_limit.rejected) == (1, {})
    assert (beyond.accepted, beyond.rejected) == (0, {"a": "its update is 6 versions old; at most 5 are tolerated"})
    assert [o.error for o in beyond.outcomes] == [beyond.rejected["a"], "no data"]
    assert beyond.updates() == []


def test_a_sum_with_a_quarantined_client_in_it_is_rejected_as_a_whole() -> None:
    updates = taken([partial("ab", 3, 1.0), partial("cd", 3, 1.0)], 3, policy(quarantined="a"))
    assert updates.rejected == {
        "a": "an incident keeps it in quarantine",
        "b": "its update is summed with that of a, which is in quarantine",
    }
    assert [o.client_id for o in updates.outcomes if o.error is None] == ["c", "d"]
    assert updates.lineage()["clients"] == ["c", "d"]


@pytest.mark.parametrize(
    ("message", "codes", "counted"),
    [
        (single("a"), [], ""),
        (single("x"), [RejectionCode.UNEXPECTED_CLIENT], ""),
        (single("e"), [RejectionCode.ALREADY_ANSWERED], ""),
        (single("a", started=2), [RejectionCode.FUTURE_ROUND], ""),
        (single("a", started=-5), [RejectionCode.STALE_UPDATE], ""),
        (single("d"), [RejectionCode.QUARANTINED_CLIENT], ""),
        (single("a", move=np.nan), [RejectionCode.INVALID_UPDATE], "a"),
        (partial("ab", 1, np.nan), [RejectionCode.INVALID_UPDATE] * 2, ""),
        (partial("ax", 1, 1.0), [RejectionCode.UNEXPECTED_CLIENT, RejectionCode.SUMMED_WITH_REJECTED], ""),
        (partial("ad", 1, 1.0), [RejectionCode.SUMMED_WITH_REJECTED, RejectionCode.QUARANTINED_CLIENT], ""),
        (ClientFailures.of(1, "ab", "no data"), [], ""),
    ],
)
def test_each_rejection_has_its_code_and_only_an_own_invalid_update_counts_against_a_client(
    message: UpdateMessage, codes: list[RejectionCode], counted: str
) -> None:
    open_round = admission(1, policy(quarantined="d"))
    assert [rejection.code for rejection in open_round.admit(message)] == codes
    updates, _ = open_round.close(room=None)
    assert open_round.accepted == updates.accepted == (message == single("a"))
    assert [outcome.client_id for outcome in updates.outcomes if outcome.counted_against_client] == list(counted)


def test_a_norm_above_the_clipping_norm_is_rejected_and_looked_at_once() -> None:
    looked_at: list[int] = []
    validator = UpdateValidator({"w": (1,)}, by_examples=True, single=False)
    open_round = UpdateAdmission(
        3,
        policy(enough=1),
        validator,
        lambda _: (set("ab"), set()),
        fault_of=lambda update: looked_at.append(update.round_index) or "it is too long",
    )
    assert [rejection.code for rejection in open_round.admit(single("a", 3))] == [RejectionCode.NOT_CLIPPED]
    for tolerance in (1, 2, 3):
        open_round.apply(policy(tolerance, enough=1))
    assert (looked_at, open_round.complete) == ([3], False)


def test_a_policy_changed_while_the_round_waits_holds_for_what_arrived_before() -> None:
    open_round = admission(3, policy(enough=2))
    open_round.admit(UpdateBundle(3, (single("a", 1), single("b", 3))))
    assert (open_round.accepted, open_round.complete) == (2, True)
    open_round.apply(policy(tolerance=1, enough=2))
    assert (open_round.accepted, open_round.complete) == (1, False)
    open_round.apply(policy(quarantined="b", enough=1))
    assert (open_round.accepted, open_round.complete) == (1, True)
    updates, _ = open_round.close(room=None)
    assert updates.rejected == {"b": "an incident keeps it in quarantine"}


def test_answers_beyond_the_room_go_to_the_next_round_and_are_judged_by_its_policy() -> None:
    open_round = admission(3)
    open_round.admit(UpdateBundle(3, (single("a", 3), ClientFailures.of(3, "b", "no data"), single("c", 3))))
    updates, left = open_round.close(room=1)
    assert [outcome.client_id for outcome in updates.outcomes] == ["a", "b"]
    validator = UpdateValidator({"w": (1,)}, by_examples=True, single=False)
    following = UpdateAdmission(4, policy(), validator, lambda _: (set("abcd"), set()), carried_over=left)
    assert following.accepted == 1
    assert [rejection.code for rejection in following.admit(single("c", 4))] == [RejectionCode.ALREADY_ANSWERED]
    following.apply(policy(tolerance=0))
    assert following.accepted == 0
