"""The system that the commands of the runbook are replayed on, with a vehicle that is found offline."""

from __future__ import annotations

from pathlib import Path

from fedvit.incidents.drills.runbook import RUNBOOK as PLACE
from fedvit.incidents.drills.system import (
    CONTROL,
    EDGES,
    Call,
    CommandResult,
    DrillSystem,
    accepts_connections,
    responds,
    wait_until,
)

__all__ = [
    "CONTROL",
    "EDGES",
    "RUNBOOK",
    "Call",
    "CommandResult",
    "Drill",
    "accepts_connections",
    "responds",
    "wait_until",
]

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / PLACE


class Drill(DrillSystem):
    """One replay of the runbook."""

    def __init__(self, checkout: Path) -> None:
        super().__init__(checkout, ROOT)

    def start(self, factor: float = 1.0) -> None:
        """Start it."""
        super().start(factor)
        answer = self.request("/api/clients/register", "POST", json={"device_id": "truck-7", "capabilities": {}})
        assert answer.status_code == 201, answer.text
