"""The services that the routes use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import Settings
from fedvit.ports import AccountantPort, AggregatorPort, ClockPort
from fedvit.store.store import Store


@dataclass(frozen=True, slots=True)
class Services:
    """Settings, store, actors and clock of the routes. Actors are looked up at each call: they may have restarted."""

    settings: Settings
    store: Store
    aggregator: Callable[[], AggregatorPort]
    accountant: Callable[[], AccountantPort]
    metrics_dir: Path | None = None
    clock: ClockPort = SYSTEM_CLOCK
