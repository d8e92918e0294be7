"""Evaluation against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedvit.errors import DataError
from fedvit.evaluation.evaluate import evaluate
from fedvit.models.layers import HeadBody
from fedvit.models.vision import VisionModel

# Torch threads that wait for each other on shared cores take ten times as long.
torch.set_num_threads(1)

CLASSES = ("red", "yellow", "green")


def model() -> VisionModel:
    """Its logits are its features."""
    return VisionModel(nn.Identity(), HeadBody(nn.Identity()), 1, 3)


def test_counts_recalls_and_loss() -> None:
    labels = torch.tensor([0, 0, 0, 2, 2])
    called = torch.tensor([0, 0, 1, 2, 0])
    result = evaluate(model(), 10.0 * torch.eye(3)[called], labels, CLASSES)
    assert result.confusion == ((2, 1, 0), (0, 0, 0), (1, 0, 1))
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.recall_by_class == {"red": pytest.approx(2 / 3), "green": pytest.approx(1 / 2)}
    right = math.log(1 + 2 * math.exp(-10))
    assert result.loss == pytest.approx((3 * right + 2 * (right + 10)) / 5, rel=1e-5)
    assert result.num_examples == 5


def test_batches_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(700, 3, generator=generator), torch.randint(0, 3, (700,), generator=generator)
    result = evaluate(model(), logits, labels, CLASSES)
    assert result.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert sum(map(sum, result.confusion)) == 700


def test_nothing_to_evaluate_on_is_an_error() -> None:
    with pytest.raises(DataError):
        evaluate(model(), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), CLASSES)
