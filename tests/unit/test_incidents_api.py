"""The incident log over the API: what Alertmanager tells, the timeline, notes and the report."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alertmanager import WEBHOOK, alert, message
from control_client import URL, Through
from incident_site import Site
from typer.testing import CliRunner, Result

from fedvit.cli import api_session
from fedvit.cli.main import app
from fedvit.incidents.report import TEMPLATE
from fedvit.types import utc_now

RUNBOOK = Path(__file__).parents[2] / "docs" / "runbook.md"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "home")
    yield site
    site.close()


def ago(minutes: float) -> datetime:
    return utc_now() - timedelta(minutes=minutes)


def post_alerts(site: Site, *alerts: dict[str, Any]) -> list[str]:
    answer = site.http.post(WEBHOOK, json=message(*alerts))
    assert answer.status_code == 200, answer.text
    results: list[str] = answer.json()["incidents"]
    return results


def lines(site: Site, name: str, kind: str) -> list[str]:
    return [entry["text"] for entry in site.get(f"/api/incidents/{name}")["timeline"] if entry["kind"] == kind]


# --- Alertmanager ----------------------------------------------------------------------------------------------------


def test_an_alert_opens_an_incident_that_its_end_resolves(site: Site) -> None:
    began, ended = ago(30), ago(10)
    (name,) = post_alerts(site, alert(starts_at=began))
    assert post_alerts(site, alert(starts_at=began)) == [name]
    assert site.get("/api/incidents?status=open")[0] | {"opened_at": 0} == {
        **{"incident_id": name, "alertname": "EdgeDeviceOffline", "severity": "P2", "status": "open"},
        **{"summary": "EdgeDeviceOffline, in words.", "opened_at": 0, "resolved_at": None, "alerts": 1, "firing": 1},
    }
    assert name.startswith(f"INC-{began:%Y-%m%d}-")
    post_alerts(site, alert(starts_at=began, ends_at=ended))
    result = site.get(f"/api/incidents/{name}")
    assert (result["status"], datetime.fromisoformat(result["resolved_at"])) == ("resolved", ended)
    assert site.get("/api/incidents?status=open") == []
    assert site.store.audit.entries() == []


def test_its_format_is_alertmanagers_to_write_and_to_extend(site: Site) -> None:
    sent = message(alert(starts_at=ago(1), note="x" * 5000, **{f"l{i}": "y" for i in range(200)}))
    sent["alerts"][0] |= {"startsAt": "2026-03-01T03:15:00.123456789+02:00", "silenceURL": "http://x"}
    answer = site.http.post(WEBHOOK, json=sent | {"orgId": 1, "new": {"deep": []}})
    assert answer.status_code == 200, answer.text
    (logged,) = site.store.incidents.alerts("INC-2026-0301-001")
    assert logged.alert.starts_at == datetime(2026, 3, 1, 1, 15, 0, 123456, tzinfo=UTC)
    assert (len(logged.alert.labels["note"]), len(logged.alert.labels)) == (2000, 64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"version": "5"}, "version"),
        ({"alerts": {}}, "alerts"),
        ({"alerts": [{"status": "firing"}]}, "fingerprint"),
        ({"alerts": [alert(starts_at=ago(1)) | {"startsAt": "yesterday"}]}, "startsAt"),
        ({"alerts": [alert(starts_at=ago(1)) | {"startsAt": "0001-01-01T00:00:00+02:00"}]}, "calendar"),
        ({"alerts": [alert(starts_at=ago(1)) | {"status": "pending"}]}, "status"),
    ],
)
def test_what_is_no_message_of_version_4_is_refused_by_name(site: Site, change: dict[str, Any], word: str) -> None:
    answer = site.http.post(WEBHOOK, json=message() | change)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert site.store.incidents.all() == []


@pytest.mark.parametrize("name", ['x"; rm -rf /; "', "../vehicle-0001", "vehicle-0001\n", "$(id)", "a" * 65])
def test_what_an_alert_calls_a_client_becomes_part_of_no_command_unless_it_can_be_one(site: Site, name: str) -> None:
    (result,) = post_alerts(site, alert(starts_at=ago(1), client_id=name))
    (step,) = site.get(f"/api/incidents/{result}")["proposals"]
    assert step["command"] == 'curl -X DELETE "http://localhost:8000/api/clients/<device-id>"'


def test_what_would_steer_a_terminal_is_taken_out(site: Site) -> None:
    sent = alert(starts_at=ago(1))
    sent["annotations"]["summary"] = "gone\x1b[2J\r\nvéhicule"
    (result,) = post_alerts(site, sent)
    assert site.get(f"/api/incidents/{result}")["summary"] == "gone [2J  véhicule"


def test_a_severity_that_is_none_of_ours_is_the_least(site: Site) -> None:
    post_alerts(site, alert(starts_at=ago(1), severity="critical"))
    assert site.get("/api/incidents")[0]["severity"] == "P3"


def test_a_sign_of_life_is_no_incident(site: Site) -> None:
    assert post_alerts(site, alert("Watchdog", starts_at=ago(1))) == []


def test_alertmanager_is_told_to_come_again_when_the_state_cannot_be_written(site: Site) -> None:
    with closing(sqlite3.connect(site.store.home / "state.db")) as connection:
        connection.execute("DROP TABLE incident_events")
        connection.commit()
    answer = site.http.post(WEBHOOK, json=message(alert(starts_at=ago(1))))
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")


# --- the timeline ----------------------------------------------------------------------------------------------------


def test_the_timeline_has_alerts_commands_and_changes_of_state_in_order(site: Site) -> None:
    site.http.post("/api/clients/vehicle-0002/validate", json={"validated": False})
    (name,) = post_alerts(site, alert("HighTrainingLoss", starts_at=utc_now(), severity="P1"))
    site.trained()
    site.http.post("/api/training/config", json={"min_clients": 3})
    site.http.delete("/api/clients/nobody")
    site.http.post(f"/api/incidents/{name}/notes", json={"section": "root_cause", "text": "A cable."})
    result = site.get(f"/api/incidents/{name}")["timeline"]
    assert [entry["at"] for entry in result] == sorted(entry["at"] for entry in result)
    assert lines(site, name, "alert") == ["HighTrainingLoss fired, P1: HighTrainingLoss, in words."]
    commands = lines(site, name, "command")
    assert len(commands) == 3
    assert commands[0].startswith("POST /api/training/start → 202")
    assert commands[1] == 'POST /api/training/config {"min_clients": 3} → 200 (revision: 0 → 1; min_clients: 1 → 3)'
    assert commands[2] == "DELETE /api/clients/nobody → 404"
    assert [entry["actor"] for entry in result if entry["kind"] == "command"] == ["anonymous"] * 3
    assert lines(site, name, "note") == ["root cause: A cable."]
    state = lines(site, name, "state")
    assert state[0] == "run-0001 began"
    assert "run-0001 completed after 4 of 4 rounds" in state
    assert [line for line in state if line.startswith("v1.1.4 released")]


def test_what_is_done_after_an_incident_is_not_part_of_it(site: Site) -> None:
    (name,) = post_alerts(site, alert(starts_at=ago(30), ends_at=ago(20)))
    site.http.post("/api/training/config", json={"min_clients": 3})
    assert lines(site, name, "command") == []


def test_service_down_is_heard_late_and_began_when_it_began(site: Site) -> None:
    began = ago(12)
    (name,) = post_alerts(site, alert("ServiceDown", starts_at=began, severity="P0", instance="localhost:8000"))
    result = site.get(f"/api/incidents/{name}")
    assert datetime.fromisoformat(result["opened_at"]) == began
    assert lines(site, name, "alert") == [
        "ServiceDown (localhost:8000) fired, P0: ServiceDown, in words.",
        "ServiceDown (localhost:8000) reached the incident log",
    ]


# --- a breach --------------------------------------------------------------------------------------------------------


def test_a_breach_is_an_incident_from_its_report_to_its_stand_down(site: Site) -> None:
    site.trained()
    site.breach("vehicle-0001", incident="PB-1")
    site.breach("vehicle-0001", incident="PB-1")
    site.breach("vehicle-0002", incident="PB-2")
    (open_,) = site.get("/api/incidents?status=open")
    assert (open_["alertname"], open_["severity"], open_["alerts"]) == ("PrivacyBreach", "P0", 2)
    site.stand_down("PB-1")
    assert site.get("/api/incidents")[0]["status"] == "open"
    site.stand_down("PB-2")
    result = site.get(f"/api/incidents/{open_['incident_id']}")
    assert result["status"] == "resolved"
    commands = lines(site, result["incident_id"], "command")
    assert [line.split(" ", 2)[1].rsplit("/", 1)[-1] for line in commands] == [
        *["privacy-breach"] * 3,
        *["stand-down"] * 2,
    ]
    state = lines(site, result["incident_id"], "state")
    assert "vehicle-0001 came into quarantine: incident PB-1: data_exposure" in state
    (step,) = result["proposals"]
    assert (step["name"], step["automatic"]) == ("stand_down", "never")


def test_a_breach_is_contained_also_where_the_log_cannot_be_written(site: Site) -> None:
    with closing(sqlite3.connect(site.store.home / "state.db")) as connection:
        connection.execute("DROP TABLE incident_alerts")
        connection.commit()
    report = site.breach("vehicle-0001")
    assert all(action["done"] for action in report["actions"])


# --- notes and the report --------------------------------------------------------------------------------------------


def report(site: Site, name: str) -> str:
    answer = site.http.get(f"/api/incidents/{name}/report")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/markdown; charset=utf-8")
    return answer.text


def field(text: str, name: str) -> str:
    result = re.search(rf"^- \*\*{name}\*\*:(.*)$", text, re.MULTILINE)
    assert result is not None
    return result[1].strip()


def part(text: str, heading: str) -> list[str]:
    return text.split(f"## {heading}\n")[1].split("\n\n## ")[0].splitlines()


def test_the_template_is_the_runbooks(site: Site) -> None:
    fence = RUNBOOK.read_text().split("```markdown\n")[1].split("```")[0]
    assert [line.rstrip() for line in fence.splitlines()] == TEMPLATE.splitlines()


def test_a_report_keeps_the_templates_headings_and_says_what_is_known(site: Site) -> None:
    began = utc_now() - timedelta(hours=1, minutes=5)
    site.trained()
    spent = site.get("/api/privacy/budget")["epsilon_spent"]
    starts = alert("HighTrainingLoss", starts_at=began, severity="P1", client_id="vehicle-0003")
    (name,) = post_alerts(site, starts)
    post_alerts(site, starts | alert("HighTrainingLoss", starts_at=began, ends_at=utc_now(), severity="P1"))
    text = report(site, name)
    headings = [line for line in TEMPLATE.splitlines() if line.startswith("## ")]
    assert [line for line in text.splitlines() if line.startswith("#")] == [f"# Incident Report: {name}", *headings]
    assert field(text, "Date").startswith(f"{began:%Y-%m-%d}")
    assert field(text, "Duration") == "1 h 5 min"
    assert field(text, "Severity") == "P1 (HighTrainingLoss)"
    assert field(text, "Clients Affected") == "vehicle-0003 (named by alerts)"
    # vehicle-0001 failed in the first two rounds.
    assert field(text, "Data Loss") == (
        "rounds: 0 lost, 4 committed, 0 under way; updates: 2 of 16 refused or lost, "
        "0 doubled (a client counts once a round)"
    )
    assert field(text, "Privacy Impact") == (
        f"epsilon spent: 0.0000 before, {spent:.4f} after, at delta 1e-05 (from the ledger)"
    )
    timeline = part(text, "Timeline")
    assert timeline[0] == f"- {began:%H:%M} - HighTrainingLoss (vehicle-0003) fired, P1: HighTrainingLoss, in words."
    assert all(re.match(r"- (\d{4}-\d{2}-\d{2} )?\d{2}:\d{2} - \S", line) for line in timeline)
    assert [line for line in part(text, "Resolution") if line.startswith("- POST /api/training/start → 202")]


def test_what_only_people_know_is_blank_until_they_note_it(site: Site) -> None:
    (name,) = post_alerts(site, alert(starts_at=ago(30), ends_at=ago(20)))
    blank = report(site, name)
    assert (field(blank, "Root Cause"), field(blank, "Business Impact")) == ("", "")
    assert (part(blank, "Root Cause Analysis"), part(blank, "Prevention")) == (
        ["[Detailed analysis]"],
        ["[Measures to prevent recurrence]"],
    )
    assert part(blank, "Resolution") == ["[Steps taken to resolve]"]
    for section in ("root_cause", "business_impact", "resolution", "prevention", "action_item", "remark"):
        answer = site.http.post(f"/api/incidents/{name}/notes", json={"section": section, "text": f"My {section}."})
        assert answer.status_code == 200
    text = report(site, name)
    assert (field(text, "Root Cause"), field(text, "Business Impact")) == ("My root_cause.", "My business_impact.")
    assert part(text, "Root Cause Analysis") == ["My root_cause."]
    assert part(text, "Resolution") == ["My resolution."]
    assert part(text, "Prevention") == ["My prevention."]
    assert part(text, "Action Items")[-1] == "- [ ] My action_item."
    assert any(line.endswith("- remark: My remark., by anonymous") for line in part(text, "Timeline"))
    assert [entry.facts.action for entry in site.store.audit.entries()] == [
        "POST /api/incidents/{incident_id}/notes"
    ] * 6


def test_a_round_that_was_lost_is_counted(site: Site) -> None:
    (name,) = post_alerts(site, alert(starts_at=ago(1)))
    site.trained()
    with closing(sqlite3.connect(site.store.home / "state.db")) as connection:
        connection.execute("UPDATE rounds SET committed_at = NULL WHERE round_index = 4")
        connection.commit()
    assert field(report(site, name), "Data Loss").startswith("rounds: 1 lost, 3 committed, 0 under way;")
    with closing(sqlite3.connect(site.store.home / "state.db")) as connection:
        connection.execute("UPDATE runs SET status = 'stopped'")
        connection.commit()
    assert field(report(site, name), "Data Loss").startswith("rounds: 0 lost, 3 committed, 1 under way;")


def test_nothing_is_known_of_an_incident_that_is_not_there(site: Site) -> None:
    for method, path in (("GET", ""), ("GET", "/report"), ("POST", "/notes")):
        body = {"json": {"text": "x"}} if method == "POST" else {}
        assert site.http.request(method, f"/api/incidents/INC-1{path}", **body).status_code == 404


# --- the command line ------------------------------------------------------------------------------------------------


def fedvit(*words: str) -> Result:
    result = CliRunner().invoke(app, ["incident", *words, "--url", URL])
    assert result.exit_code == 0, result.output
    return result


def test_the_command_line_shows_notes_and_reports(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_session, "TRANSPORT", Through(site.http))
    monkeypatch.setenv("COLUMNS", "200")
    (name,) = post_alerts(site, alert(starts_at=ago(1), client_id="vehicle-0003"))
    assert name in fedvit("list", "--status", "open").stdout
    assert json.loads(fedvit("list", "--status", "resolved", "--json").stdout) == []
    fedvit("note", name, "A cable was cut.", "--section", "root_cause")
    shown = fedvit("show", name).stdout
    assert 'curl -X DELETE "http://localhost:8000/api/clients/vehicle-0003"' in shown
    assert "remove_client (not automatic)" in shown
    assert "root cause: A cable was cut." in shown
    assert json.loads(fedvit("show", name, "--json").stdout)["incident_id"] == name
    assert fedvit("report", name).stdout.startswith(f"# Incident Report: {name}\n")


def test_how_many_are_open_is_scraped(site: Site) -> None:
    def scraped() -> dict[str, float]:
        text = site.http.get("/metrics").text
        results = re.findall(r'^fed_vit_autorl_incidents_open{severity="(P\d)"} (\S+)$', text, re.MULTILINE)
        return {severity: float(count) for severity, count in results}

    down = alert("ServiceDown", starts_at=ago(1), severity="P0", fingerprint="b")
    post_alerts(site, alert(starts_at=ago(1)), down)
    assert scraped() == {"P0": 1, "P1": 0, "P2": 1, "P3": 0}
    post_alerts(site, down | {"status": "resolved"})
    assert scraped() == {"P0": 0, "P1": 0, "P2": 1, "P3": 0}
