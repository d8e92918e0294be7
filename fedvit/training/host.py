"""Many virtual clients behind one warm model: what a client proxy does, without Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedvit.config import Settings
from fedvit.data.fleet import VirtualFleet
from fedvit.data.images import load_images
from fedvit.errors import FedvitError
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.training.local import LocalTrainer
from fedvit.types import ClientOutcome, FloatArray, PartialUpdate, TrainTask, Weights
from fedvit.vit.models import build_model

FEATURE_BATCH = 128


class VirtualClientHost:
    """Trains virtual clients one after another on one model, keeping each client's frozen features.

    The raw images of a client are read when it first takes part; afterwards only the output of the model's frozen
    prefix is kept, in memory.
    """

    def __init__(self, settings: Settings) -> None:
        self._fleet = VirtualFleet.open(settings.data)
        self._image_size = settings.data.image_size
        self._model = build_model(settings.model, len(self._fleet.source.classes), self._image_size)
        self._trainer = LocalTrainer(self._model, physical_batch_size=settings.training.physical_batch_size)
        self._root_secret = load_or_create_root_secret(settings.home)
        self._shards: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> PartialUpdate:
        """Train each client from ``weights`` and sum their updates, weighted by their number of examples.

        A client that fails is an outcome with the reason; it adds nothing to the sum.
        """
        sums: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(a.shape, np.float64) for n, a in weights.items()}
        outcomes = []
        total = 0.0
        for client_id in sorted(client_ids):
            try:
                delta, num_examples = self._train_one(task, weights, client_id)
            except FedvitError as error:
                outcomes.append(ClientOutcome(client_id, 0, str(error)))
                continue
            for name, array in delta.items():
                sums[name] += num_examples * array.astype(np.float64)
            total += num_examples
            outcomes.append(ClientOutcome(client_id, num_examples))
        return PartialUpdate(task.round_index, tuple(outcomes), sums, total)

    def _train_one(self, task: TrainTask, weights: Weights, client_id: str) -> tuple[dict[str, FloatArray], int]:
        features, labels = self._shard(client_id)
        secret = derive_secret(self._root_secret, client_id)
        return self._trainer.train(task, weights, features, labels, secret, client_id), len(labels)

    def _shard(self, client_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        if client_id not in self._shards:
            records = self._fleet.records(client_id)
            images = torch.from_numpy(load_images(self._fleet.source, records, self._image_size))
            features = torch.cat([self._model.features(batch) for batch in images.split(FEATURE_BATCH)])
            self._shards[client_id] = features, torch.tensor([r.label for r in records])
        return self._shards[client_id]
