"""What is looked at again and again beside training: one thread, and no fault ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

_LOG = logging.getLogger(__name__)
JOIN_S = 10.0


class PeriodicTasks:
    """Calls ``looks`` one after another, every ``every_s`` seconds; a look that fails is logged and tried again."""

    def __init__(self, every_s: float, *looks: Callable[[], object]) -> None:
        self._every_s, self._looks = every_s, looks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fleet-watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End after the look under way; harmless when it never began."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            for look in self._looks:
                try:
                    look()
                except Exception:
                    _LOG.exception("a look at the fleet failed")
