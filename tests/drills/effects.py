"""For each command that changes something: a second look, at another place, that shows the change."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from drill import CONTROL, EDGES, Call, CommandResult, Drill, accepts_connections, responds, wait_until
from placeholders import DEVICE, doubted

from fedvit.store.backup_header import read_header
from fedvit.store.backup_keys import RestoreKeys

Check = Callable[[Drill, CommandResult], None]
MORE_EDGES = tuple(f"http://127.0.0.1:{port}" for port in (8083, 8084, 8085))


# --- training --------------------------------------------------------------------------------------------------------


def _doubts(drill: Drill, outcome: CommandResult) -> None:
    assert outcome.json()["client_id"] == doubted(drill)
    assert drill.client(doubted(drill))["validated"] is False


def _restarted(drill: Drill, outcome: CommandResult) -> None:
    run_id = drill.operation(outcome)["result"]["run_id"]
    drill.wait_for_training(lambda found: found["run_id"] == run_id and found["rounds_done"] >= 1, f"{run_id} trains")
    history = drill.get("/api/privacy/history?hours=1&limit=10000")
    took_part = {line["client_id"] for line in history if line["run_id"] == run_id}
    before = {line["client_id"] for line in history if line["run_id"] != run_id}
    assert doubted(drill) in before
    assert took_part == before - {doubted(drill)}


def _retrained(drill: Drill, outcome: CommandResult) -> None:
    result = drill.operation(outcome)["result"]
    assert result["base_version"] is None
    drill.wait_for_training(
        lambda found: found["run_id"] == result["run_id"] and found["rounds_done"] >= 1, "it trains"
    )


def _stopped(drill: Drill, _: CommandResult) -> None:
    drill.wait_for_training(
        lambda found: found["phase"] == "resting" and found["status"] == "stopped", "training rests"
    )


def _started(drill: Drill, _: CommandResult) -> None:
    drill.wait_for_training(lambda found: found["status"] == "running" and found["phase"] != "resting", "training runs")


def _configured(drill: Drill, _: CommandResult) -> None:
    result = drill.get("/api/training/config")
    assert (result["min_clients"], result["wait_timeout"]) == (10, 300)


def _mode_changed(drill: Drill, outcome: CommandResult) -> None:
    result = drill.get("/api/aggregation/mode")
    assert result == outcome.json()
    assert f'"mode": "{result["mode"]}"' in outcome.command
    if result["mode"] == "asynchronous":
        assert result["staleness_tolerance"] == 5
    done = drill.get("/api/training/status")["rounds_done"]
    drill.wait_for_training(
        lambda now: now["status"] != "running" or now["rounds_done"] > done, "training goes on in that mode"
    )


# --- clients ---------------------------------------------------------------------------------------------------------


def _removed(drill: Drill, _: CommandResult) -> None:
    assert drill.client(DEVICE)["active"] is False


def _registered(drill: Drill, _: CommandResult) -> None:
    assert drill.client(DEVICE)["active"] is True


def _alive(drill: Drill, _: CommandResult) -> None:
    wait_until("it was heard", lambda: drill.get(f"/api/clients/{DEVICE}")["last_seen_at"])


def _mailbox(enabled: bool) -> Check:
    def check(drill: Drill, _: CommandResult) -> None:
        assert drill.get("/api/communication/backup")["enabled"] is enabled
        assert drill.get("/api/clients/connectivity")["backup_channel"]["enabled"] is enabled

    return check


# --- privacy ---------------------------------------------------------------------------------------------------------


def _reset(drill: Drill, outcome: CommandResult) -> None:
    budget, period = drill.get("/api/privacy/budget"), outcome.json()["period"]
    assert (budget["target_epsilon"], budget["period"]) == (1.0, period)
    assert budget["lifetime_epsilon"] > 0
    assert drill.get("/api/privacy/periods")[-1]["period"] == period
    assert period == drill.memory.get("period", 1) + 1
    drill.memory["period"] = period


def _breached(drill: Drill, outcome: CommandResult) -> None:
    result = outcome.json()
    drill.memory["incident_id"] = result["incident_id"]
    assert drill.get("/api/privacy/budget")["frozen"]["incident_id"] == result["incident_id"]
    assert all(action["done"] for action in result["actions"]), result
    for client_id in result["quarantined"]:
        assert drill.get(f"/api/clients/{client_id}")["quarantined_at"] is not None
    assert drill.get("/api/model/current")["lineage"].get("rollback_of") == result["rolled_back_to"]
    bundle = Path(result["forensic_bundle"])
    # Absolute, or as seen from the folder in which the system was started.
    content = (bundle if bundle.is_absolute() else drill.checkout / bundle).read_bytes()
    assert hashlib.sha256(content).hexdigest() == result["forensic_sha256"]
    drill.wait_for_training(lambda found: found["phase"] in ("resting", "idle"), "training rests")
    assert drill.get("/api/audit?limit=1", "admin")[0]["action"] == "POST /api/emergency/privacy-breach"
    if "client1" not in outcome.command:
        assert result["quarantined"] == [doubted(drill)]
        return
    assert (result["quarantined"], set(result["unknown_clients"])) == ([], {"client1", "client2"})
    # The next report is to find what this one found: nothing frozen, and training under way.
    over = {"incident_id": result["incident_id"], "justification": "The drill goes on to the next report."}
    assert drill.request("/api/emergency/stand-down", "POST", "emergency", json=over).is_success
    assert drill.request("/api/training/start", "POST").is_success
    _started(drill, outcome)


def _stood_down(drill: Drill, _: CommandResult) -> None:
    assert drill.get("/api/privacy/budget")["frozen"] is None


def _reinstated(drill: Drill, _: CommandResult) -> None:
    assert drill.get(f"/api/clients/{doubted(drill)}")["quarantined_at"] is None


# --- the model -------------------------------------------------------------------------------------------------------


def _optimized(drill: Drill, outcome: CommandResult) -> None:
    result = drill.operation(outcome)["result"]
    assert isinstance(result["target_met"], bool)
    if result["switched"]:
        assert drill.get("/api/model/info")["variant"] == result["variant"]
        drill.wait_until_served(result["version"], result["variant"])
    assert drill.request("/api/training/start", "POST").is_success


def _switched(drill: Drill, outcome: CommandResult) -> None:
    assert drill.get("/api/model/info")["variant"] == "edge_optimized"
    drill.wait_until_served(outcome.json()["version"], "edge_optimized")
    drill.request_inferences()


def _rolled_back(drill: Drill, outcome: CommandResult) -> None:
    result, current = outcome.json(), drill.get("/api/model/current")
    asked = re.search(r'"version": "([^"]+)"', outcome.command)
    assert asked is not None
    versions = {item["version"]: item for item in drill.get("/api/model/versions?limit=1000")}
    assert versions[result["version"]]["derived_from"] == asked[1]
    # Training may have released a later one meanwhile.
    assert current["version"] == result["version"] or current["created_at"] > versions[result["version"]]["created_at"]
    drill.wait_until_served(result["version"], result["variant"])


def _exported(drill: Drill, _: CommandResult) -> None:
    assert (drill.checkout / "var/run/release/trusted_key.txt").read_text().strip()


def _more_edges(_: Drill, __: CommandResult) -> None:
    for base in MORE_EDGES:
        wait_until(f"{base} has a model", partial(responds, f"{base}/health"))


def _fewer_edges(_: Drill, __: CommandResult) -> None:
    for base in MORE_EDGES:
        wait_until(f"{base} is gone", partial(_silent, f"{base}/health"))


# --- the system ------------------------------------------------------------------------------------------------------


def _silent(url: str) -> bool:
    return not accepts_connections(url)


def _is_down(drill: Drill, _: CommandResult) -> None:
    wait_until("nothing runs", lambda: drill.fedvit("status")["system"] == "down")
    for base in (CONTROL, *EDGES):
        wait_until(f"{base} is silent", partial(_silent, base))


def _is_up(drill: Drill, _: CommandResult) -> None:
    assert drill.fedvit("status")["system"] == "ok"
    assert drill.get("/api/system/health")["status"] == "ok"


def _is_another(drill: Drill, outcome: CommandResult) -> None:
    _is_up(drill, outcome)
    assert "Stopped." in outcome.out
    drill.wait_for_training(lambda found: found["rounds_done"] >= drill.memory["rounds_done"], "training continues")


def _shut_down(drill: Drill, outcome: CommandResult) -> None:
    assert outcome.json()["kind"] == "shutdown"
    _is_down(drill, outcome)
    drill.memory["privacy"] = drill.fedvit("privacy", "show")
    drill.memory["versions"] = drill.fedvit("model", "list")


def _saved(drill: Drill, _: CommandResult) -> None:
    newest = max(drill.checkout.glob("fedvit-backup-*.bak"))
    signers = RestoreKeys().signers(drill.home)
    with newest.open("rb") as file:
        header = read_header(file, signers)
        assert (len(header.recipients), header.holds_keys) == (1, False)
        assert file.read(21) == b"age-encryption.org/v1"


def _restored(drill: Drill, _: CommandResult) -> None:
    privacy = drill.fedvit("privacy", "show")
    assert privacy["epsilon_remaining"] <= drill.memory["privacy"]["epsilon_remaining"] + 1e-9
    assert privacy["ledger_entries"] >= drill.memory["privacy"]["ledger_entries"]
    assert drill.fedvit("model", "list") == drill.memory["versions"]


def _token_made(drill: Drill, outcome: CommandResult) -> None:
    scope = outcome.command.rsplit(" ", 1)[-1]
    text = outcome.out.strip()
    listed = {token["token_id"]: token for token in drill.fedvit("token", "list")}
    assert listed[text.split("_")[1]]["scopes"] == [scope]
    drill.tokens[scope] = text


def _noted(drill: Drill, outcome: CommandResult) -> None:
    asked = re.search(r'note (\S+) "([^"]+)"', outcome.command)
    assert asked is not None
    report = drill.request(f"/api/incidents/{asked[1]}/report").text
    assert f"- **Root Cause**: {asked[2]}\n" in report
    assert drill.get(f"/api/incidents/{asked[1]}")["timeline"]


# --- the tables ------------------------------------------------------------------------------------------------------

HTTP: dict[tuple[str, str], Check] = {
    ("POST", "/api/training/restart"): _restarted,
    ("POST", "/api/training/start"): _started,
    ("POST", "/api/training/stop"): _stopped,
    ("POST", "/api/training/config"): _configured,
    ("POST", "/api/aggregation/mode"): _mode_changed,
    ("POST", "/api/clients/{id}/validate"): _doubts,
    ("POST", "/api/clients/{id}/heartbeat"): _alive,
    ("POST", "/api/clients/{id}/reinstate"): _reinstated,
    ("POST", "/api/clients/register"): _registered,
    ("DELETE", "/api/clients/{id}"): _removed,
    ("POST", "/api/communication/enable-backup"): _mailbox(True),
    ("POST", "/api/communication/disable-backup"): _mailbox(False),
    ("POST", "/api/privacy/reset-budget"): _reset,
    ("POST", "/api/emergency/privacy-breach"): _breached,
    ("POST", "/api/emergency/stand-down"): _stood_down,
    ("POST", "/api/edge/optimize"): _optimized,
    ("POST", "/api/model/retrain"): _retrained,
    ("POST", "/api/model/switch"): _switched,
    ("POST", "/api/model/rollback"): _rolled_back,
    ("POST", "/api/system/shutdown"): _shut_down,
}
SHELL: dict[str, Check] = {
    r"make up": _is_up,
    r"make down": _is_down,
    r"make down && make up": _is_another,
    r"make emergency-backup": _saved,
    r"fedvit restore \S+": _restored,
    r"fedvit token create .+": _token_made,
    r"fedvit model export .+": _exported,
    r"fedvit incident note .+": _noted,
    r"for n in 3 4 5; do\n.*": _more_edges,
    r"kill .*": _fewer_edges,
}
# These only look. Any other command needs a row above.
LOOKS = (
    r"curl .*|for device in .*|python -c .*|export PATH=.*|free -h|df -h|ps .*|tail .*|ping .*|traceroute .*"
    r"|make (health-check|diagnostics|logs)|fedvit (status|config show|privacy show|audit-log (show|verify))\b.*"
    r"|fedvit incident (list|show|report)\b.*"
)


def check_effect(drill: Drill, outcome: CommandResult) -> None:
    """Look whether the command did what the runbook says.

    Raises:
        AssertionError: it did not, or nobody wrote down how to see it.
    """
    for call in outcome.calls:
        if call.method != "GET":
            _check_of(call)(drill, outcome)
    results = [check for pattern, check in SHELL.items() if re.fullmatch(pattern, outcome.command, re.DOTALL)]
    for check in results:
        check(drill, outcome)
    assert results or re.fullmatch(LOOKS, outcome.command, re.DOTALL), (
        f"no check for {outcome.command!r}: see effects.py"
    )


def _check_of(call: Call) -> Check:
    path = httpx.URL(call.url).path
    for (method, template), check in HTTP.items():
        if call.method == method and re.fullmatch(template.replace("{id}", "[^/]+"), path):
            return check
    raise AssertionError(f"{call.method} {path} changes something and has no check: see effects.py")


def remember(drill: Drill, command: str) -> None:
    """What a check will compare with, and what a command needs, before it runs."""
    if command == "make down && make up":
        drill.memory["rounds_done"] = drill.get("/api/training/status")["rounds_done"]
    if ":9090/" in command:
        drill.wait_for_scrape()
    if "/api/edge/optimize" in command:
        # Rounds take seconds here and minutes elsewhere: a release in between would make it fail, as the runbook says.
        assert drill.request("/api/training/stop", "POST").is_success
        drill.wait_for_training(lambda found: found["phase"] == "resting", "training rests")


def values_of(text: str) -> list[Any]:
    """The JSON documents in a text, one after the other.

    Raises:
        ValueError: there is something else in it.
    """
    decoder, result, place = json.JSONDecoder(), [], 0
    while text[place:].strip():
        text, place = text[place:].lstrip(), 0
        value, place = decoder.raw_decode(text)
        result.append(value)
    return result
