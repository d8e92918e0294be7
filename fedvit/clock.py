"""Time of the machine: the :class:`fedvit.ports.ClockPort` that is used where no other clock is passed."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class SystemClock:
    """Implements :class:`fedvit.ports.ClockPort` with the clocks of this machine."""

    def now(self) -> datetime:
        """The present moment, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()
