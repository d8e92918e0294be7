"""The fleet as the control API shows it: pages that are never stale, who is connected, and what operators decide."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedvit.errors import PlacementError
from fedvit.ports import ProxyReport
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, ManualClock, seeded_fleet
from fedvit.types import Client, ClientKind, TrainingProgress, utc_now
from serve_apps.control.api import Services, create_api
from serve_apps.control.http.pages import MAX_PAGES, Page, Pages

RESTING = TrainingProgress(None, None, "resting", 0, 0, None, None, 0.0, None)


class Proxies:
    """An aggregator that knows nothing but its proxies."""

    def __init__(self) -> None:
        self.report: ProxyReport | None = FakeFleet(np.zeros(1, np.float32)).proxies_alive()
        self.asked = 0

    def proxies_alive(self) -> ProxyReport:
        self.asked += 1
        if self.report is None:
            raise PlacementError("The aggregator is restarting.")
        return self.report

    def progress(self) -> TrainingProgress:
        return RESTING


class Replicas:
    """Two replicas of the control API over one state folder: three virtual clients, two trucks, one depot."""

    def __init__(self, home: Path, clock: ManualClock) -> None:
        self.clock, self.aggregator = clock, Proxies()
        self.stores = [Store.open(home), Store.open(home)]
        self.store = self.stores[0]
        vehicles = [Client(f"truck-{i}", ClientKind.REMOTE, 10) for i in range(2)]
        self.store.clients.register([*seeded_fleet(3), *vehicles, Client("depot", ClientKind.SILO, 500)])
        settings = load_settings(environ={}, overrides={"home": home})

        def nobody() -> Any:
            raise PlacementError("The accountant is restarting.")

        self.http, self.other = (
            TestClient(create_api(Services(settings, store, lambda: self.aggregator, nobody, clock=clock)))  # type: ignore[arg-type, return-value]
            for store in self.stores
        )

    def get(self, path: str, http: TestClient | None = None) -> Any:
        answer = (http or self.http).get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def condition(self, client_id: str, kind: str, http: TestClient | None = None) -> dict[str, Any]:
        conditions = self.get(f"/api/clients/{client_id}", http)["conditions"]
        return next(item for item in conditions if item["type"] == kind)  # type: ignore[no-any-return]

    def close(self) -> None:
        for store in self.stores:
            store.close()


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[Replicas]:
    clock = ManualClock()
    result = Replicas(tmp_path, clock)
    yield result
    result.close()


# --- pages -----------------------------------------------------------------------------------------------------------


def test_a_change_shows_in_the_very_next_page_of_every_replica(replicas: Replicas) -> None:
    path = "/api/clients/status?limit=2&offset=3"
    for http in (replicas.http, replicas.other):
        assert [c["client_id"] for c in replicas.get("/api/clients/status?limit=3", http)["clients"]] == [
            "depot",
            "truck-0",
            "truck-1",
        ]
    for changed, active in ((replicas.http, 5), (replicas.other, 4)):
        replicas.get(path), replicas.get(path, replicas.other)
        changed.delete(f"/api/clients/vehicle-000{active - 4}")
        for http in (replicas.http, replicas.other):
            page = replicas.get(path, http)
            assert (page["total"], page["active"]) == (6, active)
    replicas.post("/api/clients/register", device_id="truck-0", num_examples=77)
    replicas.other.post("/api/clients/vehicle-0000/validate", json={"validated": False})
    page = replicas.get("/api/clients/status", replicas.other)
    assert page["clients"][1]["num_examples"] == 77
    assert (page["validated"], replicas.get("/api/clients/status")["validated"]) == (5, 5)


def test_a_page_is_read_once_while_nothing_changes(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int]] = []
    page = replicas.store.clients.page
    monkeypatch.setattr(replicas.store.clients, "page", lambda *place: reads.append(place) or page(*place))
    first = replicas.http.get("/api/clients/status?limit=2").content
    assert replicas.http.get("/api/clients/status?limit=2").content == first
    assert replicas.http.get("/api/clients/status?limit=2&offset=1").content != first
    assert reads == [(0, 2), (1, 2)]
    replicas.store.metadata.set("anything", 1)
    replicas.get("/api/clients/status?limit=2")
    assert len(reads) == 3


def test_time_alone_makes_a_page_old(replicas: Replicas) -> None:
    def connected() -> list[str]:
        page = replicas.get("/api/clients/status?limit=3")
        return [item["conditions"][0]["status"] for item in page["clients"]]

    assert connected() == ["False", "False", "False"]
    replicas.post("/api/clients/truck-0/heartbeat")
    assert connected() == ["False", "True", "False"]
    replicas.clock.advance(150)
    assert connected() == ["False", "True", "False"]
    replicas.clock.advance(0.001)
    assert connected() == ["False", "False", "False"]


def test_a_page_shows_proxies_that_died_within_seconds(replicas: Replicas) -> None:
    def connected() -> str:
        return str(replicas.get("/api/clients/status?offset=3")["clients"][0]["conditions"][0]["status"])

    assert connected() == "True"
    replicas.aggregator.report = ProxyReport({"even": False})
    assert (connected(), replicas.aggregator.asked) == ("True", 1)
    replicas.clock.advance(5.001)
    assert connected() == "False"
    replicas.aggregator.report = None
    replicas.clock.advance(5.001)
    assert connected() == "Unknown"
    assert replicas.aggregator.asked == 3


def test_a_page_that_is_none_is_refused(replicas: Replicas) -> None:
    for query in ("limit=0", "limit=1001", "offset=-1", f"offset={2**63}", "limit=x", "limit=2&limit=3"):
        for path in ("status", "connectivity"):
            assert replicas.http.get(f"/api/clients/{path}?{query}").status_code == 422, query
    assert replicas.get(f"/api/clients/status?offset={2**63 - 1}")["clients"] == []


def test_pages_are_few_and_what_changes_while_one_is_made_makes_it_old() -> None:
    mark = [0]
    results: list[int] = []

    def make(number: int) -> Page:
        results.append(number)
        mark[0] += number == 999
        return Page(str(number).encode())

    pages = Pages(lambda: mark[0], utc_now)
    for number in range(MAX_PAGES + 1):
        pages.render(number, lambda number=number: make(number))  # type: ignore[misc]
    assert (pages.find(0), pages.find(1)) == (None, b"1")
    assert pages.render(1, lambda: make(1)) == b"1"
    assert len(results) == MAX_PAGES + 1
    assert pages.render("x", lambda: make(999)) == b"999"
    assert pages.find("x") is None


# --- who is connected ------------------------------------------------------------------------------------------------


def test_connectivity_follows_heartbeats_and_proxies(replicas: Replicas) -> None:
    result = replicas.get("/api/clients/connectivity")
    assert (result["total"], result["connected"], result["disconnected"]) == (6, 3, 3)
    assert (result["ratio"], result["partition_suspected"], result["heartbeat_timeout_s"]) == (0.5, False, 150.0)
    assert result["by_kind"] == {
        "virtual": {"total": 3, "connected": 3},
        "remote": {"total": 2, "connected": 0},
        "silo": {"total": 1, "connected": 0},
    }
    assert [lost["client_id"] for lost in result["disconnected_clients"]] == ["depot", "truck-0", "truck-1"]
    assert "never heard" in result["disconnected_clients"][0]["reason"]
    replicas.post("/api/clients/truck-0/heartbeat")
    assert replicas.get("/api/clients/connectivity")["connected"] == 4
    replicas.clock.advance(151)
    lost = replicas.get("/api/clients/connectivity?limit=1&offset=1")["disconnected_clients"]
    assert [item["client_id"] for item in lost] == ["truck-0"]
    assert lost[0]["last_seen_at"] is not None
    assert "more than 150 s" in lost[0]["reason"]
    replicas.aggregator.report = ProxyReport({"even": True, "odd": False}, frozenset({"vehicle-0001"}))
    result = replicas.get("/api/clients/connectivity")
    assert (result["connected"], result["partition_suspected"]) == (2, True)
    assert "proxy" in next(x for x in result["disconnected_clients"] if x["client_id"] == "vehicle-0001")["reason"]


def test_what_another_replica_heard_counts_once_it_is_in_the_store(replicas: Replicas) -> None:
    with replicas.other:
        replicas.other.post("/api/clients/truck-1/heartbeat", json={})
    assert replicas.get("/api/clients/connectivity")["by_kind"]["remote"]["connected"] == 1
    assert replicas.condition("truck-1", "Connected")["status"] == "True"


def test_a_removed_client_is_not_missed(replicas: Replicas) -> None:
    for name in ("depot", "truck-0", "truck-1"):
        replicas.http.delete(f"/api/clients/{name}")
    result = replicas.get("/api/clients/connectivity")
    assert (result["total"], result["ratio"]) == (3, 1.0)


def test_without_an_aggregator_the_fleet_is_still_shown(replicas: Replicas) -> None:
    replicas.aggregator.report = None
    result = replicas.get("/api/clients/connectivity")
    assert (result["connected"], result["partition_suspected"]) == (0, True)
    assert replicas.condition("vehicle-0000", "Connected")["reason"] == "AggregatorSilent"


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_verdict_is_kept_with_its_reason(replicas: Replicas) -> None:
    assert replicas.condition("truck-0", "Validated")["reason"] == "ByDefault"
    answer = replicas.post("/api/clients/truck-0/validate", validated=False, reason="Mud on the lens.")
    assert answer["validated"] is False
    result = replicas.condition("truck-0", "Validated", replicas.other)
    assert (result["status"], result["reason"], result["message"]) == ("False", "ByOperator", "Mud on the lens.")
    assert result["last_transition_at"] is not None
    assert replicas.get("/api/clients/status")["validated"] == 5
    replicas.post("/api/clients/truck-0/validate", validated=True)
    result = replicas.condition("truck-0", "Validated")
    assert (result["status"], "Mud" in result["message"]) == ("True", False)


def test_a_quarantine_is_lifted_with_a_justification(replicas: Replicas) -> None:
    at = utc_now() - timedelta(hours=1)
    replicas.store.clients.quarantine(["truck-0"], "incident PB-1", at)
    shown = replicas.get("/api/clients/truck-0")
    assert shown["quarantine_reason"] == "incident PB-1"
    assert replicas.condition("truck-0", "Quarantined")["last_transition_at"] == shown["quarantined_at"]
    assert replicas.http.post("/api/clients/truck-0/reinstate", json={"justification": ""}).status_code == 422
    answer = replicas.post("/api/clients/truck-0/reinstate", justification="It was somebody else's key.")
    assert (answer["quarantined_at"], answer["quarantine_reason"]) == (None, None)
    assert replicas.condition("truck-0", "Quarantined")["status"] == "False"
    assert replicas.store.clients.get("truck-0").quarantined is False
    line = replicas.store.audit.entries()[-1].facts
    assert (line.before["quarantine_reason"], line.after["quarantine_reason"]) == ("incident PB-1", None)
    assert line.params["body"] == {"justification": "It was somebody else's key."}


def test_nobody_is_not_found(replicas: Replicas) -> None:
    assert replicas.http.get("/api/clients/nobody").status_code == 404
    for verb, body in (("validate", {"validated": True}), ("reinstate", {"justification": "because"})):
        assert replicas.http.post(f"/api/clients/nobody/{verb}", json=body).status_code == 404


def test_removal_is_a_condition_too(replicas: Replicas) -> None:
    assert replicas.condition("truck-0", "Active")["status"] == "True"
    replicas.http.delete("/api/clients/truck-0")
    assert replicas.condition("truck-0", "Active")["reason"] == "Removed"


def test_training_says_what_it_lacks(replicas: Replicas) -> None:
    results = {c["type"]: (c["status"], c["reason"]) for c in replicas.get("/api/training/status")["conditions"]}
    assert results == {
        "Running": ("False", "NoRun"),
        "BudgetAvailable": ("Unknown", "AccountantSilent"),
        "Released": ("False", "NoRelease"),
    }
