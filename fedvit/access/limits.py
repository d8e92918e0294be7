"""Rate limits of requests and of failed authentications, in the memory of one process."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

# Beyond this the names that were idle longest are forgotten, so that invented names cannot fill the memory.
MAX_NAMES = 10_000


class TokenBuckets:
    """One token bucket for each name: ``burst`` requests (at least 1) at once, ``rate`` a second in the long run.

    ``clock`` returns monotonic seconds.
    """

    def __init__(self, rate: float, burst: int, clock: Callable[[], float], max_names: int = MAX_NAMES) -> None:
        self._rate, self._burst, self._clock, self._max_names = rate, burst, clock, max_names
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """The number of remembered names."""
        return len(self._buckets)

    def take(self, name: str) -> float:
        """Take a token; 0 if there was one, else the seconds until there is one."""
        with self._lock:
            now = self._clock()
            level, since = self._buckets.pop(name, (float(self._burst), now))
            level = min(self._burst, level + (now - since) * self._rate)
            granted = level >= 1
            self._buckets[name] = (level - 1 if granted else level, now)
            if len(self._buckets) > self._max_names:
                self._buckets.popitem(last=False)
            return 0.0 if granted else (1 - level) / self._rate


class FailureWindow:
    """Failures of each name within the last ``window_s`` seconds, of which ``allowed`` are tolerated.

    ``clock`` returns monotonic seconds.
    """

    def __init__(self, allowed: int, window_s: float, clock: Callable[[], float], max_names: int = MAX_NAMES) -> None:
        self._allowed, self._window_s, self._clock, self._max_names = allowed, window_s, clock, max_names
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def __len__(self) -> int:
        """The number of remembered names."""
        return len(self._failures)

    def fail(self, name: str) -> float:
        """Count a failure; 0 while failures are tolerated, else the seconds until the next one is."""
        with self._lock:
            now = self._clock()
            times = self._failures.pop(name, deque(maxlen=self._allowed))
            while times and times[0] <= now - self._window_s:
                times.popleft()
            wait_s = times[0] + self._window_s - now if len(times) >= self._allowed else 0.0
            if not wait_s:
                times.append(now)
            self._failures[name] = times
            if len(self._failures) > self._max_names:
                self._failures.popitem(last=False)
            return wait_s


def whole_seconds(wait_s: float) -> int:
    """For ``Retry-After``: whole seconds, at least one."""
    return max(1, math.ceil(wait_s))
