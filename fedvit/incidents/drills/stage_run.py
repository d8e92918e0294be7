"""One stage of a drill at work: fault, alert, commands of the runbook, recovery, and the time that each took."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.prometheus import CLEAR_S, DETECT_S, ExpectedAlert
from fedvit.incidents.drills.runbook import RUNBOOK, commands, equivalents
from fedvit.incidents.drills.system import TIMEOUT_S, CommandResult, DrillSystem, wait_until
from fedvit.types import utc_now

_PLACEHOLDER = re.compile(r"<[a-z]+(?:-[a-z]+)*>|\{\.\.\.\}|\"\.\.\.\"")
# Prometheus and Alertmanager round the times of alerts.
_ROUNDING = timedelta(seconds=2)


@dataclass
class StageRun:
    """The steps of one stage of a drill, and when each happened.

    Args:
        system: the system under drill.
        alert: the alert that the fault must raise.
        say: called with each line of progress.

    Attributes:
        notes: remarks for the table of results.
    """

    system: DrillSystem
    alert: ExpectedAlert
    say: Callable[[str], None]
    notes: list[str] = field(default_factory=list)
    injected_at: datetime | None = None
    _injected_s: float | None = None
    _detected_s: float | None = None
    _cleared_s: float | None = None

    # --- the steps ---------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Wait until the alert is not active, so that its next firing is due to this fault."""
        self.alert.wait_until_cleared()

    def inject(self, what: str) -> None:
        """Note that the fault is injected now."""
        self.say(f"fault: {what}")
        self.injected_at, self._injected_s = utc_now(), time.monotonic()

    def detect(self, within_s: float = DETECT_S, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Wait until the alert fires; ``meanwhile`` is called repeatedly and may keep the fault up."""
        self.alert.wait_until_firing(within_s, meanwhile)
        self._detected_s = time.monotonic()
        self.say(f"{self.alert} fires after {self.detected_after_s:.1f} s")

    def follow(self, section: str, pattern: str, **values: str) -> CommandResult:
        """Run the one command in a section of the runbook that matches the pattern, as it is printed there.

        Args:
            section: the beginning of the section's heading.
            pattern: a regular expression that is searched for in each command.
            values: the value of each placeholder, with underscores instead of hyphens in its name.

        Raises:
            DrillError: there is no such command, or more than one, or it fails.
        """
        return self.look(section, pattern, **values).checked()

    def look(self, section: str, pattern: str, **values: str) -> CommandResult:
        """Like :meth:`follow`, for a command that may fail while the system is broken."""
        text = runbook_command(self.system, section, pattern)
        for name, value in values.items():
            text = text.replace(f"<{name.replace('_', '-')}>", value)
        if left := _PLACEHOLDER.search(text):
            raise DrillError(f"The drill does not say what to put in the place of {left[0]} in {text!r}.")
        self.say(f"$ {text.splitlines()[0]}{' …' if len(text.splitlines()) > 1 else ''}")
        return self.system.run(text)

    def check(self, what: str, condition: Callable[[], Any], within_s: float = TIMEOUT_S) -> Any:
        """Wait for an effect and return the first true value; see :func:`wait_until`."""
        value = wait_until(what, condition, within_s)
        self.say(f"seen: {what}")
        return value

    def clear(self, within_s: float = CLEAR_S) -> None:
        """Wait until the alert is not active any more."""
        self.alert.wait_until_cleared(within_s)
        self._cleared_s = time.monotonic()
        self.say(f"{self.alert} is silent {self.recovered_after_s:.1f} s later")

    # --- results -----------------------------------------------------------------------------------------------------

    @property
    def detected_after_s(self) -> float | None:
        """From the fault to the alert, seconds."""
        return _between(self._injected_s, self._detected_s)

    @property
    def recovered_after_s(self) -> float | None:
        """From the alert to its end, seconds."""
        return _between(self._detected_s, self._cleared_s)

    def incident(self) -> str:
        """The id of the incident that was logged for this alert, after it is resolved.

        Raises:
            DrillError: there is none, or it is not resolved in time.
        """
        assert self.injected_at is not None
        since = self.injected_at - _ROUNDING

        def resolved() -> Any:
            for row in self.system.get("/api/incidents?limit=1000"):
                recent = row["alertname"] == self.alert.name and datetime.fromisoformat(row["opened_at"]) >= since
                if recent and row["status"] == "resolved":
                    return row["incident_id"]
            return None

        return str(wait_until(f"an incident of {self.alert.name} is resolved", resolved))


def runbook_command(system: DrillSystem, section: str, pattern: str) -> str:
    """The command of a section of the runbook; Docker commands are replaced according to the runbook's table.

    Raises:
        DrillError: the section has no such command, or more than one.
    """
    text = (system.root / RUNBOOK).read_text()
    in_section = [command for command in commands(text) if command.heading.startswith(section)]
    matches = [command for command in in_section if re.search(pattern, command.text)]
    if len(matches) != 1:
        raise DrillError(
            f"{len(matches)} commands under {section!r} of {RUNBOOK} match {pattern!r}.",
            cure="Where the runbook changed, its drill has to.",
        )
    command = matches[0]
    if not command.docker_only:
        return command.text
    return next(filter(None, (row.translate(command.text) for row in equivalents(text))))


def _between(start_s: float | None, end_s: float | None) -> float | None:
    return None if start_s is None or end_s is None else end_s - start_s
