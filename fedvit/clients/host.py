"""Many virtual clients behind one warm model: what a client proxy does, without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import BROADCAST, GradientCorrection, Rule
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.client_state import ClientState
from fedvit.clients.local import LocalTrainer, PlainTrainer, Trainer
from fedvit.clients.partial_aggregator import PartialAggregator, check_base, failed
from fedvit.clients.update_encoder import UpdateEncoder
from fedvit.clients.update_statistics import UpdateStatisticsMonitor
from fedvit.config import Settings
from fedvit.data.fleet import VirtualFleet
from fedvit.data.records import load_images
from fedvit.data.sources import ImageSource, Record
from fedvit.drift.client import HistogramClient
from fedvit.errors import UpdateRejectedError
from fedvit.models.models import build_model
from fedvit.models.trainable import frozen_weights, trainable_weights
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.mechanism import clip_update
from fedvit.privacy.secrets import derive_secret, load_or_create_root_secret
from fedvit.types import ClientOutcome, Encoding, FloatArray, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientUpdate, EncodedUpdate, UpdateBundle, UpdateMessage
from fedvit.wire.histograms import ClientHistogram, HistogramRequest
from fedvit.wire.tensors import encode_weights


@dataclass(frozen=True, slots=True)
class Shard:
    """One client's records as the body reads them. ``digest`` is the SHA-256 of its images and labels."""

    features: torch.Tensor
    labels: torch.Tensor
    digest: str


class Holdings(Protocol):
    """Who holds which records of a data set."""

    @property
    def source(self) -> ImageSource:
        """The data set."""
        ...

    def records(self, client_id: str) -> Sequence[Record]:
        """The records of one client."""
        ...


