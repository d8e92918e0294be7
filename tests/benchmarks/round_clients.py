"""Virtual clients to measure the round engine with: some that do nothing, and some that train a small CNN."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from fedvit.clients.workload import VirtualClients
from fedvit.config import Settings
from fedvit.types import Evaluation, TrainTask, Weights


class EmptyClients(VirtualClients):
    """Options: ``clients``, ``parameters`` (float32, in ``arrays`` arrays) and ``held_back_s``, the stragglers' wait.

    ``fit`` gives back weights that it holds already; they follow from no data, so no record has to be protected.
    """

    protects_records = True

    def initial_weights(self) -> Weights:
        """Zeros."""
        return {name: np.zeros_like(array) for name, array in self._own.items()}

    def clients(self) -> Iterable[tuple[str, int]]:
        """``clients`` of 10 examples."""
        return ((client_id(i), 10) for i in range(self.settings.workload.options["clients"]))

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        """The same for every client and round."""
        return self._own, 10

    def evaluate(self, weights: Weights) -> Evaluation | None:
        """Nothing to say."""
        return None

    @cached_property
    def _own(self) -> dict[str, Any]:
        options = self.settings.workload.options
        arrays = options.get("arrays", 1)
        size = options["parameters"] // arrays
        rng = np.random.default_rng(0)
        return {f"p{i:03d}": rng.standard_normal(size, dtype=np.float32) * np.float32(1e-3) for i in range(arrays)}


class CnnClients(VirtualClients):
    """A small CNN on images of 32x32: ``clients`` of ``examples`` images each, one epoch of SGD in batches of 10."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._examples = settings.workload.options["examples"]

    @cached_property
    def _cnn(self) -> Any:
        # Who only registers clients needs no torch.
        from tests.benchmarks.small_cnn import SmallCnn

        return SmallCnn()

    def initial_weights(self) -> Weights:
        """Of a seeded model."""
        return self._cnn.weights()

    def clients(self) -> Iterable[tuple[str, int]]:
        """All of one size."""
        return ((client_id(i), self._examples) for i in range(self.settings.workload.options["clients"]))

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        """One epoch."""
        return self._cnn.fit(weights, int(client_id.rpartition("-")[2]), self._examples), self._examples


def client_id(index: int) -> str:
    """What the clients are called."""
    return f"vehicle-{index:07d}"
