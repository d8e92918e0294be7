"""Periodic tasks in one background thread; an error is logged and ends nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
JOIN_S = 10.0


class PeriodicTasks:
    """Calls ``tasks`` one after another, every ``interval_s`` seconds; a task that fails is called again next time."""

    def __init__(self, interval_s: float, *tasks: Callable[[], object]) -> None:
        self._interval_s, self._tasks = interval_s, tasks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="periodic-tasks", daemon=True)

    def start(self) -> None:
        """Start the thread; the first calls come after one interval."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the present calls; harmless when it was never started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for task in self._tasks:
                try:
                    task()
                except Exception:
                    _LOG.exception("the periodic task %s failed", getattr(task, "__name__", task))
