"""What all our Ray Serve deployments have in common."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, Any] = {
    # How often a replica that is to end looks whether its requests are answered; Ray waits two seconds first.
    "graceful_shutdown_wait_loop_s": 0.2,
    # We keep logs and counters of our own; a second line each would only cost time and disk.
    "logging_config": {"enable_access_log": False},
}