class ClientHost:
    """Trains virtual clients one after another on one model, keeping each client's frozen features.

    The raw images of a client are read when it first takes part; afterwards only the output of the model's frozen
    prefix is kept, in memory.

    Args:
        holdings: whose records they are; by default those of the virtual fleet that the settings describe.
        model: as the settings describe it, where it is built already; it is not changed.
    """

    def __init__(self, settings: Settings, holdings: Holdings | None = None, model: VisionModel | None = None) -> None:
        self._fleet: Holdings = VirtualFleet.open(settings.data) if holdings is None else holdings
        self._image_size = settings.data.image_size
        classes = len(self._fleet.source.classes)
        self._model = build_model(settings.model, classes, self._image_size) if model is None else model
        self._settings = settings
        self._rule = rule_for(settings)
        self._trainer = self._trainer_of(settings)
        self._root_secret = load_or_create_root_secret(settings.home)
        self._kept = ClientState(settings.home, self._rule.name)
        self._sender = UpdateEncoder(settings.home, self._root_secret, settings.training.compression.top_k_fraction)
        self._shards: dict[str, Shard] = {}
        # The model is never changed, and says where training starts.
        self._noised = settings.simulation.private and settings.privacy.privacy_unit == "record"

    def _trainer_of(self, settings: Settings) -> Trainer:
        """Who takes a client's steps: where records are protected, the client itself adds the noise."""
        kind = LocalTrainer if settings.privacy.privacy_unit == "record" else PlainTrainer
        return kind(self._model, physical_batch_size=settings.training.physical_batch_size)

    @cached_property
    def _personal_trainer(self) -> PlainTrainer:
        return PlainTrainer(self._model, physical_batch_size=self._settings.training.physical_batch_size)

    def train(self, task: TrainTask, weights: Weights, client_ids: Sequence[str]) -> UpdateMessage:
        """Train each client from ``weights`` and sum their updates, or bundle them where the rule needs single updates.

        They are weighted as the rule says; where the client is the privacy unit they are clipped, one by one and before
        anything is summed, and have a weight of 1. A client that fails, or whose update fails validation, is
        an outcome with the reason; it adds nothing to the sum.

        Args:
            weights: and what the rule hands out beside them.

        Raises:
            IntegrityError: these are not the weights that the task, and so the noise, was made for.
        """
        check_base(task, weights)
        base = {name: array for name, array in weights.items() if not name.startswith(BROADCAST)}
        handed = {name: array for name, array in weights.items() if name.startswith(BROADCAST)}
        validator = UpdateValidator.of(self._settings, self._rule, base)
        made = ((client_id, self._answer(task, base, handed, validator, client_id)) for client_id in sorted(client_ids))
        answers = (self._seen(task, base, self._sent(client_id, answer)) for client_id, answer in made)
        if self._rule.needs == "single_updates":
            smaller = self._settings.training.compression.encodings[:1]
            # Who has nothing to send says why as it is: bytes do not tell a refusal from a failure.
            parts = tuple(
                self._sender.encoded(task, a, smaller[0], validator) if smaller and isinstance(a, ClientUpdate) else a
                for a in answers
            )
            return UpdateBundle(task.round_index, parts)
        summing = PartialAggregator(task, validator.shapes)
        for answer in answers:
            summing.add(answer)
        return summing.message()

    def train_alone(self, task: TrainTask, weights: Weights, client_id: str, encoding: Encoding) -> EncodedUpdate:
        """Train one client and give back its answer as bytes, whatever the rule, for one that travels by itself.

        Raises:
            IntegrityError: these are not the weights that the task was made for.
        """
        check_base(task, weights)
        base = {name: array for name, array in weights.items() if not name.startswith(BROADCAST)}
        handed = {name: array for name, array in weights.items() if name.startswith(BROADCAST)}
        validator = UpdateValidator.of(self._settings, self._rule, base)
        return self._sender.encoded(task, self._answer(task, base, handed, validator, client_id), encoding, validator)

    def _sent(self, client_id: str, answer: ClientAnswer) -> ClientAnswer:
        """What arrives of a client's own answer: all of it, unless somebody who hosts faulty clients says otherwise."""
        return answer

    def _seen(self, task: TrainTask, base: Weights, answer: ClientAnswer) -> ClientAnswer:
        """A single answer as it arrived, with what shows of the client in it."""
        return self._conduct.seen(task, base, answer) if self._noised else answer

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        """See :class:`fedvit.ports.ClientHostPort`."""
        return self._sketcher.histograms(request, client_ids)

    @cached_property
    def _conduct(self) -> UpdateStatisticsMonitor:
        classifier = self._model.body.classifier()
        names = [f"{name}.weight" for name, module in self._model.named_modules() if module is classifier]
        initial = trainable_weights(self._model).get(names[0]) if names else None
        return (
            UpdateStatisticsMonitor(names[0], initial) if initial is not None else UpdateStatisticsMonitor(None, None)
        )

    @cached_property
    def _sketcher(self) -> HistogramClient:
        return HistogramClient(
            self._model, self._fleet.source, self._image_size, self._fleet.records, self._root_secret
        )

    @cached_property
    def frozen_digest(self) -> str:
        """SHA-256, hex, of the weights that never travel: the server's have to be the same."""
        return hashlib.sha256(encode_weights(frozen_weights(self._model))).hexdigest()

    def _answer(
        self, task: TrainTask, base: Weights, handed: Weights, validator: UpdateValidator, client_id: str
    ) -> ClientAnswer:
        try:
            return self._train_one(task, base, handed, client_id, validator)
        except Exception as error:
            return failed(task, client_id, error)

    def _train_one(
        self, task: TrainTask, base: Weights, handed: Weights, client_id: str, validator: UpdateValidator
    ) -> ClientUpdate:
        """One client's own answer; what it keeps for itself is kept only when that may count.

        Raises:
            UpdateRejectedError: it may not.
        """
        shard, half = self._shard(client_id), self._rule.client
        kept, kept_digest = self._kept.before(task.run_id, task.round_index, client_id)
        # Bound to the very records, and to what leads the steps: changed data must never meet the noise of an earlier
        # release, nor must another path.
        bound_to = f"{shard.digest}/{kept_digest}" if half.keeps else shard.digest
        secret = derive_secret(self._root_secret, f"{client_id}/{bound_to}")
        correction = half.before_training(base, handed, kept)
        delta = self._trainer.train(task, base, shard.features, shard.labels, secret, client_id, correction)
        own = _own_update(task, self._rule, client_id, delta, len(shard.labels))
        if fault := validator.fault_of(own):
            raise UpdateRejectedError(f"The update of {client_id} is refused: {fault}.")
        if half.keeps:
            self._kept.leave(task.run_id, task.round_index, client_id, half.after_training(delta, handed, kept))
        if half.personal_pull is not None:
            self._train_personal(task, base, kept or base, shard, secret, client_id, half.personal_pull)
        return own

    def _train_personal(
        self, task: TrainTask, base: Weights, own: Weights, shard: Shard, secret: bytes, client_id: str, pull: float
    ) -> None:
        """The client's own model takes its steps. Nobody sees it, so nothing of it is clipped, noised or charged."""
        correction, coins = GradientCorrection(pull=pull, anchor=base), derive_secret(secret, "personal")
        train = self._personal_trainer.train
        delta = train(task, own, shard.features, shard.labels, coins, client_id, correction)
        self._kept.leave(task.run_id, task.round_index, client_id, {n: own[n] + d for n, d in delta.items()})

    def _shard(self, client_id: str) -> Shard:
        if client_id not in self._shards:
            records = self._fleet.records(client_id)
            images = load_images(self._fleet.source, records, self._image_size)
            labels = torch.tensor([r.label for r in records])
            batches = torch.from_numpy(images).split(FEATURE_BATCH)
            features = torch.cat([self._model.features(batch) for batch in batches])
            digest = hashlib.sha256(images.tobytes() + labels.numpy().tobytes()).hexdigest()
            self._shards[client_id] = Shard(features, labels, digest)
        return self._shards[client_id]


def _own_update(
    task: TrainTask, rule: Rule, client_id: str, delta: Mapping[str, FloatArray], num_examples: int
) -> ClientUpdate:
    """What one client adds to the sum, with its weight, and whether it was within the bound before it was clipped.

    Raises:
        UpdateRejectedError: the client is the privacy unit, and its update has no finite norm.
    """
    outcome = ClientOutcome(client_id, num_examples)
    if task.privacy_unit == "client":
        clipped, within = clip_update(delta, task.l2_clip_norm)
        return ClientUpdate(task.round_index, outcome, clipped, 1.0, int(within))
    weight = float(num_examples) if rule.weighting == "examples" else 1.0
    addend = {name: weight * array.astype(np.float64) for name, array in delta.items()}
    return ClientUpdate(task.round_index, outcome, addend, weight)
