"""Many virtual clients behind one warm model: what a client proxy does, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedvit.config import Settings
from fedvit.data.fleet import VirtualFleet
from fedvit.data.images import load_images
from fedvit.errors import FedvitError, IntegrityError
from fedvit.privacy.mechanism import Sums, clip_update
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.training.local import LocalTrainer
from fedvit.training.plain import PlainTrainer
from fedvit.types import ClientOutcome, FloatArray, PartialUpdate, TrainTask, Weights
from fedvit.vit.models import build_model
from fedvit.wire.tensors import encode_weights

FEATURE_BATCH = 128


@dataclass(frozen=True, slots=True)
class _Shard:
    """One client's records as the body reads them. ``digest`` is the SHA-256 of its images and labels."""

    features: torch.Tensor
    labels: torch.Tensor
    digest: str


class VirtualClientHost:
    """Trains virtual clients one after another on one model, keeping each client's frozen features.

    The raw images of a client are read when it first takes part; afterwards only the output of the model's frozen
    prefix is kept, in memory.
    """

    def __init__(self, settings: Settings) -> None:
        self._fleet = VirtualFleet.open(settings.data)
        self._image_size = settings.data.image_size
        self._model = build_model(settings.model, len(self._fleet.source.classes), self._image_size)
        kind = LocalTrainer if settings.privacy.privacy_unit == "record" else PlainTrainer
        self._trainer = kind(self._model, physical_batch_size=settings.training.physical_batch_size)
        self._root_secret = load_or_create_root_secret(settings.home)
        self._shards: dict[str, _Shard] = {}

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> PartialUpdate:
        """Train each client from ``weights`` and sum their updates.

        They are weighted by their number of examples; where the client is the privacy unit they are clipped, one by one
        and before anything is summed, and have a weight of 1. A client that fails is an outcome with the reason; it
        adds nothing to the sum.

        Raises:
            IntegrityError: these are not the weights that the task, and so the noise, was made for.
        """
        _check_base(task, weights)
        sums: dict[str, npt.NDArray[np.float64]] = {n: np.zeros(a.shape, np.float64) for n, a in weights.items()}
        outcomes = []
        total, within_clip = 0.0, 0
        for client_id in sorted(client_ids):
            try:
                delta, num_examples = self._train_one(task, weights, client_id)
                addend, weight, within = _addend(task, delta, num_examples)
            except Exception as error:
                # Whatever ails one client, the others' work must not be lost with it.
                outcomes.append(ClientOutcome(client_id, 0, _reason(error)))
                continue
            for name, array in addend.items():
                sums[name] += array
            total += weight
            within_clip += within
            outcomes.append(ClientOutcome(client_id, num_examples))
        return PartialUpdate(task.round_index, tuple(outcomes), sums, total, within_clip)

    def _train_one(self, task: TrainTask, weights: Weights, client_id: str) -> tuple[dict[str, FloatArray], int]:
        shard = self._shard(client_id)
        # Bound to the very records: changed data must never meet the noise of an earlier release.
        secret = derive_secret(self._root_secret, f"{client_id}/{shard.digest}")
        delta = self._trainer.train(task, weights, shard.features, shard.labels, secret, client_id)
        return delta, len(shard.labels)

    def _shard(self, client_id: str) -> _Shard:
        if client_id not in self._shards:
            records = self._fleet.records(client_id)
            images = load_images(self._fleet.source, records, self._image_size)
            labels = torch.tensor([r.label for r in records])
            batches = torch.from_numpy(images).split(FEATURE_BATCH)
            features = torch.cat([self._model.features(batch) for batch in batches])
            digest = hashlib.sha256(images.tobytes() + labels.numpy().tobytes()).hexdigest()
            self._shards[client_id] = _Shard(features, labels, digest)
        return self._shards[client_id]


def _addend(task: TrainTask, delta: Mapping[str, FloatArray], num_examples: int) -> tuple[Sums, float, bool]:
    """What one client adds to the sum, its weight, and whether it was within the bound before it was clipped.

    Raises:
        UpdateRejectedError: the client is the privacy unit, and its update has no finite norm.
    """
    if task.privacy_unit == "client":
        clipped, within = clip_update(delta, task.l2_clip_norm)
        return clipped, 1.0, within
    return {name: num_examples * array.astype(np.float64) for name, array in delta.items()}, float(num_examples), False


def _check_base(task: TrainTask, weights: Weights) -> None:
    """One release id, one base: two bases under the same noise would lay their gradients' difference bare."""
    found = hashlib.sha256(encode_weights(weights)).hexdigest()
    if found != task.base_digest:
        raise IntegrityError(
            f"Round {task.round_index} starts from weights {task.base_digest[:12]}, but {found[:12]} arrived.",
            cure="Nothing was trained; the round is repeated.",
        )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, FedvitError) else f"{type(error).__name__}: {error}"
