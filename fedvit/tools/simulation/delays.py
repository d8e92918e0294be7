"""How long simulated clients take, and which tasks they never answer. Pure: equal arguments, equal answers."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from fedvit.config import DelayConfig


@dataclass(frozen=True, slots=True)
class Trip:
    """One task with one client: the server hears of it ``duration_s`` after it was handed out.

    Where the client does not answer, that is when its silence is noticed.
    """

    duration_s: float
    answers: bool


class Delays:
    """Draws a :class:`Trip` for each client and round, whatever was drawn before.

    Args:
        config: the distribution.
        seed: of the simulation.

    Attributes:
        stop_on_cancel: whether a client learns at once that nobody waits for it any more.
    """

    def __init__(self, config: DelayConfig, seed: int) -> None:
        self.stop_on_cancel = config.stop_on_cancel
        self._config = config
        self._seed = seed

    def trip(self, client_id: str, round_index: int) -> Trip:
        """What becomes of the task that ``client_id`` is handed in round ``round_index``."""
        draw = generator(self._seed, "trip", client_id, round_index)
        takes_s = self._takes_s(client_id, float(draw.standard_normal()))
        if draw.random() >= self._config.dropout_prob:
            return Trip(takes_s, answers=True)
        return Trip(float(draw.random()) * takes_s + self._config.dropout_detection_s, answers=False)

    def _takes_s(self, client_id: str, of_task: float) -> float:
        config = self._config
        if config.kind == "constant":
            return config.median_s
        of_client = float(generator(self._seed, "pace", client_id).standard_normal())
        z = math.sqrt(config.client_variance_share) * of_client + math.sqrt(1 - config.client_variance_share) * of_task
        return config.median_s * math.exp(config.sigma * z)


def generator(seed: int, *facts: object) -> np.random.Generator:
    """The generator of a seed and of whatever its numbers belong to; any difference gives an unrelated one."""
    digest = hashlib.sha256(repr((seed, *facts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
