"""What the routes stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedvit.config import Settings
from fedvit.ports import AccountantPort, AggregatorPort
from fedvit.store.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes stand on. The two actors are looked up at each call: they may have been restarted."""

    settings: Settings
    store: Store
    aggregator: Callable[[], AggregatorPort]
    accountant: Callable[[], AccountantPort]
    metrics_dir: Path | None = None
