"""A control API over a real store, ledger and training loop, for what is done in an emergency."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.testclient import TestClient

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.errors import PlacementError
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.ports import AggregatorPort
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import Cohort, TrainTask, Weights, utc_now
from fedvit.updates import UpdateMessage
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
WAIT_S = 20.0
BREACH = "/api/emergency/privacy-breach"
JsonObject = dict[str, Any]


class LateFleet(FakeFleet):
    """One client joins in round three only; a round of a held fleet waits until it is let."""

    def __init__(self, *, held: bool = False) -> None:
        super().__init__(TARGET)
        self.begun, self.let = threading.Event(), threading.Event()
        if not held:
            self.let.set()

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        self.failing = frozenset({"vehicle-0001"} if task.round_index < 3 else ())
        self.begun.set()
        assert self.let.wait(WAIT_S)
        yield from super().train(task, weights, cohort, timeout_s=timeout_s)


class Site:
    """A control API over a real store, ledger and training loop, with the tokens of an operator and an emergency."""

    def __init__(
        self,
        home: Path,
        fleet: LateFleet | None = None,
        *,
        system_id: str = "first",
        more: JsonObject | None = None,
        **access: Any,
    ) -> None:
        self.fleet = fleet or LateFleet()
        self.settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": 4},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 1, "max_accuracy_drop": 1.0},
                "access": access,
                **(more or {}),
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(4))
        accountant = PrivacyAccountant(self.store, self.settings)
        self.local: LocalAggregator = LocalAggregator(
            settings=self.settings,
            store=self.store,
            accountant=accountant,
            fleet=self.fleet,
            model=PointModel(TARGET),
            system_id=system_id,
        )
        self.local.resume()
        self.aggregator: AggregatorPort | None = self.local
        services = Services(self.settings, self.store, self._aggregator, lambda: accountant)
        self.http = TestClient(create_api(services), raise_server_exceptions=False)
        token = create_token(self.store, "on call", [Scope.EMERGENCY], now=utc_now())
        self.bearer = {"Authorization": f"Bearer {token.text}"}
        self.actor = f"token:{token.token.token_id}:on call"

    def _aggregator(self) -> AggregatorPort:
        if self.aggregator is None:
            raise PlacementError("The aggregator is restarting.")
        return self.aggregator

    def trained(self) -> Site:
        self.http.post("/api/training/start")
        self.local.wait(WAIT_S)
        return self

    def get(self, path: str) -> Any:
        return self.http.get(path).json()

    def breach(self, *clients: str, actions: tuple[str, ...] = (), incident: str = "PB-1") -> JsonObject:
        body = {
            "incident_id": incident,
            "affected_clients": list(clients),
            "breach_type": "data_exposure",
            "immediate_actions": list(actions),
        }
        answer = self.http.post(BREACH, json=body, headers=self.bearer)
        assert answer.status_code == 200, answer.text
        result: JsonObject = answer.json()
        return result

    def stand_down(self, incident: str) -> Any:
        body = {"incident_id": incident, "justification": "The leak is closed."}
        return self.http.post("/api/emergency/stand-down", json=body, headers=self.bearer)

    def close(self) -> None:
        self.local.close()
        self.store.close()
