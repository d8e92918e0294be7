"""A small CNN and made-up images, the same for every engine that is measured. Imports torch and nothing of fedvit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

BATCH, CLASSES, SIZE = 10, 10, 32
LEARNING_RATE = 0.05


def build_cnn() -> nn.Sequential:
    """Two convolutions and two linear layers, 545,098 parameters; equal every time."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def examples_of(client: int, count: int) -> tuple[Tensor, Tensor]:
    """One client's images [N, 3, 32, 32] and labels [N]."""
    generator = torch.Generator().manual_seed(client)
    images = torch.randn((count, 3, SIZE, SIZE), generator=generator)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


class SmallCnn:
    """The model with the images of the clients that were trained, both kept from round to round."""

    def __init__(self) -> None:
        self.model = build_cnn()
        self._data: dict[int, tuple[Tensor, Tensor]] = {}

    def weights(self) -> dict[str, np.ndarray]:
        """A copy, float32 by name."""
        return {name: p.detach().numpy().copy() for name, p in self.model.named_parameters()}

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Take these weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.numpy()[...] = weights[name]

    def fit(self, weights: dict[str, np.ndarray], client: int, count: int) -> dict[str, np.ndarray]:
        """The client's weights after one epoch from ``weights``; they are overwritten by the next client."""
        if client not in self._data:
            self._data[client] = examples_of(client, count)
        self.load(weights)
        images, labels = self._data[client]
        self.epoch(images, labels)
        return {name: p.detach().numpy() for name, p in self.model.named_parameters()}

    def epoch(self, images: Tensor, labels: Tensor) -> None:
        """One pass of SGD in batches of 10."""
        for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            loss = functional.cross_entropy(self.model(x), y)
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.add_(parameter.grad, alpha=-LEARNING_RATE)
