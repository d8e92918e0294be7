"""One client's share of a round without noise of its own: SGD, for where the aggregator protects the whole client."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional

from fedvit.clients.local import check_records, drawn_records
from fedvit.models.trainable import load_weights
from fedvit.models.vision import VisionModel
from fedvit.privacy.outputs import output_id
from fedvit.types import FloatArray, TrainTask, Weights


class PlainTrainer:
    """Trains clients one after another on one warm copy of the model's body; the model itself is not changed.

    What it returns is neither clipped nor noised and must not leave the client like that.

    Args:
        model: says what is trained; its features are what :meth:`train` is given.
        physical_batch_size: examples differentiated at once; a matter of memory alone.
    """

    def __init__(self, model: VisionModel, *, physical_batch_size: int) -> None:
        if physical_batch_size < 1:
            raise ValueError(f"physical_batch_size must be at least 1, not {physical_batch_size}")
        self._physical_batch_size = physical_batch_size
        frozen = {id(p): p for p in model.body.parameters() if not p.requires_grad}
        self._body = copy.deepcopy(model.body, memo=dict(frozen)).eval()
        self._parameters = {f"body.{name}": p for name, p in self._body.named_parameters() if p.requires_grad}

    def train(
        self,
        task: TrainTask,
        base: Weights,
        features: Tensor,
        labels: Tensor,
        secret: bytes,
        client_id: str,
    ) -> dict[str, FloatArray]:
        """``local - base`` after ``task.local_steps`` steps of SGD, by trainable name, float32.

        Every step goes by the mean gradient of the records that it draws, each with ``task.sampling_prob``; one that
        draws none stays where it is. On one thread the same arguments give the same bits.

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
        load_weights(dict(self._parameters), base)
        for step in range(task.local_steps):
            drawn = drawn_records(task, labels, secret, release, step)
            self._step(features, labels, drawn, task.learning_rate)
        return {
            name: parameter.detach().cpu().numpy() - base[name].astype("float32", copy=False)
            for name, parameter in self._parameters.items()
        }

    def _step(self, features: Tensor, labels: Tensor, drawn: Tensor, learning_rate: float) -> None:
        # split() of nothing is one empty part.
        for part in drawn.split(self._physical_batch_size) if len(drawn) else ():
            loss = functional.cross_entropy(self._body(features[part]), labels[part], reduction="sum")
            (loss / len(drawn)).backward()
        with torch.no_grad():
            for parameter in self._parameters.values():
                if parameter.grad is not None:
                    parameter.sub_(learning_rate * parameter.grad)
                parameter.grad = None
