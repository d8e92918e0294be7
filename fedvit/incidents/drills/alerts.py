"""What the real Prometheus says of an alert."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from fedvit.incidents.drills.site import PROMETHEUS, await_that

DETECT_S = 180.0
CLEAR_S = 240.0


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert by its name, and by labels that it must have."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def states(self) -> list[str]:
        """``pending`` or ``firing``, for each one that Prometheus has; none where all is well."""
        answer = httpx.get(f"{PROMETHEUS}/api/v1/alerts", timeout=10, trust_env=False).raise_for_status()
        return [str(found["state"]) for found in answer.json()["data"]["alerts"] if self._is(found["labels"])]

    def await_firing(self, within_s: float = DETECT_S, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Return once it fires; ``meanwhile`` is called again and again.

        Raises:
            DrillError: it does not in time.
        """

        def fires() -> bool:
            meanwhile()
            return "firing" in self.states()

        await_that(f"the alert {self} fires", fires, within_s)

    def await_silence(self, within_s: float = CLEAR_S) -> None:
        """Return once it neither fires nor is about to.

        Raises:
            DrillError: it goes on.
        """
        await_that(f"the alert {self} clears", lambda: not self.states(), within_s)

    def _is(self, labels: Mapping[str, Any]) -> bool:
        wanted = {"alertname": self.name, **self.labels}
        return all(labels.get(name) == value for name, value in wanted.items())

    def __str__(self) -> str:
        told = ", ".join(f"{name}={value}" for name, value in self.labels.items())
        return f"{self.name}{{{told}}}" if told else self.name


def query(expression: str) -> list[dict[str, Any]]:
    """The instant vector of a PromQL expression.

    Raises:
        httpx.HTTPError: Prometheus does not answer, or not well.
    """
    answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False)
    found: list[dict[str, Any]] = answer.raise_for_status().json()["data"]["result"]
    return found
