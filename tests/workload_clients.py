"""Virtual clients of a test's own, without torch: each pulls the weights towards a point that is its alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import numpy as np

from fedvit.clients.workload import VirtualClients
from fedvit.types import Evaluation, TrainTask, Weights

SHAPES: dict[str, tuple[int, ...]] = {"body": (40, 50), "head": (3,), "scale": ()}
LATE_S = 0.3


class PullingClients(VirtualClients):
    """Options: ``clients`` and ``failing`` ids.

    The file ``stragglers`` in the state folder names clients that take longer than the others, and ``killers`` those
    that end the process. They are no options, because the noise and the seeds of a client follow from all options.
    """

    def initial_weights(self) -> Weights:
        """Zeros."""
        return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    def clients(self) -> Iterable[tuple[str, int]]:
        """Of 10 examples and more."""
        return ((f"vehicle-{i:02d}", 10 + i) for i in range(self.settings.workload.options.get("clients", 6)))

    def fit(self, client_id: str, weights: Weights, task: TrainTask, seed: int) -> tuple[Weights, int]:
        """Half the way to a point that follows from the seed."""
        options = self.settings.workload.options
        if client_id in options.get("failing", ()):
            raise RuntimeError("no data today")
        stragglers = self.settings.home / "stragglers"
        if stragglers.exists() and client_id in stragglers.read_text().split():
            time.sleep(LATE_S)
        killers = self.settings.home / "killers"
        if killers.exists() and client_id in killers.read_text().split():
            os._exit(1)
        rng = np.random.default_rng(seed)
        local = {}
        for name, array in sorted(weights.items()):
            point = rng.standard_normal(array.shape, dtype=np.float32)
            local[name] = np.asarray(array + 0.5 * (point - array), dtype=np.float32)
        return local, 10 + int(client_id[-2:])

    def evaluate(self, weights: Weights) -> Evaluation:
        """How far from zero."""
        return Evaluation(float(sum(np.square(a).sum() for a in weights.values())), 0.5, {"all": 0.5}, ((1,),), 1)


class ProtectingClients(PullingClients):
    """The same, and they say that they protect their records."""

    protects_records = True
