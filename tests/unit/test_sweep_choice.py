"""Who goes on, who is worth considering and who is taken, although every score is noisy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedvit.settings import load_settings
from fedvit.tools.sweep.cost import cost_sentences, sweep_cost
from fedvit.tools.sweep.halving import Halving, Score, score_of
from fedvit.tools.sweep.outcome import Configuration, TrialOutcome, choose, configurations, pareto_front
from fedvit.tools.sweep.space import plan_sweep


def test_a_score_knows_the_noise_of_its_images_and_of_its_rounds() -> None:
    steady = score_of([0.1, 0.8, 0.8, 0.8], num_test=400, window=3)
    assert steady.value == pytest.approx(0.8)
    assert steady.error == pytest.approx(math.sqrt(0.8 * 0.2 / 400))
    shaky = score_of([0.9, 0.7, 0.8], num_test=400, window=3)
    assert shaky.value == pytest.approx(0.8)
    assert shaky.error == pytest.approx(math.sqrt(0.8 * 0.2 / 400 + 0.01 / 3))
    with pytest.raises(ValueError):
        score_of([], num_test=400, window=3)


def test_among_equals_the_clearly_worse_stop() -> None:
    halving = Halving(reduction_factor=2, margin=1.0)
    assert halving.goes_on("first", 5, 4.0, Score(0.5, 0.01))
    assert halving.goes_on("better", 5, 4.0, Score(0.9, 0.01))
    # The better half of three are two.
    assert halving.goes_on("second", 5, 4.0, Score(0.6, 0.01))
    assert not halving.goes_on("worse", 5, 4.0, Score(0.55, 0.01))
    assert halving.goes_on("as good", 5, 4.0, Score(0.9, 0.01))


def test_what_noise_may_have_done_stops_nobody() -> None:
    for error, goes_on in ((0.01, False), (0.05, True)):
        halving = Halving(reduction_factor=2, margin=1.0)
        halving.record("a", 5, 4.0, Score(0.85, error))
        halving.record("b", 5, 4.0, Score(0.84, error))
        assert halving.goes_on("c", 5, 4.0, Score(0.80, error)) is goes_on


def test_a_private_trial_is_not_held_against_one_with_less_noise_but_the_other_way_round_it_is() -> None:
    halving = Halving(reduction_factor=2, margin=1.0)
    for i in range(4):
        halving.record(f"quiet-{i}", 5, 20.0, Score(0.95, 0.01))
    assert halving.goes_on("private", 5, 2.0, Score(0.6, 0.01))
    for i in range(5):
        halving.record(f"private-{i}", 5, 2.0, Score(0.9, 0.01))
    assert not halving.goes_on("loud and bad", 5, 20.0, Score(0.5, 0.01))


def test_rungs_are_compared_each_for_itself_and_hearing_twice_changes_nothing() -> None:
    halving = Halving(reduction_factor=2, margin=0.0)
    for _ in range(3):
        halving.record("good", 9, 4.0, Score(0.9, 0.0))
    assert halving.goes_on("young", 3, 4.0, Score(0.2, 0.0))
    assert not halving.goes_on("old", 9, 4.0, Score(0.2, 0.0))


def test_halving_keeps_the_best_of_many_noisy_trials() -> None:
    """With the noise of the scores known to it, a third or a little more goes on, and the truly best among them."""
    rng, halving, true = np.random.default_rng(1), Halving(3, 1.0), np.linspace(0.3, 0.9, 60)
    result = true + rng.normal(scale=0.02, size=60)
    order = rng.permutation(60)
    for i in order:
        halving.record(str(i), 5, 4.0, Score(float(result[i]), 0.02))
    kept = {i for i in order if halving.goes_on(str(i), 5, 4.0, Score(float(result[i]), 0.02))}
    assert set(range(45, 60)) <= kept
    assert len(kept) < 30


def outcome(trial_id: str, score: float, epsilon: float | None = 4.0, **more: object) -> TrialOutcome:
    facts = {"parameters": {"learning_rate": trial_id.split("-")[0]}, "seed": 0, "status": "completed", "hours": 2.0}
    return TrialOutcome(  # type: ignore[arg-type]
        trial_id=trial_id, score=score, standard_error=0.01, epsilon=epsilon, **{**facts, **more}
    )


def test_seeds_of_a_configuration_are_one_candidate_and_only_when_all_of_them_ended() -> None:
    result = configurations(
        [
            outcome("a-0", 0.8, epsilon=3.0),
            outcome("a-1", 0.6, epsilon=5.0, hours=4.0),
            outcome("b-0", 0.9),
            outcome("b-1", 0.9, status="stopped_early"),
        ]
    )
    assert [one.trial_ids for one in result] == [("a-0", "a-1")]
    assert result[0].score.value == pytest.approx(0.7)
    # Seeds that disagree say more than the images of either.
    assert result[0].score.error == pytest.approx(0.1)
    assert (result[0].epsilon, result[0].hours) == (5.0, 3.0)


def candidate(name: str, epsilon: float, score: float, hours: float, error: float = 0.01) -> Configuration:
    return Configuration((name,), {"name": name}, Score(score, error), epsilon, hours)


def test_the_front_has_what_nothing_betters_in_privacy_utility_and_time() -> None:
    results = [
        candidate("private", 2.0, 0.7, 5.0),
        candidate("accurate", 8.0, 0.9, 5.0),
        candidate("fast", 8.0, 0.8, 1.0),
        candidate("beaten", 8.0, 0.7, 5.0),
        candidate("twin", 8.0, 0.9, 5.0),
    ]
    assert [one.trial_ids[0] for one in pareto_front(results)] == ["private", "fast", "accurate", "twin"]


def test_of_those_that_cannot_be_told_from_the_best_the_most_private_is_taken_within_the_budget() -> None:
    results = [
        candidate("lucky", 8.0, 0.910, 5.0),
        candidate("private", 4.0, 0.905, 5.0),
        candidate("slower", 4.0, 0.906, 6.0),
        candidate("worse", 2.0, 0.80, 5.0),
        candidate("beyond", 20.0, 0.99, 5.0),
    ]
    assert (choose(results, 8.0, 1.0) or results[3]).trial_ids == ("private",)
    assert (choose(results, 8.0, 0.0) or results[3]).trial_ids == ("lucky",)
    assert (choose(results, 50.0, 1.0) or results[3]).trial_ids == ("beyond",)
    assert choose(results, 1.0, 1.0) is None
    assert choose([], 8.0, 1.0) is None


def test_choosing_costs_more_than_the_chosen_run_and_less_than_the_sum() -> None:
    overrides = {"training": {"rounds": 5}, "sweep": {"parameters": {"noise_multiplier": [1.5, 2.5]}}}
    settings = load_settings(environ={}, overrides=overrides)
    plans = plan_sweep(settings)
    cost = sweep_cost(plans, plans[0].settings)
    assert cost is not None
    assert cost.chosen == plans[0].epsilon
    assert plans[0].epsilon < cost.with_sweep < 2 * plans[0].epsilon + plans[1].epsilon
    assert cost.best_of_random is not None
    assert cost.best_of_random > cost.chosen
    text = " ".join(cost_sentences(cost, "record"))
    assert f"{cost.with_sweep:.3f}" in text
    assert "Papernot and Steinke" in text


def test_what_is_not_private_has_no_price_and_says_so() -> None:
    overrides = {"simulation": {"private": False}, "sweep": {"parameters": {"learning_rate": [1.0]}}}
    plans = plan_sweep(load_settings(environ={}, overrides=overrides))
    assert sweep_cost(plans, plans[0].settings) is None
    assert "not private" in cost_sentences(None, "record")[0]
    assert choose([candidate("only", math.inf, 0.9, 1.0)], 8.0, 1.0) is not None
