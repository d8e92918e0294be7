"""The audit trail of the control API."""

from __future__ import annotations

import json
import logging
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from scoped_api import BODY, Anything, ScopedApi

from fedvit.access.identity import Identity, Scope
from fedvit.store.records import AuditFacts
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.types import utc_now
from serve_apps.control.http import request_log
from serve_apps.control.http.access import Note, requires
from serve_apps.control.http.audit import LINES_AT_ONCE, LINES_PER_S, MAX_MERGED, AuditQuota
from serve_apps.logs import log_to_file

# --- the audit trail -------------------------------------------------------------------------------------------------


def test_every_change_is_audited_with_before_and_after(guarded: ScopedApi) -> None:
    headers = {"X-Request-ID": "r-1"}
    guarded.ask("POST", "/api/clients/register", "device", json=BODY, headers=headers)
    guarded.ask("DELETE", "/api/clients/truck-7", "operator")
    guarded.ask("DELETE", "/api/clients/nobody", "operator")
    guarded.ask("POST", "/api/training/stop", "viewer")
    guarded.ask("POST", "/api/training/stop")
    guarded.ask("GET", "/api/training/status", "viewer")
    lines = guarded.ask("GET", "/api/audit", "admin").json()
    assert [(line["action"], line["status"]) for line in lines] == [
        ("POST /api/clients/register", 201),
        ("DELETE /api/clients/{client_id}", 200),
        ("DELETE /api/clients/{client_id}", 404),
        ("POST /api/training/stop", 403),
    ]
    assert [line["scopes"] for line in lines] == [["device"], ["operator"], ["operator"], ["viewer"]]
    assert (lines[0]["request_id"], lines[0]["source"], lines[0]["params"]) == ("r-1", "testclient", {"body": BODY})
    assert lines[0]["before"] is None
    assert (lines[1]["before"]["active"], lines[1]["after"]["active"]) == (True, False)
    assert lines[1]["params"] == {"path": {"client_id": "truck-7"}}
    assert guarded.ask("GET", "/api/audit?limit=1", "admin").json() == lines[-1:]
    assert guarded.ask("GET", "/api/audit?after=2&limit=1", "admin").json() == lines[2:3]
    assert guarded.store.audit.verify() == 4


def test_secrets_reach_neither_trail_nor_log_nor_answer(guarded: ScopedApi, tmp_path: Path) -> None:
    logger = logging.getLogger("fedvit.control")
    log_to_file(logger, tmp_path / "logs" / "control.log")
    secret, other = guarded.tokens[Scope.OPERATOR], "hunter2-hunter2"
    jwt = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.c2ln"
    capabilities = {"api_token": other, "note": f"Bearer {secret}", secret: 1, "deep": [{"Password": other}, jwt]}
    try:
        body = BODY | {"capabilities": capabilities}
        answer = guarded.ask(
            "POST", f"/api/clients/register?x={secret}", "operator", json=body, headers={"X-Request-ID": "r-2"}
        )
        unknown = guarded.ask("POST", f"/api/{secret}", "operator")
        wrong = guarded.ask("POST", "/api/clients/register", "operator", json={secret: 1})
    finally:
        logger.handlers[0].close()
        logger.removeHandler(logger.handlers[0])
        logger.propagate = True
    assert [a.status_code for a in (answer, unknown, wrong)] == [201, 404, 422]
    log = (tmp_path / "logs" / "control.log").read_text()
    trail = json.dumps([entry.facts.params for entry in guarded.store.audit.entries()])
    line = json.loads(log.splitlines()[0])
    assert (line["request_id"], line["route"], line["status"]) == ("r-2", "/api/clients/register", 201)
    assert line["actor"].endswith(":operator")
    for text in (log, trail):
        for hidden in (secret.split("_", 2)[-1], jwt):
            assert hidden not in text
    assert other not in trail + log
    assert trail.count("[redacted]") >= 5


def test_refusals_do_not_fill_the_log(
    guarded: ScopedApi, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "REFUSALS_AT_ONCE", 5)
    monkeypatch.setattr(request_log, "REFUSALS_PER_S", 1e-9)
    with ScopedApi(guarded.store.home / "other", mode="tokens") as api, caplog.at_level(logging.INFO, "fedvit.control"):
        for _ in range(20):
            api.ask("GET", "/api/audit")
        api.ask("POST", "/api/training/stop", "operator")
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    assert [record.status for record in lines] == [401] * 5 + [202]  # type: ignore[attr-defined]


