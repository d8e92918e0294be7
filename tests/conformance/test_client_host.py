"""The client host port: Vision Transformer clients, a workload's clients, and clients with simulated faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from contracts.client_host import ClientHostContract
from contracts.fleet import task_for

from fedvit.clients.host import vision_host
from fedvit.clients.workload import WorkloadHost, server_model
from fedvit.config import Settings
from fedvit.ports import ClientHostPort
from fedvit.settings import load_settings
from fedvit.tools.simulation.clients import faulty_host
from fedvit.tools.simulation.faults import Faults
from fedvit.types import TrainTask, Weights

CLIENT_LEVEL: dict[str, Any] = {
    "privacy": {"privacy_unit": "client"},
    "training": {"cohort": {"selection": "poisson", "sampling_prob": 0.5}},
}


class HostOfThree(ClientHostContract):
    clients = ("vehicle-00", "vehicle-01", "vehicle-02")

    @pytest.fixture
    def weights(self, settings: Settings) -> Weights:
        return server_model(settings).initial_weights()

    @pytest.fixture
    def task(self, weights: Weights) -> TrainTask:
        return task_for(weights, 1)


class VisionSettings:
    @pytest.fixture
    def settings(self, tmp_path: Path, images: Path) -> Settings:
        overrides: dict[str, Any] = {
            "home": tmp_path / "var",
            "data": {
                "source": "folder",
                "path": images,
                "image_size": 32,
                "partition": {"scheme": "iid", "clients": 3},
            },
            "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
            **CLIENT_LEVEL,
        }
        return load_settings(environ={}, overrides=overrides)


class TestVisionHost(VisionSettings, HostOfThree):
    @pytest.fixture
    def host(self, settings: Settings) -> ClientHostPort:
        return vision_host(settings)


class TestFaultyHost(VisionSettings, HostOfThree):
    @pytest.fixture
    def host(self, settings: Settings) -> ClientHostPort:
        return faulty_host(settings, Faults((), self.clients, 0), lambda: True)


class TestWorkloadHost(HostOfThree):
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        overrides: dict[str, Any] = {
            "home": tmp_path,
            "workload": {"clients_class": "workload_clients:PullingClients", "options": {"clients": 3}},
            **CLIENT_LEVEL,
        }
        return load_settings(environ={}, overrides=overrides)

    @pytest.fixture
    def host(self, settings: Settings) -> ClientHostPort:
        return WorkloadHost(settings)
