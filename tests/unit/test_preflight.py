"""The preflight check before a run charges anything, and the traceback of what fails during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_clients_host import settings as vision_settings  # noqa: F401  a fixture
from test_rounds_coordinator import TARGET, coordinator
from test_rounds_coordinator import settings as round_settings
from test_workload import HostedFleet, settings
from workload_clients import ProtectingClients

from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.registry import SHIPPED
from fedvit.aggregation.rule import NO_FACTS, Fold, RoundFacts, State, Updates
from fedvit.api.training import ProgressView
from fedvit.clients.tracebacks import location_in, traceback_of
from fedvit.clients.workload import load_workload, server_model
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.errors import AggregationError, WorkloadError
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.failures import last_failure
from fedvit.rounds.preflight import RUN, check_vision, check_workload
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel
from fedvit.types import Evaluation, RunStatus, TrainTask, Weights
from serve_apps.startup.checks import check_training

HERE = f"{__name__}:"


class Buggy(ProtectingClients):
    """``fit`` looks for a parameter that does not exist."""

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        return {"body": weights["w"]}, 10


class BuggyEvaluation(ProtectingClients):
    """``evaluate`` does."""

    def evaluate(self, weights: Weights) -> Evaluation:
        return Evaluation(float(weights["w"].sum()), 0.5, {}, (), 0)


class WithPublicClient(ProtectingClients):
    """Trains a client of made-up data."""

    public_client = "made-up"

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        if task.run_id == RUN:
            assert client_id == "made-up"
            assert task.local_steps == 1
        return dict(weights), 10


class FirstClientIsEmpty(ProtectingClients):
    """Some clients have no data today."""

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        return dict(weights), 0 if client_id == "vehicle-00" else 10


class Nobody(ProtectingClients):
    """No clients."""

    def clients(self) -> Any:
        return ()


# --- before a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "function"), [("Buggy", "fit"), ("BuggyEvaluation", "evaluate")])
def test_a_bug_is_shown_with_its_place_before_anything_is_written(tmp_path: Path, kind: str, function: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        check_training(settings(tmp_path, HERE + kind), print)
    assert f"in {function}" in caught.value.message
    assert Path(__file__).name in caught.value.message
    assert 'weights["w"]' in caught.value.details["traceback"]
    assert not (tmp_path / "state.db").exists()


@pytest.mark.parametrize("kind", ["WithPublicClient", "FirstClientIsEmpty"])
@pytest.mark.parametrize("rule", ["fedavg", "median", "trimmed_mean"])
def test_a_good_workload_passes(tmp_path: Path, kind: str, rule: str) -> None:
    check_workload(settings(tmp_path, HERE + kind, aggregation=rule))


def test_a_workload_without_clients_does_not(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError):
        check_workload(settings(tmp_path, f"{HERE}Nobody"))


def test_a_rule_that_returns_what_no_round_can_start_from_is_found_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plugin(FedAvg):
        name = "plugin"

        def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
            return Fold({}, {})

    monkeypatch.setitem(SHIPPED, "plugin", Plugin)
    with pytest.raises(AggregationError):
        check_workload(settings(tmp_path, aggregation="plugin"))


@pytest.mark.parametrize(
    "training", [{}, {"aggregation": "median", "compression": {"encodings": ["int8"]}}, {"aggregation": "scaffold"}]
)
def test_vehicles_train_made_up_images_and_leave_nothing(
    vision_settings: Settings,  # noqa: F811
    training: dict[str, Any],
) -> None:
    config = vision_settings.model_dump(mode="python")
    config = Settings.model_validate({**config, "training": {**config["training"], **training}})
    check_vision(config, VirtualFleet.open(config.data))
    assert not config.home.exists()


def test_a_run_that_has_begun_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path)
    check_training(config, print)()
    with Store.open(tmp_path) as store:
        _loop(config, store).run()
    monkeypatch.setattr(ProtectingClients, "fit", Buggy.fit)
    check_training(config, print)


# --- during a run ----------------------------------------------------------------------------------------------------


def _loop(config: Settings, store: Store) -> Coordinator:
    return Coordinator(
        settings=config,
        store=store,
        accountant=GenerousAccountant(store),
        fleet=HostedFleet(config),
        model=server_model(config),
    )


def test_the_traceback_of_a_client_is_kept_and_its_place_is_the_reason(tmp_path: Path) -> None:
    config = settings(tmp_path, f"{HERE}Buggy")
    with Store.open(tmp_path) as store:
        store.clients.register(load_workload(config).registered())
        run = _loop(config, store).run()
        assert run.status is RunStatus.FAILED
        assert Path(__file__).name in str(run.reason)
        failure = last_failure(store, run.run_id)
        assert failure is not None
        assert (failure.round_index, failure.client_id, failure.error) == (1, "vehicle-00", "KeyError: 'w'")
        assert 'return {"body": weights["w"]}, 10' in failure.traceback
        assert last_failure(store, "run-0002") is None
        view = ProgressView.model_validate(
            {**dict.fromkeys(ProgressView.model_fields, None), "phase": "resting", "rounds_total": 3, "rounds_done": 0}
            | {"epsilon": 0.0, "conditions": (), "failure": failure}
        )
        assert view.failure is not None
        assert view.failure.traceback == failure.traceback


def test_the_traceback_of_an_evaluation_is_kept_too(tmp_path: Path) -> None:
    class Broken(PointModel):
        def evaluate(self, weights: Weights) -> Evaluation:
            if len(store.versions.all()) < 2:
                return super().evaluate(weights)
            raise KeyError("w")

    _, store = coordinator(round_settings(tmp_path))
    loop = Coordinator(
        settings=round_settings(tmp_path),
        store=store,
        accountant=GenerousAccountant(store),
        fleet=FakeFleet(TARGET),
        model=Broken(TARGET),
    )
    with pytest.raises(KeyError):
        loop.run()
    failure = last_failure(store, "run-0001")
    assert failure is not None
    assert (failure.client_id, failure.round_index) == (None, 3)
    assert location_in(failure.traceback).endswith("in evaluate")
    store.close()


def test_a_place_is_one_of_the_user_s_own_code() -> None:
    try:
        np.zeros(2).reshape(3)
    except ValueError as error:
        text = traceback_of(error)
    assert location_in(text).startswith(Path(__file__).name)
    assert location_in("") == ""
