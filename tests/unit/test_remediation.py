"""What is done about alerts without a person: proposed, taken once, slowed, capped, failed, and what never is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alertmanager import WEBHOOK, alert, message
from incident_site import Site
from raises import raises_naming

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.api.incidents import RemediationOutcome
from fedvit.config import RemediationConfig, Settings
from fedvit.errors import ConfigError
from fedvit.incidents.playbook import PLAYBOOK, Step
from fedvit.incidents.remediation import orders, why_withheld
from fedvit.settings import load_settings
from fedvit.store.records import FiredAlert, Remediation, RemediationState
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import NEVER_AUTOMATIC, RemediationAction, RunStatus, Severity

RUNBOOK = (Path(__file__).parents[2] / "docs" / "runbook.md").read_text()
NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)
REMOVE, STOP = RemediationAction.REMOVE_CLIENT, RemediationAction.STOP_TRAINING
STEPS = {step.name: step for play in PLAYBOOK.values() for step in play.steps}
Make = Callable[..., Site]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    sites = []

    def build(*allow: str, **remediation: Any) -> Site:
        more = {"remediation": {"allow": list(allow), **remediation}}
        sites.append(Site(tmp_path / "home", more=more))
        return sites[-1]

    yield build
    for site in sites:
        site.close()


def post_alerts(site: Site, *alerts: dict[str, Any]) -> str:
    answer = site.http.post(WEBHOOK, json=message(*alerts))
    assert answer.status_code == 200, answer.text
    results: list[str] = answer.json()["incidents"]
    return results[0]


def exhausted(minute: int = 0, **labels: str) -> dict[str, Any]:
    return alert("PrivacyBudgetExhausted", starts_at=NOON + timedelta(minutes=minute), severity="P0", **labels)


def offline(client_id: str, fingerprint: str | None = None) -> dict[str, Any]:
    return alert(starts_at=NOON, client_id=client_id, fingerprint=fingerprint or client_id)


def proposals(site: Site, incident_id: str) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in site.get(f"/api/incidents/{incident_id}")["proposals"]}


def done_by_itself(site: Site) -> list[tuple[str, int]]:
    facts = [entry.facts for entry in site.store.audit.entries()]
    return [(one.action, one.status) for one in facts if one.actor == "remediation"]


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_each_command_stands_in_the_runbook_and_says_what_the_call_does(step: Step) -> None:
    assert step.command in RUNBOOK
    if step.call is None:
        return
    asked = re.match(r'curl -X (\w+) "http://localhost:8000([^"]+)"', step.command)
    assert asked is not None
    assert (asked[1], asked[2].replace("<device-id>", "{client_id}")) == (step.call.method, step.call.path)
    body = re.search(r"-d '(.*)'\Z", step.command, re.DOTALL)
    assert (json.loads(body[1]) if body else None) == step.call.body


def test_each_section_is_one_of_the_runbook() -> None:
    titles = re.findall(r"^#+ (.+)$", RUNBOOK, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {play.section for play in PLAYBOOK.values()} <= anchors


def test_everything_that_may_be_allowed_is_somewhere_in_the_table_and_nothing_that_may_not() -> None:
    assert {step.action for step in STEPS.values()} - {None} == set(RemediationAction)
    assert set(NEVER_AUTOMATIC) <= {name for name, step in STEPS.items() if step.action is None}


# --- proposed, and taken once ----------------------------------------------------------------------------------------


def test_without_a_list_everything_is_proposed_and_nothing_is_done(make: Make) -> None:
    site = make()
    result = proposals(site, post_alerts(site, exhausted()))
    assert {name: step["automatic"] for name, step in result.items()} == {
        "stop_training": "not_allowed",
        "privacy_reset": "never",
    }
    assert result["stop_training"]["command"] == 'curl -X POST "http://localhost:8000/api/training/stop"'
    assert (result["stop_training"]["method"], result["stop_training"]["path"]) == ("POST", "/api/training/stop")
    assert site.store.audit.entries() == []


def test_what_is_allowed_is_done_once_although_alertmanager_repeats_itself(make: Make) -> None:
    site = make("stop_training")
    site.trained()
    for _ in range(3):
        name = post_alerts(site, exhausted())
    assert done_by_itself(site) == [("POST /api/training/stop", 202)]
    facts = site.store.audit.latest(1)[0].facts
    assert (facts.actor, facts.scopes, facts.source) == ("remediation", ("operator",), "remediation")
    assert facts.before is not None
    step = proposals(site, name)["stop_training"]
    assert (step["automatic"], step["outcome"], step["detail"]) == ("allowed", "done", "202")
    timeline = site.get(f"/api/incidents/{name}")["timeline"]
    assert [entry["text"].split(" → ")[0] for entry in timeline if entry["kind"] == "remediation"] == [
        "POST /api/training/stop"
    ]


def test_of_many_that_tell_the_same_at_once_one_acts(tmp_path: Path) -> None:
    settings = load_settings(environ={}, overrides={"remediation": {"allow": ["stop_training"]}})
    with Store.open(tmp_path) as store:
        name = recorded(store, FiredAlert("PrivacyBudgetExhausted", Severity.P0, "a", NOON))
        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(lambda _: orders(store, settings, name, NOON), range(16)))
    assert sum(map(len, results)) == 1


def test_an_alert_that_has_cleared_is_no_reason_to_act(make: Make) -> None:
    site = make("stop_training")
    post_alerts(site, exhausted() | {"status": "resolved", "endsAt": (NOON + timedelta(minutes=1)).isoformat()})
    assert done_by_itself(site) == []


def test_the_way_is_an_operators_bodies_and_all(make: Make) -> None:
    site = make("restart_validated_only")
    site.trained()
    post_alerts(site, alert("HighTrainingLoss", starts_at=NOON))
    assert done_by_itself(site) == [("POST /api/training/restart", 202)]
    operation = site.store.operations.all()[0]
    assert (operation.kind, operation.params) == ("restart", {"client_selection": "validated_only"})
    assert site.local.wait_operation(operation.operation_id, 20).status.ended
    assert site.local.wait(20).status is RunStatus.COMPLETED


def test_a_failure_is_recorded_and_not_tried_again(make: Make) -> None:
    site = make("stop_training")
    site.aggregator = None
    for _ in range(2):
        name = post_alerts(site, exhausted())
    assert done_by_itself(site) == [("POST /api/training/stop", 503)]
    step = proposals(site, name)["stop_training"]
    assert (step["outcome"], step["detail"]) == ("failed", "503: The aggregator is restarting.")
    texts = [entry["text"] for entry in site.get(f"/api/incidents/{name}")["timeline"]]
    assert "stop_training failed: 503: The aggregator is restarting." in texts


# --- slowed and capped -----------------------------------------------------------------------------------------------


def test_a_cooldown_withholds_the_second_of_a_kind_and_says_so(make: Make) -> None:
    site = make("remove_client", max_client_share=0.9)
    name = post_alerts(site, offline("vehicle-0000"))
    post_alerts(site, offline("vehicle-0001"))
    assert [client.client_id for client in site.store.clients.all(active=False)] == ["vehicle-0000"]
    result = site.get(f"/api/incidents/{name}")["proposals"]
    assert [(step["target"], step["outcome"]) for step in result] == [
        ("vehicle-0000", "done"),
        ("vehicle-0001", "withheld"),
    ]
    assert result[1]["detail"].startswith("cooldown: remove_client was taken less than 900 s before")


def test_what_was_withheld_is_done_when_the_reason_has_passed(tmp_path: Path) -> None:
    settings = allowing("remove_client", cooldown_s=900, max_client_share=0.9)
    with Store.open(tmp_path) as store:
        store.clients.register(seeded_fleet(4))
        name = recorded(store, edge("vehicle-0000"), edge("vehicle-0001"))
        first = orders(store, settings, name, NOON)
        assert [order.path for order in first] == ["/api/clients/vehicle-0000"]
        store.remediations.finish(first[0].claimed, RemediationOutcome.DONE, "200")
        assert orders(store, settings, name, NOON + timedelta(seconds=899)) == []
        later = orders(store, settings, name, NOON + timedelta(seconds=900))
        assert [order.path for order in later] == ["/api/clients/vehicle-0001"]


def test_no_more_actions_an_hour_than_the_settings_say(make: Make) -> None:
    site = make("asynchronous_mode", "enable_backup_channel", "stop_training", max_actions_per_hour=2, cooldown_s=0.001)
    post_alerts(site, alert("NetworkPartition", starts_at=NOON))
    name = post_alerts(site, exhausted(fingerprint="b"))
    assert len(done_by_itself(site)) == 2
    step = proposals(site, name)["stop_training"]
    assert (step["outcome"], step["detail"]) == ("withheld", "cap: 2 actions were taken within the hour")


def test_no_removal_takes_out_more_than_a_share_of_the_fleet(make: Make) -> None:
    site = make("remove_client")
    name = post_alerts(site, offline("vehicle-0000"))
    assert done_by_itself(site) == []
    assert proposals(site, name)["remove_client"]["detail"] == (
        "cap: it would leave out 1 of 4 clients, more than a share of 0.1"
    )


def test_removals_add_up_however_slowly_they_come(tmp_path: Path) -> None:
    settings = allowing("remove_client", max_client_share=0.25)
    with Store.open(tmp_path) as store:
        store.clients.register(seeded_fleet(8))
        name = recorded(store, *(edge(f"vehicle-000{i}") for i in range(4)))
        taken = []
        for day in range(4):
            for order in orders(store, settings, name, NOON + timedelta(days=day)):
                taken.append(order.claimed.target)
                store.clients.update(str(order.claimed.target), active=False)
                store.remediations.finish(order.claimed, RemediationOutcome.DONE, "200")
        assert taken == ["vehicle-0000", "vehicle-0001"]
        store.clients.update("vehicle-0000", active=True)
        (order,) = orders(store, settings, name, NOON + timedelta(days=5))
        assert order.claimed.target == "vehicle-0002"


def test_a_message_of_many_takes_out_no_more_either(tmp_path: Path) -> None:
    settings = allowing("remove_client", max_client_share=0.25, cooldown_s=1e-9, max_actions_per_hour=100)
    with Store.open(tmp_path) as store:
        store.clients.register(seeded_fleet(8))
        name = recorded(store, *(edge(f"vehicle-000{i}") for i in range(8)))
        result = orders(store, settings, name, NOON + timedelta(seconds=1))
        assert [order.claimed.target for order in result] == ["vehicle-0000", "vehicle-0001"]
        (withheld,) = (
            one for one in store.remediations.of_incident(name) if one.outcome is RemediationOutcome.WITHHELD
        )
        assert withheld.detail == "cap: it would leave out 3 of 8 clients, more than a share of 0.25"


def test_a_restart_that_would_leave_most_clients_out_is_withheld() -> None:
    standing = RemediationState(attempted=(), active=10, unvalidated=2, target_active=False, removed=0, fleet=10)
    config = RemediationConfig(allow=(RemediationAction.RESTART_VALIDATED_ONLY,))
    reason = why_withheld(config, RemediationAction.RESTART_VALIDATED_ONLY, None, NOON, standing)
    assert reason == "cap: it would leave out 2 of 10 clients, more than a share of 0.1"
    assert why_withheld(config, STOP, None, NOON, standing) is None


@pytest.mark.parametrize(
    ("labels", "why"), [({"client_id": "nobody"}, "nobody is no active client"), ({}, "the alert names no client")]
)
def test_an_alert_without_a_client_of_ours_removes_none(make: Make, labels: dict[str, str], why: str) -> None:
    site = make("remove_client", max_client_share=0.9)
    name = post_alerts(site, alert(starts_at=NOON, **labels))
    assert done_by_itself(site) == []
    assert proposals(site, name)["remove_client"]["detail"] == why


def test_asking_for_fewer_clients_never_asks_for_more(make: Make) -> None:
    site = make("fewer_clients")
    name = post_alerts(site, alert("LowClientParticipation", starts_at=NOON))
    assert proposals(site, name)["fewer_clients"]["detail"] == "min_clients is 1, not above 10"
    site.http.post("/api/training/config", json={"min_clients": 50})
    post_alerts(site, alert("LowClientParticipation", starts_at=NOON))
    assert site.get("/api/training/config")["min_clients"] == 10


# --- what never is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEVER_AUTOMATIC)
def test_what_only_a_person_may_do_cannot_be_allowed(name: str) -> None:
    with raises_naming(ConfigError, name):
        allowing(name)


def test_an_action_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with raises_naming(ConfigError, "reboot", "restart_validated_only", "backup_channel"):
        allowing("reboot")


def test_nobody_can_call_himself_remediation(make: Make) -> None:
    """Its name on the audit trail is its own: what a request says of itself is no name, and tokens have a prefix."""
    site = make("stop_training")
    token = create_token(site.store, "remediation", [Scope.OPERATOR], now=NOON)
    bearer = {"Authorization": f"Bearer {token.text}"}
    for headers in ({"fedvit.acting": "remediation"}, bearer):
        assert site.http.post("/api/training/stop", headers=headers).status_code == 202
    assert done_by_itself(site) == []


# --- helpers ---------------------------------------------------------------------------------------------------------


def allowing(*names: str, **more: Any) -> Settings:
    return load_settings(environ={}, overrides={"remediation": {"allow": list(names), **more}})


def edge(client_id: str) -> FiredAlert:
    return FiredAlert("EdgeDeviceOffline", Severity.P2, client_id, NOON, labels={"client_id": client_id})


def recorded(store: Store, *alerts: FiredAlert) -> str:
    return store.incidents.record_alerts(alerts, reopen_within=timedelta(hours=1), at=NOON)[0]


def test_what_was_begun_and_never_finished_is_not_begun_again(tmp_path: Path) -> None:
    """The process died in the middle: nobody knows, so nobody acts."""
    with Store.open(tmp_path) as store:
        name = recorded(store, FiredAlert("PrivacyBudgetExhausted", Severity.P0, "a", NOON))
        (order,) = orders(store, allowing("stop_training"), name, NOON)
        assert orders(store, allowing("stop_training"), name, NOON + timedelta(days=1)) == []
        (result,) = store.remediations.of_incident(name)
        assert result == Remediation(name, "a", NOON, STOP, None, NOON, RemediationOutcome.BEGUN, "")
        assert order.key == f"a:{NOON.isoformat()}:stop_training"
