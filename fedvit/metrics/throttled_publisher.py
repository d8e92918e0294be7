"""Tells somebody the newest of many values, now and then, without keeping the one waiting who has them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")
_LOG = logging.getLogger("fedvit.monitoring")


class ThrottledPublisher(Generic[_Value]):
    """Calls ``tell`` in a thread of its own: at once, and after that at most every ``every_s``; the last value always.

    What ``tell`` raises is logged.
    """

    def __init__(self, tell: Callable[[_Value], None], every_s: float) -> None:
        self._tell, self._every_s = tell, every_s
        self._values: list[_Value] = []
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="latest")
        self._thread.start()

    def __call__(self, value: _Value) -> None:
        """Have it told; a value that was not told yet is forgotten."""
        with self._changed:
            self._values = [value]
            self._changed.notify()

    def close(self) -> None:
        """Tell what is left, and end."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (value := self._next()) is not None:
            try:
                self._tell(value[0])
            except Exception as error:
                _LOG.warning("%s: %s", type(error).__name__, error)
            self._closed.wait(self._every_s)

    def _next(self) -> list[_Value] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._values or self._closed.is_set())
            values, self._values = self._values, []
            return values or None
