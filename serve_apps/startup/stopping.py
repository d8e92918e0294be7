"""Graceful stops with a time limit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

LOG = logging.getLogger(__name__)
TRAINING_STOP_S = 30.0
CLUSTER_STOP_S = 15.0


def stop_within(limit_s: float, stop: Callable[..., object], *arguments: object) -> None:
    """Call ``stop`` and wait for at most ``limit_s``: a cluster that died must not keep this process from ending."""

    def attempt() -> None:
        try:
            stop(*arguments)
        except Exception as error:
            LOG.warning("%s: %s", type(error).__name__, str(error).strip().splitlines()[0] if str(error) else "")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        LOG.warning("gave up on %s after %g s", getattr(stop, "__name__", stop), limit_s)
