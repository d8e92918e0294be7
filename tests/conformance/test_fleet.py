"""The fleet port: the fleet of a round over virtual clients, the simulated one, and the shipped double."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from contracts.fleet import FleetContract

from fedvit.config import DelayConfig
from fedvit.ports import FleetPort
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet
from fedvit.tools.simulation.delays import Delays
from fedvit.tools.simulation.fleet import SimulatedFleet, VirtualClock
from fedvit.types import ClientOutcome, TrainTask, Weights
from fedvit.updates import ClientUpdate

TARGET = np.ones(2, np.float32)


class FleetOfSix(FleetContract):
    clients = tuple(f"vehicle-{index:02d}" for index in range(6))

    @pytest.fixture
    def weights(self) -> Weights:
        return {"point": np.zeros(2, np.float32)}


class TestFakeFleet(FleetOfSix):
    @pytest.fixture
    def fleet(self) -> FleetPort:
        return FakeFleet(TARGET)


class TestMixedFleet(FleetOfSix):
    @pytest.fixture
    def fleet(self, tmp_path: Path) -> Iterator[FleetPort]:
        settings = load_settings(environ={}, overrides={"home": tmp_path})
        with Store.open(tmp_path) as store:
            yield MixedFleet(settings, store, FakeFleet(TARGET))


class Clients:
    """Clients that send an update of zeros."""

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> ClientUpdate:
        return ClientUpdate(task.round_index, ClientOutcome(client_id, 1), {"point": np.zeros(2)}, 1.0)


class TestSimulatedFleet(FleetOfSix):
    has_keys = False

    @pytest.fixture
    def fleet(self) -> FleetPort:
        delays = Delays(DelayConfig(kind="constant", median_s=10.0, dropout_prob=0.0), 0)
        return SimulatedFleet(Clients(), delays, VirtualClock(), poll_s=60.0)
