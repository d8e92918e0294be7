"""A breach on a running system, its end, and the system shut down over its own API."""

from __future__ import annotations

import hashlib
import json
import os
import select
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Fedvit

from fedvit.store.store import Store
from fedvit.types import OperationStatus, RunStatus

pytestmark = [pytest.mark.ray, pytest.mark.campaign]

INCIDENT = "PB-$(date +%Y%m%d-%H%M%S)"
WAIT_S = 120.0


def await_training(client: httpx.Client, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What training says once it has come that far."""
    deadline_s = time.monotonic() + WAIT_S
    while time.monotonic() < deadline_s:
        results: dict[str, Any] = client.get("/api/training/status").json()
        if reached(results):
            return results
        time.sleep(0.1)
    raise AssertionError(f"training still says {results}")


def rests(report: dict[str, Any]) -> bool:
    return report["status"] != "running"


def check_bundle(report: dict[str, Any], client_id: str) -> None:
    """The bundle is the one in the report, and holds the evidence."""
    content = Path(report["forensic_bundle"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == report["forensic_sha256"]
    with tarfile.open(report["forensic_bundle"]) as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    manifest = json.loads(files.pop("manifest.json"))
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == {
        name: hashlib.sha256(text).hexdigest() for name, text in files.items()
    }
    assert set(files) == {
        f"{name}.jsonl"
        for name in (
            *("audit", "budget_periods", "clients", "contributions", "incident", "ledger", "releases", "runs"),
            *("settings", "tokens", "verification", "versions"),
        )
    }
    assert manifest["unreadable"] == {}
    contributed = [json.loads(line) for line in files["contributions.jsonl"].splitlines()]
    assert contributed[0]["affected_clients"] == [client_id]


def await_end(pid: int) -> None:
    """Return when the process has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended, _, _ = select.select([handle], [], [], WAIT_S)
    os.close(handle)
    assert ended, f"{pid} is still there"


def test_a_breach_is_contained_and_the_system_shut_down(fedvit: Fedvit) -> None:
    fedvit.settings |= {"training.rounds": "500", "privacy.noise_multiplier": "40.0"}
    fedvit.json("up")
    result = json.loads(
        fedvit.call("token", "create", "on call", "--scope", "emergency", "--json", configured=False).stdout
    )
    bearer = {"Authorization": f"Bearer {result['token']}"}
    with httpx.Client(base_url=fedvit.control, timeout=60) as client:
        await_training(client, lambda status: status["rounds_done"] >= 1)
        caught = client.get("/api/clients/status").json()["clients"][0]["client_id"]
        report = {
            "incident_id": INCIDENT,
            "affected_clients": [caught, "client2"],
            "breach_type": "data_exposure",
            "immediate_actions": ["stop_training", "isolate_data"],
        }
        assert client.post("/api/emergency/privacy-breach", json=report).status_code == 401
        answer = client.post("/api/emergency/privacy-breach", json=report, headers=bearer)
        assert answer.status_code == 200, answer.text
        report = answer.json()
        assert [action for action in report["actions"] if not action["done"]] == []
        assert (report["quarantined"], report["unknown_clients"]) == ([caught], ["client2"])
        check_bundle(report, caught)

        rounds_done = await_training(client, rests)["rounds_done"]
        assert client.post("/api/training/start").status_code == 202
        refused = await_training(client, rests)
        assert (refused["status"], refused["rounds_done"]) == ("failed", rounds_done)
        assert f"incident {INCIDENT}" in refused["message"]
        state = client.get("/api/emergency").json()
        assert (state["incident"]["incident_id"], state["quarantined"]) == (INCIDENT, [caught])

        over = {"incident_id": INCIDENT, "justification": "A drill."}
        stood_down = client.post("/api/emergency/stand-down", json=over, headers=bearer).json()
        assert stood_down == {"incident_id": INCIDENT, "ledger_frozen": False, "still_quarantined": [caught]}
        client.post("/api/training/start")
        await_training(client, lambda status: status["rounds_done"] > rounds_done)
        version = client.get("/api/model/versions?limit=1").json()[0]
        assert caught not in version["lineage"]["clients"]
        assert len(version["lineage"]["clients"]) == 5

        pid = json.loads((fedvit.home / "run" / "system.json").read_text())["pid"]
        wish = client.post("/api/system/shutdown", json={"mode": "graceful", "save_state": True})
        assert wish.status_code == 202, wish.text
    await_end(pid)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{fedvit.control}/healthz")
    assert fedvit.json("status", configured=False)["system"] == "down"
    with Store.open(fedvit.home) as store:
        operation = store.operations.get(wish.json()["operation_id"])
        run = store.runs.latest()
    assert (operation.kind, operation.status) == ("shutdown", OperationStatus.SUCCEEDED)
    assert operation.result is not None
    assert run is not None
    assert (run.status, run.rounds_done) == (RunStatus.STOPPED, operation.result["rounds_done"])
    archive = Path(operation.result["archive"])
    assert archive.parent == fedvit.home.resolve() / "backups"
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == operation.result["sha256"]
