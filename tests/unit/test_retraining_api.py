"""Retraining, restart, training settings and operations over the API."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from control_system import WAIT_S, HeldFleet, JsonObject, System

from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.testing.doubles import FakeFleet
from fedvit.types import RunStatus, TrainTask

Make = Callable[..., System]


# --- retrain and restart ---------------------------------------------------------------------------------------------


def _first_task(fleet: FakeFleet, run_id: str) -> TrainTask:
    return next(task for task, _ in fleet.tasks if task.run_id == run_id)


@pytest.mark.parametrize(("strategy", "origin"), [("full_retrain", None), ("fine_tune", "v1.1.4")])
def test_retraining_is_a_new_run_from_the_origin_in_the_request(make: Make, strategy: str, origin: str | None) -> None:
    system = make().trained()
    ended = system.done("/api/model/retrain", {"strategy": strategy})
    assert (ended["result"]["run_id"], ended["result"]["base_version"]) == ("run-0002", origin)
    assert system.local.wait(WAIT_S).status is RunStatus.COMPLETED
    first, second = (system.store.runs.get(f"run-000{n}") for n in (1, 2))
    assert first.config_digest != second.config_digest
    start = _first_task(system.fleet, "run-0002").base_digest
    expected = _first_task(system.fleet, "run-0001").base_digest
    if origin is not None:
        expected = system.store.versions.get(origin).weights_digest
    assert start == expected
    status = system.get("/api/training/status")
    assert (status["run_id"], status["rounds_done"]) == ("run-0002", 4)
    assert system.store.versions.get("v1.2.1").lineage["base_version"] == origin


def test_retraining_twice_is_two_runs(make: Make) -> None:
    system = make().trained()
    for expected in ("run-0002", "run-0003"):
        assert system.done("/api/model/retrain", {"strategy": "full_retrain"})["result"]["run_id"] == expected
        system.local.wait(WAIT_S)


def test_without_budget_for_one_round_retraining_is_refused(make: Make) -> None:
    system = make(epsilon=epsilon_pld({PoissonGaussian(4.0, 0.5): 2}, 1e-5) + 1e-6).trained()
    assert system.get("/api/training/status")["status"] == "budget_exhausted"
    spent = system.get("/api/privacy/budget")
    answer = system.http.post("/api/model/retrain", json={"strategy": "full_retrain"})
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/privacy-budget-exhausted")
    assert system.get("/api/privacy/budget") == spent
    assert [run.run_id for run in system.store.runs.all()] == ["run-0001"]
    assert system.get("/api/operations") == []


def test_a_restart_ends_the_run_after_its_round_and_draws_validated_clients_only(make: Make) -> None:
    fleet = HeldFleet()
    system = make(fleet=fleet)
    system.store.clients.update("vehicle-0002", validated=False)
    system.http.post("/api/training/start")
    assert fleet.begun.wait(WAIT_S)
    answer = system.http.post("/api/training/restart", json={"client_selection": "validated_only"})
    assert answer.status_code == 202
    fleet.let.set()
    operation_id = answer.json()["operation_id"]
    system.local.wait_operation(operation_id, WAIT_S)
    system.local.wait(WAIT_S)
    ended = system.get(f"/api/operations/{operation_id}")
    assert ended["result"] == {
        "run_id": "run-0002",
        "base_version": None,
        "client_selection": "validated_only",
        "rounds_total": 4,
    }
    old = system.store.runs.get("run-0001")
    assert (old.status, old.rounds_done) == (RunStatus.SUPERSEDED, 1)
    assert "client_selection=validated_only" in (old.reason or "")
    cohorts = {run: _cohorts(fleet, run) for run in ("run-0001", "run-0002")}
    assert all("vehicle-0002" in cohort for cohort in cohorts["run-0001"])
    assert len(cohorts["run-0002"]) == 4
    assert all(cohort == tuple(f"vehicle-000{i}" for i in (0, 1, 3, 4)) for cohort in cohorts["run-0002"])
    # What was chosen stays chosen for a later order that says nothing of it.
    assert system.done("/api/training/restart", {})["result"]["client_selection"] == "validated_only"


def _cohorts(fleet: FakeFleet, run_id: str) -> list[Sequence[str]]:
    return [cohort.client_ids for task, cohort in fleet.tasks if task.run_id == run_id]


def test_a_restart_without_enough_validated_clients_is_refused(make: Make) -> None:
    system = make()
    for client in system.store.clients.all():
        system.store.clients.update(client.client_id, validated=False)
    answer = system.http.post("/api/training/restart", json={"client_selection": "validated_only"})
    assert answer.status_code == 409
    assert "0 clients may take part" in answer.json()["detail"]
    assert system.store.runs.all() == []


def test_a_fleet_that_outgrew_delta_is_a_conflict_and_no_fault_of_the_request(make: Make) -> None:
    system = make()
    answer = system.http.post("/api/clients/register", json={"device_id": "truck-9", "num_examples": 10**6})
    assert answer.status_code == 201
    answer = system.http.post("/api/training/restart", json={})
    assert (answer.status_code, "target_delta" in answer.text) == (409, True)
    answer = system.http.post("/api/training/start")
    assert (answer.status_code, "target_delta" in answer.text) == (409, True)
    assert system.get("/api/training/status")["status"] is None
    assert system.store.runs.all() == []


def test_a_cancelled_restart_lets_the_present_run_go_on(make: Make) -> None:
    fleet = HeldFleet()
    system = make(fleet=fleet)
    system.http.post("/api/training/start")
    assert fleet.begun.wait(WAIT_S)
    operation_id = system.http.post("/api/training/restart", json={}).json()["operation_id"]
    cancelled = system.http.delete(f"/api/operations/{operation_id}")
    assert (cancelled.status_code, cancelled.json()["cancel_requested"]) == (202, True)
    assert system.local.wait_operation(operation_id, WAIT_S).status == "cancelled"
    fleet.let.set()
    system.http.post("/api/training/start")
    system.local.wait(WAIT_S)
    system.http.post("/api/training/start")
    assert system.local.wait(WAIT_S).status is RunStatus.COMPLETED
    assert [run.run_id for run in system.store.runs.all()] == ["run-0001"]


def test_a_restart_that_was_interrupted_begins_its_run_once(make: Make, tmp_path: Path) -> None:
    system = make().trained()
    ended = system.done("/api/model/retrain", {"strategy": "full_retrain"})
    system.local.wait(WAIT_S)
    # As if the process had died after the new run was opened, and before the operation was given its end.
    with closing(sqlite3.connect(system.store.home / "state.db")) as database, database:
        change = "UPDATE operations SET status = 'running', ended_at = NULL, result = NULL WHERE operation_id = ?"
        database.execute(change, (ended["operation_id"],))
    system.close()
    system = make()
    again = system.local.wait_operation(ended["operation_id"], WAIT_S)
    assert (again.status, again.result) == ("succeeded", ended["result"])
    assert [run.run_id for run in system.store.runs.all()] == ["run-0001", "run-0002"]


# --- training config -------------------------------------------------------------------------------------------------


def test_the_training_config_is_live_kept_and_guarded(make: Make) -> None:
    fleet = HeldFleet()
    system = make(fleet=fleet)
    read = system.http.get("/api/training/config")
    assert read.json() == {"min_clients": 1, "wait_timeout": 600, "revision": 0}
    system.http.post("/api/training/start")
    assert fleet.begun.wait(WAIT_S)
    changed = system.http.post(
        "/api/training/config",
        json={"min_clients": 5, "wait_timeout": 300},
        headers={"If-Match": read.headers["etag"]},
    )
    assert (changed.status_code, changed.headers["etag"]) == (200, '"1"')
    stale = system.http.post(
        "/api/training/config", json={"min_clients": 2}, headers={"If-Match": read.headers["etag"]}
    )
    assert (stale.status_code, stale.json()["type"]) == (412, "/problems/stale-request")
    fleet.let.set()
    system.local.wait(WAIT_S)
    # The round under way went by the old patience, the next ones by the new.
    assert fleet.timeouts_s == [600, 300, 300, 300]
    system.store.clients.update("vehicle-0000", active=False)
    answer = system.http.post("/api/training/restart", json={})
    assert answer.status_code == 409
    assert "4 clients may take part" in answer.json()["detail"]
    system.close()
    assert make(fleet=fleet).get("/api/training/config") == {"min_clients": 5, "wait_timeout": 300, "revision": 1}


def test_too_few_clients_for_the_live_minimum_end_the_run_in_words(make: Make) -> None:
    system = make()
    system.http.post("/api/training/config", json={"min_clients": 10})
    system.trained()
    status = system.get("/api/training/status")
    assert status["status"] == "failed"
    assert status["message"] == "Round 1 has 5 eligible clients; at least 10 are needed."
    system.http.post("/api/training/config", json={"min_clients": 5})
    assert system.trained().get("/api/training/status")["status"] == "completed"


@pytest.mark.parametrize(
    "body", [{}, {"min_clients": 0}, {"wait_timeout": -1}, {"min_clients": 2, "patience": 1}, {"wait_timeout": "long"}]
)
def test_a_bad_training_config_is_refused(make: Make, body: JsonObject) -> None:
    system = make()
    assert system.http.post("/api/training/config", json=body).status_code == 422
    assert system.get("/api/training/config")["revision"] == 0


# --- operations and info ---------------------------------------------------------------------------------------------


def test_operations_are_listed_newest_first_and_filtered(make: Make) -> None:
    system = make().trained()
    names = [
        system.done("/api/edge/optimize", {"strategy": "lighter_variant", "target_latency": target})["operation_id"]
        for target in (0.001, 50)
    ]
    assert [o["operation_id"] for o in system.get("/api/operations")] == names[::-1]
    assert [o["operation_id"] for o in system.get("/api/operations?limit=1&offset=1")] == names[:1]
    assert system.get("/api/operations?status=queued&status=running") == []
    assert system.http.get("/api/operations?status=lost").status_code == 422
    for call in (system.http.get, system.http.delete):
        assert call("/api/operations/op-none").status_code == 404


def test_a_repeated_idempotency_key_gives_the_same_operation(make: Make) -> None:
    system = make().trained()
    body = {"strategy": "quantization", "target_latency": 50}
    first, again = (
        system.http.post("/api/edge/optimize", json=body, headers={"Idempotency-Key": "once"}) for _ in range(2)
    )
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.content == again.content
    assert first.headers["location"] == again.headers["location"]
    assert len(system.get("/api/operations")) == 1


def test_a_request_whose_process_died_before_it_answered_is_repeated_at_once(make: Make) -> None:
    system = make().trained()
    body, key = {"strategy": "quantization", "target_latency": 50}, {"Idempotency-Key": "once"}
    finish = system.store.idempotency.finish
    system.store.idempotency.finish = lambda *_: None  # type: ignore[method-assign]
    first = system.http.post("/api/edge/optimize", json=body, headers=key)
    system.store.idempotency.finish = finish  # type: ignore[method-assign]
    again = system.http.post("/api/edge/optimize", json=body, headers=key)
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["operation_id"] == again.json()["operation_id"]
    assert len(system.get("/api/operations")) == 1
    other = system.http.post("/api/edge/optimize", json={**body, "target_latency": 60}, headers=key)
    assert other.status_code == 409


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain"])
def test_json_is_json_whatever_its_content_type_says(make: Make, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = make().http.post("/api/training/config", content=b'{"min_clients": 3}', headers=headers)
    assert (answer.status_code, answer.json()["min_clients"]) == (200, 3)


def test_what_is_done_to_the_model_is_audited_with_before_and_after(make: Make) -> None:
    system = make(max_accuracy_drop=0.5).trained()
    operation = system.done("/api/edge/optimize", {"strategy": "quantization", "target_latency": 0.001})
    system.http.delete(f"/api/operations/{operation['operation_id']}")
    system.http.post("/api/model/rollback", json={"version": "v1.1.2"})
    system.http.post("/api/model/switch", json={"variant": "edge_optimized"})
    system.http.post("/api/training/config", json={"min_clients": 2})
    started, optimized, cancelled, rolled_back, switched, configured = (
        entry.facts for entry in system.store.audit.entries()
    )
    assert started.action == "POST /api/training/start"
    assert optimized.before["version"] == "v1.1.4"
    assert optimized.after["operation_id"] == operation["operation_id"]
    assert cancelled.before == cancelled.after == {**optimized.after, "status": "succeeded"}
    assert (rolled_back.before["version"], rolled_back.after["version"]) == ("v1.1.4", "v1.1.5")
    assert (switched.before["variant"], switched.after["variant"]) == ("standard", "edge_optimized")
    assert (configured.before["min_clients"], configured.after["min_clients"]) == (1, 2)
    assert {optimized.status, cancelled.status} == {202}


def test_model_info_tells_size_and_complexity(make: Make) -> None:
    system = make().trained()
    info = system.get("/api/model/info")
    assert set(info["size"]) == {"standard", "edge_optimized"}
    assert info["complexity"]["parameters"] == 2
    assert info["complexity"]["trainable_parameters"] == 2


def test_the_new_routes_document_their_problems(make: Make) -> None:
    paths = make().get("/openapi.json")["paths"]
    responses = paths["/api/model/rollback"]["post"]["responses"]
    assert {"200", "404", "409", "422", "502", "503"} <= set(responses)
    assert list(responses["409"]["content"]) == ["application/problem+json"]
    assert "202" in paths["/api/edge/optimize"]["post"]["responses"]
