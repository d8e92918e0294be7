"""Data, clients and server model of simulations; several runs share one world."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from fedvit.clients.host import FeatureCache
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.evaluation.server_model import ServerModel
from fedvit.models.build import build_model
from fedvit.models.vision import VisionModel
from fedvit.ports import ServerModelPort
from fedvit.tools.simulation.clients import SimulatedClients
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import TrainingClients
from fedvit.types import Client


class World(Protocol):
    """The clients and the global model of simulations."""

    @property
    def clients(self) -> list[Client]:
        """The fleet."""

    @property
    def server(self) -> ServerModelPort:
        """The global model."""

    def training_clients(self, settings: Settings, faults: Faults) -> TrainingClients:
        """The clients of one run."""


class ImageWorld:
    """The configured data set and model; a client's images are read when it first takes part in a run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def fits(self, settings: Settings) -> bool:
        """Whether a run with these settings can use this world."""
        return (settings.data, settings.model) == (self._settings.data, self._settings.model)

    def load(self) -> None:
        """Load all data and the model, so that processes that are forked later share them."""
        for client in self.clients:
            self._data.load(client.client_id)
        self.server.evaluate(self.server.initial_weights())

    @cached_property
    def clients(self) -> list[Client]:
        return self._fleet.clients()

    @cached_property
    def server(self) -> ServerModelPort:
        return ServerModel(self._settings)

    def training_clients(self, settings: Settings, faults: Faults) -> TrainingClients:
        return SimulatedClients(settings, faults, self._data, self._fleet, self._model)

    @cached_property
    def _fleet(self) -> VirtualFleet:
        return VirtualFleet.open(self._settings.data)

    @cached_property
    def _data(self) -> FeatureCache:
        return FeatureCache(self._model, self._fleet)

    @cached_property
    def _model(self) -> VisionModel:
        """The model of which the clients of each run train copies."""
        data = self._settings.data
        return build_model(self._settings.model, len(self._fleet.source.classes), data.image_size)
