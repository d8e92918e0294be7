"""Scenarios of the drills, one incident in each file."""

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

# Drills that need a system of their own come first; the one that ends the system comes last.
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
"""The drills that CI runs on one system, within a few minutes."""


def drills_named(names: Sequence[str]) -> list[Drill]:
    """The drills of these names, each once, in the order of :data:`ALL`; ``all`` and ``short`` name several.

    Raises:
        NotFoundError: there is no such drill.
    """
    known = {drill.name for drill in ALL}
    groups = {"all": known, "short": set(SHORT)}
    selected = set[str]().union(*(groups.get(name, {name}) for name in names))
    if unknown := sorted(selected - known):
        ordered = ", ".join(drill.name for drill in ALL)
        raise NotFoundError(f"There is no drill {unknown[0]!r}.", cure=f"There are all, short, {ordered}.")
    return [drill for drill in ALL if drill.name in selected]
