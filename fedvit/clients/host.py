"""Client host: local training of many clients on one warm model, composed of data, trainer, encoder and monitor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.rule import BROADCAST, GradientCorrection
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.client_state import ClientState
from fedvit.clients.contributions import RingAggregator, RingEncoder, with_own_noise
from fedvit.clients.local import LocalTrainer, PlainTrainer, Trainer
from fedvit.clients.partial_aggregator import PartialAggregator, check_base, failed
from fedvit.clients.secure import SecureClients
from fedvit.clients.update_encoder import UpdateEncoder
from fedvit.clients.update_statistics import UpdateStatisticsMonitor
from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.data.records import ImageSource, Record, load_images
from fedvit.drift.client import HistogramClient
from fedvit.errors import DataError, ForbiddenError, UpdateRejectedError
from fedvit.models.build import build_model
from fedvit.models.trainable import frozen_weights, head_name, trainable_weights
from fedvit.models.vision import FEATURE_BATCH, VisionModel
from fedvit.privacy.mechanism import clip_update
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret, output_id
from fedvit.secure_session import SecureAnswer, SecureSession
from fedvit.types import ClientOutcome, Encoding, FloatArray, TrainTask, Weights
from fedvit.updates import (
    ClientAnswer,
    ClientFailures,
    ClientUpdate,
    EncodedUpdate,
    RingSum,
    SingleMessage,
    UpdateBundle,
    UpdateMessage,
)
from fedvit.wire.histograms import ClientHistogram, HistogramRequest
from fedvit.wire.tensors import weights_digest

_NUM_EXAMPLES = f"{BROADCAST}num_examples"
"""Name of the number of records that a client state was made of."""


@dataclass(frozen=True, slots=True)
class ClientData:
    """One client's records as inputs of the model's body. ``digest`` is the SHA-256 of its images and labels."""

    features: torch.Tensor
    labels: torch.Tensor
    digest: str


class ClientDataSource(Protocol):
    """The records of clients, for training."""

    def load(self, client_id: str) -> ClientData:
        """One client's records; the same object at every call."""


class ClientRecords(Protocol):
    """A data set and its division among clients."""

    @property
    def source(self) -> ImageSource:
        """The data set."""

    def records(self, client_id: str) -> Sequence[Record]:
        """The records of one client."""


class FeatureCache:
    """Clients' records as features of a model's frozen prefix; implements :class:`ClientDataSource`.

    The images of a client are read when it first takes part. Afterwards only the features are kept, in memory.

    Args:
        cache: by client id; hosts of the same records and model may share one.
    """

    def __init__(self, model: VisionModel, records: ClientRecords, cache: dict[str, ClientData] | None = None) -> None:
        self._model, self._records = model, records
        self._cache = {} if cache is None else cache

    def load(self, client_id: str) -> ClientData:
        if client_id not in self._cache:
            records = self._records.records(client_id)
            images = load_images(self._records.source, records, self._model.image_size)
            labels = torch.tensor([r.label for r in records])
            batches = torch.from_numpy(images).split(FEATURE_BATCH)
            features = torch.cat([self._model.features(batch) for batch in batches])
            digest = hashlib.sha256(images.tobytes() + labels.numpy().tobytes()).hexdigest()
            self._cache[client_id] = ClientData(features, labels, digest)
        return self._cache[client_id]


