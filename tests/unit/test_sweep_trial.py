"""A trial at work, without Ray: it waits at its rungs, ends when nobody wants more of it, and keeps its worker warm."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from toy_world import ToyWorld

from fedvit.config import Settings
from fedvit.errors import ConfigError, ConflictError, DataError, StateError
from fedvit.settings import load_settings
from fedvit.tools.sweep.journal import Journal
from fedvit.tools.sweep.outcome import TrialOutcome
from fedvit.tools.sweep.space import TrialPlan, plan_sweep
from fedvit.tools.sweep.trial import RUNNING, SteppedTrial, WarmTrials, stopped_early

ROUNDS = 6
SECRET = bytes(range(32))


def settings_of(home: Path, **overrides: Any) -> Settings:
    tree: dict[str, Any] = {
        "home": home,
        "training": {"rounds": ROUNDS, "learning_rate": 0.5, "aggregation": "fedbuff"},
        "privacy": {"target_epsilon": 100.0},
        "simulation": {"mode": "asynchronous", "buffer_size": 5},
        "sweep": {"parameters": {"noise_multiplier": [1.0, 2.0]}, "first_rung": 2, "reduction_factor": 2},
    }
    return load_settings(environ={}, overrides={**tree, **overrides})


@pytest.fixture
def plans(tmp_path: Path) -> list[TrialPlan]:
    return plan_sweep(settings_of(tmp_path))


def test_a_trial_waits_at_its_rungs_and_tells_where_it_is(plans: list[TrialPlan]) -> None:
    world = ToyWorld()
    trial = SteppedTrial(plans[0], lambda: world, [2, 4], since_s=0.0)
    first = trial.advance()
    assert (first.status, first.rounds, list(first.rungs)) == (RUNNING, 2, ["2"])
    assert max(round_index for round_index, _ in world.trained) == 2
    assert trial.advance().rounds == 4
    last = trial.advance()
    assert (last.status, last.rounds, list(last.rungs)) == ("completed", ROUNDS, ["2", "4"])
    assert last.rungs["2"] == first.rungs["2"]
    assert last.epsilon is not None
    assert 0 < last.epsilon <= plans[0].epsilon
    assert last.score == pytest.approx(sum(point[2] for point in last.curve[-3:]) / 3)
    assert sum(last.staleness.values()) == last.outcomes["accepted"]
    assert TrialOutcome.from_json(json.loads(json.dumps(last.to_json()))).to_json() == json.loads(
        json.dumps(last.to_json())
    )


def test_repeated_it_comes_to_the_same(plans: list[TrialPlan]) -> None:
    runs = [SteppedTrial(plans[0], ToyWorld, [], since_s=0.0).advance() for _ in range(2)]
    assert (runs[0].curve, runs[0].epsilon, runs[0].hours) == (runs[1].curve, runs[1].epsilon, runs[1].hours)


def test_who_is_drawn_follows_from_the_secret_and_not_from_the_seed(tmp_path: Path) -> None:
    cohort = {"cohort": {"selection": "uniform", "size": 6}}
    training = {"rounds": 3, "learning_rate": 0.5, "aggregation": "fedbuff", **cohort}
    plan = plan_sweep(settings_of(tmp_path, training=training))[0]

    def trained(secret: bytes) -> list[tuple[int, str]]:
        world = ToyWorld()
        SteppedTrial(plan, lambda: world, [], since_s=0.0, root_secret=secret).advance()
        return world.trained

    assert trained(SECRET) == trained(SECRET)
    assert trained(SECRET) != trained(SECRET[::-1])


def test_an_abandoned_trial_does_no_further_round_and_its_worker_takes_the_next(plans: list[TrialPlan]) -> None:
    world, opened = ToyWorld(), []

    def open_world(plan: TrialPlan) -> ToyWorld:
        opened.append(plan.trial_id)
        return world

    worker = WarmTrials(open_world, SECRET)
    assert worker.begin(plans[0], [2])
    assert not worker.begin(plans[1], [2])
    early = stopped_early(worker.advance(plans[0].trial_id))
    assert (early.status, early.rounds, early.warm) == ("stopped_early", 2, False)
    # Of another trial: that has no effect here.
    worker.abandon(plans[1].trial_id)
    assert not worker.begin(plans[1], [2])
    worker.abandon(plans[0].trial_id)
    while not worker.begin(plans[1], []):
        threading.Event().wait(0.005)
    assert max(round_index for round_index, _ in world.trained) == 2
    second = worker.advance(plans[1].trial_id)
    assert (second.status, second.warm) == ("completed", True)
    assert second.startup_s < second.startup_s + second.seconds
    assert opened == [plans[0].trial_id]


def test_worlds_are_kept_by_data_and_model(tmp_path: Path) -> None:
    changes = {"training": {"rounds": 1}, "simulation": {"private": False}}
    sweep = {"parameters": {"trainable": ["head", "biases", "all"]}}
    plans = plan_sweep(settings_of(tmp_path, sweep=sweep, **changes))
    opened: list[str] = []

    def open_world(plan: TrialPlan) -> ToyWorld:
        opened.append(plan.settings.model.trainable)
        return ToyWorld()

    worker = WarmTrials(open_world, SECRET, most_worlds=2)
    for index in (0, 1, 0, 2, 0, 1):
        while not worker.begin(plans[index], []):
            threading.Event().wait(0.005)
        assert worker.advance(plans[index].trial_id).status == "completed"
    assert opened == ["head", "biases", "all", "biases"]


def test_a_trial_that_is_not_continued_ends_by_itself(plans: list[TrialPlan]) -> None:
    world = ToyWorld()
    trial = SteppedTrial(plans[0], lambda: world, [2], since_s=0.0, abandoned_after_s=0.05)
    trial.advance()
    while not trial.over:
        threading.Event().wait(0.005)
    assert max(round_index for round_index, _ in world.trained) == 2


def test_a_fault_of_a_trial_is_its_outcome(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, training={"rounds": 3, "aggregation": "no-such-rule"})
    result = SteppedTrial(plan_sweep(settings)[0], ToyWorld, [], since_s=0.0).advance()
    assert result.status == "failed"
    assert "no-such-rule" in str(result.reason)
    assert result.score is None


@pytest.mark.parametrize("error", [DataError("no images"), ZeroDivisionError("of all things"), SystemExit(3)])
def test_data_or_a_plugin_that_fails_is_the_outcome_of_its_trial_alone(
    plans: list[TrialPlan], error: BaseException
) -> None:
    def open_world(plan: TrialPlan) -> ToyWorld:
        if plan is plans[0]:
            raise error
        return ToyWorld()

    worker = WarmTrials(open_world, SECRET)
    assert worker.begin(plans[0], [2])
    failed = worker.advance(plans[0].trial_id)
    assert failed.status == "failed"
    assert str(error) in str(failed.reason)
    while not worker.begin(plans[1], []):
        threading.Event().wait(0.005)
    assert worker.advance(plans[1].trial_id).status == "completed"


def test_a_failed_trial_is_shown_and_not_finished(tmp_path: Path, plans: list[TrialPlan]) -> None:
    journal = Journal(tmp_path / "sweep")
    with journal.working(settings_of(tmp_path)):
        journal.write(TrialOutcome(plans[0].trial_id, {"noise_multiplier": 1.0}, 0, "failed", reason="no images"))
        assert journal.finished(plans) == []
        assert [one.reason for one in journal.outcomes(plans)] == ["no images"]
        journal.write(TrialOutcome(plans[0].trial_id, {"noise_multiplier": 1.0}, 0, "completed"))
        assert [one.status for one in journal.finished(plans)] == ["completed"]


def test_a_budget_that_ends_a_trial_ends_it_with_a_score(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, privacy={"target_epsilon": 6.0, "noise_multiplier": 0.8})
    plan = TrialPlan("t", {}, settings)
    result = SteppedTrial(plan, ToyWorld, [], since_s=0.0).advance()
    assert result.status == "budget_exhausted"
    assert 0 < result.rounds < ROUNDS
    assert result.epsilon is not None
    assert result.epsilon <= 6


def test_the_journal_remembers_whole_trials_of_one_sweep(tmp_path: Path, plans: list[TrialPlan]) -> None:
    settings, journal = settings_of(tmp_path), Journal(tmp_path / "sweep")
    done = TrialOutcome(plans[1].trial_id, {"noise_multiplier": 2.0}, 0, "completed", score=0.5, standard_error=0.1)
    with journal.working(settings):
        assert journal.finished(plans) == []
        journal.write(done)
        with pytest.raises(StateError), journal.working(settings):
            pass
        secret = journal.secret()
    again = Journal(tmp_path / "sweep")
    assert again.secret() == secret
    with again.working(settings):
        assert [one.to_json() for one in again.finished(plans)] == [done.to_json()]
    other = settings_of(tmp_path, privacy={"target_epsilon": 50.0})
    with pytest.raises(ConflictError):
        again.check(other)
    (tmp_path / "sweep" / "trials" / f"{plans[0].trial_id}.json").write_text('{"trial_id": "half')
    with pytest.raises(StateError, match=f"{plans[0].trial_id}.json"):
        again.finished(plans)


def test_settings_are_changed_by_path_and_checked(tmp_path: Path) -> None:
    from fedvit.settings import changed_settings

    settings = settings_of(tmp_path)
    changed = changed_settings(settings, {"privacy.noise_multiplier": 3.0, "model.hybrid.width": 64})
    assert (changed.privacy.noise_multiplier, changed.model.hybrid.width) == (3.0, 64)
    assert settings.privacy.noise_multiplier is None
    with pytest.raises(ConfigError, match=r"'model.hybrid.heads'|must be a multiple"):
        changed_settings(settings, {"model.hybrid.heads": 7})
