"""What simulations of the same data and model share: who holds what, features read once, the server's model."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

from fedvit.clients.host import FeatureCache
from fedvit.config import Settings
from fedvit.data.fleet import VirtualFleet
from fedvit.evaluation.server_model import ServerModel
from fedvit.models.models import build_model
from fedvit.models.vision import VisionModel
from fedvit.tools.simulation.faults import Faults
from fedvit.tools.simulation.fleet import Learners
from fedvit.tools.simulation.learners import SimulatedClients
from fedvit.tools.simulation.server import Evaluated
from fedvit.types import Client


class World(Protocol):
    """Clients with something to learn, and a model to learn it."""

    @property
    def clients(self) -> list[Client]:
        """The fleet."""
        ...

    @property
    def server(self) -> Evaluated:
        """The global model."""
        ...

    def learners(self, settings: Settings, faults: Faults) -> Learners:
        """The clients of one run."""
        ...


class ImageWorld:
    """The configured data set and model; a client's images are read when it first takes part in any of the runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def fits(self, settings: Settings) -> bool:
        """Whether a run with these settings is of this world."""
        return (settings.data, settings.model) == (self._settings.data, self._settings.model)

    def load(self) -> None:
        """Read everything now, so that processes forked afterwards share it."""
        for client in self.clients:
            self._data.load(client.client_id)
        self.server.evaluate(self.server.initial_weights())

    @cached_property
    def clients(self) -> list[Client]:
        """The virtual fleet."""
        return self._fleet.clients()

    @cached_property
    def server(self) -> Evaluated:
        """The model on the data set's test images."""
        return ServerModel(self._settings)

    def learners(self, settings: Settings, faults: Faults) -> Learners:
        """Clients that train for real."""
        return SimulatedClients(settings, faults, self._data, self._fleet, self._model)

    @cached_property
    def _fleet(self) -> VirtualFleet:
        return VirtualFleet.open(self._settings.data)

    @cached_property
    def _data(self) -> FeatureCache:
        return FeatureCache(self._model, self._fleet)

    @cached_property
    def _model(self) -> VisionModel:
        """Every run's clients train copies of it."""
        data = self._settings.data
        return build_model(self._settings.model, len(self._fleet.source.classes), data.image_size)
