"""Evaluation of a model on public, held-out images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedvit.errors import DataError
from fedvit.models.vision import VisionModel
from fedvit.types import Evaluation

_BATCH = 256


@torch.no_grad()
def evaluate(model: VisionModel, features: Tensor, labels: Tensor, classes: Sequence[str]) -> Evaluation:
    """Loss, accuracy, recall and confusion over features [N, ...] and labels [N].

    A class without images has no recall and is left out of ``recall_by_class``.

    Raises:
        DataError: there is nothing to evaluate on.
    """
    if len(labels) == 0:
        raise DataError("There are no held-out images to evaluate on.", cure="Add test images to the data set.")
    model.eval()
    logits = torch.cat([model.body(part) for part in features.split(_BATCH)])
    pairs = labels * len(classes) + logits.argmax(dim=1)
    confusion = torch.bincount(pairs, minlength=len(classes) ** 2).reshape(len(classes), len(classes))
    totals = confusion.sum(dim=1)
    recall = {name: float(confusion[i, i] / totals[i]) for i, name in enumerate(classes) if totals[i]}
    return Evaluation(
        loss=float(functional.cross_entropy(logits, labels)),
        accuracy=float(confusion.trace() / len(labels)),
        recall_by_class=recall,
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        num_examples=len(labels),
    )
