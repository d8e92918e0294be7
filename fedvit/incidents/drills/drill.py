"""Drills: their stages, the steps and times of a stage, and results."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import httpx

from fedvit.errors import DrillError
from fedvit.incidents.drills.losses import Losses
from fedvit.incidents.drills.runbook import RUNBOOK, commands, equivalents
from fedvit.incidents.drills.system import PROMETHEUS, TIMEOUT_S, CommandResult, DrillSystem, wait_until
from fedvit.types import utc_now

# Programs that every drill needs.
PROGRAMS = ("make", "curl", "jq", "prometheus", "prometheus-alertmanager")
DETECT_S = 180.0
CLEAR_S = 240.0
_PLACEHOLDER = re.compile(r"<[a-z]+(?:-[a-z]+)*>|\{\.\.\.\}|\"\.\.\.\"")
# Prometheus and Alertmanager round the times of alerts.
_ROUNDING = timedelta(seconds=2)


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


@dataclass(frozen=True, slots=True)
class Stage:
    """One fault and the recovery from it.

    Attributes:
        name: "" in a drill with a single stage.
        play: all steps from the fault to the end of the alert.
        may_lose_updates: whether charged updates may be missing from every round, because the network or the breach
            response cut them off. Rounds are never lost, and no update ever counts twice.
    """

    name: str
    alert: ExpectedAlert
    play: Callable[[StageRun], None]
    may_lose_updates: bool = False


@dataclass(frozen=True, slots=True)
class Drill:
    """One incident of the runbook. A drill with ``settings`` runs on a system of its own."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    needs: tuple[str, ...] = ()
    needs_root: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class DrillResult:
    """A row of the table. Seconds are None if the event did not happen; ``verdict`` is green, failed or skipped."""

    drill: str
    alert: str
    verdict: str
    detected_after_s: float | None = None
    recovered_after_s: float | None = None
    losses: Losses | None = None
    incident: str | None = None
    why: str = ""
    notes: tuple[str, ...] = ()


def fault_in(losses: Losses, stage: Stage) -> str | None:
    """Why the losses fail the stage, or None."""
    if losses.rounds_lost:
        return f"{losses.rounds_lost} rounds are lost"
    if losses.updates_doubled or losses.uncharged:
        return f"{losses.updates_doubled} updates count twice, {losses.uncharged} are not on the ledger"
    if losses.updates_lost and not stage.may_lose_updates:
        return f"{losses.updates_lost} updates are lost"
    # Without losses both epsilons are the same sum, so they must be equal to the bit.
    if losses.epsilon_difference < 0 or (losses.epsilon_difference and not losses.updates_lost):
        return f"the ledger says {losses.epsilon_difference:+.6f} epsilon more than was released"
    return None
