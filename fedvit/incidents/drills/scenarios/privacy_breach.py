"""Somebody tries tokens until the alert fires, and a client's data is exposed: stop, isolate, keep evidence, go on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx

from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.site import CONTROL, Site
from fedvit.store.store import Store

SECTION = "Privacy Breach Response"
BURST = 5


def play(course: Course) -> None:
    """Knock with bad tokens; report the breach; see it contained; stand down."""
    site = course.site
    victim = min(
        c["client_id"] for c in site.get("/api/clients/status?limit=1000")["clients"] if c["kind"] == "virtual"
    )
    course.inject("requests with tokens that nobody made")
    course.detect(meanwhile=_knock)
    token = site.tokens["emergency"]
    told = course.follow(SECTION, r"\"rollback_model\"", emergency_token=token, client_id=victim).json()
    for action in told["actions"]:
        course.say(f"  {action['action']}: {'done' if action['done'] else 'not done'}: {action['detail']}")
    _contained(course, told, victim)
    course.follow(SECTION, r"'\.frozen'")
    course.follow(SECTION, r"quarantine_reason", client_id=victim)
    _nothing_is_charged(course)
    course.follow(SECTION, r"stand-down", emergency_token=token, incident_id=told["incident_id"])
    course.check("the ledger is free", lambda: site.get("/api/privacy/budget")["frozen"] is None)
    course.follow(SECTION, r"/reinstate", client_id=victim)
    course.check("the client is back", lambda: site.get(f"/api/clients/{victim}")["quarantined_at"] is None)
    done = site.get("/api/training/status")["rounds_done"]
    course.follow(SECTION, r"/api/training/start")
    site.training(lambda now: now["rounds_done"] > done, "rounds are committed again")
    course.clear()


def _knock() -> None:
    for _ in range(BURST):
        headers = {"Authorization": "Bearer fvt_000000000000_stolen"}
        httpx.get(f"{CONTROL}/api/privacy/history", headers=headers, timeout=30)


def _contained(course: Course, told: dict[str, Any], victim: str) -> None:
    site = course.site
    missed = {action["action"] for action in told["actions"] if not action["done"]}
    # There is no model to go back to that it did not contribute to: the answer says so, and changes nothing.
    course.check("what can be done is done", lambda: missed <= {"rollback_model"})
    if missed:
        course.notes.append("no release without the client exists, so the model was not rolled back")
    course.check("the client is isolated", lambda: told["quarantined"] == [victim])
    frozen = site.get("/api/privacy/budget")["frozen"]
    course.check("the ledger is frozen", lambda: frozen["incident_id"] == told["incident_id"])
    site.training(lambda now: now["phase"] in ("resting", "idle"), "training rests")
    bundle = site.checkout / Path(told["forensic_bundle"])
    digest = hashlib.sha256(bundle.read_bytes()).hexdigest()
    course.check("the evidence is what was promised", lambda: digest == told["forensic_sha256"])


def _nothing_is_charged(course: Course) -> None:
    """A start must not get past a frozen ledger."""
    site = course.site
    before = _ledger_lines(site)
    site.ask("/api/training/start", "POST")
    site.training(lambda now: now["phase"] in ("resting", "idle"), "training rests")
    course.check("nothing is charged while it is frozen", lambda: _ledger_lines(site) == before)


def _ledger_lines(site: Site) -> int:
    with Store.open(site.home) as store:
        return store.ledger.verify()


DRILL = Drill(
    "privacy-breach",
    "requests with bad tokens, then a breach is reported",
    (Stage("", Alert("UnauthorizedAccess"), play, may_lose_updates=True),),
)