def test_the_trail_stays_small_whatever_is_sent(site: ScopedApi) -> None:
    @site.api.post("/api/anything", dependencies=[requires(Scope.OPERATOR)])
    def anything(body: Anything, note: Note) -> str:
        note.before, note.after = float("inf"), {"at": utc_now()}
        return "ok"

    for value in ("x" * 100_000, ["x" * 400] * 1000, {str(i): i for i in range(1000)}, "a\x00b"):
        assert site.ask("POST", "/api/anything", content=json.dumps({"value": value}).encode()).status_code == 200
    for entry in site.store.audit.entries():
        assert len(json.dumps(entry.facts.params)) < 10_000
        assert entry.facts.before == "inf"
    assert site.store.audit.verify() == 4


def test_a_change_that_could_not_be_audited_says_so(site: ScopedApi) -> None:
    site.ask("POST", "/api/training/start")
    with closing(sqlite3.connect(site.store.home / "state.db")) as connection:
        connection.execute("DELETE FROM audit")
        connection.commit()
    answer = site.ask("POST", "/api/training/start")
    assert (answer.status_code, answer.json()["type"]) == (502, "/problems/integrity")
    assert site.aggregator.starts == 2  # A broken audit trail must not prevent an emergency stop.
    assert site.ask("GET", "/api/training/status").status_code == 200


# --- the quota -------------------------------------------------------------------------------------------------------


def test_a_device_that_calls_without_end_adds_few_lines_and_none_of_its_calls_is_lost(guarded: ScopedApi) -> None:
    calls = LINES_AT_ONCE + 50
    with guarded.client:
        for _ in range(calls):
            guarded.clock.advance(0.05)
            assert guarded.ask("POST", "/api/training/stop", "device").status_code == 403
        lines = guarded.ask("GET", "/api/audit?limit=1000", "admin").json()
        assert len(lines) == LINES_AT_ONCE
    # The end of the application writes what is left.
    last = guarded.store.audit.latest(1)[0].facts
    assert last.params == {"merged": 50, "calls": {"POST /api/training/stop 403": 50}}
    assert (last.actor, last.action) == (lines[-1]["actor"], "POST /api/training/stop")
    assert guarded.store.audit.verify() == LINES_AT_ONCE + 1


def test_the_calls_of_a_viewer_are_merged_and_those_of_an_operator_never(guarded: ScopedApi) -> None:
    for _ in range(LINES_AT_ONCE + 20):
        guarded.clock.advance(1)
        assert guarded.ask("POST", "/api/training/stop", "viewer").status_code == 403
        assert guarded.ask("POST", "/api/training/stop", "operator").status_code == 202
    scopes = [entry.facts.scopes for entry in guarded.store.audit.entries()]
    assert scopes.count(("operator",)) == LINES_AT_ONCE + 20
    assert scopes.count(("viewer",)) == LINES_AT_ONCE


def test_merged_lines_are_written_when_their_actor_has_a_line_again_and_survive_a_broken_store(tmp_path: Path) -> None:
    clock, device = ManualClock(), Identity("token:1", frozenset({Scope.DEVICE}), authenticated=True)
    facts = AuditFacts("token:1", ("device",), "here", "r", "POST /x", {}, None, None, 201)
    with Store.open(tmp_path) as store:
        quota = AuditQuota(store, clock)
        for _ in range(LINES_AT_ONCE + 3):
            quota.append(facts, device)
        quota.flush()
        assert len(store.audit.entries()) == LINES_AT_ONCE
        clock.advance(1 / LINES_PER_S)
        append = store.audit.append
        store.audit.append = broken  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            quota.flush()
        quota.append(facts, device)
        store.audit.append = append  # type: ignore[method-assign]
        quota.flush(last=True)
        assert store.audit.latest(1)[0].facts.params == {"merged": 4, "calls": {"POST /x 201": 4}}
        quota.flush(last=True)
        assert len(store.audit.entries()) == LINES_AT_ONCE + 1


def broken(facts: AuditFacts) -> int:
    raise OSError("full")


def test_many_actors_do_not_fill_the_memory(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        quota = AuditQuota(store, ManualClock())
        for number in range(MAX_MERGED + 10):
            actor = f"token:{number}"
            identity = Identity(actor, frozenset({Scope.DEVICE}), authenticated=True)
            facts = AuditFacts(actor, ("device",), "here", "r", "POST /x", {}, None, None, 201)
            store.audit.append = lambda _: 0  # type: ignore[method-assign]
            for _ in range(LINES_AT_ONCE + 1):
                quota.append(facts, identity)
        written: list[AuditFacts] = []
        store.audit.append = lambda facts: written.append(facts) or 0  # type: ignore[method-assign,func-returns-value]
        quota.flush(last=True)
        assert len(written) == MAX_MERGED + 1
        assert written[-1].params["merged"] == 10
