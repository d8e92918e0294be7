"""What a report says beside its figures: where they come from, and how clients differ."""

from __future__ import annotations

import importlib.metadata
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import yaml

from fedvit.config import Settings
from fedvit.types import Client, Participation, utc_now

SPREAD_COLUMNS = ("Over the clients", "Least", "Lower quartile", "Median", "Upper quartile", "Most")
# Where the state is and who may use it is nobody's business who reads a report.
_LEFT_OUT = {"home", "access", "backup"}


@dataclass(frozen=True, slots=True)
class Origin:
    """Date, version, command and settings of a report; ``settings`` is YAML of those that differ from the defaults."""

    written_at: datetime
    version: str
    command: str
    settings: str

    @classmethod
    def of(cls, settings: Settings) -> Origin:
        """The origin of a report that this process writes now."""
        tree = settings.model_dump(mode="json", exclude=_LEFT_OUT, exclude_defaults=True)
        command = shlex.join(["fedvit", *sys.argv[1:]])
        return cls(utc_now(), importlib.metadata.version("fedvit"), command, yaml.safe_dump(tree, sort_keys=False))

    def rows(self) -> list[tuple[str, str]]:
        """All but the settings, as (name, value) rows."""
        written = f"{self.written_at:%Y-%m-%d %H:%M} UTC"
        return [("Report written", written), ("fedvit", self.version), ("Command", self.command)]


def spread_rows(clients: Sequence[Client], participation: Mapping[str, Participation]) -> list[tuple[str, ...]]:
    """How much clients differ, one row for each quantity, in the order of :data:`SPREAD_COLUMNS`; empty without any."""
    if not clients:
        return []
    idle = Participation(0, 0)
    took_part = [participation.get(client.client_id, idle) for client in clients]
    return [
        _row("Training images", [client.num_examples for client in clients]),
        _row("Rounds taken part in", [one.rounds for one in took_part]),
        _row("Updates accepted", [one.rounds - one.failures for one in took_part]),
        _row("Updates not accepted", [one.failures for one in took_part]),
    ]


def _row(name: str, values: Sequence[int]) -> tuple[str, ...]:
    middle: Sequence[float] = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    )
    return (
        name,
        *(f"{value:,.4g}" if value % 1 else f"{int(value):,}" for value in (min(values), *middle, max(values))),
    )
