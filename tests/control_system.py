"""A control API without Ray, over a real store, ledger, training loop and operations; model and fleet are doubles."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from control_client import Through
from fastapi.testclient import TestClient
from tiny_release import CLASSES, IMAGE_SIZE, tiny_model

from fedvit.config import Settings
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.ports import ExportedModel
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.registry.client import ReleaseClient
from fedvit.registry.feed import HttpFeed
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import Cohort, TrainTask, Variant, Weights
from fedvit.updates import UpdateMessage
from fedvit.wire.manifest import load_or_create_signing_key
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
WAIT_S = 20.0
JsonObject = dict[str, Any]


class TinyModel(PointModel):
    """Exports a network that an edge can really load, another one for each variant and each state of the point."""

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        export = super().export(weights, variant)
        tilt = float(weights["point"][0]) + list(Variant).index(variant)
        return ExportedModel(tiny_model(tilt), export.agreement, export.accuracy, export.complexity)


class HeldFleet(FakeFleet):
    """Trains a round only when it is let."""

    def __init__(self) -> None:
        super().__init__(TARGET)
        self.begun, self.let = threading.Event(), threading.Event()

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        self.begun.set()
        assert self.let.wait(WAIT_S)
        yield from super().train(task, weights, cohort, timeout_s=timeout_s)


class System:
    """A control API over a real store, ledger, training loop and operations; model and fleet are doubles."""

    def __init__(
        self,
        home: Path,
        model: PointModel,
        fleet: FakeFleet,
        release: JsonObject,
        epsilon: float,
        access: JsonObject | None = None,
    ) -> None:
        self.model, self.fleet = model, fleet
        self.settings: Settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "data": {"image_size": IMAGE_SIZE},
                "training": {"rounds": 4},
                "privacy": {"noise_multiplier": 4.0, "target_epsilon": epsilon},
                "release": {"every_rounds": 2, **release},
                "access": access or {},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=list(CLASSES))
        self.store.clients.register(seeded_fleet(5))
        accountant = PrivacyAccountant(self.store, self.settings)
        self.local = LocalAggregator(
            settings=self.settings, store=self.store, accountant=accountant, fleet=fleet, model=model
        )
        self.local.resume()
        services = Services(self.settings, self.store, aggregator=lambda: self.local, accountant=lambda: accountant)
        self.api = create_api(services)
        self.http = TestClient(self.api, raise_server_exceptions=False)

    def close(self) -> None:
        self.local.close()
        self.store.close()

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def trained(self) -> System:
        self.http.post("/api/training/start")
        self.local.wait(WAIT_S)
        return self

    def done(self, path: str, body: JsonObject) -> JsonObject:
        """Ask for a long operation, follow its Location, and return it when it has ended."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"/api/operations/{answer.json()['operation_id']}"
        self.local.wait_operation(answer.json()["operation_id"], WAIT_S)
        ended: JsonObject = self.get(answer.headers["location"])
        return ended

    def follower(self, cache: Path, variant: str | None = None) -> ReleaseClient:
        key = load_or_create_signing_key(self.settings.home / "keys").public_key()
        feed = HttpFeed("http://testserver", transport=Through(self.http))
        return ReleaseClient(feed, cache, [key], variant)
