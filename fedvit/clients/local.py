"""Local training on a client: a fixed number of steps of DP-SGD, or of SGD without noise, from a round's weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedvit.aggregation.rule import GradientCorrection
from fedvit.dp.dpsgd import SecretDPOptimizer, per_example_gradients
from fedvit.dp.gradients import PerExampleGradients
from fedvit.errors import DataError
from fedvit.models.trainable import load_weights
from fedvit.models.vision import VisionModel
from fedvit.privacy.randomness import SecretStream, output_id
from fedvit.types import FloatArray, TrainTask, Weights

_CHECKED_EXAMPLES = 2


class Features(Protocol):
    """The inputs of a model's body, indexed by records [B]; a tensor [N, ...] is an implementation."""

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


Step: TypeAlias = Callable[[Features, Tensor, Tensor], None]
"""Takes one step on features, labels [N] and the indices [B] of the drawn records."""


class Trainer(Protocol):
    """Local training of one client at a time; see :class:`BodyTrainer`."""

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
        correction: GradientCorrection | None = None,
    ) -> Mapping[str, FloatArray]:
        """The client's update, ``local - base``."""


class BodyTrainer(ABC):
    """Trains clients one after another on one warm copy of a model's body; the model itself is not changed.

    Args:
        parameters: of the copy, the trainable ones, by name.
        physical_batch_size: examples differentiated at once; it affects memory only.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], physical_batch_size: int) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size must be at least 1, not {physical_batch_size}")
        self.parameters, self.physical_batch_size = parameters, physical_batch_size

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
        correction: GradientCorrection | None = None,
    ) -> dict[str, FloatArray]:
        """``local - base`` after ``task.local_steps`` steps, by trainable name, float32.

        Every step draws each of the N records with ``task.sampling_prob`` (Poisson). On one thread, the same arguments
        give the same bits.

        Args:
            features: [N, ...] from :meth:`VisionModel.features`.
            labels: [N], int64 class indices.
            secret: the client's key.
            correction: added to the gradient of every step, also of one that draws no record.

        Raises:
            DataError: there are no records, or labels and features differ in number.
            ModelError: ``base`` does not fit the model.
        """
        check_records(features, labels, client_id)
        output = output_id(task, client_id, len(labels))
        load_weights(self.parameters, base)
        take_step = self._begin(task, len(labels), secret, output)
        for step in range(task.local_steps):
            drawn = drawn_records(task, labels, secret, output, step)
            with _corrected(correction, self.parameters, task.learning_rate):
                take_step(features, labels, drawn)
        return self._update(task, base)

    def _update(self, task: TrainTask, base: Weights) -> dict[str, FloatArray]:
        return {
            name: parameter.detach().cpu().numpy() - base[name].astype("float32", copy=False)
            for name, parameter in self.parameters.items()
        }

    @abstractmethod
    def _begin(self, task: TrainTask, num_examples: int, secret: bytes, output: str) -> Step: ...


class LocalTrainer(BodyTrainer):
    """DP-SGD: clips the drawn records' gradients, sums, adds noise, and divides by the expected batch size.

    A step that draws no record consists of noise alone.

    Args:
        model: defines the trainable part; its features are the input of :meth:`train`.
        physical_batch_size: examples differentiated at once; it affects memory only.
        gradients: an engine for the model's body; by default the cheapest one that is correct.

    Raises:
        ModelError: the trainable part has no correct per-example gradients.
    """

    def __init__(
        self, model: VisionModel, *, physical_batch_size: int, gradients: PerExampleGradients | None = None
    ) -> None:
        # Of the latest step, where it has no noise.
        self._mean_gradient: dict[str, Tensor] = {}
        self.gradients = gradients or per_example_gradients(model.body, "body.", _public_features(model))
        super().__init__(self.gradients.parameters, physical_batch_size)

    def optimizer(
        self, task: TrainTask, num_examples: int, secret: bytes, output: str, first_step: int = 0
    ) -> SecretDPOptimizer:
        """The optimiser for one mechanism output, starting at the step of this index."""
        return SecretDPOptimizer(
            list(self.parameters.values()),
            learning_rate=task.learning_rate,
            noise_multiplier=task.noise_multiplier if task.noise_place == "client" else 0.0,
            l2_clip_norm=task.l2_clip_norm,
            expected_batch=task.sampling_prob * num_examples,
            noise_for_step=lambda step: _stream(secret, "noise", output, step),
            first_step=first_step,
        )

    def step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        """One step on the drawn records [B], in physical batches; ``labels`` are those of all N records."""
        # split() of an empty tensor gives one empty part: an empty draw adds its noise like any other.
        parts = drawn.split(self.physical_batch_size)
        for position, part in enumerate(parts, start=1):
            self._clip(features, labels, part, optimizer.max_grad_norm)
            optimizer.signal_skip_step(do_skip=position < len(parts))
            optimizer.step()
            if position == len(parts) and not optimizer.noise_multiplier:
                self._mean_gradient = {name: _known(p.grad) for name, p in self.parameters.items()}
            optimizer.zero_grad(set_to_none=True)

    def _update(self, task: TrainTask, base: Weights) -> dict[str, FloatArray]:
        if task.noise_place == "client":
            return super()._update(task, base)
        # Of the one step itself. The difference of rounded weights would add rounding errors that depend on the records
        # and that the noise, which comes later, is not made for.
        return {name: (-task.learning_rate * mean).cpu().numpy() for name, mean in self._mean_gradient.items()}

    def _begin(self, task: TrainTask, num_examples: int, secret: bytes, output: str) -> Step:
        self.gradients.clear()
        return partial(self.step, self.optimizer(task, num_examples, secret, output))

    def _clip(self, features: Features, labels: Tensor, part: Tensor, l2_clip_norm: float) -> None:
        self.gradients.clip(features[part], labels[part], l2_clip_norm)


class PlainTrainer(BodyTrainer):
    """SGD along the mean gradient of the drawn records, for runs in which the aggregator protects whole clients.

    A step that draws no record changes nothing. The update is neither clipped nor noised and must not leave the client
    like that. See :class:`LocalTrainer` for the arguments.
    """

    def __init__(self, model: VisionModel, *, physical_batch_size: int) -> None:
        frozen = {id(p): p for p in model.body.parameters() if not p.requires_grad}
        self._body = copy.deepcopy(model.body, memo=dict(frozen)).eval()
        parameters = {f"body.{name}": p for name, p in self._body.named_parameters() if p.requires_grad}
        super().__init__(parameters, physical_batch_size)

    def _begin(self, task: TrainTask, num_examples: int, secret: bytes, output: str) -> Step:
        return partial(self._step, task.learning_rate)

    def _step(self, learning_rate: float, features: Features, labels: Tensor, drawn: Tensor) -> None:
        # split() of an empty tensor gives one empty part.
        for part in drawn.split(self.physical_batch_size) if len(drawn) else ():
            loss = functional.cross_entropy(self._body(features[part]), labels[part], reduction="sum")
            (loss / len(drawn)).backward()
        with torch.no_grad():
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(learning_rate * parameter.grad)
                parameter.grad = None


@contextmanager
def _corrected(
    correction: GradientCorrection | None, parameters: Mapping[str, nn.Parameter], learning_rate: float
) -> Iterator[None]:
    """Add the correction, computed from the weights before the step, after the step.

    It depends on no record, so it is added beside the clipped and noised gradient: privacy is that of the step alone.
    """
    changes: dict[str, Tensor] = {}
    if correction is not None:
        for name, parameter in parameters.items():
            changes[name] = -learning_rate * _correction_gradient(correction, name, parameter.detach())
    yield
    with torch.no_grad():
        for name, change in changes.items():
            parameters[name].add_(change)


def _correction_gradient(correction: GradientCorrection, name: str, parameter: Tensor) -> Tensor:
    gradient, anchor, shift = torch.zeros_like(parameter), correction.anchor or {}, correction.shift or {}
    if name in anchor:
        gradient += correction.pull * (parameter - _tensor(anchor[name]))
    if name in shift:
        gradient += _tensor(shift[name])
    return gradient


def _known(gradient: Tensor | None) -> Tensor:
    assert gradient is not None, "every step of DP-SGD sets all gradients"
    return gradient


def _tensor(array: FloatArray) -> Tensor:
    """A tensor of the array's numbers; a read-only array, which torch warns about, is copied."""
    return torch.from_numpy(np.require(array, requirements="W"))


def check_records(features: Tensor, labels: Tensor, client_id: str) -> None:
    """Check that a client has records to train on.

    Raises:
        DataError: there are no records, or labels and features differ in number.
    """
    if len(labels) == 0 or len(labels) != len(features):
        raise DataError(
            f"Client {client_id} has {len(features)} images and {len(labels)} labels.",
            cure="Every client needs at least one image, and one label an image.",
        )


def drawn_records(task: TrainTask, labels: Tensor, secret: bytes, output: str, step: int) -> Tensor:
    """Indices [B] of the records that a step draws, each of the N with ``task.sampling_prob``: secret Poisson coins."""
    coins = _stream(secret, "poisson", output, step).coins(len(labels), task.sampling_prob)
    return torch.from_numpy(coins.nonzero()[0])


def _stream(secret: bytes, purpose: str, output: str, step: int) -> SecretStream:
    return SecretStream(secret, purpose, {"release": output, "step": step})


def _public_features(model: VisionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECKED_EXAMPLES, model.image_size, model.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return model.features(images.to(next(model.body.parameters()).device))
