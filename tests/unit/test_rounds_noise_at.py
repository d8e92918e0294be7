"""Where the noise of a round is added: the places that settings allow, and what each puts into the sum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.training.policy import VehiclePolicy
from fedvit.aggregation.rule import RoundFacts
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.contributions import with_own_noise
from fedvit.config import Settings
from fedvit.errors import ConfigError, ForbiddenError
from fedvit.privacy import mechanism
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.events import Gaussian, PoissonGaussian
from fedvit.privacy.randomness import output_id
from fedvit.privacy.round_cost import spend_of
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.context import RoundBase, train_task
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.protection import protection_for
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import ClientOutcome, RunStatus, TrainTask
from fedvit.updates import ClientUpdate, PartialSum

Overrides = dict[str, Any]
CAPPED = {"selection": "all", "max_participations": 9}
SIZE = 20_000


def settings_of(home: Path, unit: str, place: str | None, **training: Any) -> Settings:
    cohort = CAPPED if unit == "client" else {}
    privacy = {"privacy_unit": unit, "noise_at": place, "noise_multiplier": 1.5, "l2_clip_norm": 0.5}
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": 1, "learning_rate": 0.5, "cohort": cohort, **training},
            "privacy": {"sampling_prob": 0.25, "target_epsilon": 50.0, **privacy},
            "histograms": {"every_rounds": None},
            "release": {"every_rounds": 10},
        },
    )


def task_of(settings: Settings) -> TrainTask:
    return train_task(
        settings,
        "run-0001",
        1,
        base_digest="b" * 64,
        data_digest="d" * 64,
        noise_multiplier=1.5,
        l2_clip_norm=settings.privacy.l2_clip_norm,
        context_digest="",
    )


def fleet_of(store: Store, clients: int) -> None:
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(clients))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"training": {"local_steps": 2}, "privacy": {"noise_at": "server"}}, "training.local_steps"),
        ({"training": {"ranks": 2}, "privacy": {"noise_at": "server"}}, "training.ranks"),
        ({"privacy": {"noise_at": "server"}, "workload": {"clients_class": "a:B"}}, "workload.clients_class"),
        (
            {"training": {"validation": {"max_update_norm": 1.0}}, "privacy": {"noise_at": "server"}},
            "training.validation.max_update_norm",
        ),
        (
            {"training": {"compression": {"encodings": ["int8"]}}, "privacy": {"noise_at": "server"}},
            "training.compression.encodings",
        ),
        ({"simulation": {"private": False}, "privacy": {"noise_at": "server"}}, "simulation.private"),
        (
            {
                "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
                "privacy": {"noise_at": "client", "privacy_unit": "client"},
            },
            "training.cohort.selection",
        ),
        (
            {
                "training": {"cohort": CAPPED},
                "privacy": {"noise_at": "client", "privacy_unit": "client", "adaptive_clip": {}},
            },
            "adaptive_clip",
        ),
        ({"training": {"local_steps": 2}, "privacy": {"noise_at": "distributed"}}, "training.local_steps"),
        (
            {
                "training": {"cohort": {"selection": "uniform", "size": 9, "over_selection": 0.5}},
                "privacy": {"noise_at": "distributed"},
            },
            "training.cohort.over_selection",
        ),
        (
            {"training": {"initial_mode": {"mode": "asynchronous"}}, "privacy": {"noise_at": "distributed"}},
            "training.initial_mode.mode",
        ),
        ({"simulation": {"mode": "asynchronous"}, "privacy": {"noise_at": "distributed"}}, "simulation.mode"),
        ({"secure_aggregation": {"min_survivors": 4, "max_colluding": 4}}, "max_colluding"),
        (
            {
                "training": {"cohort": {"selection": "uniform", "size": 3}},
                "privacy": {"noise_at": "distributed"},
                "secure_aggregation": {"min_survivors": 4},
            },
            "secure_aggregation.min_survivors",
        ),
        (
            {
                "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
                "privacy": {"noise_at": "distributed", "privacy_unit": "client"},
            },
            "training.cohort.selection",
        ),
    ],
)
def test_a_place_that_does_not_go_with_another_setting_is_refused_by_name(overrides: Overrides, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(environ={}, overrides=overrides)
    assert key in str(caught.value)


@pytest.mark.parametrize(("unit", "place"), [("record", "client"), ("client", "server")])
def test_the_default_place_leaves_runs_and_outputs_as_they_were(tmp_path: Path, unit: str, place: str) -> None:
    unset, named = settings_of(tmp_path, unit, None), settings_of(tmp_path, unit, place)
    assert unset.training_digest() == named.training_digest()
    assert "noise_at" not in unset.training_identity()["privacy"]
    assert "secure_aggregation" not in unset.training_identity()
    assert output_id(task_of(unset), "car-1", 40) == output_id(task_of(named), "car-1", 40)
    assert task_of(named).noise_at == ""


def test_another_place_makes_another_run_and_other_outputs(tmp_path: Path) -> None:
    tasks = [task_of(settings_of(tmp_path, "record", place)) for place in ("client", "server", "distributed")]
    assert len({output_id(task, "car-1", 40) for task in tasks}) == 3
    assert [task.noise_place for task in tasks] == ["client", "server", "distributed"]


def test_a_rule_that_follows_single_updates_does_not_go_with_noise_on_sums(tmp_path: Path) -> None:
    for rule in ("scaffold", "median"):
        with Store.open(tmp_path / rule) as store, pytest.raises(ConfigError) as caught:
            protection_for(settings_of(tmp_path / rule, "record", "server", aggregation=rule), store)
        assert "privacy.noise_at" in str(caught.value)


def test_server_noise_on_records_has_the_deviation_that_is_charged(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "record", "server")
    task, base = task_of(settings), {"w": np.zeros(SIZE, np.float32)}
    sums = {"w": np.linspace(-1, 1, SIZE)}
    with Store.open(tmp_path) as store:
        protection = protection_for(settings, store)
        run = store.runs.create(rounds_total=1, noise_multiplier=1.5, config={}, config_digest="", data_digest="")
        outcomes = (ClientOutcome("a", 30), ClientOutcome("b", 10))
        update = PartialSum(1, outcomes, sums, 40.0)
        start = RoundBase.of(protection.rule, base, "", {})
        folds = [protection.fold(run, task, start, [update], RoundFacts()).weights["w"] for _ in range(2)]
    np.testing.assert_array_equal(folds[0], folds[1])
    noise = 40.0 * folds[0] - sums["w"]
    # z * learning_rate * clip / sampling_prob.
    assert noise.std() == pytest.approx(1.5 * 0.5 * 0.5 / 0.25, rel=0.03)
    assert abs(noise.mean()) < 5 * noise.std() / SIZE**0.5


def test_server_noise_costs_a_record_what_noise_at_its_client_costs(tmp_path: Path) -> None:
    spends = []
    for place in ("client", "server"):
        settings = settings_of(tmp_path / place, "record", place)
        with Store.open(settings.home) as store:
            fleet_of(store, 4)
            loop = Coordinator(
                settings=settings,
                store=store,
                accountant=PrivacyAccountant(store, settings),
                fleet=FakeFleet(np.array([0.1, 0.2], np.float32)),
                model=PointModel(np.array([0.1, 0.2], np.float32)),
            )
            assert loop.run().status is RunStatus.COMPLETED
            spends.append([spend_of(entry.charge) for entry in store.ledger.entries()])
    assert spends[0] == spends[1] == [(PoissonGaussian(1.5, 0.25), 1)] * 4


def test_an_update_without_noise_is_at_most_as_long_as_its_noise_is_made_for(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "record", "server")
    task, outcome = task_of(settings), ClientOutcome("a", 10)
    with Store.open(tmp_path) as store:
        rule = protection_for(settings, store).rule
    validator = UpdateValidator.of(settings, rule, {"w": np.zeros(4, np.float32)}, task=task)
    assert validator.bounds is None, "neither statistics nor clipping may depend on an update without noise"
    largest = 10 * mechanism.sensitivity(task)
    for factor, valid in ((1.0, True), (1.01, False)):
        update = ClientUpdate(1, outcome, {"w": np.array([factor * largest, 0, 0, 0])}, 10.0)
        assert (validator.fault_of(update) is None) is valid


def test_noise_of_clients_on_whole_updates_is_charged_a_client_at_a_time(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "client", "client")
    target = np.zeros(4000, np.float32)

    class Noised(FakeFleet):
        def _one(self, task: TrainTask, client_id: str, step: Any) -> Any:
            own = super()._one(task, client_id, step)
            assert isinstance(own, ClientUpdate)
            return with_own_noise(task, own, client_id.encode().ljust(32, b"0"))

    with Store.open(settings.home) as store:
        fleet_of(store, 9)
        loop = Coordinator(
            settings=settings,
            store=store,
            accountant=PrivacyAccountant(store, settings),
            fleet=Noised(target),
            model=PointModel(target),
        )
        run = loop.run()
        assert (run.status, store.rounds.get(run.run_id, 1).num_updates) == (RunStatus.COMPLETED, 9)
        assert [spend_of(entry.charge) for entry in store.ledger.entries()] == [(Gaussian(1.5), 1)] * 9
        version = store.versions.latest()
        assert version is not None
        moved = 9 * stored_weights(store, version.weights_digest)["point"]
    # Nine clients' noise, and none of the aggregator's.
    assert moved.std() == pytest.approx(3 * 1.5 * 0.5, rel=0.05)


def test_a_vehicle_sends_no_update_without_noise_of_its_own(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "record", "server")
    task = replace(task_of(settings), noise_multiplier=5.0)
    with pytest.raises(ForbiddenError):
        VehiclePolicy().check_update(task, settings, "f" * 64)
