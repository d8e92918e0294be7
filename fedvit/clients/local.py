"""One client's share of a round: a fixed number of DP-SGD steps from the round's weights."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fedvit.dp.dpsgd import SecretDPOptimizer, per_example_gradients
from fedvit.errors import DataError
from fedvit.models.trainable import load_weights
from fedvit.models.vision import VisionModel
from fedvit.privacy.outputs import output_id
from fedvit.privacy.randomness import SecretStream
from fedvit.types import FloatArray, TrainTask, Weights

_CHECKED_EXAMPLES = 2


class Features(Protocol):
    """What a body reads, by the indices [B] of records; a tensor [N, ...] is one."""

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class LocalTrainer:
    """Trains clients one after another on one warm copy of the model's body; the model itself is not changed.

    Args:
        model: says what is trained; its features are what :meth:`train` is given.
        physical_batch_size: examples differentiated at once; a matter of memory alone.

    Raises:
        ModelError: the trainable part has no correct per-example gradients.
    """

    def __init__(self, model: VisionModel, *, physical_batch_size: int) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size must be at least 1, not {physical_batch_size}")
        self._physical_batch_size = physical_batch_size
        self._gradients = per_example_gradients(model.body, "body.", _public_features(model))

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
    ) -> dict[str, FloatArray]:
        """``local - base`` after ``task.local_steps`` steps, by trainable name, float32.

        Every step draws each of the N records with ``task.sampling_prob`` (Poisson; a step that draws none is noise
        only), clips, sums, adds noise and divides by the expected batch. On one thread the same arguments give the
        same bits.

        Args:
            features: [N, ...] as :meth:`VisionModel.features` gives them.
            labels: [N], int64 class indices.
            secret: the client's key.

        Raises:
            DataError: there are no records, or labels and features disagree in number.
            ModelError: ``base`` does not fit the model.
        """
        check_records(features, labels, client_id)
        release = output_id(task, client_id, len(labels))
        self._gradients.clear()
        load_weights(self._gradients.parameters, base)
        optimizer = self._optimizer(task, len(labels), secret, release)
        for step in range(task.local_steps):
            self._step(optimizer, features, labels, drawn_records(task, labels, secret, release, step))
        return {
            name: parameter.detach().cpu().numpy() - base[name].astype("float32", copy=False)
            for name, parameter in self._gradients.parameters.items()
        }

    def _optimizer(self, task: TrainTask, num_examples: int, secret: bytes, release: str) -> SecretDPOptimizer:
        return SecretDPOptimizer(
            list(self._gradients.parameters.values()),
            learning_rate=task.learning_rate,
            noise_multiplier=task.noise_multiplier,
            l2_clip_norm=task.l2_clip_norm,
            expected_batch=task.sampling_prob * num_examples,
            noise_for_step=lambda step: _stream(secret, "noise", release, step),
        )

    def _step(self, optimizer: SecretDPOptimizer, features: Features, labels: Tensor, drawn: Tensor) -> None:
        # split() of nothing is one empty part: an empty draw takes the same road to its noise.
        parts = drawn.split(self._physical_batch_size)
        for position, part in enumerate(parts, start=1):
            self._clip(features, labels, part, optimizer.max_grad_norm)
            optimizer.signal_skip_step(do_skip=position < len(parts))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _clip(self, features: Features, labels: Tensor, part: Tensor, l2_clip_norm: float) -> None:
        self._gradients.clip(features[part], labels[part], l2_clip_norm)


def check_records(features: Tensor, labels: Tensor, client_id: str) -> None:
    """Make sure that a client can be trained at all.

    Raises:
        DataError: there are no records, or labels and features disagree in number.
    """
    if len(labels) == 0 or len(labels) != len(features):
        raise DataError(
            f"Client {client_id} has {len(features)} images and {len(labels)} labels.",
            cure="Every client needs at least one image, and one label an image.",
        )


def drawn_records(task: TrainTask, labels: Tensor, secret: bytes, release: str, step: int) -> Tensor:
    """The indices of the records that a step draws, each of the N with ``task.sampling_prob``: secret Poisson coins."""
    coins = _stream(secret, "poisson", release, step).coins(len(labels), task.sampling_prob)
    return torch.from_numpy(coins.nonzero()[0])


def _stream(secret: bytes, purpose: str, release: str, step: int) -> SecretStream:
    return SecretStream(secret, purpose, {"release": release, "step": step})


def _public_features(model: VisionModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (_CHECKED_EXAMPLES, model.image_size, model.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return model.features(images.to(next(model.body.parameters()).device))
