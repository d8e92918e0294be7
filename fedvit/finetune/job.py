"""One rank of a fine-tuning job: ranges of steps, each charged before its first step and saved after its last.

Only the weights after the last step of a range leave the job, so a rank that dies within a range has released nothing.
The range is then repeated from the previous checkpoint. It draws the same records and the same noise on any number of
ranks, and its charge is already in the ledger.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from fedvit.clients.local import drawn_records
from fedvit.config import FinetuneConfig, Settings
from fedvit.data.manifest import build_manifest
from fedvit.data.records import ImageSource, Record, load_images
from fedvit.data.sources import open_source
from fedvit.errors import ConfigError, FedvitError
from fedvit.evaluation.evaluate import evaluate
from fedvit.finetune.checkpoint import Checkpoint, OptimizerState, load_optimizer_state, optimizer_state
from fedvit.finetune.ranks import RankedDPOptimizer, RankedTrainer, Ranks
from fedvit.models.build import build_model
from fedvit.models.trainable import load_trainable_weights, load_weights, trainable_weights
from fedvit.models.vision import VisionModel
from fedvit.ports import POPULATION, Charge
from fedvit.privacy.epsilon import calibrate_noise_multiplier, check_delta
from fedvit.privacy.randomness import derive_secret, load_or_create_root_secret, output_id
from fedvit.types import Evaluation, TrainTask, Weights
from fedvit.wire.tensors import weights_digest

NAME = "finetune"
_NAME_LENGTH = 16
_EVALUATION_BATCH = 128
# Records are read in fixed groups of neighbours: the images that share a pass through the prefix affect the last bits
# of its output, and a repeated step must get the same features.
_GROUP = 64


class LazyFeatures:
    """Implements :class:`fedvit.clients.local.Features`.

    If the frozen prefix has weights, its output is cached, because it is expensive to compute. Otherwise the pixels are
    cached, which need a quarter of the memory. The cache is in host memory, not on a GPU. The model is on the device
    that computes the prefix; an index refers to ``records``, which are of ``source``.
    """

    def __init__(self, model: VisionModel, source: ImageSource, records: Sequence[Record]) -> None:
        self._model, self._source, self._records = model, source, tuple(records)
        self._device = next(model.body.parameters()).device
        self._caches_output = any(True for _ in model.prefix.parameters())
        self._loaded = np.zeros(-(-len(self._records) // _GROUP), np.bool_)
        self._cache: Tensor | None = None

    def __getitem__(self, index: Tensor, /) -> Tensor:
        """Features [B, ...] of the records of these indices [B].

        Raises:
            DataError: an image cannot be read or decoded; the message names its key.
        """
        for group in np.unique(index.numpy() // _GROUP):
            if not self._loaded[group]:
                self._load(int(group))
        if self._cache is None:
            return self._model.features(self._pixels(range(0)).to(self._device))
        values = self._cache[index]
        return values if self._caches_output else self._model.features(values.to(self._device))

    def _load(self, group: int) -> None:
        members = range(group * _GROUP, min((group + 1) * _GROUP, len(self._records)))
        values = self._pixels(members)
        if self._caches_output:
            values = self._model.features(values.to(self._device)).cpu()
        if self._cache is None:
            self._cache = torch.empty((len(self._records), *values.shape[1:]), dtype=values.dtype)
        self._cache[members.start : members.stop] = values
        self._loaded[group] = True

    def _pixels(self, members: range) -> Tensor:
        records = [self._records[index] for index in members]
        return torch.from_numpy(load_images(self._source, records, self._model.image_size))


@dataclass(frozen=True, slots=True)
class Plan:
    """The definition of a job.

    ``digest`` is the SHA-256, hex, of everything that determines the result of a step; the numbers of steps and ranks
    are not part of it.
    """

    digest: str
    task: TrainTask
    num_examples: int

    @property
    def job(self) -> str:
        """The job's name, also in the ledger. Other data, weights or settings make another job."""
        return f"{NAME}-{self.digest[:_NAME_LENGTH]}"

    @property
    def output(self) -> str:
        """The mechanism output's id, from which the streams of a step are derived."""
        return output_id(self.task, NAME, self.num_examples)

    def charge(self, first: int, last: int) -> Charge:
        """The charge for steps ``first`` to ``last - 1``, to the whole population."""
        return Charge(
            run_id=self.job,
            round_index=first,
            unit_id=POPULATION,
            output_id=hashlib.sha256(f"{self.digest}/{first}-{last}".encode()).hexdigest(),
            noise_multiplier=self.task.noise_multiplier,
            sampling_prob=self.task.sampling_prob,
            steps=last - first,
        )