@dataclass(frozen=True, slots=True)
class _Round:
    """A task with its weights, separated from the broadcast state of the rule, and the validator of its updates."""

    task: TrainTask
    base: Weights
    broadcast: Weights
    validator: UpdateValidator

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the trainable parameters, by name."""
        return self.validator.shapes


class ClientHost:
    """Trains clients one after another; implements :class:`fedvit.ports.ClientHostPort`.

    Args:
        settings: of the run.
        data: the clients' records.
        trainer: takes the local steps. Where records are the privacy unit, it clips and adds noise.
        root_secret: the clients' keys are derived from it.
        personal_trainer: for the clients' personal models, if the rule has such (Ditto).
        monitor: adds statistics to the outcomes of noised updates; None if nothing is noised here.
        histograms: the clients' histograms; None if they have none.
        context_digest: of the settings, the data set's classes and the model of this host, as the host itself computes
            it; see :meth:`fedvit.config.Settings.context_digest`. Noise and coins are derived from it.
        alter_answer: applied to each client's answer before it is summed or bundled; drills inject faults with it.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        data: ClientDataSource,
        trainer: Trainer,
        root_secret: bytes,
        personal_trainer: Trainer | None = None,
        monitor: UpdateStatisticsMonitor | None = None,
        histograms: HistogramClient | None = None,
        context_digest: str = "",
        alter_answer: Callable[[str, ClientAnswer], ClientAnswer] | None = None,
    ) -> None:
        self.data, self._monitor, self.context_digest = data, monitor, context_digest
        self._settings, self._trainer, self._root_secret = settings, trainer, root_secret
        self._personal_trainer, self._histograms, self._alter_answer = personal_trainer, histograms, alter_answer
        self._rule, self._secure = rule_for(settings), SecureClients(root_secret)
        self._states = ClientState(settings.home, self._rule.name)
        self._encoder = UpdateEncoder(settings.home, root_secret, settings.training.compression.top_k_fraction)

    def train(
        self,
        task: TrainTask,
        weights: Weights,
        client_ids: Sequence[str],
        max_weight: int | None = None,
        num_examples: Mapping[str, int] | None = None,
        secure: Mapping[str, bytes] | None = None,
    ) -> UpdateMessage:
        """The sum of the clients' updates, in integers where noise is distributed, or a bundle of single updates.

        Updates are weighted as the rule says. Where the client is the privacy unit, each one is clipped before it is
        summed and has weight 1. An update that fails validation counts as a failure of its client.

        Args:
            weights: the round's weights, and the rule's broadcast state.
            max_weight: of one client, where the weights are numbers of examples.
            num_examples: that the clients are registered with.
            secure: each client's request of the phase ``mask``; without it, contributions are not masked.
        """
        this_round = self._begin(task, weights, max_weight, num_examples)
        if task.noise_place == "distributed":
            return self._ring_sum(this_round, client_ids, secure)
        answers = (self._monitored_answer(this_round, client_id) for client_id in sorted(client_ids))
        if self._rule.needs == "single_updates":
            return UpdateBundle(task.round_index, tuple(self._encoded(this_round, answer) for answer in answers))
        aggregator = PartialAggregator(task, this_round.validator.shapes)
        for answer in answers:
            aggregator.add(answer)
        return aggregator.message()

    def contribution(self, task: TrainTask, weights: Weights, client_id: str) -> RingSum | ClientFailures:
        """Train one client; its contribution as integers with its share of the noise, before it is masked.

        Raises:
            IntegrityError: the task is for other weights.
            ConfigError, SecureAggregationError: there is no plan for such contributions.
        """
        this_round = self._begin(task, weights)
        return self._encoded_in_ring(this_round, client_id, RingEncoder(task, self._settings, this_round.shapes))

    def train_encoded(self, task: TrainTask, weights: Weights, client_id: str, encoding: Encoding) -> EncodedUpdate:
        """Train one client and encode its answer, whatever the rule needs.

        Raises:
            IntegrityError: the task is for other weights.
            ForbiddenError: the update would have no noise, or too little by itself.
        """
        if task.noise_at in ("server", "distributed"):
            raise ForbiddenError(f"With noise_at {task.noise_at!r}, an update by itself has not the noise it needs.")
        this_round = self._begin(task, weights)
        return self._encoder.encode(task, self._answer(this_round, client_id), encoding, this_round.validator)

    def output_digest(self, task: TrainTask, client_id: str, encoding: Encoding) -> str:
        """SHA-256, hex, of all that determines what :meth:`train_encoded` returns for this client and encoding.

        Beside the output's id it covers what only the client knows: its data, its state, and what this host computes
        with. Equal digests give equal bytes on the same number of threads.
        """
        data, place = self.data.load(client_id), (task.run_id, task.round_index, client_id)
        output = output_id(task, client_id, len(data.labels))
        facts = [output, self.context_digest, data.digest, self._states.digest(*place), encoding.value]
        if encoding is Encoding.TOP_K:
            facts.append(self._encoder.state_digest(task, client_id))
        return hashlib.sha256("/".join(facts).encode()).hexdigest()

    def exchange(self, session: SecureSession, phase: str, requests: Mapping[str, bytes]) -> list[SecureAnswer]:
        return self._secure.exchange(session, phase, requests)

    def histograms(self, request: HistogramRequest, client_ids: Sequence[str]) -> list[ClientHistogram]:
        return self._histograms.histograms(request, client_ids) if self._histograms else []

    def histogram_digest(self, request: HistogramRequest, client_id: str) -> str:
        """SHA-256, hex, of all that determines the client's histogram.

        Raises:
            DataError: the client has no histograms, or no records.
        """
        if self._histograms is None:
            raise DataError(f"Client {client_id} has no histograms.")
        return self._histograms.output_digest(request, client_id)

    def _ring_sum(self, this_round: _Round, client_ids: Sequence[str], secure: Mapping[str, bytes] | None) -> RingSum:
        encoder = RingEncoder(this_round.task, self._settings, this_round.shapes)
        aggregator = RingAggregator(this_round.task, encoder.plan)
        for client_id in sorted(client_ids):
            own = self._encoded_in_ring(this_round, client_id, encoder)
            aggregator.add(own if secure is None else self._secure.under_masks(this_round.task, own, secure))
        return aggregator.message()

    def _encoded_in_ring(self, this_round: _Round, client_id: str, encoder: RingEncoder) -> RingSum | ClientFailures:
        answer = self._monitored_answer(this_round, client_id)
        if isinstance(answer, ClientFailures):
            return answer
        try:
            return encoder.encode(answer, derive_secret(self._root_secret, client_id))
        except Exception as error:
            return failed(this_round.task, client_id, error)

    def _begin(
        self,
        task: TrainTask,
        weights: Weights,
        max_weight: int | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> _Round:
        check_base(task, weights)
        base = {name: array for name, array in weights.items() if not name.startswith(BROADCAST)}
        broadcast = {name: array for name, array in weights.items() if name.startswith(BROADCAST)}
        max_weights = {} if max_weight is None else {task.round_index: max_weight}
        validator = UpdateValidator.of(
            self._settings, self._rule, base, num_examples, task=task, broadcast=broadcast, max_weights=max_weights
        )
        return _Round(task, base, broadcast, validator)

    def _monitored_answer(self, this_round: _Round, client_id: str) -> ClientAnswer:
        answer = self._answer(this_round, client_id)
        if self._alter_answer is not None:
            answer = self._alter_answer(client_id, answer)
        bounds = this_round.validator.bounds
        if self._monitor is None or bounds is None or not isinstance(answer, ClientUpdate):
            return answer
        return self._monitor.observe(bounds, this_round.base, answer)

    def _encoded(self, this_round: _Round, answer: ClientAnswer) -> SingleMessage:
        # A failure is not encoded: bytes do not distinguish a rejected update from other failures.
        smaller = self._settings.training.compression.encodings[:1]
        if not smaller or not isinstance(answer, ClientUpdate):
            return answer
        return self._encoder.encode(this_round.task, answer, smaller[0], this_round.validator)

    def _answer(self, this_round: _Round, client_id: str) -> ClientAnswer:
        try:
            return self._train_one(this_round, client_id)
        except Exception as error:
            return failed(this_round.task, client_id, error)

    def _train_one(self, this_round: _Round, client_id: str) -> ClientUpdate:
        """One client's update; its state is saved only if the update is valid, UpdateRejectedError is raised if not."""
        task, base, broadcast = this_round.task, this_round.base, this_round.broadcast
        data, half = self.data.load(client_id), self._rule.client
        state, state_digest = self._state_of(task, client_id, len(data.labels))
        # Derived from what this host computes with, from the records, and from the state that corrects the steps: the
        # noise of an earlier output must not be used again with another model, changed data or other steps.
        derived_from = f"{self.context_digest}/{data.digest}"
        derived_from += f"/{state_digest}" if half.keeps_state else ""
        secret = derive_secret(self._root_secret, f"{client_id}/{derived_from}")
        correction = half.before_training(base, broadcast, state)
        delta = self._trainer.train(task, base, data.features, data.labels, secret, client_id, correction)
        update = _weighted_update(this_round, ClientOutcome(client_id, len(data.labels)), delta)
        if task.privacy_unit == "client" and task.noise_place == "client":
            update = with_own_noise(task, update, secret)
        if fault := this_round.validator.fault_of(update):
            raise UpdateRejectedError(f"The update of {client_id} is refused: {fault}.")
        if half.keeps_state:
            new_state = half.after_training(delta, broadcast, state)
            count = {_NUM_EXAMPLES: np.float32(len(data.labels)).reshape(1)}
            self._states.save(task.run_id, task.round_index, client_id, {**new_state, **count})
        if half.personal_pull is not None and self._personal_trainer is not None:
            # The personal model never leaves the client, so it is not clipped, noised or charged.
            own, coins = state or base, derive_secret(secret, "personal")
            pull = GradientCorrection(pull=half.personal_pull, anchor=base)
            change = self._personal_trainer.train(task, own, data.features, data.labels, coins, client_id, pull)
            personal = {name: own[name] + array for name, array in change.items()}
            self._states.save(task.run_id, task.round_index, client_id, personal)
        return update

    def _state_of(self, task: TrainTask, client_id: str, num_examples: int) -> tuple[Weights, str]:
        """The client's state for this round, and the digest of what is stored."""
        stored, digest = self._states.load(task.run_id, task.round_index, client_id)
        state = {name: array for name, array in stored.items() if name != _NUM_EXAMPLES}
        # A control variate of fewer records has more noise than the bound on updates of the present ones allows.
        outdated = self._rule.client.keeps_state and stored.get(_NUM_EXAMPLES, 0) != num_examples
        return ({} if outdated else state), digest


def vision_host(
    settings: Settings,
    *,
    records: ClientRecords | None = None,
    model: VisionModel | None = None,
    data: ClientDataSource | None = None,
    trainer: Trainer | None = None,
    alter_answer: Callable[[str, ClientAnswer], ClientAnswer] | None = None,
) -> ClientHost:
    """The host of clients that train the configured Vision Transformer. Each argument replaces a default part.

    Args:
        records: by default those of the virtual fleet that the settings describe.
        model: by default built from the settings; it is not changed.

    Raises:
        DataError, ModelError, ConfigError: a setting cannot be used.
    """
    records = VirtualFleet.open(settings.data) if records is None else records
    if model is None:
        model = build_model(settings.model, len(records.source.classes), settings.data.image_size)
    root_secret, source = load_or_create_root_secret(settings.home), records.source
    context_digest = settings.context_digest(source.classes, weights_digest(frozen_weights(model)))
    physical_batch_size = settings.training.physical_batch_size
    by_record = settings.privacy.privacy_unit == "record"
    steps = LocalTrainer if by_record else PlainTrainer
    personal = rule_for(settings).client.personal_pull is not None
    return ClientHost(
        settings,
        data=FeatureCache(model, records) if data is None else data,
        trainer=(steps(model, physical_batch_size=physical_batch_size) if trainer is None else trainer),
        root_secret=root_secret,
        personal_trainer=PlainTrainer(model, physical_batch_size=physical_batch_size) if personal else None,
        monitor=_monitor_of(model) if settings.simulation.private and by_record else None,
        histograms=HistogramClient(
            model, source, settings.data.image_size, records.records, root_secret, context_digest
        ),
        context_digest=context_digest,
        alter_answer=alter_answer,
    )


def _monitor_of(model: VisionModel) -> UpdateStatisticsMonitor:
    head = head_name(model)
    return UpdateStatisticsMonitor(head, None if head is None else trainable_weights(model)[head])


def _weighted_update(this_round: _Round, outcome: ClientOutcome, delta: Mapping[str, FloatArray]) -> ClientUpdate:
    """One client's update, multiplied by its weight, or clipped where the client is the privacy unit."""
    task = this_round.task
    if task.privacy_unit == "client":
        clipped, within = clip_update(delta, task.l2_clip_norm)
        return ClientUpdate(task.round_index, outcome, clipped, 1.0, int(within))
    weight = float(this_round.validator.weight_of(outcome, task.round_index))
    weighted = {name: weight * array.astype(np.float64) for name, array in delta.items()}
    return ClientUpdate(task.round_index, outcome, weighted, weight)
