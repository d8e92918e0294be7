"""The system that the runbook's commands are tried on, with a vehicle that somebody will find offline."""

from __future__ import annotations

from pathlib import Path

from fedvit.incidents.drills.runbook import RUNBOOK as PLACE
from fedvit.incidents.drills.site import CONTROL, EDGES, Call, Outcome, Site, answers, await_that, succeeds

__all__ = ["CONTROL", "EDGES", "RUNBOOK", "Call", "Drill", "Outcome", "answers", "await_that", "succeeds"]

ROOT = Path(__file__).parents[2]
RUNBOOK = ROOT / PLACE


class Drill(Site):
    """One replay of the runbook."""

    def __init__(self, checkout: Path) -> None:
        super().__init__(checkout, ROOT)

    def start(self, factor: float = 1.0) -> None:
        """Start it."""
        super().start(factor)
        answer = self.ask("/api/clients/register", "POST", json={"device_id": "truck-7", "capabilities": {}})
        assert answer.status_code == 201, answer.text
