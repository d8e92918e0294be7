"""The aggregation mode over HTTP, while a run is live: each change's effect as a second request sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import RunStatus
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
MODE = "/api/aggregation/mode"
WAIT_S = 20.0
SLOW = "vehicle-0000"


class System:
    """A control API over a real store, ledger and loop; when only held clients are left, a round hangs."""

    def __init__(self, home: Path) -> None:
        self.hangs, self.go_on = threading.Event(), threading.Event()
        self.fleet = FakeFleet(TARGET, groups=4, on_silence=self._hang)
        settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": 4},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 2, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(4))
        accountant = PrivacyAccountant(self.store, settings)
        self.local = LocalAggregator(
            settings=settings, store=self.store, accountant=accountant, fleet=self.fleet, model=PointModel(TARGET)
        )
        services = Services(settings, self.store, aggregator=lambda: self.local, accountant=lambda: accountant)
        self.http = TestClient(create_api(services), raise_server_exceptions=False)

    def _hang(self) -> None:
        self.hangs.set()
        assert self.go_on.wait(WAIT_S)

    def close(self) -> None:
        self.go_on.set()
        self.local.close()
        self.store.close()


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path / "home")
    yield system
    system.close()


def test_the_runbooks_call_ends_a_round_that_hangs_and_the_run_goes_on(system: System) -> None:
    system.fleet.held.add(SLOW)
    system.http.post("/api/training/start")
    assert system.hangs.wait(WAIT_S)
    assert system.http.get("/api/training/status").json()["rounds_done"] == 0
    answer = system.http.post(MODE, content='{"mode": "asynchronous", "staleness_tolerance": 5}')
    results = {"mode": "asynchronous", "staleness_tolerance": 5, "buffer_size": None, "revision": 1}
    assert (answer.status_code, answer.json(), answer.headers["etag"]) == (200, results, '"1"')
    assert system.http.get(MODE).json() == results
    system.fleet.held.clear()
    system.go_on.set()
    assert system.local.wait(WAIT_S).status is RunStatus.COMPLETED
    versions = {v["round_index"]: v["lineage"] for v in system.http.get("/api/model/versions").json()}
    assert {lineage["aggregation"]["mode"] for lineage in versions.values()} == {"asynchronous"}
    answers = [c for lineage in versions.values() for c in lineage["clients"]]
    assert SLOW not in versions[1]["clients"]
    assert SLOW in answers
    assert len(answers) == len(system.store.ledger.entries())


def test_turned_back_the_rounds_are_synchronous_again(system: System) -> None:
    system.http.post(MODE, json={"mode": "asynchronous"})
    assert system.http.post(MODE, json={"mode": "synchronous"}).json()["revision"] == 2
    system.http.post("/api/training/start")
    assert system.local.wait(WAIT_S).status is RunStatus.COMPLETED
    lineages = [v["lineage"] for v in system.http.get("/api/model/versions").json()]
    assert [(len(lineage["clients"]), "aggregation" in lineage) for lineage in lineages] == [(4, False)] * 4


def test_what_is_left_out_stays_and_null_is_the_default(system: System) -> None:
    first = system.http.get(MODE)
    assert first.json() == {"mode": "synchronous", "staleness_tolerance": 5, "buffer_size": None, "revision": 0}

    def after(**body: Any) -> tuple[Any, ...]:
        return tuple(system.http.post(MODE, json=body).json().values())

    assert after(mode="asynchronous", staleness_tolerance=2, buffer_size=3) == ("asynchronous", 2, 3, 1)
    assert after(mode="synchronous") == ("synchronous", 2, 3, 2)
    assert after(mode="synchronous") == ("synchronous", 2, 3, 2)
    assert after(mode="asynchronous", staleness_tolerance=None, buffer_size=None) == ("asynchronous", 5, None, 3)


def test_a_stale_etag_changes_nothing(system: System) -> None:
    etag = system.http.get(MODE).headers["etag"]
    assert system.http.post(MODE, json={"mode": "asynchronous"}, headers={"If-Match": etag}).status_code == 200
    stale = system.http.post(MODE, json={"mode": "synchronous"}, headers={"If-Match": etag})
    assert (stale.status_code, stale.json()["type"]) == (412, "/problems/stale-request")
    assert system.http.get(MODE).json()["mode"] == "asynchronous"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "mode"),
        ({"mode": "fast"}, "mode"),
        ({"mode": None}, "mode"),
        ({"mode": "asynchronous", "staleness_tolerance": -1}, "staleness_tolerance"),
        ({"mode": "asynchronous", "staleness_tolerance": 1001}, "staleness_tolerance"),
        ({"mode": "asynchronous", "buffer_size": 0}, "buffer_size"),
        ({"mode": "asynchronous", "patience": 1}, "patience"),
    ],
)
def test_a_bad_mode_is_refused_by_field(system: System, body: dict[str, Any], word: str) -> None:
    answer = system.http.post(MODE, json=body)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert system.http.get(MODE).json()["revision"] == 0


def test_a_change_is_audited_with_before_and_after(system: System) -> None:
    system.http.post(MODE, json={"mode": "asynchronous", "buffer_size": 2})
    (facts,) = (entry.facts for entry in system.store.audit.entries())
    assert (facts.action, facts.status) == (f"POST {MODE}", 200)
    assert (facts.before["mode"], facts.after["mode"], facts.after["buffer_size"]) == ("synchronous", "asynchronous", 2)
