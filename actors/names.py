"""Names of the actors, of their concurrency groups, and of a system's Ray namespace."""

from __future__ import annotations

import hashlib
from pathlib import Path

AGGREGATOR = "fedvit-aggregator"
ACCOUNTANT = "fedvit-accountant"
PING = "ping"
"""The concurrency group of a client proxy's ``ping``, which answers while another thread trains."""


def proxy_name(index: int) -> str:
    """The name of a client proxy, as the Ray dashboard shows it."""
    return f"fedvit-proxy-{index}"


def namespace_of(home: Path) -> str:
    """The Ray namespace of a state folder, so that two systems on one cluster do not share actors."""
    return f"fedvit-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"
