"""All drills by name, in an order in which they can share a running system."""

from __future__ import annotations

from collections.abc import Sequence

from fedvit.errors import NotFoundError
from fedvit.incidents.drills.drill import Drill
from fedvit.incidents.drills.scenarios import (
    budget_exhausted,
    device_offline,
    high_latency,
    high_loss,
    partition,
    privacy_breach,
    server_down,
    shutdown_restore,
)

# What is another system stands first, and what ends one last.
ALL: tuple[Drill, ...] = (
    high_loss.DRILL,
    device_offline.DRILL,
    server_down.DRILL,
    high_latency.DRILL,
    partition.DRILL,
    privacy_breach.DRILL,
    budget_exhausted.DRILL,
    shutdown_restore.DRILL,
)
SHORT = ("budget-exhausted", "device-offline", "privacy-breach", "server-down")
"""What CI runs: as many incidents as a few minutes hold, on one system."""


def drills_named(names: Sequence[str]) -> list[Drill]:
    """The drills of these names; ``all`` and ``short`` name several. Each once, in the order of :data:`ALL`.

    Raises:
        NotFoundError: there is no such drill.
    """
    wanted: set[str] = set()
    for name in names:
        found = {"all": [drill.name for drill in ALL], "short": list(SHORT)}.get(name, [name])
        wanted.update(found)
    known = {drill.name for drill in ALL}
    if unknown := sorted(wanted - known):
        raise NotFoundError(f"There is no drill {unknown[0]!r}.", cure=f"There are all, short, {', '.join(known)}.")
    return [drill for drill in ALL if drill.name in wanted]
