"""Rate-limited, non-blocking publisher of the latest value."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")
_LOG = logging.getLogger(__name__)


class ThrottledPublisher(Generic[_Value]):
    """Calls ``publish`` with the latest value in a thread of its own, at most once in ``interval_s`` seconds.

    The first value is published at once, and the last one always. Exceptions of ``publish`` are logged.
    """

    def __init__(self, publish: Callable[[_Value], None], interval_s: float) -> None:
        self._publish, self._interval_s = publish, interval_s
        self._values: list[_Value] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="throttled-publisher")
        self._thread.start()

    def __call__(self, value: _Value) -> None:
        """Publish this value as soon as the interval allows, in the place of one that still waits."""
        with self._changed:
            self._values = [value]
            self._changed.notify()

    def close(self) -> None:
        """Publish a value that still waits, and end the thread."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (value := self._next()) is not None:
            try:
                self._publish(value[0])
            except Exception as error:
                _LOG.warning("%s: %s", type(error).__name__, error)
            self._closed.wait(self._interval_s)

    def _next(self) -> list[_Value] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._values or self._closed.is_set())
            values, self._values = self._values, []
            return values or None
