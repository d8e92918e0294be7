"""The course of one incident: the fault, the alert, what the operator does, and the end; with a clock."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import CLEAR_S, DETECT_S, Alert
from fedvit.incidents.drills.runbook import RUNBOOK, Command, commands, equivalents
from fedvit.incidents.drills.site import Outcome, Site, await_that
from fedvit.types import utc_now

_PLACEHOLDER = re.compile(r"<[a-z]+(?:-[a-z]+)*>|\{\.\.\.\}|\"\.\.\.\"")
# Prometheus takes the moment of an evaluation, Alertmanager its own: clocks of one machine, rounded.
_ROUNDED = timedelta(seconds=2)


@dataclass
class Course:
    """What happens in one stage of a drill, and when.

    Args:
        site: where.
        alert: by which the fault has to be seen.
        say: told what is done, line by line.

    Attributes:
        notes: what the table should say beside its figures.
    """

    site: Site
    alert: Alert
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    injected_at: datetime | None = None
    _injected_s: float | None = None
    _detected_s: float | None = None
    _cleared_s: float | None = None

    # --- the steps ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Return when the alert is silent, so that what it says later is about this fault."""
        self.alert.await_silence()

    def inject(self, what: str) -> None:
        """Say that the fault happens now."""
        self.say(f"fault: {what}")
        self.injected_at, self._injected_s = utc_now(), time.monotonic()

    def detect(self, within_s: float = DETECT_S, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Return once Prometheus has the alert firing; ``meanwhile`` keeps the fault up."""
        self.alert.await_firing(within_s, meanwhile)
        self._detected_s = time.monotonic()
        self.say(f"{self.alert} fires after {self.detected_after_s:.1f} s")

    def follow(self, section: str, pattern: str, **filled: str) -> Outcome:
        """Type the one command of a section of the runbook that the pattern is found in, as it is printed there.

        Args:
            section: the beginning of its heading.
            filled: for each placeholder, with underscores for its hyphens, what the operator puts in its place.

        Raises:
            DrillError: there is no such command, or more than one, or it does not go well.
        """
        return self._typed(section, pattern, filled).checked()

    def look(self, section: str, pattern: str, **filled: str) -> Outcome:
        """The same for a command that may fail as long as something is broken."""
        return self._typed(section, pattern, filled)

    def check(self, what: str, ask: Callable[[], Any], within_s: float | None = None) -> Any:
        """Return the first true answer: an effect that has to be seen.

        Raises:
            DrillError: there is none.
        """
        found = await_that(what, ask) if within_s is None else await_that(what, ask, within_s)
        self.say(f"seen: {what}")
        return found

    def clear(self, within_s: float = CLEAR_S) -> None:
        """Return once the alert is silent."""
        self.alert.await_silence(within_s)
        self._cleared_s = time.monotonic()
        self.say(f"{self.alert} is silent {self.recovered_after_s:.1f} s later")

    # --- what came of it ---------------------------------------------------------------------------------------------

    @property
    def detected_after_s(self) -> float | None:
        """From the fault to the alert, seconds."""
        return _between(self._injected_s, self._detected_s)

    @property
    def recovered_after_s(self) -> float | None:
        """From the alert to its end, seconds."""
        return _between(self._detected_s, self._cleared_s)

    def incident(self) -> str:
        """The id of the incident that the log opened for this alert, once it is resolved there.

        Raises:
            DrillError: there is none, or it stays open.
        """
        assert self.injected_at is not None
        since = self.injected_at - _ROUNDED

        def resolved() -> Any:
            for found in self.site.get("/api/incidents?limit=1000"):
                mine = found["alertname"] == self.alert.name and datetime.fromisoformat(found["opened_at"]) >= since
                if mine and found["status"] == "resolved":
                    return found["incident_id"]
            return None

        return str(await_that(f"an incident of {self.alert.name} is resolved", resolved))

    def _typed(self, section: str, pattern: str, filled: dict[str, str]) -> Outcome:
        text = as_typed(self.site, section, pattern)
        for name, value in filled.items():
            text = text.replace(f"<{name.replace('_', '-')}>", value)
        if left := _PLACEHOLDER.search(text):
            raise DrillError(f"The drill does not say what to put in the place of {left[0]} in {text!r}.")
        self.say(f"$ {text.splitlines()[0]}{' …' if len(text.splitlines()) > 1 else ''}")
        return self.site.run(text)


def as_typed(site: Site, section: str, pattern: str) -> str:
    """What the runbook says to type, with Docker's commands replaced as its own table says.

    Raises:
        DrillError: it has no such command there, or more than one.
    """
    text = (site.root / RUNBOOK).read_text()
    under = [command for command in commands(text) if command.heading.startswith(section)]
    found = [command for command in under if re.search(pattern, command.text)]
    if len(found) != 1:
        raise DrillError(
            f"{len(found)} commands under {section!r} of {RUNBOOK} match {pattern!r}.",
            cure="Where the runbook changed, its drill has to.",
        )
    return _translated(found[0], text)


def _translated(command: Command, runbook: str) -> str:
    if not command.docker_only:
        return command.text
    rows = (row.translate(command.text) for row in equivalents(runbook))
    return next(filter(None, rows))


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
