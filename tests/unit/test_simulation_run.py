"""Whole runs in virtual time on a toy world: what asynchronous rounds and robust rules do, and every task recorded."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from toy_world import ToyWorld

from fedvit.config import Settings
from fedvit.rounds import execution
from fedvit.settings import load_settings
from fedvit.store.records import RoundCommit
from fedvit.tools.simulation.run import Simulated, simulate
from fedvit.types import RunStatus

UNIFORM = {"selection": "uniform", "size": 10}


def settings(home: Path, *, training: dict[str, Any] | None = None, **simulation: Any) -> Settings:
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {
                "rounds": 8,
                "local_steps": 2,
                "learning_rate": 0.05,
                "round_timeout_s": 1e6,
                "cohort": UNIFORM,
                **(training or {}),
            },
            "simulation": {"private": False, **simulation},
        },
    )


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> list[RoundCommit]:
    """What every round of a run committed."""
    seen: list[RoundCommit] = []
    real = execution.RoundCommit

    def noted(**facts: Any) -> RoundCommit:
        seen.append(real(**facts))
        return seen[-1]

    monkeypatch.setattr(execution, "RoundCommit", noted)
    return seen


def hours_to(run: Simulated, accuracy: float) -> float:
    result = run.hours_to(accuracy)
    assert result is not None, f"{run.name} came to {run.accuracy}"
    return result


# --- synchronous and asynchronous ------------------------------------------------------------------------------------

ASYNCHRONOUS: dict[str, Any] = {"mode": "asynchronous", "buffer_size": 2, "staleness_tolerance": 20}
FEDBUFF = {"aggregation": "fedbuff", "rounds": 60}


def test_asynchronous_rounds_are_several_times_as_fast_to_the_same_accuracy(tmp_path: Path) -> None:
    world, ratios = ToyWorld(), []
    for seed in range(3):
        slow = simulate(settings(tmp_path, seed=seed, training={"rounds": 20}, target_accuracy=0.87), world)
        fast = simulate(settings(tmp_path, training=FEDBUFF, seed=seed, target_accuracy=0.87, **ASYNCHRONOUS), world)
        ratios.append(hours_to(slow, 0.87) / hours_to(fast, 0.87))
    assert median(ratios) > 3


def test_an_asynchronous_buffer_is_exactly_k_updates_of_k_clients(tmp_path: Path, commits: list[RoundCommit]) -> None:
    run = simulate(
        settings(tmp_path, training={**FEDBUFF, "rounds": 25}, **(ASYNCHRONOUS | {"buffer_size": 3})), ToyWorld()
    )
    contributed = [[o.client_id for o in commit.outcomes if o.error is None] for commit in commits]
    assert [len(buffer) for buffer in contributed[:-1]] == [3] * 24
    assert all(len(set(buffer)) == len(buffer) for buffer in contributed)
    assert [point.updates for point in run.points[:-1]] == [3 * n for n in range(1, 25)]
    assert sum(late * count for late, count in run.staleness.items()) > 50


def test_beyond_the_tolerance_updates_are_refused_and_their_clients_begin_anew_from_a_newer_version(
    tmp_path: Path, commits: list[RoundCommit]
) -> None:
    world = ToyWorld(count=12)
    # Nobody drops out: every client with a task works.
    strict = ASYNCHRONOUS | {"staleness_tolerance": 1, "delays": {"dropout_prob": 0.0}}
    run = simulate(
        settings(tmp_path, training={**FEDBUFF, "rounds": 40, "cohort": {"selection": "all"}}, **strict), world
    )
    stale = [
        (o.client_id, n, o.staleness)
        for n, commit in enumerate(commits, 1)
        for o in commit.outcomes
        if "old" in str(o.error)
    ]
    assert len(stale) == run.outcomes["stale"] > 10
    assert {late for _, _, late in stale}.isdisjoint({0, 1})
    assert set(run.staleness) == {0, 1}
    begun: dict[str, list[int]] = {}
    for started, client_id in world.trained:
        begun.setdefault(client_id, []).append(started)
    for client_id, refused_in, late in stale:
        later = [started for started in begun[client_id] if started > refused_in - late]
        # It receives the version after the refusal at once; only the last rounds' are never heard of again.
        assert not later or min(later) == refused_in + 1


def test_every_task_is_told_once(tmp_path: Path, commits: list[RoundCommit]) -> None:
    faults = [{"share": 0.1, "kinds": ["nan"]}]
    training = {"aggregation": "fedbuff", "rounds": 20, "validation": {"quarantine_after_rejections": None}}
    run = simulate(
        settings(tmp_path, training=training, faults=faults, **(ASYNCHRONOUS | {"staleness_tolerance": 2})), ToyWorld()
    )
    outcomes = [o for commit in commits for o in commit.outcomes]
    assert min(run.outcomes[kind] for kind in ("accepted", "stale", "refused", "silent")) > 0
    assert run.outcomes["unused"] == run.outcomes["in_flight"] == run.outcomes["failed"] == 0
    assert sum(run.outcomes.values()) == len(outcomes)
    assert Counter(o.error is None for o in outcomes)[True] == run.outcomes["accepted"]
    assert sum(bool(o.counted_against_client) for o in outcomes) == run.outcomes["refused"]


# --- rounds in the field ---------------------------------------------------------------------------------------------


def test_over_selection_commits_with_the_first_and_gives_the_others_up(
    tmp_path: Path, commits: list[RoundCommit]
) -> None:
    cohort = {"selection": "uniform", "size": 8, "over_selection": 0.5}
    patient = simulate(settings(tmp_path, training={"cohort": {**cohort, "size": 12, "over_selection": 0}}), ToyWorld())
    commits.clear()
    world = ToyWorld()
    hasty = simulate(settings(tmp_path, training={"cohort": cohort}), world)
    assert hasty.status is RunStatus.COMPLETED
    for commit in commits:
        assert len(commit.outcomes) == 12
        accepted = [o for o in commit.outcomes if o.error is None]
        reasons = {o.error for o in commit.outcomes if o.error}
        assert len(accepted) == 8
        assert reasons <= {"it fell silent", "the round has as many updates as it wants"}
    assert len(world.trained) == 8 * 8
    assert hasty.points[-1].hours < 0.6 * patient.points[-1].hours


def test_a_deadline_ends_a_round_with_whoever_has_answered(tmp_path: Path, commits: list[RoundCommit]) -> None:
    run = simulate(settings(tmp_path, training={"round_deadline_s": 450.0}), ToyWorld())
    assert run.status is RunStatus.COMPLETED
    assert max(commit.duration_s for commit in commits) == 450.0
    late = [o.error for commit in commits for o in commit.outcomes if o.error]
    assert "no answer within the round's 450 s" in late
    assert run.outcomes["accepted"] + run.outcomes["given_up"] + run.outcomes["silent"] == 80


def test_nobody_is_late_for_a_deadline_that_comes_after_all(tmp_path: Path) -> None:
    calm = simulate(settings(tmp_path, training={"rounds": 3}), ToyWorld())
    same = simulate(settings(tmp_path, training={"rounds": 3, "round_deadline_s": 1e6}), ToyWorld())
    assert same.points == calm.points


# --- faulty clients --------------------------------------------------------------------------------------------------


def robust(tmp_path: Path, aggregation: str, *kinds: str, **options: Any) -> float:
    faults = [{"share": 0.2, "kinds": kinds}] if kinds else []
    training = {"aggregation": aggregation, "aggregation_options": options, "cohort": {"selection": "all"}}
    run = simulate(settings(tmp_path, training=training, faults=faults, delays={"dropout_prob": 0.0}), ToyWorld())
    assert run.status is RunStatus.COMPLETED
    assert run.accuracy is not None
    return run.accuracy


def test_a_fifth_lies_robust_rules_hold_and_the_mean_collapses(tmp_path: Path) -> None:
    attack = ("sign_flip", "scale")
    clean = robust(tmp_path, "fedavg")
    assert clean > 0.85
    assert robust(tmp_path, "multi_krum", *attack, num_byzantine=4) > clean - 0.02
    assert robust(tmp_path, "trimmed_mean", *attack, trim_fraction=0.2) > clean - 0.02
    assert robust(tmp_path, "geometric_median", *attack) > clean - 0.02
    assert robust(tmp_path, "fedavg", *attack) < clean - 0.3


# --- a run as a whole ------------------------------------------------------------------------------------------------


def test_equal_settings_give_equal_points_and_another_seed_others(tmp_path: Path) -> None:
    wish = settings(tmp_path, training=FEDBUFF | {"rounds": 10}, **ASYNCHRONOUS)
    first, again = simulate(wish, ToyWorld()), simulate(wish, ToyWorld())
    assert first.points == again.points
    other = simulate(settings(tmp_path, training=FEDBUFF | {"rounds": 10}, seed=1, **ASYNCHRONOUS), ToyWorld())
    assert other.points != first.points
    # Nothing of it is left where a real run would keep its state.
    assert list(tmp_path.iterdir()) == []


def test_it_ends_at_its_target_or_after_its_hours_and_looks_now_and_then(tmp_path: Path) -> None:
    good = simulate(settings(tmp_path, target_accuracy=0.8, training={"rounds": 50}), ToyWorld())
    assert good.status is RunStatus.STOPPED
    assert len(good.points) < 20
    short = simulate(settings(tmp_path, max_hours=2.0, evaluate_every_s=3600.0, training={"rounds": 50}), ToyWorld())
    assert short.status is RunStatus.STOPPED
    assert 2.0 <= short.points[-1].hours < 6.0
    seen = [point.hours for point in short.points if point.accuracy is not None]
    assert all(later - earlier >= 1.0 for earlier, later in pairwise(seen))


def test_a_private_run_is_charged_like_a_real_one_and_one_that_is_not_says_so(tmp_path: Path) -> None:
    open_run = simulate(settings(tmp_path, training={"rounds": 2}), ToyWorld())
    assert open_run.epsilon == math.inf
    private = load_settings(
        environ={},
        overrides={
            "home": tmp_path,
            "training": {"rounds": 2, "cohort": UNIFORM},
            "privacy": {"noise_multiplier": 4.0},
        },
    )
    assert 0 < simulate(private, ToyWorld()).epsilon < 8
