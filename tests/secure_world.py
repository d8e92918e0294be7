"""Secure aggregation of twenty virtual clients and three vehicles that train for real, through the real API."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from control_client import URL, Through
from fastapi.testclient import TestClient
from PIL import Image

from edge_runtime.training.policy import VehiclePolicy
from edge_runtime.training.vehicle import PollResult, Vehicle
from fedvit.client import FedvitClient
from fedvit.clients.host import ClientHost, vision_host
from fedvit.evaluation.server_model import ServerModel
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.fleets import MixedFleet
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, ManualClock
from fedvit.types import Client, ClientKind, Cohort, TrainTask, Weights, utc_now
from fedvit.updates import UpdateMessage
from serve_apps.control.api import Services, create_api

CLASSES = ("green", "red")
VEHICLES = ("truck-0", "truck-1", "truck-2")
VIRTUAL = 20
PHASE_S, PAUSE_S = 60.0, 20.0
POLICY = VehiclePolicy(noise_at=("distributed",), max_epsilon=1000.0)


def images(folder: Path, count: int, seed: int) -> Path:
    """Random images of 16 x 16, ``count`` a class."""
    draw = np.random.default_rng(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


class HostFleet(FakeFleet):
    """Virtual clients of one real client host, in one message a group."""

    def __init__(self, host: ClientHost) -> None:
        super().__init__(np.zeros(2, np.float32))
        self.host, self._masks = host, dict[str, bytes]()

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        self._masks = dict(cohort.secure or {})
        yield from super().train(task, weights, cohort, timeout_s=timeout_s)

    def train_group(self, task: TrainTask, weights: Weights, client_ids: tuple[str, ...]) -> UpdateMessage:
        return self.host.train(task, weights, client_ids, secure={c: self._masks[c] for c in client_ids})

    def exchange(
        self, session: SecureSession, phase: str, requests: Mapping[str, bytes], *, timeout_s: float
    ) -> Iterator[SecureAnswer | None]:
        yield from self.host.exchange(session, phase, requests)


class SecureWorld:
    """A server, its virtual clients, and three vehicles.

    Attributes:
        act: what happens while a phase waits; by default every vehicle polls.
        results: what vehicles' polls came to, where they came to something.
    """

    def __init__(
        self, folder: Path, *, rounds: int = 1, policies: Mapping[str, VehiclePolicy] | None = None, **secure: Any
    ) -> None:
        images(folder / "server/train", VIRTUAL, 0)
        images(folder / "server/test", 1, 1)
        self.folder, self._policies = folder, policies or {}
        self.settings = load_settings(
            environ={},
            overrides={
                "home": folder / "home",
                "data": {
                    "source": "folder",
                    "path": folder / "server",
                    "image_size": 32,
                    "partition": {"clients": VIRTUAL, "scheme": "iid", "min_examples": 2},
                },
                "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
                "training": {
                    "rounds": rounds,
                    "local_steps": 1,
                    "cohort": {"selection": "all"},
                    "round_timeout_s": PHASE_S,
                },
                "privacy": {"noise_multiplier": 4.0, "noise_at": "distributed", "target_epsilon": 1000.0},
                "secure_aggregation": {"phase_timeout_s": PHASE_S, **secure},
                "histograms": {"every_rounds": None},
                # The clock of the world runs ahead of that of the API.
                "fleet": {"heartbeat_timeout_s": 80_000.0},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(self.settings.home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=CLASSES)
        self.clock, self.results = ManualClock(), list[PollResult]()
        self.host = vision_host(self.settings)
        sizes = {f"vehicle-{i:02d}": 0 for i in range(VIRTUAL)}
        self.store.clients.register([Client(c, ClientKind.VIRTUAL, len(self.host.data.load(c).labels)) for c in sizes])

        def nobody() -> NoReturn:
            raise AssertionError("an actor was asked")

        self.way = Through(TestClient(create_api(Services(self.settings, self.store, nobody, nobody))))
        self.client = FedvitClient(URL, transport=self.way, sleep=lambda _: None)
        for seed, name in enumerate(VEHICLES, 2):
            images(folder / f"{name}-data", 2, seed)
        self.vehicles = {name: self._vehicle(name) for name in VEHICLES}
        for vehicle in self.vehicles.values():
            vehicle.register()
        self.store.clients.set_last_seen(dict.fromkeys(VEHICLES, utc_now()))
        self.act: Callable[[], object] = self.poll_all
        self.fleet = MixedFleet(self.settings, self.store, HostFleet(self.host), clock=self.clock, pause=self._pause)
        self.accountant = GenerousAccountant(self.store)

    def loop(self) -> Coordinator:
        """A process that runs the training."""
        return Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=self.fleet,
            model=ServerModel(self.settings),
            clock=self.clock,
        )

    def home_of(self, name: str) -> Path:
        return self.folder / name

    def poll(self, name: str) -> PollResult:
        result = self.vehicles[name].poll()
        if result.status is not None:
            self.results.append(result)
        return result

    def poll_all(self) -> None:
        for name in VEHICLES:
            self.poll(name)

    def restart(self, name: str) -> None:
        """Another process of the vehicle over the same home."""
        self.vehicles[name].close()
        self.vehicles[name] = self._vehicle(name)

    def close(self) -> None:
        for vehicle in self.vehicles.values():
            vehicle.close()
        self.store.close()

    def _vehicle(self, name: str) -> Vehicle:
        policy = self._policies.get(name, POLICY)
        return Vehicle(self.client, name, self.folder / f"{name}-data", self.home_of(name), policy=policy)

    def _pause(self, _: float) -> None:
        self.clock.advance(PAUSE_S)
        self.act()
