"""Options that all Ray Serve deployments share."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, Any] = {
    # Seconds between two checks whether an ending replica has answered its requests; Ray's default is two.
    "graceful_shutdown_wait_loop_s": 0.2,
    # The applications have their own logs and counters; a second line for each request would cost time and disk.
    "logging_config": {"enable_access_log": False},
}
