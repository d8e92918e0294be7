"""Alerts and metrics as the Prometheus of a drill reports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

from fedvit.incidents.drills.system import PROMETHEUS, wait_until

DETECT_S = 180.0
CLEAR_S = 240.0


@dataclass(frozen=True, slots=True)
class ExpectedAlert:
    """The alert that a drill expects, by its name and by labels that it must have."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def states(self) -> list[str]:
        """``pending`` or ``firing`` for each matching alert of Prometheus; empty if there is none."""
        response = httpx.get(f"{PROMETHEUS}/api/v1/alerts", timeout=10, trust_env=False).raise_for_status()
        expected = {"alertname": self.name, **self.labels}.items()
        return [str(row["state"]) for row in response.json()["data"]["alerts"] if expected <= row["labels"].items()]

    def wait_until_firing(self, within_s: float = DETECT_S, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until it fires and call ``meanwhile`` before each query.

        Raises:
            DrillError: it does not in time.
        """

        def fires() -> bool:
            meanwhile()
            return "firing" in self.states()

        wait_until(f"the alert {self} fires", fires, within_s)

    def wait_until_cleared(self, within_s: float = CLEAR_S) -> None:
        """Wait until it is neither firing nor pending.

        Raises:
            DrillError: it is not in time.
        """
        wait_until(f"the alert {self} clears", lambda: not self.states(), within_s)

    def __str__(self) -> str:
        labels = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return f"{self.name}{{{labels}}}" if labels else self.name
