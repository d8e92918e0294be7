"""Quality and drift as the control API tells them, after rounds that really went so."""

from __future__ import annotations

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
from fedvit.types import Evaluation, Weights
from serve_apps.control.api import Services, create_api
from serve_apps.control.fleet import data_health

TARGET = np.array([1.0, -2.0], dtype=np.float32)
WAIT_S = 20.0


class TwoClassModel(PointModel):
    """Answers the first class to 30 held-out images of 40."""

    def evaluate(self, weights: Weights) -> Evaluation:
        result = super().evaluate(weights)
        return Evaluation(result.loss, result.accuracy, result.recall_by_class, ((20, 5), (10, 5)), 40)


@pytest.fixture
def http(tmp_path: Path) -> Iterator[TestClient]:
    with Store.open(tmp_path) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near", "far"])
        store.clients.register(seeded_fleet(4))
        overrides = {"training": {"rounds": 2}, "privacy": {"noise_multiplier": 4.0}, "home": tmp_path}
        settings = load_settings(environ={}, overrides=overrides)
        accountant = PrivacyAccountant(store, settings)
        fleet = FakeFleet(TARGET, failing=["vehicle-0002"])
        local = LocalAggregator(
            settings=settings, store=store, accountant=accountant, fleet=fleet, model=TwoClassModel(TARGET)
        )
        http = TestClient(create_api(Services(settings, store, lambda: local, lambda: accountant)))
        assert get(http, "/api/clients/data-quality")["score"] is None
        assert get(http, "/api/monitoring/data-drift") | {"signals": []} == {
            "drifting": False,
            "score": None,
            "threshold": 0.5,
            "reference_version": None,
            "signals": [],
            "compared": 0,
            "features": [],
            "drifting_clients": {},
            "drifting_clusters": [],
        }
        http.post("/api/training/start")
        local.wait(WAIT_S)
        yield http
        local.close()


def get(http: TestClient, path: str) -> Any:
    answer = http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_quality_follows_the_rounds_and_the_verdicts(http: TestClient) -> None:
    http.post("/api/clients/vehicle-0003/validate", json={"validated": False})
    http.post("/api/clients/register", json={"device_id": "truck-1", "num_examples": 50})
    result = get(http, "/api/clients/data-quality?limit=2")
    assert (result["assessed"], result["threshold"], result["unvalidated"]) == (5, 0.7, ["vehicle-0003"])
    assert result["score"] == pytest.approx((0 + 0.5 + 1 + 1 + 1) / 5)
    assert [client["client_id"] for client in result["clients"]] == ["vehicle-0002", "truck-1"]
    assert (result["clients"][0]["rounds"], result["clients"][0]["failures"]) == (2, 2)
    assert "2 of 2 rounds" in result["clients"][0]["reasons"][0]
    rest = get(http, "/api/clients/data-quality?offset=2")["clients"]
    assert [client["validated"] for client in rest] == [True, True, False]
    http.post("/api/clients/truck-1/heartbeat", json={})
    assert get(http, "/api/clients/data-quality")["clients"][-1]["reasons"] == ["It took part in no round yet."]
    http.delete("/api/clients/vehicle-0002")
    assert get(http, "/api/clients/data-quality")["score"] == 1.0


def test_drift_holds_the_answers_against_the_held_out_images(http: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    result = get(http, "/api/monitoring/data-drift")
    assert (result["reference_version"], result["drifting"], result["score"]) == ("v1.1.2", False, 0.0)
    loss, mix, histograms = result["signals"]
    assert (loss["name"], loss["value"]) == ("held_out_loss", loss["reference"])
    assert (mix["name"], mix["score"]) == ("prediction_mix", None)
    assert "not enough answers yet: 0" in mix["reason"]
    assert (histograms["name"], histograms["score"]) == ("histograms", None)
    answers = {"v1.1.2": {0: 75, 1: 25}, "v1.1.1": {0: 0, 1: 1000}}
    monkeypatch.setattr(data_health, "predictions_by_class", lambda version, _: answers[version])
    assert get(http, "/api/monitoring/data-drift")["drifting"] is False
    answers["v1.1.2"] = {0: 25, 1: 75}
    result = get(http, "/api/monitoring/data-drift")
    assert (result["drifting"], result["signals"][1]["score"]) == (True, 1.0)
