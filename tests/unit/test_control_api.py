"""The control API over a real store, a real accountant and a training loop without Ray or torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedvit.errors import PlacementError
from fedvit.ports import AggregatorPort
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import TrainingProgress
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)


class InlineAggregator:
    """Runs the loop to its end inside ``start_training``."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self.stops = 0

    def start_training(self) -> TrainingProgress:
        self._coordinator.run()
        return self._coordinator.progress()

    def stop_training(self) -> TrainingProgress:
        self.stops += 1
        return self._coordinator.progress()

    def progress(self) -> TrainingProgress:
        return self._coordinator.progress()

    def wait(self, timeout_s: float) -> TrainingProgress:
        return self._coordinator.progress()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        opened.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        opened.clients.register(seeded_fleet(5))
        yield opened


@pytest.fixture
def services(store: Store) -> Services:
    settings = load_settings(
        environ={},
        overrides={
            "home": store.home,
            "training": {"rounds": 2},
            "privacy": {"noise_multiplier": 4.0},
            "release": {"variants": ["standard"]},
        },
    )
    accountant = PrivacyAccountant(store, settings)
    aggregator = InlineAggregator(
        Coordinator(
            settings=settings, store=store, accountant=accountant, fleet=FakeFleet(TARGET), model=PointModel(TARGET)
        )
    )
    return Services(settings, store, aggregator=lambda: aggregator, accountant=lambda: accountant)


@pytest.fixture
def client(services: Services) -> TestClient:
    return TestClient(create_api(services), raise_server_exceptions=False)


def test_training_changes_what_every_part_answers(client: TestClient) -> None:
    assert client.get("/api/training/status").json()["rounds_done"] == 0
    assert client.get("/api/privacy/budget").json()["epsilon_spent"] == 0
    started = client.post("/api/training/start")
    assert started.status_code == 202
    assert started.json()["status"] == "completed"
    assert client.get("/api/training/status").json()["rounds_done"] == 2
    budget = client.get("/api/privacy/budget").json()
    assert 0 < budget["epsilon_spent"] < 8
    assert budget["epsilon_remaining"] == pytest.approx(8 - budget["epsilon_spent"])
    current = client.get("/api/model/current").json()
    assert (current["version"], current["released"]) == ("v1.1.2", True)
    assert [v["version"] for v in client.get("/api/model/versions").json()] == ["v1.1.2", "v1.1.1"]
    assert client.get("/api/system/health").json()["release"] == "v1.1.2"
    history = client.get("/api/privacy/history?hours=1").json()
    assert len(history) == 2 * 5
    assert {entry["noise_multiplier"] for entry in history} == {4.0}


def test_model_info_answers_what_the_runbook_reads(client: TestClient, store: Store) -> None:
    client.post("/api/training/start")
    info = client.get("/api/model/info").json()
    digest = client.get("/api/model/current").json()["artifacts"]["standard"]
    assert info["size"] == {"standard": len(store.blobs.get(digest))}
    assert info["complexity"]["trainable"] == "all"


def test_a_release_is_served_as_it_was_signed(client: TestClient, store: Store) -> None:
    client.post("/api/training/start")
    release = store.releases.current()
    assert release is not None
    assert client.get("/api/model/release?variant=standard").text == release.envelopes["standard"]
    digest = release.artifacts["standard"]
    assert client.get(f"/api/model/blobs/{digest}").content == store.blobs.get(digest)


def test_a_download_that_broke_off_goes_on(client: TestClient, store: Store) -> None:
    assert client.post("/api/training/start").is_success
    release = store.releases.current()
    assert release is not None
    digest = release.artifacts["standard"]
    content = store.blobs.get(digest)
    rest = client.get(f"/api/model/blobs/{digest}", headers={"Range": "bytes=3-"})
    assert (rest.status_code, rest.content) == (206, content[3:])
    assert rest.headers["content-range"] == f"bytes 3-{len(content) - 1}/{len(content)}"
    for other in ("bytes=0-", "bytes=99999999-", "bytes=3-5", "bytes=-3", "x"):
        whole = client.get(f"/api/model/blobs/{digest}", headers={"Range": other})
        assert (whole.status_code, whole.content) == (200, content)


