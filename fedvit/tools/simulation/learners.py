"""Real local training for simulated clients, and what some of them make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedvit.clients.host import ClientHost, Holdings, Shard
from fedvit.clients.local import PlainTrainer, Trainer
from fedvit.config import Settings
from fedvit.models.vision import VisionModel
from fedvit.tools.simulation.faults import Faults
from fedvit.types import TrainTask, Weights
from fedvit.updates import (
    ClientAnswer,
    ClientFailures,
    ClientUpdate,
    EncodedUpdate,
    PartialSum,
    SingleMessage,
    UpdateBundle,
)


class SimulatedClients(ClientHost):
    """The host of virtual clients, one answer each. Where the simulation is not private, they train by plain SGD.

    Args:
        settings: of the run; its ``home`` is the simulation's own.
        faults: who errs, and how.
        shards: what the clients hold, by id, as an earlier simulation of the same data and model has read it.
        holdings: see :class:`fedvit.clients.host.ClientHost`, as ``model``.
    """

    def __init__(
        self,
        settings: Settings,
        faults: Faults,
        shards: dict[str, Shard],
        holdings: Holdings | None = None,
        model: VisionModel | None = None,
    ) -> None:
        super().__init__(settings, holdings, model)
        self._faults = faults
        self._shards = shards

    def answer(self, task: TrainTask, weights: Weights, client_id: str) -> SingleMessage:
        """One client's own answer, as it arrives."""
        message = self.train(task, weights, [client_id])
        own = message.parts[0] if isinstance(message, UpdateBundle) else message
        if isinstance(own, EncodedUpdate):
            return own
        if isinstance(own, PartialSum):
            own = _single(own)
        return self._seen(task, weights, self._faults.sent(client_id, own))

    def load(self, client_id: str) -> None:
        """Read what a client holds, if nobody has yet."""
        super()._shard(client_id)

    def _trainer_of(self, settings: Settings) -> Trainer:
        if settings.simulation.private:
            return super()._trainer_of(settings)
        return PlainTrainer(self._model, physical_batch_size=settings.training.physical_batch_size)

    def _shard(self, client_id: str) -> Shard:
        shard = super()._shard(client_id)
        labels = torch.from_numpy(self._faults.labels(client_id, shard.labels.numpy(), self._model.num_classes))
        if torch.equal(labels, shard.labels):
            return shard
        # Other records, so other noise.
        return replace(shard, labels=labels, digest=f"{shard.digest}/flipped")


class LyingClients(SimulatedClients):
    """The host of a real system's virtual clients in a drill.

    Args:
        lies: whether they lie now.
    """

    def __init__(self, settings: Settings, faults: Faults, lies: Callable[[], bool]) -> None:
        super().__init__(settings, faults, {})
        self._lies = lies

    def _shard(self, client_id: str) -> Shard:
        return super()._shard(client_id) if self._lies() else ClientHost._shard(self, client_id)

    def _sent(self, client_id: str, answer: ClientAnswer) -> ClientAnswer:
        return self._faults.sent(client_id, answer) if self._lies() else answer


def _single(own: PartialSum) -> ClientAnswer:
    """A sum over one client as that client's answer."""
    (outcome,) = own.outcomes
    if outcome.error is not None:
        return ClientFailures(own.round_index, own.outcomes)
    return ClientUpdate(own.round_index, outcome, own.weighted_sum, own.total_weight, own.within_clip)
