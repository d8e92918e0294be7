"""The round machine, driven by events alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedvit.rounds import machine as m
from fedvit.types import Cohort, RunStatus

COHORT = ("a", "b", "c")


def answer(effect: m.Effect, *, fail_charge_at: int | None = None, updates: int = 3) -> m.Event:
    """The event with which a well-meaning coordinator answers an effect."""
    match effect:
        case m.DrawCohort(round_index):
            return m.CohortDrawn(Cohort(round_index, COHORT))
        case m.ChargeRound(cohort):
            return m.ChargeRefused("no budget") if cohort.round_index == fail_charge_at else m.Charged()
        case m.TrainRound():
            return m.Trained(updates, len(COHORT) - updates)
        case m.CommitRound(round_index):
            return m.Committed(f"v{round_index}")
        case m.ReleaseVersion():
            return m.Released()
    raise AssertionError(effect)


def drive(
    plan: m.RunPlan,
    *,
    done: int = 0,
    unreleased: str | None = None,
    stop_after: int | None = None,
    fail_charge_at: int | None = None,
    updates: int = 3,
) -> list[m.Effect]:
    """All effects from start to rest."""
    state, effects = m.step(m.LoopState(plan), m.Started(done, unreleased))
    seen: list[m.Effect] = []
    while effects:
        (effect,) = effects
        seen.append(effect)
        if isinstance(effect, m.EndRun):
            break
        if isinstance(effect, m.TrainRound) and effect.cohort.round_index == stop_after:
            state, _ = m.step(state, m.StopRequested())
        state, effects = m.step(state, answer(effect, fail_charge_at=fail_charge_at, updates=updates))
    assert state.phase is m.Phase.RESTING
    return seen


def test_every_round_is_charged_before_it_is_trained_and_committed_after() -> None:
    effects = drive(m.RunPlan(rounds_total=2, min_clients=1, release_every_rounds=5))
    assert [type(e) for e in effects] == [
        *(m.DrawCohort, m.ChargeRound, m.TrainRound, m.CommitRound),
        *(m.DrawCohort, m.ChargeRound, m.TrainRound, m.CommitRound),
        m.ReleaseVersion,
        m.EndRun,
    ]
    assert effects[-1] == m.EndRun(RunStatus.COMPLETED, None)


def test_releases_come_every_so_many_rounds_and_at_the_end() -> None:
    effects = drive(m.RunPlan(rounds_total=5, min_clients=1, release_every_rounds=2))
    assert [e.version for e in effects if isinstance(e, m.ReleaseVersion)] == ["v2", "v4", "v5"]


def test_a_last_round_that_is_due_is_released_once() -> None:
    effects = drive(m.RunPlan(rounds_total=4, min_clients=1, release_every_rounds=2))
    assert [e.version for e in effects if isinstance(e, m.ReleaseVersion)] == ["v2", "v4"]


def test_a_stop_ends_after_the_round_under_way_and_releases_it() -> None:
    effects = drive(m.RunPlan(rounds_total=9, min_clients=1, release_every_rounds=5), stop_after=3)
    assert effects[-2] == m.ReleaseVersion("v3")
    assert isinstance(effects[-1], m.EndRun)
    assert effects[-1].status is RunStatus.STOPPED


def test_a_refused_charge_trains_nothing_and_releases_what_was_committed() -> None:
    effects = drive(m.RunPlan(rounds_total=9, min_clients=1, release_every_rounds=5), fail_charge_at=3)
    trained = [e.cohort.round_index for e in effects if isinstance(e, m.TrainRound)]
    assert trained == [1, 2]
    assert effects[-2] == m.ReleaseVersion("v2")
    assert effects[-1] == m.EndRun(RunStatus.BUDGET_EXHAUSTED, "no budget")


def test_a_restart_continues_after_the_last_committed_round() -> None:
    effects = drive(m.RunPlan(rounds_total=4, min_clients=1, release_every_rounds=9), done=2, unreleased="v2")
    assert effects[0] == m.DrawCohort(3)


def test_a_restart_after_the_last_commit_still_releases_it() -> None:
    effects = drive(m.RunPlan(rounds_total=4, min_clients=1, release_every_rounds=9), done=4, unreleased="v4")
    assert effects == [m.ReleaseVersion("v4"), m.EndRun(RunStatus.COMPLETED, None)]


def test_a_finished_run_rests_at_once() -> None:
    assert drive(m.RunPlan(4, 1, 9), done=4) == [m.EndRun(RunStatus.COMPLETED, None)]


@pytest.mark.parametrize(("min_clients", "updates"), [(4, 3), (1, 0)])
def test_too_few_clients_end_the_run_in_words(min_clients: int, updates: int) -> None:
    effects = drive(m.RunPlan(3, min_clients, 9), updates=updates)
    last = effects[-1]
    assert isinstance(last, m.EndRun)
    assert last.status is RunStatus.FAILED
    assert last.reason is not None
    assert f"at least {min_clients}" in last.reason
    assert not any(isinstance(e, m.CommitRound) for e in effects)


def test_a_failed_effect_ends_the_run_with_its_reason() -> None:
    state, _ = m.step(m.LoopState(m.RunPlan(3, 1, 9)), m.Started(0))
    state, effects = m.step(state, m.Failed("the disk is full"))
    assert effects == (m.EndRun(RunStatus.FAILED, "the disk is full"),)


def test_an_event_out_of_place_is_a_fault_of_the_program() -> None:
    with pytest.raises(m.ImpossibleEventError):
        m.step(m.LoopState(m.RunPlan(3, 1, 9)), m.Committed("v1"))


@given(total=st.integers(1, 12), every=st.integers(1, 13), done=st.integers(0, 12), crash=st.integers(1, 40))
def test_a_crash_at_any_effect_never_commits_a_round_twice(total: int, every: int, done: int, crash: int) -> None:
    done = min(done, total)
    plan = m.RunPlan(total, 1, every)
    committed = list(range(1, done + 1))
    state, effects = m.step(m.LoopState(plan), m.Started(done))
    for count in range(1000):
        (effect,) = effects
        if count == crash:
            state, effects = m.step(m.LoopState(plan), m.Started(len(committed)))
            continue
        if isinstance(effect, m.EndRun):
            break
        if isinstance(effect, m.CommitRound):
            committed.append(effect.round_index)
        state, effects = m.step(state, answer(effect))
    assert committed == list(range(1, total + 1))


def test_a_sampled_round_takes_place_whomever_it_drew_and_waits_for_all() -> None:
    state, _ = m.step(m.LoopState(m.RunPlan(2, min_clients=3, release_every_rounds=9, sampled=True)), m.Started(0))
    state, (charge,) = m.step(state, m.CohortDrawn(Cohort(1, ())))
    assert isinstance(charge, m.ChargeRound)
    state, (train,) = m.step(state, m.Charged())
    assert isinstance(train, m.TrainRound)
    assert train.wait_for_all
    state, (commit,) = m.step(state, m.Trained(0, 0))
    assert commit == m.CommitRound(1)


def test_a_run_that_nobody_may_take_part_in_any_more_ends_like_one_without_a_budget() -> None:
    state, _ = m.step(m.LoopState(m.RunPlan(9, 1, release_every_rounds=9)), m.Started(4, unreleased="v4"))
    state, effects = m.step(state, m.ChargeRefused("the cap is 2"))
    assert effects == (m.ReleaseVersion("v4"),)
    _, effects = m.step(state, m.Released())
    assert effects == (m.EndRun(RunStatus.BUDGET_EXHAUSTED, "the cap is 2"),)
