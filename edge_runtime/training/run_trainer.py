"""Training on a vehicle for the tasks of one run: it checks, charges and computes the vehicle's outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_runtime.training.outputs import Output, OutputLedger
from edge_runtime.training.policy import Purpose, VehiclePolicy
from edge_runtime.training.records import OwnRecords
from fedvit.api.clients import HistogramRequestView, TaskView
from fedvit.clients.host import ClientHost, vision_host
from fedvit.clients.partial_aggregator import check_base
from fedvit.config import Settings
from fedvit.errors import ConfigError, DataError, IntegrityError
from fedvit.models.build import build_model
from fedvit.models.trainable import frozen_weights, trainable_weights
from fedvit.ports import Charge
from fedvit.privacy.events import Event, Gaussian
from fedvit.privacy.randomness import output_id
from fedvit.privacy.round_cost import charge_of, round_event
from fedvit.secagg.noise import Plan, event_of
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.task_plan import plan_of
from fedvit.settings import load_settings
from fedvit.types import TrainTask, Weights
from fedvit.updates import ClientFailures
from fedvit.wire.histograms import HistogramRequest
from fedvit.wire.tensors import largest_task_weights, weights_digest

_SECTIONS = {"model", "training", "privacy"}
_SECURE = "secure_aggregation"
RunKey = tuple[Mapping[str, Any], int, tuple[str, ...]]


def run_key(view: TaskView) -> RunKey:
    """What a trainer is built from: it is used again for tasks with an equal key."""
    return view.settings, view.image_size, view.classes


def run_settings(view: TaskView, *, home: Path, checkpoint: Path | None, policy: VehiclePolicy) -> Settings:
    """The settings of a task's run, with this vehicle's paths and its owner's budget.

    Raises:
        ConfigError: a section is missing or unknown, or a setting is unknown or out of range.
    """
    if view.settings.keys() - {_SECURE} != _SECTIONS:
        named = ", ".join(sorted(view.settings)) or "none"
        raise ConfigError(
            f"The task came with the sections {named[:200]} of settings.", cure="It needs model, training and privacy."
        )
    parts: dict[str, dict[str, Any]] = {name: dict(section) for name, section in view.settings.items()}
    parts["model"]["checkpoint"] = checkpoint
    parts["privacy"] |= {"target_epsilon": policy.max_epsilon, "target_delta": policy.target_delta}
    return load_settings(environ={}, overrides={"home": home, "data": {"image_size": view.image_size}, **parts})


@dataclass(frozen=True, slots=True)
class RunTrainer:
    """Computes one vehicle's outputs for the tasks of one run.

    Attributes:
        key: see :func:`run_key`.
        frozen_digest: SHA-256, hex, of the weights that never travel, as this vehicle built them.
        max_weights_bytes: the most that a task's weights may have.
        num_parameters: of the trained part of the model.
    """

    key: RunKey
    settings: Settings
    client_id: str
    records: OwnRecords
    host: ClientHost
    frozen_digest: str
    max_weights_bytes: int
    num_parameters: int
    outputs: OutputLedger

    @classmethod
    def build(cls, view: TaskView, settings: Settings, client_id: str, data: Path, outputs: OutputLedger) -> RunTrainer:
        """The trainer for tasks like this one.

        Raises:
            DataError, ModelError, ConfigError: the images or the model cannot be used.
        """
        records = OwnRecords.open(data, view.classes)
        model = build_model(settings.model, len(view.classes), view.image_size)
        host, digest = vision_host(settings, records=records, model=model), weights_digest(frozen_weights(model))
        trainable = trainable_weights(model)
        size, max_bytes = sum(array.size for array in trainable.values()), largest_task_weights(trainable)
        return cls(run_key(view), settings, client_id, records, host, digest, max_bytes, size, outputs)

    @property
    def num_examples(self) -> int:
        """The number of images at the time when the run's first task came."""
        return len(self.records.records(self.client_id))

    def check(self, task: TrainTask, view: TaskView) -> None:
        """Check that the update will be what the server charged, computed with what this vehicle has.

        Raises:
            DataError: the vehicle holds another number of images.
            IntegrityError: the task, its settings, the model or the data set's classes are not those that were charged.
        """
        if self.num_examples != view.num_examples:
            raise DataError(f"This vehicle holds {self.num_examples} images, and was asked for {view.num_examples}.")
        training, privacy = self.settings.training, self.settings.privacy
        of_task = (task.local_steps, task.learning_rate, task.sampling_prob, task.privacy_unit, task.l2_clip_norm)
        of_run = (training.local_steps, training.learning_rate, privacy.sampling_prob, privacy.privacy_unit)
        if (*of_task, task.noise_place) != (*of_run, privacy.l2_clip_norm, privacy.noise_place):
            raise IntegrityError("The task is not of the run whose settings came with it.")
        if output_id(task, self.client_id, self.num_examples) != view.output_id:
            raise IntegrityError("The task is not the one that was charged.")
        if self.frozen_digest != view.frozen_digest:
            raise IntegrityError("The weights that never travel are others here than on the server.")
        if self.host.context_digest != task.context_digest:
            raise IntegrityError("The model of this vehicle is not the one that was charged.")

    def update(self, task: TrainTask, weights: Weights, view: TaskView) -> bytes:
        """The encoded update, after it is charged to the vehicle's own ledger.

        Raises:
            ConflictError, BudgetExhaustedError, IntegrityError: see :class:`OutputLedger`.
            IntegrityError: the weights are not those of the task.
        """
        check_base(task, weights)
        digest = self.host.output_digest(task, self.client_id, view.encoding)
        charge = self._charge(round_event(self.settings, task.noise_multiplier), task, view.output_id)
        output = Output(Purpose.UPDATE, charge, digest)
        self.outputs.charge(output)
        update = self.host.train_encoded(task, weights, self.client_id, view.encoding)
        if update.outcome.error is None:
            self.outputs.release(output, update.content)
        return update.content

    def check_session(self, task: TrainTask, parameters: Parameters) -> Plan:
        """Check that a session's parameters are those of its task and settings; the plan of its contributions.

        Raises:
            IntegrityError: they are others.
            ConfigError, SecureAggregationError: no session fits the task and the settings.
        """
        plan, secure = plan_of(task, self.settings, self.num_parameters), self.settings.secure_aggregation
        expected = parameters_for(
            parameters.session,
            parameters.participants,
            min_survivors=secure.survivors(task.participants),
            max_colluding=secure.max_colluding,
            dropout_rate=secure.dropout_rate,
            bits=plan.bits,
            length=plan.padded,
        )
        if parameters != expected or len(parameters.participants) > task.participants:
            raise IntegrityError("The parameters of the session do not follow from its task and settings.")
        return plan

    def contribution(self, task: TrainTask, weights: Weights, view: TaskView) -> npt.NDArray[np.uint32]:
        """The ring vector of a session's task, [padded], after it is charged to the vehicle's own ledger.

        Raises:
            ConflictError, BudgetExhaustedError, IntegrityError: see :class:`OutputLedger`.
            IntegrityError: the weights are not those of the task.
            DataError: the contribution cannot be computed.
        """
        check_base(task, weights)
        digest = self.host.output_digest(task, self.client_id, view.encoding)
        plan = plan_of(task, self.settings, self.num_parameters)
        charge = self._charge(event_of(plan, task.sampling_prob), task, view.output_id)
        output = Output(Purpose.UPDATE, charge, digest, task.attempt)
        self.outputs.charge(output)
        own = self.host.contribution(task, weights, self.client_id)
        if isinstance(own, ClientFailures):
            raise DataError(str(own.outcomes[0].error))
        self.outputs.release(output, own.vector.tobytes())
        return own.vector

    def histogram(self, request: HistogramRequest, view: HistogramRequestView) -> tuple[int, ...]:
        """The requested counts with noise, after they are charged to the vehicle's own ledger.

        Raises:
            ConflictError, BudgetExhaustedError, IntegrityError: see :class:`OutputLedger`.
            DataError: the vehicle holds another number of images, or they cannot be counted.
            IntegrityError: the request is not the one that was charged.
        """
        count = self.num_examples
        if count != view.num_examples:
            raise DataError(f"This vehicle holds {count} images, and was asked to histogram {view.num_examples}.")
        if request.output_id(self.client_id, count) != view.output_id:
            raise IntegrityError("The histogram is not the one that was charged.")
        self.outputs.check(Purpose.HISTOGRAM, request.run_id, request.round_index, view.output_id)
        digest = self.host.histogram_digest(request, self.client_id)
        charge = self._charge(Gaussian(request.noise_multiplier), request, view.output_id)
        output = Output(Purpose.HISTOGRAM, charge, digest)
        self.outputs.charge(output)
        histograms = self.host.histograms(request, [self.client_id])
        if not histograms:
            raise DataError("The images of this vehicle cannot be counted.")
        counts = histograms[0].counts
        self.outputs.release(output, json.dumps(counts).encode())
        return counts

    def _charge(self, event: Event, task: TrainTask | HistogramRequest, output: str) -> Charge:
        return charge_of(
            event,
            run_id=task.run_id,
            round_index=task.round_index,
            unit_id=self.client_id,
            output_id=output,
            unit=task.privacy_unit,
        )
