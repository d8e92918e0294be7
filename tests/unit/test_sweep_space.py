"""What a sweep tries out: planned from settings alone, under stable names, and refused where it makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from raises import raises_naming

from fedvit.config import Settings
from fedvit.errors import ConfigError, ConflictError, DataError, ModelError, PlacementError
from fedvit.settings import load_settings
from fedvit.tools.sweep.checks import check_rules, check_trials
from fedvit.tools.sweep.space import check_room, plan_sweep, rungs_of, sweep_digest


def settings_of(parameters: Any, simulation: dict[str, Any] | None = None, **sweep: Any) -> Settings:
    overrides = {"sweep": {"parameters": parameters, **sweep}, "simulation": simulation or {}}
    return load_settings(environ={}, overrides=overrides)


def test_every_combination_is_one_trial_with_its_own_settings() -> None:
    parameters = {"noise_multiplier": [1.0, 2.0], "staleness_tolerance": [0, 3], "model.adapter_rank": [4]}
    plans = plan_sweep(settings_of(parameters))
    assert [tuple(plan.parameters.values()) for plan in plans] == [(1.0, 0, 4), (1.0, 3, 4), (2.0, 0, 4), (2.0, 3, 4)]
    assert [plan.settings.privacy.noise_multiplier for plan in plans] == [1.0, 1.0, 2.0, 2.0]
    assert [plan.settings.simulation.staleness_tolerance for plan in plans] == [0, 3, 0, 3]
    assert len({plan.trial_id for plan in plans}) == 4
    assert [plan.trial_id for plan in plan_sweep(settings_of(parameters))] == [plan.trial_id for plan in plans]
    # Noise decides the price, staleness does not.
    assert plans[0].epsilon == plans[1].epsilon > plans[2].epsilon


def test_seeds_repeat_a_configuration() -> None:
    plans = plan_sweep(settings_of({"learning_rate": [1.0, 2.0]}, {"seed": 5}, seeds=2))
    assert [(p.parameters["learning_rate"], p.settings.simulation.seed) for p in plans] == [
        (1.0, 5),
        (1.0, 6),
        (2.0, 5),
        (2.0, 6),
    ]


def test_ranges_are_drawn_within_their_bounds_and_again_alike() -> None:
    parameters = {
        "learning_rate": {"low": 0.1, "high": 10.0, "log": True},
        "local_steps": {"low": 1, "high": 4},
        "trainable": ["head", "biases", "adapters"],
    }
    plans = plan_sweep(settings_of(parameters, trials=60))
    rates = [p.settings.training.learning_rate for p in plans]
    assert all(0.1 <= rate <= 10 for rate in rates)
    # On a logarithmic scale half of them lie below the geometric mean.
    assert 15 < sum(rate < 1 for rate in rates) < 45
    assert {p.settings.training.local_steps for p in plans} == {1, 2, 3, 4}
    assert {p.settings.model.trainable for p in plans} == {"head", "biases", "adapters"}
    assert plan_sweep(settings_of(parameters, trials=60)) == plans
    assert plan_sweep(settings_of(parameters, trials=60, seed=1)) != plans


@pytest.mark.parametrize(
    ("parameters", "simulation", "seeds", "count"),
    [
        ({"learning_rate": [1.0, 1.0, 1]}, {}, 1, 1),
        ({"learning_rate": [1.0, 2.0, 1]}, {}, 2, 4),
        # Seeds 0 and 1 of the first, 1 and 2 of the second.
        ({"simulation.seed": [0, 1]}, {}, 2, 3),
        ({"local_epochs": [1, 1.01]}, {}, 1, 1),
    ],
)
def test_equal_trials_are_planned_once(parameters: Any, simulation: dict[str, Any], seeds: int, count: int) -> None:
    plans = plan_sweep(settings_of(parameters, simulation, seeds=seeds))
    assert len(plans) == count
    assert [plan.trial_id.split("-")[0] for plan in plans] == [f"{i:03d}" for i in range(count)]


@pytest.mark.parametrize("name", ["alpha", "data.partition.alpha"])
def test_the_partition_is_varied(name: str) -> None:
    plans = plan_sweep(settings_of({name: [0.1, 10.0]}))
    assert [plan.settings.data.partition.alpha for plan in plans] == [0.1, 10.0]
    assert len({plan.trial_id.split("-")[1] for plan in plans}) == 2


def test_an_unknown_rule_is_found_before_any_trial() -> None:
    with pytest.raises(ConfigError):
        check_rules(plan_sweep(settings_of({"aggregation": ["fedavg", "fedadm"]})))
    with pytest.raises(ConflictError):
        check_rules(plan_sweep(settings_of({"aggregation": ["fedavg", "scaffold"], "mode": ["asynchronous"]})))
    check_rules(plan_sweep(settings_of({"aggregation": ["fedavg", "median"]})))


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({"model.name": ["hybrid_lite0", "vit_tiny_patch16_225"]}, ModelError),
        ({"data.partition.clients": [2, 2000]}, DataError),
    ],
)
def test_data_and_models_of_all_trials_are_checked_before_any_begins(
    images: Path, parameters: Any, error: type[Exception]
) -> None:
    partition = {"scheme": "iid", "clients": 2, "min_examples": 2}
    base = {
        "data": {"source": "folder", "path": images, "image_size": 32, "partition": partition},
        "model": {"pretrained": False},
        "sweep": {"parameters": parameters},
    }
    with pytest.raises(error):
        check_trials(plan_sweep(load_settings(environ={}, overrides=base)))


def test_local_epochs_are_the_poisson_steps_that_make_them() -> None:
    plans = plan_sweep(settings_of({"local_epochs": [0.5, 2], "sampling_prob": [0.1]}))
    assert [p.settings.training.local_steps for p in plans] == [5, 20]


@pytest.mark.parametrize(
    ("parameters", "more", "message", "cure"),
    [
        ({}, {}, "sweep.parameters is empty", "Name some"),
        ({"learning_rate": []}, {}, "learning_rate has no values", "Give it a list"),
        ({"noise_multiplyer": [1.0]}, {}, "Did you mean 'noise_multiplier'", "Known are"),
        ({"serving.port": [8000]}, {}, "serving.port is no parameter", "section.key of model"),
        ({"training.roundz": [3]}, {}, "'training.roundz' is no setting", ""),
        ({"local_steps": [0]}, {}, "'training.local_steps': input should be greater than or equal to 1", ""),
        ({"noise_multiplier": [0, 1.0]}, {}, "noise_multiplier of 0 stays within no budget", "Use 0.3 or more"),
        ({"local_epochs": [0]}, {}, "local_epochs is 0", "above 0"),
        ({"local_epochs": [1], "local_steps": [1]}, {}, "sets training.local_steps twice", "Name it once"),
        ({"learning_rate": [1.0], "training.learning_rate": [2.0]}, {}, "sets training.learning_rate twice", "once"),
        ({"learning_rate": {"low": 1, "high": 2}}, {}, "is a range", "sweep.trials"),
        ({"learning_rate": list(range(1, 200)), "local_steps": list(range(1, 200))}, {}, "39,601 trials", "Shorten"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused_with_what_would_be_right(
    parameters: Any, more: dict[str, Any], message: str, cure: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan_sweep(settings_of(parameters, **more))
    assert message in refused.value.message
    assert cure in (refused.value.cure or "")


def test_noise_is_not_varied_where_nobody_draws_any() -> None:
    with raises_naming(ConfigError, "noise_multiplier", "simulation.private"):
        plan_sweep(settings_of({"noise_multiplier": [1.0]}, {"private": False}))


@pytest.mark.parametrize("bad", [{"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True}, {"from": 1}])
def test_a_range_that_is_none_is_refused(bad: dict[str, Any]) -> None:
    with raises_naming(ConfigError, "sweep.parameters.learning_rate"):
        settings_of({"learning_rate": bad}, trials=2)


def test_rungs_are_rounds_before_the_last() -> None:
    settings = settings_of({"learning_rate": [1.0]}, first_rung=3)
    assert settings.training.rounds == 30
    assert rungs_of(settings) == (3, 9, 27)
    assert rungs_of(settings_of({"learning_rate": [1.0]})) == ()
    with raises_naming(ConfigError, "sweep.first_rung", "30 rounds"):
        rungs_of(settings_of({"learning_rate": [1.0]}, first_rung=30))


def test_more_trials_at_a_time_than_cpus_are_refused_with_the_number_that_fits() -> None:
    settings = settings_of({"learning_rate": [1.0]}, concurrent_trials=3, cpus_per_trial=0.9)
    check_room(settings, 2.7)
    with raises_naming(PlacementError, "3 trials", "0.9 CPU", "2 are free") as refused:
        check_room(settings, 2)
    assert "Lower sweep.concurrent_trials to 2" in str(refused.value.cure)


def test_how_many_run_at_a_time_does_not_make_another_sweep() -> None:
    base = settings_of({"learning_rate": [1.0]})
    assert sweep_digest(settings_of({"learning_rate": [1.0]}, concurrent_trials=7)) == sweep_digest(base)
    assert sweep_digest(settings_of({"learning_rate": [2.0]})) != sweep_digest(base)
    assert sweep_digest(settings_of({"learning_rate": [1.0]}, margin=2.0)) != sweep_digest(base)
