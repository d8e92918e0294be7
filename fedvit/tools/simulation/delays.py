"""Delays and drop-outs of simulated clients. Pure: equal arguments give equal delays."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fedvit.config import DelayConfig


@dataclass(frozen=True, slots=True)
class TaskDelay:
    """Delay of one task: seconds until its answer, or until the server detects that there is none."""

    duration_s: float
    answers: bool


class Delays:
    """Draws a :class:`TaskDelay` for each client and round, independently of earlier draws.

    Args:
        config: the distribution.
        seed: the seed of the simulation.

    Attributes:
        stop_on_cancel: whether a client stops work on a cancelled task at once.
    """

    def __init__(self, config: DelayConfig, seed: int) -> None:
        self.stop_on_cancel = config.stop_on_cancel
        self._config = config
        self._seed = seed

    def of_task(self, client_id: str, round_index: int) -> TaskDelay:
        """The delay of a client's task in a round."""
        draw = generator(self._seed, "trip", client_id, round_index)
        work_s = self._work_s(client_id, float(draw.standard_normal()))
        if draw.random() >= self._config.dropout_prob:
            return TaskDelay(work_s, answers=True)
        return TaskDelay(float(draw.random()) * work_s + self._config.dropout_detection_s, answers=False)

    def _work_s(self, client_id: str, of_task: float) -> float:
        config = self._config
        if config.kind == "constant":
            return config.median_s
        of_client = float(generator(self._seed, "pace", client_id).standard_normal())
        z = math.sqrt(config.client_variance_share) * of_client + math.sqrt(1 - config.client_variance_share) * of_task
        return config.median_s * math.exp(config.sigma * z)


def generator(seed: int, *purpose: object) -> np.random.Generator:
    """A generator for a seed and a purpose; different purposes give unrelated generators."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
