"""A privacy breach and its end over the API: every effect as a second request, or the state, shows it."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from incident_site import BREACH, WAIT_S, JsonObject, LateFleet, Site

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.errors import LedgerFrozenError, PlacementError
from fedvit.incidents.forensics import NOT_TOLD_APART
from fedvit.ports import Charge
from fedvit.store.records import Token
from fedvit.types import RunStatus, utc_now

LITERAL = "PB-$(date +%Y%m%d-%H%M%S)"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "home")
    yield site
    site.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "home", LateFleet(held=True))
    yield site
    site.close()


def action(report: JsonObject, name: str) -> JsonObject:
    result: JsonObject = next(taken for taken in report["actions"] if taken["action"] == name)
    return result


def bundle(report: JsonObject) -> dict[str, list[JsonObject]]:
    """The files of a bundle, each checked against the manifest."""
    content = Path(report["forensic_bundle"]).read_bytes()
    assert hashlib.sha256(content).hexdigest() == report["forensic_sha256"]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    manifest = json.loads(files.pop("manifest.json"))
    assert set(manifest["files"]) == set(files)
    for name, text in files.items():
        assert manifest["files"][name] == {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in files.items()}


# --- what always happens ---------------------------------------------------------------------------------------------


def test_a_breach_in_the_middle_of_a_round_contains_everything(held: Site) -> None:
    bound = Token("0" * 12, "truck", "h" * 64, ("device",), utc_now(), client_id="vehicle-0001")
    held.store.tokens.add(bound)
    held.http.post("/api/training/start")
    assert held.fleet.begun.wait(WAIT_S)
    result = held.breach("vehicle-0001", "nobody")
    assert [taken["action"] for taken in result["actions"]] == [
        *("freeze_ledger", "stop_training", "isolate_data", "revoke_credentials", "forensic_bundle"),
    ]
    assert all(taken["done"] for taken in result["actions"])
    assert (result["quarantined"], result["unknown_clients"]) == (["vehicle-0001"], ["nobody"])
    assert (result["revoked_tokens"], result["rolled_back_to"], result["ledger_frozen"]) == (["0" * 12], None, True)
    assert "Only when asked for: rollback_model" in result["policy"]
    assert held.store.tokens.get("0" * 12).revoked_at is not None

    held.fleet.let.set()
    progress = held.local.wait(WAIT_S)
    assert (progress.status, progress.rounds_done) == (RunStatus.STOPPED, 1)
    assert held.http.get("/api/model/current").status_code == 404
    state = held.get("/api/emergency")
    assert (state["incident"]["incident_id"], state["incident"]["by"]) == ("PB-1", held.actor)
    assert (state["incident"]["reason"], state["quarantined"]) == ("data_exposure", ["vehicle-0001"])
    held.trained()
    status = held.get("/api/training/status")
    assert (status["status"], status["rounds_done"]) == ("failed", 1)
    assert "incident PB-1: data_exposure" in status["message"]
    for path in ("/api/training/restart", "/api/model/retrain"):
        refused = held.http.post(path, json={"strategy": "full_retrain"} if "retrain" in path else {})
        assert (refused.status_code, refused.json()["type"]) == (409, "/problems/ledger-frozen")


def test_the_bundle_holds_the_evidence_and_no_secret(site: Site) -> None:
    site.trained()
    site.store.budget.grant(9.0, "The officer approved it today.", "token:a:Ana", None)
    result = site.breach("vehicle-0001", incident=LITERAL)
    path = Path(result["forensic_bundle"])
    assert path.parent == site.settings.home / "forensics"
    assert path.name.startswith("PB-_date_Y_m_d-_H_M_S-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p for p in path.parent.iterdir() if p != path] == []
    files = bundle(result)
    assert [line["action"] for line in files["audit.jsonl"]] == ["POST /api/training/start"]
    assert [line["sequence"] for line in files["ledger.jsonl"]] == list(range(1, 17))
    assert files["ledger.jsonl"][1]["prev_hash"] == files["ledger.jsonl"][0]["hash"]
    assert [(line["chain"], line["intact"], line["lines"]) for line in files["verification.jsonl"]] == [
        ("audit trail", True, 1),
        ("privacy ledger", True, 16),
    ]
    (period,) = files["budget_periods.jsonl"]
    assert (period["target_epsilon"], period["ledger_sequence"]) == (9.0, 16)
    assert period["prev_hash"] == "0" * 64
    lineage = {line["version"]: line["lineage"]["clients"] for line in files["versions.jsonl"]}
    assert [name for name, clients in lineage.items() if "vehicle-0001" in clients] == ["v1.1.4", "v1.1.3"]
    contributed = {line["version"]: line["affected_clients"] for line in files["contributions.jsonl"]}
    assert contributed == {"v1.1.1": [], "v1.1.2": [], "v1.1.3": ["vehicle-0001"], "v1.1.4": ["vehicle-0001"]}
    caught = next(line for line in files["clients.jsonl"] if line["client_id"] == "vehicle-0001")
    assert caught["quarantine_reason"] == f"incident {LITERAL}: data_exposure"
    (token,) = files["tokens.jsonl"]
    assert (token["name"], "secret_hash" in token) == ("on call", False)
    (incident,) = files["incident.jsonl"]
    assert (incident["incident_id"], incident["reported_by"]) == (LITERAL, site.actor)
    assert [taken["action"] for taken in incident["actions"]] == [t["action"] for t in result["actions"][:-1]]
    assert files["settings.jsonl"][0]["training"]["rounds"] == 4
    assert (len(files["releases.jsonl"]), files["runs.jsonl"][0]["run_id"]) == (4, "run-0001")


def test_a_tampered_ledger_is_evidence_and_no_obstacle(site: Site) -> None:
    site.trained()
    with closing(sqlite3.connect(site.store.home / "state.db")) as database, database:
        database.execute("UPDATE privacy_ledger SET steps = 99 WHERE sequence = 3")
    result = site.breach("vehicle-0001")
    assert action(result, "forensic_bundle")["done"]
    broken = bundle(result)["verification.jsonl"][1]
    assert (broken["intact"], broken["sequence"]) == (False, 3)


def test_a_part_that_cannot_be_read_is_named_and_the_rest_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> list[Any]:
        raise PlacementError("The table is gone.")

    monkeypatch.setattr(site.store.releases, "all", fail)
    result = site.breach("vehicle-0001")
    files = bundle(result)
    assert files["releases.jsonl"] == []
    assert files["clients.jsonl"]
    with tarfile.open(result["forensic_bundle"]) as archive:
        manifest = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
    assert manifest["unreadable"] == {"releases.jsonl": "PlacementError: The table is gone."}


def test_a_repeated_report_is_harmless_and_makes_another_bundle(site: Site) -> None:
    site.trained()
    first = site.breach("vehicle-0001", actions=("rollback_model",))
    state = site.get("/api/emergency")
    again = site.breach("vehicle-0001", actions=("rollback_model",))
    assert site.get("/api/emergency") == state
    assert first["forensic_bundle"] != again["forensic_bundle"]
    assert (first["rolled_back_to"], again["rolled_back_to"]) == ("v1.1.2", "v1.1.2")
    assert len(site.store.releases.all()) == 5
    assert bundle(first)["ledger.jsonl"] == bundle(again)["ledger.jsonl"]


def test_without_the_aggregator_all_that_needs_only_the_store_is_done(site: Site) -> None:
    site.trained()
    site.aggregator = None
    result = site.breach("vehicle-0001", actions=("rollback_model",))
    failed = [taken["action"] for taken in result["actions"] if not taken["done"]]
    assert failed == ["stop_training", "rollback_model"]
    assert action(result, "stop_training")["detail"] == "The aggregator is restarting."
    assert (result["rolled_back_to"], result["ledger_frozen"], result["quarantined"]) == (None, True, ["vehicle-0001"])
    assert bundle(result)["ledger.jsonl"]
    assert site.get("/api/emergency")["incident"]["incident_id"] == "PB-1"
    site.aggregator = site.local
    assert site.breach("vehicle-0001", actions=("rollback_model",))["rolled_back_to"] == "v1.1.2"


def test_an_aggregator_that_is_silent_does_not_keep_the_answer(tmp_path: Path) -> None:
    site = Site(tmp_path, request_timeout_s=2)
    woken = threading.Event()

    class Silent:
        def stop_training(self) -> None:
            woken.wait(WAIT_S)

    site.aggregator = Silent()  # type: ignore[assignment]
    result = site.breach("vehicle-0001")
    woken.set()
    assert [taken["action"] for taken in result["actions"] if not taken["done"]] == ["stop_training"]
    assert "Not done within" in action(result, "stop_training")["detail"]
    assert bundle(result)
    site.close()


def test_a_step_that_fails_is_reported_and_none_is_skipped(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(site.store.clients, "quarantine", fail)
    result = site.breach("vehicle-0001")
    assert action(result, "isolate_data") == {
        "action": "isolate_data",
        "done": False,
        "detail": "OSError: no space left",
    }
    assert (result["quarantined"], result["unknown_clients"]) == ([], [])
    assert [taken["done"] for taken in result["actions"]] == [True, True, False, True, True]


def test_a_bundle_that_cannot_be_written_is_reported_with_its_place(site: Site) -> None:
    (site.settings.home / "forensics").write_text("in the way")
    result = site.breach("vehicle-0001")
    assert not action(result, "forensic_bundle")["done"]
    assert result["forensic_sha256"] is None
    assert result["forensic_bundle"].startswith(str(site.settings.home / "forensics"))
    assert result["ledger_frozen"]


# --- roll back -------------------------------------------------------------------------------------------------------


def test_the_last_release_without_the_clients_serves_again(site: Site) -> None:
    site.trained()
    old = site.store.versions.get("v1.1.2")
    result = site.breach("vehicle-0001", actions=("rollback_model",))
    assert result["rolled_back_to"] == "v1.1.2"
    assert action(result, "rollback_model")["done"]
    current = site.get("/api/model/current")
    assert (current["version"], current["derived_from"], current["artifacts"]) == ("v1.1.5", "v1.1.2", old.artifacts)
    assert (current["lineage"]["reason"], current["lineage"]["forced"]) == ("incident PB-1", True)


def test_a_roll_back_that_nobody_asked_for_does_not_happen(site: Site) -> None:
    site.trained()
    result = site.breach("vehicle-0001", actions=("stop_training", "isolate_data"))
    assert result["rolled_back_to"] is None
    assert site.get("/api/model/current")["version"] == "v1.1.4"


def test_where_there_is_no_release_without_them_that_is_said(site: Site) -> None:
    site.trained()
    result = site.breach("vehicle-0000", actions=("rollback_model",))
    taken = action(result, "rollback_model")
    assert (taken["done"], result["rolled_back_to"]) == (False, None)
    assert "no release without them" in taken["detail"]
    assert site.get("/api/model/current")["version"] == "v1.1.4"


def test_a_release_to_which_they_did_not_contribute_stays(site: Site) -> None:
    site.trained()
    result = site.breach("nobody", actions=("rollback_model",))
    assert action(result, "rollback_model")["done"]
    assert result["rolled_back_to"] is None
    assert len(site.store.releases.all()) == 4


def test_a_second_incident_does_not_bring_back_what_the_first_withdrew(site: Site) -> None:
    site.trained()
    site.breach("vehicle-0001", actions=("rollback_model",))
    site.http.post("/api/model/rollback", json={"version": "v1.1.4", "force": True})
    result = site.breach("nobody", actions=("rollback_model",), incident="PB-2")
    assert result["rolled_back_to"] == "v1.1.5"
    assert site.store.versions.get(site.get("/api/model/current")["version"]).weights_digest == (
        site.store.versions.get("v1.1.2").weights_digest
    )


def test_of_secure_sums_it_is_said_that_contributions_cannot_be_told_apart(site: Site) -> None:
    site.trained()
    (run,) = site.store.runs.all()
    plain = site.breach("vehicle-0000")
    assert not any(line["secure_aggregation"] for line in bundle(plain)["contributions.jsonl"])
    site.stand_down("PB-1")
    site.store.runs.set_config(run.run_id, {**run.config, "privacy": {"noise_at": "distributed"}})
    secure = site.breach("vehicle-0001", incident="PB-2")
    lines = {line["version"]: line for line in bundle(secure)["contributions.jsonl"]}
    assert len(lines) == 4
    assert all(line["secure_aggregation"] and line["note"] == NOT_TOLD_APART for line in lines.values())
    # Who was in a sum is known nevertheless.
    assert (lines["v1.1.2"]["affected_clients"], lines["v1.1.4"]["affected_clients"]) == ([], ["vehicle-0001"])
    assert NOT_TOLD_APART in action(secure, "forensic_bundle")["detail"]
    assert NOT_TOLD_APART not in action(plain, "forensic_bundle")["detail"]


# --- quarantine and its end ------------------------------------------------------------------------------------------


def test_a_quarantined_client_cannot_register_itself_back(site: Site) -> None:
    site.http.post("/api/clients/register", json={"device_id": "truck-7", "num_examples": 12})
    site.breach("truck-7")
    assert site.http.post("/api/clients/register", json={"device_id": "truck-7", "num_examples": 99}).status_code == 201
    assert site.store.clients.get("truck-7").quarantined
    assert site.http.delete("/api/clients/truck-7").status_code == 200
    site.http.post("/api/clients/register", json={"device_id": "truck-7"})
    assert site.get("/api/emergency")["quarantined"] == ["truck-7"]
    site.stand_down("PB-1")
    site.trained()
    assert all("truck-7" not in cohort.client_ids for _, cohort in site.fleet.tasks)


def test_standing_down_lifts_the_freeze_and_nothing_else(site: Site) -> None:
    site.breach("vehicle-0001")
    answer = site.stand_down("PB-1")
    assert answer.status_code == 200
    assert answer.json() == {"incident_id": "PB-1", "ledger_frozen": False, "still_quarantined": ["vehicle-0001"]}
    assert site.get("/api/emergency") == {"incident": None, "quarantined": ["vehicle-0001"]}
    assert site.stand_down("PB-1").json() == answer.json()
    site.trained()
    assert site.get("/api/training/status")["status"] == "completed"


def test_each_incident_is_stood_down_by_its_own_name(site: Site) -> None:
    site.breach("vehicle-0001")
    second = site.breach("vehicle-0002", incident="PB-2")
    assert "Incident PB-1 froze it before" in action(second, "freeze_ledger")["detail"]
    refused = site.stand_down("PB-3")
    assert refused.status_code == 409
    assert "'PB-1', 'PB-2'" in refused.json()["cure"]
    assert site.stand_down("PB-1").json()["ledger_frozen"] is True
    assert site.get("/api/emergency")["incident"]["incident_id"] == "PB-2"
    assert site.stand_down("PB-2").json()["ledger_frozen"] is False


# --- who may, and what is refused ------------------------------------------------------------------------------------


def test_only_an_emergency_token_will_do_also_in_the_open_mode(site: Site) -> None:
    admin = create_token(site.store, "admin", [Scope.ADMIN], now=utc_now()).text
    body = {"incident_id": "PB-1", "affected_clients": ["vehicle-0001"], "breach_type": "x", "immediate_actions": []}
    for path in (BREACH, "/api/emergency/stand-down"):
        assert site.http.post(path, json=body).status_code == 401
        assert site.http.post(path, json=body, headers={"Authorization": f"Bearer {admin}"}).status_code == 403
    assert site.get("/api/emergency") == {"incident": None, "quarantined": []}
    assert not (site.settings.home / "forensics").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"immediate_actions": ["stop_training", "burn_it"]}, ["'burn_it' is no action", "rollback_model"]),
        ({"immediate_actions": "stop_training"}, ["immediate_actions"]),
        ({"immediate_actions": [{}]}, ["immediate_actions", "stop_training"]),
        ({"incident_id": ""}, ["incident_id"]),
        ({"affected_clients": [""]}, ["affected_clients"]),
        ({"colour": "red"}, ["colour"]),
    ],
)
def test_a_malformed_report_is_refused_by_field(site: Site, change: JsonObject, words: list[str]) -> None:
    body = {"incident_id": "PB-1", "affected_clients": [], "breach_type": "x", "immediate_actions": []} | change
    answer = site.http.post(BREACH, content=json.dumps(body), headers=site.bearer)
    assert answer.status_code == 422
    assert all(word in answer.json()["detail"] for word in words), answer.text
    assert site.get("/api/emergency")["incident"] is None


@pytest.mark.parametrize("change", [{"incident_id": "\ud800"}, {"affected_clients": ["\ud800"]}])
def test_what_no_database_can_keep_is_no_json(site: Site, change: JsonObject) -> None:
    body = {"incident_id": "PB-1", "affected_clients": [], "breach_type": "x", "immediate_actions": []} | change
    answer = site.http.post(BREACH, content=json.dumps(body), headers=site.bearer)
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/invalid-json")
    assert site.get("/api/emergency")["incident"] is None


@pytest.mark.parametrize("name", ["../../etc/passwd", "...", "\u0000\u0001", "事故" * 100, "a/b\\c", " "])
def test_any_text_names_an_incident_and_none_leaves_the_folder(site: Site, name: str) -> None:
    result = site.breach("vehicle-0001", incident=name)
    path = Path(result["forensic_bundle"])
    assert path.parent == site.settings.home / "forensics"
    assert path.is_file()
    assert bundle(result)["incident.jsonl"][0]["incident_id"] == name
    assert site.get("/api/emergency")["incident"]["incident_id"] == name
    assert site.stand_down(name).json()["ledger_frozen"] is False


def test_a_report_is_audited_with_what_it_did(site: Site) -> None:
    result = site.breach("vehicle-0001")
    entry = site.store.audit.latest(1)[0].facts
    assert (entry.action, entry.actor, entry.status) == (f"POST {BREACH}", site.actor, 200)
    assert entry.before == {"frozen_by": None, "quarantined": []}
    assert entry.after["quarantined"] == ["vehicle-0001"]
    assert entry.after["sha256"] == result["forensic_sha256"]
    assert entry.params["body"]["incident_id"] == "PB-1"


def test_charges_are_refused_while_it_lasts(site: Site) -> None:
    site.breach()
    charge = Charge("run-0001", 1, "vehicle-0000", "r" * 64, 4.0, 0.5, 1)
    with pytest.raises(LedgerFrozenError) as frozen:
        site.store.ledger.append([charge])
    assert frozen.value.details["incident_id"] == "PB-1"
