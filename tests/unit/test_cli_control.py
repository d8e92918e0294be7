"""The command line over a real control API: a command for each route, confirmation, dry runs, waiting."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_client import URL, Recorder, SentError, Through, route_of
from control_system import TARGET, WAIT_S, HeldFleet, System
from test_client_routes import CALLS
from typer.testing import CliRunner, Result

from fedvit.api.system import OperationView
from fedvit.cli import api_session
from fedvit.cli.main import app
from fedvit.testing.doubles import FakeFleet, PointModel

# Routes without a command: vehicles fetch releases and tasks and upload, probes check replicas, Alertmanager posts.
FOR_MACHINES = {
    "GET /api/model/release",
    "GET /api/model/blobs/{digest}",
    "GET /api/clients/{client_id}/task",
    "GET /api/clients/{client_id}/task/weights",
    "PUT /api/clients/{client_id}/histograms/{run_id}/{round_index}",
    "PUT /api/clients/{client_id}/sessions/{session}/{phase}",
    "PUT /api/clients/{client_id}/updates/{run_id}/{round_index}",
    "GET /healthz",
    "POST /api/incidents/alerts",
}
WHY = ("--justification", "The board has agreed to it.")
HARMLESS = {
    "clients list": "GET /api/clients/status",
    "clients show truck-7": "GET /api/clients/{client_id}",
    "clients register truck-7": "POST /api/clients/register",
    "clients validate truck-7 --bad": "POST /api/clients/{client_id}/validate",
    f"clients reinstate truck-7 {WHY[0]} ok": "POST /api/clients/{client_id}/reinstate",
    "clients heartbeat truck-7": "POST /api/clients/{client_id}/heartbeat",
    "clients receipt truck-7 run-0001 4": "GET /api/clients/{client_id}/updates/{run_id}/{round_index}",
    "clients connectivity": "GET /api/clients/connectivity",
    "clients data-quality": "GET /api/clients/data-quality",
    "training status": "GET /api/training/status",
    "training start": "POST /api/training/start",
    "training config": "GET /api/training/config",
    "training config --min-clients 3": "POST /api/training/config",
    "aggregation mode": "GET /api/aggregation/mode",
    "aggregation mode asynchronous --staleness-tolerance 5": "POST /api/aggregation/mode",
    "model info": "GET /api/model/info",
    "model current": "GET /api/model/current",
    "model list": "GET /api/model/versions",
    "model optimize --strategy quantization --target-latency 50": "POST /api/edge/optimize",
    "privacy show": "GET /api/privacy/budget",
    "privacy history": "GET /api/privacy/history",
    "privacy periods": "GET /api/privacy/periods",
    "backup-channel status": "GET /api/communication/backup",
    "backup-channel enable": "POST /api/communication/enable-backup",
    "backup-channel disable": "POST /api/communication/disable-backup",
    "drift": "GET /api/monitoring/data-drift",
    "metrics": "GET /metrics",
    "emergency status": "GET /api/emergency",
    "incident list": "GET /api/incidents",
    "incident show INC-2026-1124-001": "GET /api/incidents/{incident_id}",
    "incident note INC-2026-1124-001 cable": "POST /api/incidents/{incident_id}/notes",
    "incident report INC-2026-1124-001": "GET /api/incidents/{incident_id}/report",
    "operation list": "GET /api/operations",
    "operation show op-1": "GET /api/operations/{operation_id}",
    "operation cancel op-1": "DELETE /api/operations/{operation_id}",
    "operation wait op-1": "GET /api/operations/{operation_id}",
    "audit-log show": "GET /api/audit",
}
DANGEROUS = {
    "clients remove truck-7": "DELETE /api/clients/{client_id}",
    "training stop": "POST /api/training/stop",
    "training restart": "POST /api/training/restart",
    "model rollback v1.1.2": "POST /api/model/rollback",
    "model switch edge_optimized": "POST /api/model/switch",
    "model retrain fine_tune": "POST /api/model/retrain",
    f"privacy reset-budget 1.0 {WHY[0]} ok": "POST /api/privacy/reset-budget",
    "privacy approve r-1": "POST /api/privacy/reset-budget/{request_id}/approve",
    "emergency privacy-breach PB-1 --client truck-7": "POST /api/emergency/privacy-breach",
    f"emergency stand-down PB-1 {WHY[0]} over": "POST /api/emergency/stand-down",
    "down": "POST /api/system/shutdown",
}
# Reads routes of other commands, too.
COMPOSED = {"health-check": "GET /api/system/health"}
COMMANDS = HARMLESS | DANGEROUS
CHANGING = {command: route for command, route in COMMANDS.items() if not route.startswith("GET ")}


def fedvit(*words: str, url: str | None = URL, answer: str | None = None) -> Result:
    more = [] if url is None else ["--url", url]
    return CliRunner().invoke(app, [*words, *more], input=answer)


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Send the command line's requests through a transport."""
    return lambda transport: monkeypatch.setattr(api_session, "TRANSPORT", transport)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is a terminal."""
    monkeypatch.setattr(api_session, "is_terminal", lambda: True)


@pytest.fixture
def make(tmp_path: Path, reach: Callable[[Any], None]) -> Iterator[Callable[..., tuple[System, Through]]]:
    """A system that the command line reaches at ``URL``."""
    systems = []

    def build(fleet: FakeFleet | None = None) -> tuple[System, Through]:
        fleet = fleet or FakeFleet(TARGET)
        systems.append(System(tmp_path / "home", PointModel(TARGET), fleet, {"max_accuracy_drop": 0.5}, 8.0))
        through = Through(systems[-1].http)
        reach(through)
        return systems[-1], through

    yield build
    for system in systems:
        system.close()


# --- every command ---------------------------------------------------------------------------------------------------


def test_every_route_has_a_command() -> None:
    routes = {*COMMANDS.values(), *COMPOSED.values(), *FOR_MACHINES}
    assert {route_of(call.request, routes) for call in CALLS} == routes


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_calls_its_route(command: str, reach: Callable[[Any], None]) -> None:
    reach(Recorder())
    result = fedvit(*command.split(), *(["--yes"] if command in DANGEROUS else []))
    assert isinstance(result.exception, SentError), result.output
    assert route_of(result.exception.request, set(COMMANDS.values())) == COMMANDS[command]


@pytest.mark.parametrize("command", DANGEROUS)
def test_a_dangerous_change_must_be_confirmed(command: str, reach: Callable[[Any], None]) -> None:
    reach(Recorder())
    result = fedvit(*command.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: This must be confirmed")


def test_a_dry_run_changes_nothing(make: Callable[..., tuple[System, Through]]) -> None:
    system, through = make()
    for command in CHANGING:
        through.sent.clear()
        result = fedvit(*command.split(), "--dry-run", *(["--yes"] if command in DANGEROUS else []))
        assert through.sent, command
        assert through.changes == [], command
        assert result.exit_code == 0 or result.stderr.startswith("Error: "), command
    assert system.store.audit.entries() == []


# --- what a user sees ------------------------------------------------------------------------------------------------


def printed(result: Result, status: int = 0) -> Any:
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def test_a_rollback_is_previewed_confirmed_and_done(
    make: Callable[..., tuple[System, Through]], terminal: None
) -> None:
    system, through = make()
    system.trained()
    preview = printed(fedvit("model", "rollback", "v1.1.2", "--force", "--dry-run", "--json"))
    assert preview["request"] == {
        "method": "POST",
        "url": f"{URL}/api/model/rollback",
        "body": {"version": "v1.1.2", "force": True},
    }
    present = preview["present"]
    assert (present["current"]["version"], present["target"]["version"]) == ("v1.1.4", "v1.1.2")
    assert present["target"]["accuracy"] < present["current"]["accuracy"]
    declined = fedvit("model", "rollback", "v1.1.2", answer="n\n")
    assert declined.exit_code == 1
    assert "Roll the whole fleet back to v1.1.2?" in declined.stderr
    assert "Nothing was sent." in declined.stderr
    assert through.changes == []
    assert fedvit("model", "rollback", "v1.1.2", answer="y\n").exit_code == 0
    assert through.changes == ["POST /api/model/rollback"]
    assert printed(fedvit("model", "current", "--json"))["derived_from"] == "v1.1.2"


def test_a_dry_run_fails_where_the_change_would(make: Callable[..., tuple[System, Through]]) -> None:
    make()[0].trained()
    result = fedvit("model", "rollback", "v9.9.9", "--dry-run")
    assert result.exit_code == 2
    assert "no model version 'v9.9.9'" in result.stderr


def test_a_dry_run_reads_well(make: Callable[..., tuple[System, Through]]) -> None:
    make()
    result = fedvit("training", "config", "--min-clients", "3", "--if-match", "0", "--dry-run")
    assert result.exit_code == 0
    assert f"POST {URL}/api/training/config" in result.stdout
    assert "min_clients=3" in result.stdout
    assert '"0"' in result.stdout
    assert printed(fedvit("training", "config", "--json"))["revision"] == 0


def test_long_work_is_followed_or_not(make: Callable[..., tuple[System, Through]]) -> None:
    system, _ = make()
    system.trained()
    ended = printed(fedvit("model", "optimize", "--strategy", "quantization", "--target-latency", "50", "--json"))
    assert (ended["status"], ended["result"]["target_met"]) == ("succeeded", True)
    begun = printed(fedvit("model", "retrain", "fine_tune", "--yes", "--no-wait", "--json"))
    assert begun["kind"] == "retrain"
    assert printed(fedvit("operation", "wait", begun["operation_id"], "--json"))["status"] == "succeeded"
    system.local.wait(WAIT_S)
    listed = printed(fedvit("operation", "list", "--status", "succeeded", "--json"))
    assert [each["kind"] for each in listed] == ["retrain", "optimize"]
    shown = fedvit("operation", "show", begun["operation_id"])
    assert begun["operation_id"] in shown.stdout


def test_work_that_does_not_succeed_is_status_1(make: Callable[..., tuple[System, Through]]) -> None:
    fleet = HeldFleet()
    system, _ = make(fleet)
    printed(fedvit("training", "start", "--json"))
    assert fleet.begun.wait(WAIT_S)
    name = printed(fedvit("training", "restart", "--yes", "--no-wait", "--json"))["operation_id"]
    late = printed(fedvit("operation", "wait", name, "--timeout", "0", "--json"), status=1)
    assert late["error"] == "still-running"
    printed(fedvit("operation", "cancel", name, "--json"))
    system.local.wait_operation(name, WAIT_S)
    assert printed(fedvit("operation", "wait", name, "--json"), status=1)["status"] == "cancelled"
    fleet.let.set()
    assert printed(fedvit("training", "stop", "--yes", "--json"))["phase"] == "resting"


def test_clients_are_listed_registered_and_removed(make: Callable[..., tuple[System, Through]]) -> None:
    make()
    added = printed(fedvit("clients", "register", "truck-7", "--capabilities", '{"camera": "front"}', "--json"))
    assert (added["client_id"], added["active"]) == ("truck-7", True)
    listed = fedvit("clients", "list")
    assert "truck-7" in listed.stdout
    assert "6 clients, 6 active" in listed.stdout
    assert printed(fedvit("clients", "remove", "truck-7", "--yes", "--json"))["active"] is False
    assert printed(fedvit("clients", "list", "--limit", "1", "--json"))["active"] == 5
    assert printed(fedvit("clients", "remove", "nobody", "--yes", "--json"), status=2)["error"] == "not-found"
    bad = fedvit("clients", "register", "truck-8", "--capabilities", "front")
    assert (bad.exit_code, "no JSON object" in bad.stderr) == (2, True)


def test_a_stale_revision_is_one_sentence(make: Callable[..., tuple[System, Through]]) -> None:
    make()
    assert printed(fedvit("training", "config", "--wait-timeout", "30", "--if-match", "0", "--json"))["revision"] == 1
    stale = fedvit("training", "config", "--wait-timeout", "40", "--if-match", "0")
    assert stale.exit_code == 2
    assert "Traceback" not in stale.output


def test_every_reading_is_one_json_document_or_text(make: Callable[..., tuple[System, Through]]) -> None:
    system, _ = make()
    system.trained()
    readings = [command for command, route in HARMLESS.items() if route.startswith("GET ")]
    for command in readings:
        named = command.replace("truck-7", "vehicle-0001")
        if "op-1" not in command and "INC-" not in command:
            printed(fedvit(*named.split(), "--json"))
            assert fedvit(*named.split()).exit_code == 0, command


# --- which system, and which token -----------------------------------------------------------------------------------


def test_the_url_comes_from_the_option_then_from_what_runs_here_then_from_the_environment(
    reach: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(Recorder())
    monkeypatch.setenv("FEDVIT_URL", "http://far.example:1")

    def asked(*words: str) -> str:
        error = fedvit("training", "status", *words, url=None).exception
        assert isinstance(error, SentError)
        return str(error.request.url.host)

    assert asked() == "far.example"
    assert asked("--url", "http://near.example") == "near.example"
    nothing = fedvit("training", "status", "--home", str(tmp_path), url=None)
    assert (nothing.exit_code, "Nothing runs on" in nothing.stderr) == (2, True)


def test_the_token_comes_from_the_environment(reach: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    reach(Recorder())
    monkeypatch.setenv("FEDVIT_TOKEN", "fvt_secret\n")
    error = fedvit("training", "status").exception
    assert isinstance(error, SentError)
    assert error.request.headers["authorization"] == "Bearer fvt_secret"


def test_a_refused_token_names_the_variable_to_set(
    make: Callable[..., tuple[System, Through]], monkeypatch: pytest.MonkeyPatch
) -> None:
    make()
    monkeypatch.setenv("FEDVIT_TOKEN", "fvt_unknown_token")
    refused = fedvit("training", "status")
    assert refused.exit_code == 2
    assert "Set FEDVIT_TOKEN" in refused.stderr


@pytest.mark.parametrize("reports_its_end", [True, False])
def test_a_shutdown_is_over_when_the_api_answers_no_more(reach: Callable[[Any], None], reports_its_end: bool) -> None:
    operation = dict.fromkeys(OperationView.model_fields) | {
        **{"operation_id": "op-1", "kind": "shutdown", "status": "running", "progress": 0.5, "stage": "saving"},
        **{"params": {}, "created_at": "2026-01-31T03:00:00Z", "cancel_requested": False},
    }
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.path}")
        if request.method == "POST":
            return httpx.Response(202, json=operation)
        if reports_its_end and request.url.path != "/healthz":
            return httpx.Response(200, json={**operation, "status": "succeeded"})
        return httpx.Response(404, text="Path not found")

    reach(httpx.MockTransport(answer))
    assert printed(fedvit("down", "--yes", "--json")) == {"stopped": True, "operation_id": "op-1"}
    assert asked == ["POST /api/system/shutdown", "GET /api/operations/op-1", "GET /healthz"]


def test_down_signals_the_process_of_a_state_folder_unless_an_api_is_named(
    reach: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reach(Recorder())
    home = ("--home", str(tmp_path))
    assert printed(fedvit("down", "--json", *home, url=None)) == {"stopped": False}
    assert "Nothing runs on" in fedvit("down", "--mode", "force", "--yes", *home, url=None).stderr
    monkeypatch.setenv("FEDVIT_URL", "http://far.example:1")
    assert fedvit("down", url=None).exit_code == 2, "it must be confirmed"
    error = fedvit("down", "--yes", "--no-save-state", url=None).exception
    assert isinstance(error, SentError)
    assert error.request.url.host == "far.example"
    assert json.loads(error.request.content) == {"mode": "graceful", "save_state": False}
    assert printed(fedvit("down", "--json", *home, url=None)) == {"stopped": False}


def test_a_state_folder_and_its_system_answer_alike(
    make: Callable[..., tuple[System, Through]], tmp_path: Path
) -> None:
    make()[0].trained()
    home = ("--home", str(tmp_path / "home"), "--json")
    stored, served = (
        printed(fedvit("model", "list", "--json", *words, url=url)) for words, url in ((home, None), ((), URL))
    )
    assert [version["version"] for version in stored] == [version["version"] for version in served]
    assert [version["version"] for version in stored if version["current"]] == ["v1.1.4"]
    stored = printed(fedvit("privacy", "show", *home, url=None))
    served = printed(fedvit("privacy", "show", "--json"))
    assert stored["ledger_entries"] > 0
    assert served["epsilon_spent"] == stored["epsilon_spent"]
    assert set(served) <= set(stored)


@pytest.fixture
def announced(make: Callable[..., tuple[System, Through]], tmp_path: Path) -> Iterator[System]:
    """A system that looks as if `fedvit up` had left it running."""
    system, _ = make()
    home = tmp_path / "home"
    (home / "run").mkdir(exist_ok=True)
    facts = {"pid": 1, "control": URL, "inference": "http://127.0.0.1:9", "edges": [], "dashboard": None}
    (home / "run" / "system.json").write_text(json.dumps(facts))
    with (home / "system.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield system


def test_training_on_a_running_system_is_followed(announced: System, tmp_path: Path) -> None:
    done = printed(fedvit("training", "run", "--home", str(tmp_path / "home"), "--json", url=None))
    assert (done["status"], done["rounds_done"]) == ("completed", 4)
    facts = printed(fedvit("status", "--home", str(tmp_path / "home"), "--json", url=None))
    assert (facts["system"], facts["training"]) == ("ok", "completed")
    assert (facts["rounds_done"], facts["rounds_total"]) == (4, 4)
    assert facts["release"] == "v1.1.4"
    assert facts["epsilon_spent"] > 0
    health = printed(fedvit("health-check", "--home", str(tmp_path / "home"), "--json", url=None), status=1)
    assert health["control"] == "ok"
    assert health["inference"].startswith("no answer")
