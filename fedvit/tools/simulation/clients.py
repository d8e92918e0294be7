"""Simulated clients that train for real, some of them with faulty labels or updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedvit.clients.host import ClientData, ClientDataSource, ClientHost, FeatureCache, vision_host
from fedvit.clients.local import PlainTrainer
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.models.build import build_model
from fedvit.models.vision import VisionModel
from fedvit.tools.simulation.faults import Faults
from fedvit.types import TrainTask, Weights
from fedvit.updates import (
    ClientAnswer,
    ClientFailures,
    ClientUpdate,
    EncodedUpdate,
    PartialSum,
    RingSum,
    SingleMessage,
    UpdateBundle,
)


class MislabelledData:
    """Data of clients some of which have wrong labels; implements :class:`fedvit.clients.host.ClientDataSource`.

    Args:
        active: whether labels are wrong at present.
    """

    def __init__(
        self, data: ClientDataSource, faults: Faults, num_classes: int, active: Callable[[], bool] = lambda: True
    ) -> None:
        self._data, self._faults, self._num_classes, self._active = data, faults, num_classes, active

    def load(self, client_id: str) -> ClientData:
        """One client's records, with the labels that it trains on."""
        data = self._data.load(client_id)
        if not self._active():
            return data
        labels = torch.from_numpy(self._faults.labels(client_id, data.labels.numpy(), self._num_classes))
        if torch.equal(labels, data.labels):
            return data
        # Other records, so other noise.
        return replace(data, labels=labels, digest=f"{data.digest}/flipped")


class SimulatedClients:
    """Clients that answer one at a time; without noise if the simulation is not private.

    Args:
        settings: of the run; its ``home`` is the simulation's own.
        faults: the faulty clients.
        data: the clients' records, without faults.
        records, model: see :func:`fedvit.clients.host.vision_host`.
    """

    def __init__(
        self, settings: Settings, faults: Faults, data: ClientDataSource, records: VirtualFleet, model: VisionModel
    ) -> None:
        self._faults, self._in_ring = faults, settings.privacy.noise_place == "distributed"
        batch = settings.training.physical_batch_size
        self._host = vision_host(
            settings,
            records=records,
            model=model,
            data=MislabelledData(data, faults, model.num_classes),
            # A contribution in integers cannot be altered any more.
            alter_answer=faults.alter if self._in_ring else None,
            trainer=None if settings.simulation.private else PlainTrainer(model, physical_batch_size=batch),
        )

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> SingleMessage:
        """One client's answer as the server receives it."""
        message = self._host.train(task, weights, [client_id])
        answer = message.parts[0] if isinstance(message, UpdateBundle) else message
        if isinstance(answer, EncodedUpdate | RingSum):
            return answer
        if isinstance(answer, PartialSum):
            answer = _single(answer)
        return self._faults.alter(client_id, answer)


def faulty_host(settings: Settings, faults: Faults, active: Callable[[], bool]) -> ClientHost:
    """The host of a real system's virtual clients in a drill; faults occur while ``active``."""
    fleet = VirtualFleet.open(settings.data)
    model = build_model(settings.model, len(fleet.source.classes), settings.data.image_size)

    def alter_answer(client_id: str, answer: ClientAnswer) -> ClientAnswer:
        return faults.alter(client_id, answer) if active() else answer

    return vision_host(
        settings,
        records=fleet,
        model=model,
        data=MislabelledData(FeatureCache(model, fleet), faults, model.num_classes, active),
        alter_answer=alter_answer,
    )


def _single(own: PartialSum) -> ClientAnswer:
    """A sum over one client as that client's answer."""
    (outcome,) = own.outcomes
    if outcome.error is not None:
        return ClientFailures(own.round_index, own.outcomes)
    return ClientUpdate(own.round_index, outcome, own.total(), own.total_weight, own.within_clip)