def test_only_a_missing_release_has_the_code_that_followers_wait_for(client: TestClient) -> None:
    assert client.get("/api/model/release").json()["type"] == "/problems/no-release"
    client.post("/api/training/start")
    assert client.get("/api/model/release?variant=edge_optimized_fp32").json()["type"] == "/problems/not-found"


def test_weights_are_not_served(client: TestClient, store: Store) -> None:
    client.post("/api/training/start")
    version = store.versions.latest()
    assert version is not None
    assert client.get(f"/api/model/blobs/{version.weights_digest}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/api/model/current",
        "/api/model/info",
        "/api/model/release",
        f"/api/model/blobs/{'0' * 64}",
        "/api/model/blobs/..%2f..%2fkeys%2froot.key",
    ],
)
def test_before_a_release_there_is_nothing_and_that_is_said(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/problem+json")


def test_a_vehicle_registers_leaves_and_comes_back(client: TestClient) -> None:
    body = {"device_id": "truck-7", "num_examples": 12, "capabilities": {"camera": "front"}}
    assert client.post("/api/clients/register", json=body).status_code == 201
    assert client.get("/api/clients/status").json()["total"] == 6
    assert client.delete("/api/clients/truck-7").json()["active"] is False
    assert client.get("/api/clients/status").json()["active"] == 5
    assert client.post("/api/clients/register", json=body).json()["active"] is True
    assert client.get("/api/clients/status").json() | {"clients": []} == {
        "total": 6,
        "active": 6,
        "validated": 6,
        "clients": [],
    }


def test_clients_come_in_pages(client: TestClient) -> None:
    page = client.get("/api/clients/status?limit=2&offset=3").json()
    assert [c["client_id"] for c in page["clients"]] == ["vehicle-0003", "vehicle-0004"]
    assert page["total"] == 5


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"device_id": "../etc/passwd"}, "device_id"),
        ({"device_id": "a", "colour": "red"}, "colour"),
        ({"device_id": "a", "num_examples": -1}, "num_examples"),
        ({}, "device_id"),
    ],
)
def test_a_bad_registration_is_refused_by_field(client: TestClient, body: dict[str, object], word: str) -> None:
    answer = client.post("/api/clients/register", json=body)
    assert answer.status_code == 422
    assert word in answer.json()["detail"]
    assert client.get("/api/clients/status").json()["total"] == 5


def test_a_virtual_client_cannot_be_taken_over(client: TestClient) -> None:
    answer = client.post("/api/clients/register", json={"device_id": "vehicle-0001"})
    assert answer.status_code == 409


def test_an_unknown_client_is_not_found(client: TestClient) -> None:
    answer = client.delete("/api/clients/nobody")
    assert (answer.status_code, answer.json()["type"]) == (404, "/problems/not-found")


def test_stop_is_passed_on(client: TestClient, services: Services) -> None:
    assert client.post("/api/training/stop").status_code == 202
    assert services.aggregator().stops == 1  # type: ignore[attr-defined]


def test_a_dead_actor_degrades_health_and_nothing_else(services: Services) -> None:
    def dead() -> AggregatorPort:
        raise PlacementError("The aggregator is restarting.")

    client = TestClient(create_api(Services(services.settings, services.store, dead, services.accountant)))
    health = client.get("/api/system/health").json()
    assert health["status"] == "degraded"
    assert health["parts"]["aggregator"] == "PlacementError: The aggregator is restarting."
    assert health["parts"]["store"] == "ok"
    assert client.get("/healthz").status_code == 200
    assert client.post("/api/training/start").status_code == 503


def test_metrics_are_in_prometheus_text(client: TestClient) -> None:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")


def test_the_openapi_document_names_every_route(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/api/training/start", "/api/clients/{client_id}", "/api/privacy/budget", "/api/model/info"} <= set(paths)