def with_noise(settings: Settings) -> Settings:
    """The settings with a noise multiplier; if none is set, the smallest that keeps all steps within the budget.

    Raises:
        ConfigError: there is none, or the privacy unit is not the record.
    """
    privacy = settings.privacy
    if privacy.privacy_unit != "record":
        raise ConfigError(
            f"Fine-tuning protects records, and privacy.privacy_unit is {privacy.privacy_unit!r}.",
            cure="Set privacy.privacy_unit to 'record', in a state folder whose ledger is one of records.",
        )
    if privacy.noise_multiplier is not None:
        return settings
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=privacy.target_epsilon,
        target_delta=privacy.target_delta,
        sampling_prob=privacy.sampling_prob,
        steps=settings.finetune.steps,
    )
    return settings.model_copy(update={"privacy": privacy.model_copy(update={"noise_multiplier": noise_multiplier})})


def plan_of(settings: Settings, source: ImageSource, base: Weights) -> Plan:
    """The job of these settings, this data set and these starting weights.

    Raises:
        ConfigError: ``target_delta`` is larger than 1/n.
        DataError: a file cannot be read.
    """
    privacy, finetune = settings.privacy, settings.finetune
    manifest = build_manifest(source)
    check_delta(privacy.target_delta, manifest.num_train)
    task = TrainTask(
        NAME,
        0,
        weights_digest(base),
        manifest.digest,
        privacy.noise_multiplier or 0.0,
        privacy.sampling_prob,
        privacy.l2_clip_norm,
        1,
        finetune.learning_rate,
    )
    model = settings.model.model_dump(mode="json")
    # The digest determines the noise, so this setting keeps the name that it had in the first digests.
    model["hybrid"]["bands"] = model["hybrid"].pop("pooling_bands")
    facts = {
        "release": output_id(task, NAME, manifest.num_train),
        "model": model,
        "image_size": settings.data.image_size,
        **{name: getattr(finetune, name) for name in ("optimizer", "momentum", "precision", "device")},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Plan(digest, task, manifest.num_train)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a job on one rank.

    Attributes:
        images_per_s: expected images a second over all ranks; the number of drawn images is private.
        evaluation: on the data set's test images; on rank 0 only.
        error: the reason if the job ended before its last step.
    """

    steps: int
    ranks: int
    device: str
    images_per_s: float | None
    evaluation: Evaluation | None
    error: FedvitError | None = None


class Finetuning:
    """A job on one rank.

    Args:
        settings: with a noise multiplier; paths must be valid in this process.
        charge: writes charges to the ledger; called on rank 0 only.
        save: saves the checkpoint's files, by name, after a step; called equally often on all ranks, with no files on
            others than rank 0.
    """

    def __init__(
        self,
        settings: Settings,
        ranks: Ranks,
        *,
        charge: Callable[[Sequence[Charge]], object],
        save: Callable[[int, Mapping[str, bytes]], None],
    ) -> None:
        self._config, self._ranks, self._charge, self._save = settings.finetune, ranks, charge, save
        self._source = open_source(settings.data)
        model = build_model(settings.model, len(self._source.classes), settings.data.image_size)
        self._base = trainable_weights(model)
        self.plan = plan_of(settings, self._source, self._base)
        self._secret = derive_secret(load_or_create_root_secret(settings.home), f"{NAME}/{self.plan.digest}")
        self._model = model.to(ranks.device)
        self._features = LazyFeatures(self._model, self._source, self._source.train)
        self._labels = torch.tensor([record.label for record in self._source.train])
        self._trainer = RankedTrainer(
            self._model,
            ranks,
            physical_batch_size=settings.training.physical_batch_size,
            bfloat16=self._config.precision == "bfloat16",
            inner=partial(_inner_optimizer, self._config),
        )
        self._seconds: list[float] = []

    def run(self, checkpoint: Mapping[str, bytes] | None = None) -> Outcome:
        """Take the remaining steps, from a checkpoint's files or from the beginning.

        If a range cannot be charged, the job ends before it on all ranks, and the outcome has the reason.

        Raises:
            StateError: ranks have different data, settings or keys.
            IntegrityError: the checkpoint is damaged, or belongs to another job.
            DataError: an image cannot be read or decoded.
        """
        self._ranks.check_agreed("data set or configuration", bytes.fromhex(self.plan.digest))
        # Derived by a one-way function: the digest that ranks exchange is no secret.
        self._ranks.check_agreed("secret key", derive_secret(self._secret, "told to other ranks"))
        step, optimizer = self._resume(checkpoint)
        error = None
        while step < self._config.steps:
            last = min(step + self._config.checkpoint_every_steps, self._config.steps)
            if (error := self._charge_range(step, last)) is not None:
                break
            self._take_steps(optimizer, step, last)
            step = last
            self._save(step, self._files(optimizer, step))
        evaluation = None if self._ranks.index else self._evaluate()
        device = _device_name(self._ranks.device)
        return Outcome(step, self._ranks.count, device, self._images_per_s(), evaluation, error)

    def _resume(self, files: Mapping[str, bytes] | None) -> tuple[int, RankedDPOptimizer]:
        step, weights = 0, cast("Weights", self._base)
        states: OptimizerState = {}
        if files is not None:
            checkpoint = Checkpoint.from_files(files, self.plan.digest)
            step, weights, states = checkpoint.step, checkpoint.weights, checkpoint.optimizer_state
        load_weights(self._trainer.parameters, weights)
        task, count = self.plan.task, self.plan.num_examples
        optimizer = self._trainer.optimizer(task, count, self._secret, self.plan.output, first_step=step)
        load_optimizer_state(optimizer, list(self._trainer.parameters), states)
        return step, optimizer

    def _charge_range(self, first: int, last: int) -> FedvitError | None:
        """None once the range is in the ledger; otherwise the reason on rank 0, and a general error on the others."""
        error: FedvitError | None = None
        if self._ranks.index == 0:
            try:
                self._charge([self.plan.charge(first, last)])
            except FedvitError as refusal:
                error = refusal
        if self._ranks.any(error is not None):
            return error or FedvitError("The range was not charged; rank 0 has the reason.")
        return None

    def _take_steps(self, optimizer: RankedDPOptimizer, first: int, last: int) -> None:
        started_s = time.perf_counter()
        for step in range(first, last):
            drawn = drawn_records(self.plan.task, self._labels, self._secret, self.plan.output, step)
            self._trainer.step(optimizer, self._features, self._labels, drawn)
        if self._ranks.device.type == "cuda":
            torch.cuda.synchronize(self._ranks.device)
        self._seconds.append((time.perf_counter() - started_s) / (last - first))

    def _files(self, optimizer: RankedDPOptimizer, step: int) -> Mapping[str, bytes]:
        if self._ranks.index:
            return {}
        states = optimizer_state(optimizer, list(self._trainer.parameters))
        return Checkpoint(self.plan.digest, step, self.plan.job, self._weights(), states).to_files()

    def _weights(self) -> Weights:
        return {name: parameter.detach().cpu().numpy().copy() for name, parameter in self._trainer.parameters.items()}

    def _images_per_s(self) -> float | None:
        # The first range reads and decodes the images.
        seconds = self._seconds[1:] or self._seconds
        expected = self.plan.task.sampling_prob * self.plan.num_examples
        return expected * len(seconds) / sum(seconds) if seconds else None

    def _evaluate(self) -> Evaluation:
        load_trainable_weights(self._model, self._weights())
        test = self._source.test
        index = torch.arange(len(test)).split(_EVALUATION_BATCH)
        features = LazyFeatures(self._model, self._source, test)
        labels = torch.tensor([record.label for record in test], device=self._ranks.device)
        whole = torch.cat([features[part].to(self._ranks.device) for part in index])
        return evaluate(self._model, whole, labels, self._source.classes)


def _inner_optimizer(config: FinetuneConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the noised gradient, which is no longer private."""
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate)
    return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum)


def _device_name(device: torch.device) -> str:
    """The vendor's name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads a rank"
