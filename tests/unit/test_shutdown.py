"""Shutting down over the API: what is answered, what is durable by then, and how a new start continues."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from incident_site import WAIT_S, JsonObject, LateFleet, Site
from trained_home import untar

from fedvit.cli.supervisor import end_this_process, interruptible
from fedvit.errors import InterruptedRunError, PlacementError, UsageError
from fedvit.operations import local_aggregator
from fedvit.operations.runner import OperationKind
from fedvit.types import OperationStatus, RunStatus
from serve_apps.startup.cluster import ShutdownWatch

SHUTDOWN = "/api/system/shutdown"
Make = Callable[..., Site]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    sites: list[Site] = []

    def build(**options: Any) -> Site:
        sites.append(Site(tmp_path / "home", **options))
        return sites[-1]

    yield build
    for site in sites:
        site.fleet.let.set()
        site.close()


def asked(site: Site, mode: str, **more: Any) -> JsonObject:
    answer = site.http.post(SHUTDOWN, json={"mode": mode, **more})
    assert answer.status_code == 202, answer.text
    result: JsonObject = answer.json()
    assert answer.headers["location"] == f"/api/operations/{result['operation_id']}"
    assert result["kind"] == "shutdown"
    return result


def ended(site: Site, accepted: JsonObject) -> JsonObject:
    site.local.wait_operation(accepted["operation_id"], WAIT_S)
    result: JsonObject = site.get(f"/api/operations/{accepted['operation_id']}")
    return result


def test_a_graceful_end_waits_for_the_round_and_saves_the_state(make: Make) -> None:
    site = make(fleet=LateFleet(held=True))
    site.http.post("/api/training/start")
    assert site.fleet.begun.wait(WAIT_S)
    outcome = asked(site, "graceful")
    assert site.local.await_shutdown(0.2) is None
    assert site.get(f"/api/operations/{outcome['operation_id']}")["status"] == "running"
    refused = site.http.post("/api/training/start")
    assert (refused.status_code, "shutting down" in refused.json()["detail"]) == (409, True)
    site.fleet.let.set()
    assert site.local.await_shutdown(WAIT_S) == "graceful"
    operation = ended(site, outcome)
    result = operation["result"]
    assert (operation["status"], result["mode"], result["run_id"], result["rounds_done"]) == (
        *("succeeded", "graceful", "run-0001"),
        1,
    )
    archive = Path(result["archive"])
    assert (archive.parent, archive.is_file()) == (site.settings.home / "backups", True)
    run = site.store.runs.get("run-0001")
    assert (run.status, run.rounds_done) == (RunStatus.STOPPED, 1)
    assert site.get("/api/model/current")["version"] == "v1.1.1"


def test_without_save_state_there_is_no_archive(make: Make) -> None:
    site = make()
    operation = ended(site, asked(site, "graceful", save_state=False))
    assert operation["result"]["archive"] is None
    assert site.local.await_shutdown(WAIT_S) == "graceful"
    assert not (site.settings.home / "backups").exists()


def test_force_waits_neither_for_the_round_nor_for_a_graceful_end(make: Make) -> None:
    site = make(fleet=LateFleet(held=True))
    site.http.post("/api/training/start")
    assert site.fleet.begun.wait(WAIT_S)
    graceful = asked(site, "graceful")
    again = site.http.post(SHUTDOWN, json={"mode": "graceful"})
    assert (again.status_code, '"force"' in again.json()["cure"]) == (409, True)
    assert ended(site, asked(site, "force"))["status"] == "succeeded"
    assert site.local.await_shutdown(WAIT_S) == "force"
    assert site.get(f"/api/operations/{graceful['operation_id']}")["status"] == "running"


def test_a_long_operation_under_way_is_left_to_the_next_start(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    site = make()
    begun, go_on = threading.Event(), threading.Event()

    def work(_: object) -> JsonObject:
        begun.set()
        assert go_on.wait(WAIT_S)
        return {"done": True}

    monkeypatch.setitem(site.local._operations._kinds, "optimize", OperationKind(work, repeatable=True))
    slow = site.local.submit("optimize", {})
    assert begun.wait(WAIT_S)
    asked(site, "graceful")
    assert site.local.await_shutdown(WAIT_S) == "graceful"
    assert site.store.operations.get(slow.operation_id).status is OperationStatus.RUNNING
    go_on.set()


def test_a_restart_under_way_trains_only_after_the_next_start(make: Make) -> None:
    site = make(fleet=LateFleet(held=True))
    site.http.post("/api/training/start")
    assert site.fleet.begun.wait(WAIT_S)
    restart = site.http.post("/api/training/restart", json={}).json()["operation_id"]
    asked(site, "graceful", save_state=False)
    site.local.await_shutdown(0.2)
    site.fleet.let.set()
    assert site.local.await_shutdown(WAIT_S) == "graceful"
    assert site.local.wait_operation(restart, WAIT_S).status is OperationStatus.SUCCEEDED
    assert site.local.wait(WAIT_S).rounds_done == 0
    assert {task.run_id for task, _ in site.fleet.tasks} == {"run-0001"}
    site.close()
    after = make(system_id="second")
    after.local.wait(WAIT_S)
    run = after.store.runs.get("run-0002")
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)


def test_a_cancelled_shutdown_lets_training_go_on(make: Make) -> None:
    site = make(fleet=LateFleet(held=True))
    site.http.post("/api/training/start")
    assert site.fleet.begun.wait(WAIT_S)
    result = asked(site, "graceful")
    assert site.http.delete(f"/api/operations/{result['operation_id']}").status_code == 202
    assert ended(site, result)["status"] == "cancelled"
    assert site.local.await_shutdown(0) is None
    site.fleet.let.set()
    site.local.wait(WAIT_S)
    site.trained()
    assert site.get("/api/training/status")["status"] == "completed"


def test_what_cannot_be_saved_does_not_go_down(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UsageError("The backup cannot be written.")

    monkeypatch.setattr(local_aggregator, "write_backup", fail)
    site = make().trained()
    operation = ended(site, asked(site, "graceful"))
    assert (operation["status"], operation["error"]["message"]) == ("failed", "The backup cannot be written.")
    assert site.local.await_shutdown(0) is None
    assert site.http.post("/api/training/start").status_code == 202


def test_the_wish_outlasts_a_restart_of_the_aggregator_and_not_of_the_system(make: Make) -> None:
    site = make()
    ended(site, asked(site, "graceful"))
    site.close()
    assert make().local.await_shutdown(0) == "graceful"
    assert make(system_id="second").local.await_shutdown(0) is None


def test_a_shutdown_that_was_interrupted_is_not_taken_up_again(make: Make) -> None:
    site = make(fleet=LateFleet(held=True))
    site.http.post("/api/training/start")
    assert site.fleet.begun.wait(WAIT_S)
    running = asked(site, "graceful")["operation_id"]
    queued = site.store.operations.create("shutdown", {"mode": "force", "save_state": True})[0].operation_id
    site.store.runs.set_status("run-0001", RunStatus.STOPPED)
    after = make(system_id="second")
    for operation_id in (running, queued):
        operation = after.get(f"/api/operations/{operation_id}")
        assert (operation["status"], operation["error"]["code"]) == ("failed", "interrupted")
    assert after.local.await_shutdown(0) is None


def test_an_archive_taken_at_the_end_does_not_shut_down_what_starts_from_it(make: Make, tmp_path: Path) -> None:
    site = make()
    archive = ended(site, asked(site, "graceful"))["result"]["archive"]
    key = site.settings.home / "keys" / "backup.key"
    restored = Site(untar(Path(archive), tmp_path / "restored", key))
    assert [(o["kind"], o["status"]) for o in restored.get("/api/operations")] == [("shutdown", "failed")]
    assert restored.local.await_shutdown(0) is None
    restored.close()


@pytest.mark.parametrize(
    "body", [{}, {"mode": "soon"}, {"mode": "force", "now": 1}, {"mode": "force", "save_state": 2}]
)
def test_a_malformed_wish_is_refused(make: Make, body: JsonObject) -> None:
    site = make()
    assert site.http.post(SHUTDOWN, json=body).status_code == 422
    assert site.get("/api/operations") == []


# --- who hears of it -------------------------------------------------------------------------------------------------


class Aggregator:
    """Gives the answers in its list; errors are raised. After that it says nothing for a while."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def await_shutdown(self, timeout_s: float) -> str | None:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


