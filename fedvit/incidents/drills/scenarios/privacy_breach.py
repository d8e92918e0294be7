"""Requests with invalid tokens raise the alert, then a breach is reported: contain it, keep evidence, continue."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx

from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.system import CONTROL, DrillSystem
from fedvit.store.store import Store

SECTION = "Privacy Breach Response"
BURST = 5


def play(run: StageRun) -> None:
    """Send invalid tokens, report the breach, check that it is contained, and stand down."""
    system = run.system
    victim = min(
        c["client_id"] for c in system.get("/api/clients/status?limit=1000")["clients"] if c["kind"] == "virtual"
    )
    run.inject("requests with invalid tokens")
    run.detect(meanwhile=_send_invalid_tokens)
    token = system.tokens["emergency"]
    report = run.follow(SECTION, r"\"rollback_model\"", emergency_token=token, client_id=victim).json()
    for action in report["actions"]:
        run.say(f"  {action['action']}: {'done' if action['done'] else 'not done'}: {action['detail']}")
    _check_contained(run, report, victim)
    run.follow(SECTION, r"'\.frozen'")
    run.follow(SECTION, r"quarantine_reason", client_id=victim)
    _check_frozen(run)
    run.follow(SECTION, r"stand-down", emergency_token=token, incident_id=report["incident_id"])
    run.check("the ledger is free", lambda: system.get("/api/privacy/budget")["frozen"] is None)
    run.follow(SECTION, r"/reinstate", client_id=victim)
    run.check("the client is back", lambda: system.get(f"/api/clients/{victim}")["quarantined_at"] is None)
    done = system.rounds_done()
    run.follow(SECTION, r"/api/training/start")
    system.wait_for_rounds(done, "rounds are committed again")
    run.clear()


def _send_invalid_tokens() -> None:
    for _ in range(BURST):
        headers = {"Authorization": "Bearer fvt_000000000000_stolen"}
        httpx.get(f"{CONTROL}/api/privacy/history", headers=headers, timeout=30)


def _check_contained(run: StageRun, report: dict[str, Any], victim: str) -> None:
    system = run.system
    missed = {action["action"] for action in report["actions"] if not action["done"]}
    # The client may have contributed to every release; then the report says that no rollback was possible.
    run.check("what can be done is done", lambda: missed <= {"rollback_model"})
    if missed:
        run.notes.append("no release without the client exists, so the model was not rolled back")
    run.check("the client is isolated", lambda: report["quarantined"] == [victim])
    frozen = system.get("/api/privacy/budget")["frozen"]
    run.check("the ledger is frozen", lambda: frozen["incident_id"] == report["incident_id"])
    system.wait_for_rest()
    bundle = system.checkout / Path(report["forensic_bundle"])
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    run.check("the evidence is what was promised", lambda: digest == report["forensic_sha256"])


def _check_frozen(run: StageRun) -> None:
    """Start training, and check that nothing is charged to a frozen ledger."""
    system = run.system
    before = _ledger_lines(system)
    system.request("/api/training/start", "POST")
    system.wait_for_rest()
    run.check("nothing is charged while it is frozen", lambda: _ledger_lines(system) == before)


def _ledger_lines(system: DrillSystem) -> int:
    with Store.open(system.home) as store:
        return store.ledger.verify()


DRILL = Drill(
    "privacy-breach",
    "requests with bad tokens, then a breach is reported",
    (Stage("", ExpectedAlert("UnauthorizedAccess"), play, may_lose_updates=True),),
)
