"""Runs that go on: with more rounds, and with another population than they began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rounds_client_level import POISSON, loop_over
from test_rounds_client_level import settings as client_level
from test_rounds_coordinator import coordinator, settings
from test_workload import HostedFleet
from test_workload import settings as workload_settings

from fedvit.clients.workload import load_workload, server_model
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.registry.publisher import stored_weights
from fedvit.store.store import Store
from fedvit.testing.doubles import GenerousAccountant, seeded_fleet
from fedvit.types import Client, ClientKind, OperationStatus, RunStatus


def weights_after(home: Path, *rounds: int) -> tuple[list[str], Any]:
    """Train with these numbers of rounds, one start after another: the runs, and the last weights."""
    for count in rounds:
        loop, store = coordinator(settings(home, rounds=count))
        run = loop.run()
        assert run.status is RunStatus.COMPLETED
    version = store.versions.latest()
    assert version is not None
    result = [r.run_id for r in store.runs.all()], stored_weights(store, version.weights_digest)["point"]
    store.close()
    return result


def test_more_rounds_continue_a_finished_run(tmp_path: Path) -> None:
    continued, at_once = weights_after(tmp_path / "a", 2, 4), weights_after(tmp_path / "b", 4)
    assert continued[0] == at_once[0] == ["run-0001"]
    np.testing.assert_array_equal(continued[1], at_once[1])


def test_more_rounds_continue_an_unfinished_run(tmp_path: Path) -> None:
    stop: list[Any] = []
    loop, store = coordinator(
        settings(tmp_path, rounds=4), on_progress=lambda p: stop and p.rounds_done == 2 and stop[0]()
    )
    stop.append(loop.request_stop)
    assert loop.run().status is RunStatus.STOPPED
    store.close()
    loop, store = coordinator(settings(tmp_path, rounds=5))
    run = loop.run()
    assert (run.run_id, run.status, run.rounds_done) == ("run-0001", RunStatus.COMPLETED, 5)
    store.close()


def test_fewer_rounds_and_other_settings_are_another_run_that_says_so(tmp_path: Path) -> None:
    reasons: list[str | None] = []
    for changes in ({"rounds": 3}, {"rounds": 2}, {"rounds": 2, "learning_rate": 1.0}):
        loop, store = coordinator(
            settings(tmp_path, **changes),
            on_progress=lambda p: reasons.append(p.message) if p.phase == "drawing" else None,
        )
        loop.run()
        store.close()
    with Store.open(tmp_path) as store:
        assert [r.rounds_done for r in store.runs.all()] == [3, 2, 2]
    said = [reason for reason in dict.fromkeys(reasons) if reason]
    assert len(said) == 2
    assert "run-0001" in said[0]
    assert "training.rounds" in said[0]
    assert "run-0002" in said[1]
    assert "training.learning_rate" in said[1]


def test_fine_tuning_a_workload_starts_from_its_last_version(tmp_path: Path) -> None:
    config = workload_settings(tmp_path)
    with Store.open(tmp_path) as store:
        store.clients.register(load_workload(config).registered())
        local = LocalAggregator(
            settings=config,
            store=store,
            accountant=GenerousAccountant(store),
            fleet=HostedFleet(config),
            model=server_model(config),
        )
        local.resume()
        try:
            local.start_training()
            assert local.wait(60.0).status is RunStatus.COMPLETED
            operation = local.submit("retrain", {"strategy": "fine_tune"})
            ended = local.wait_operation(operation.operation_id, 60.0)
            assert ended.status is OperationStatus.SUCCEEDED, ended.error
            assert ended.result is not None
            assert ended.result["base_version"] == "v1.1.3"
            local.wait(60.0)
            first = store.versions.get(str(store.rounds.get("run-0002", 1).version))
            trained = store.versions.get("v1.1.3")
            assert first.lineage["parent_weights_digest"] == trained.weights_digest
        finally:
            local.close()


# --- a population that changes ---------------------------------------------------------------------------------------


def fleet_of(count: int) -> list[Client]:
    return [Client(f"vehicle-{i:04d}", ClientKind.VIRTUAL, 10) for i in range(count)]


def test_clients_that_are_not_listed_any_more_leave_the_population_until_they_return(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.clients.register(fleet_of(10), complete=True)
        store.clients.enrol(Client("car", ClientKind.REMOTE, 5), admitted=True)
        store.clients.update("vehicle-0001", active=False)
        store.clients.register(fleet_of(1), complete=True)
        assert [c.client_id for c in store.clients.all(active=True)] == ["car", "vehicle-0000"]
        assert store.clients.count_units() == (2, 15)
        store.clients.register(fleet_of(3), complete=True)
        # An operator made the other one inactive.
        assert [c.client_id for c in store.clients.all(active=True)] == ["car", "vehicle-0000", "vehicle-0002"]
        assert store.clients.get("vehicle-0002").capabilities == {}


def test_a_registration_that_is_not_complete_makes_nobody_leave(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.clients.register(fleet_of(3), complete=True)
        store.clients.register(fleet_of(1))
        assert store.clients.count(active=True) == 3


@pytest.mark.parametrize("while_it_runs", [False, True])
def test_the_divisor_of_a_sum_follows_the_population(tmp_path: Path, while_it_runs: bool) -> None:
    config = client_level(tmp_path, POISSON, rounds=4)
    stop: list[Any] = []

    def shrink(progress: Any) -> None:
        if progress.rounds_done == 2 and progress.phase == "drawing" and stop:
            if while_it_runs:
                store.clients.register(seeded_fleet(6)[:2], complete=True)
            else:
                stop.pop()()

    loop, store = loop_over(config, on_progress=shrink)
    stop.append(loop.request_stop)
    run = loop.run()
    if not while_it_runs:
        assert run.config["expected_cohort"] == 3.0
        store.clients.register(seeded_fleet(6)[:2], complete=True)
        run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)
    assert run.config["expected_cohort"] == 1.0
    store.close()