@pytest.mark.parametrize(("mode", "forced"), [("graceful", False), ("force", True)])
def test_the_watch_outlasts_silence_and_restarts_and_reports_once(mode: str, forced: bool) -> None:
    reports: list[str] = []
    watch = ShutdownWatch(lambda: reports.append("end"), retry_s=0.001)
    aggregator = Aggregator(None, PlacementError("It restarts."), RuntimeError("It died."), None, mode)
    watch.run(aggregator)  # type: ignore[arg-type]
    assert (reports, aggregator.answers, watch.forced) == (["end"], [], forced)


def test_a_system_that_stops_by_itself_reports_no_shutdown() -> None:
    reports: list[str] = []
    watch = ShutdownWatch(lambda: reports.append("end"))

    class Stopping(Aggregator):
        def await_shutdown(self, timeout_s: float) -> str | None:
            watch.stop()
            return super().await_shutdown(timeout_s)

    watch.run(Stopping("graceful"))  # type: ignore[arg-type]
    assert reports == []


def test_the_wish_takes_the_way_of_fedvit_down() -> None:
    def wait_for_the_end() -> None:
        with interruptible():
            threading.Thread(target=end_this_process).start()
            signal.pause()

    with pytest.raises(InterruptedRunError):
        wait_for_the_end()
