"""Exponential back-off with jitter, for work that a poll would repeat."""

from __future__ import annotations

import random
from collections.abc import Callable

from fedvit.clock import SYSTEM_CLOCK
from fedvit.ports import ClockPort

FIRST_S = 2.0
MOST_S = 300.0


class Backoff:
    """When something that failed may be tried again.

    After the first failure at once, so at the next poll; then after 2, 4, 8, ... seconds, at most :data:`MOST_S`, of
    which up to a half is left out at random. The random part keeps a fleet from trying together.

    Args:
        draw: a number in [0, 1).
    """

    def __init__(self, clock: ClockPort = SYSTEM_CLOCK, draw: Callable[[], float] = random.random) -> None:
        self._clock, self._draw = clock, draw
        self.reset()

    def reset(self) -> None:
        """Forget all failures."""
        self._failures, self._due_s = 0, 0.0

    def failed(self) -> None:
        """Count one failure more."""
        self._failures += 1
        if self._failures > 1:
            # A large power of two is no float.
            delay_s = min(MOST_S, FIRST_S * 2.0 ** min(self._failures - 2, 30))
            self._due_s = self._clock.monotonic() + delay_s * (0.5 + 0.5 * self._draw())

    @property
    def wait_s(self) -> float:
        """Seconds until the next attempt; 0 if it may be made now."""
        return max(0.0, self._due_s - self._clock.monotonic()) if self._failures > 1 else 0.0
