"""A run of virtual and remote clients through the real API, store, ledger and loop, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from fastapi.testclient import TestClient
from httpx import Response

from fedvit.privacy.randomness import SecretStream
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, ManualClock, PointModel, seeded_fleet
from fedvit.types import Client, ClientKind, ClientOutcome, Encoding, RunStatus, utc_now
from fedvit.updates import ClientUpdate
from fedvit.wire.tensors import decode_weights
from fedvit.wire.updates import encode_smaller
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
ALL = [encoding.value for encoding in Encoding]


class Yard:
    """A run of two virtual clients and some trucks.

    Attributes:
        act: what happens while the round waits; by default every truck does its duty.
        waits: how often the round has waited.
    """

    def __init__(self, home: Path, *, trucks: int = 1, rounds: int = 1, encodings: Any = ALL, **training: Any) -> None:
        self.settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": rounds, **training},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(2))
        self.trucks = [f"truck-{i}" for i in range(trucks)]
        for truck in self.trucks:
            self.store.clients.register(
                [Client(truck, ClientKind.REMOTE, 30, capabilities={"training": {"encodings": list(encodings)}})]
            )
        self.store.clients.set_last_seen(dict.fromkeys(self.trucks, utc_now()))

        def nobody() -> NoReturn:
            raise AssertionError("an actor was asked")

        self.http = TestClient(create_api(Services(self.settings, self.store, nobody, nobody)))
        self.clock, self.waits = ManualClock(), 0
        self.act: Callable[[], object] = lambda: [self.do_duty(truck) for truck in self.trucks]
        self.on_progress: Callable[[Any], object] = lambda _: None
        self.process()

    def process(self) -> None:
        """Another process takes over."""
        self.virtual = FakeFleet(TARGET)
        self.accountant = GenerousAccountant(self.store)
        self.loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=MixedFleet(self.settings, self.store, self.virtual, clock=self.clock, pause=self._pause),
            model=PointModel(TARGET),
            on_progress=lambda progress: self.on_progress(progress),
        )

    def _pause(self, _: float) -> None:
        # Silence must not last for ever, and three looks are enough for whoever answers.
        self.clock.advance(250)
        self.waits += 1
        self.act()

    def run(self) -> RunStatus:
        return self.loop.run().status

    def task(self, truck: str) -> Any:
        answer = self.http.get(f"/api/clients/{truck}/task")
        assert answer.status_code == 200, answer.text
        return answer.json()["task"]

    def update(self, truck: str, task: Any, *, step: float = 0.5, **changes: Any) -> bytes:
        """What the truck learned: a share of the way to the target, like its virtual brothers."""
        content = self.http.get(f"/api/clients/{truck}/task/weights").content
        assert hashlib.sha256(content).hexdigest() == task["base_digest"]
        point = decode_weights(content, max_bytes=10_000)["point"]
        count = changes.pop("num_examples", task["num_examples"])
        outcome = ClientOutcome(changes.pop("client_id", truck), count)
        sums = {"point": count * step * (TARGET - point).astype(np.float64)}
        update = ClientUpdate(task["round_index"], outcome, sums, float(count))
        coins = SecretStream(bytes(32), "coins", {})
        return encode_smaller(replace(update, **changes), Encoding(task["encoding"]), coins.uniform, 1.0)

    def put(self, truck: str, content: bytes, round_index: int = 1, **more: Any) -> Response:
        return self.http.put(f"/api/clients/{truck}/updates/run-0001/{round_index}", content=content, **more)

    def do_duty(self, truck: str) -> Response | None:
        task = self.task(truck)
        return self.put(truck, self.update(truck, task), task["round_index"]) if task else None

    def receipt(self, truck: str, round_index: int = 1) -> Any:
        return self.http.get(f"/api/clients/{truck}/updates/run-0001/{round_index}").json()

    def lineage(self, round_index: int = 1) -> dict[str, Any]:
        return dict(self.store.versions.get(f"v1.1.{round_index}").lineage)

    def point(self, round_index: int = 1) -> Any:
        return stored_weights(self.store, self.store.versions.get(f"v1.1.{round_index}").weights_digest)["point"]
