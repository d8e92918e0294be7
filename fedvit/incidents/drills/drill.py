"""What a drill is, and what came of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.tally import Tally

# Every drill types commands and watches alerts.
PROGRAMS = ("make", "curl", "jq", "prometheus", "prometheus-alertmanager")


@dataclass(frozen=True, slots=True)
class Stage:
    """One fault and the way out of it.

    Attributes:
        name: "" where a drill has but one.
        play: does everything from the fault to the end of the alert.
        may_lose_updates: whether updates that were paid for may count nowhere: they were under way when the network,
            or the privacy officer, cut them off. Rounds are never lost, and no update ever counts twice.
    """

    name: str
    alert: Alert
    play: Callable[[Course], None]
    may_lose_updates: bool = False


@dataclass(frozen=True, slots=True)
class Drill:
    """One incident of the runbook. ``settings`` make its system another than the one that most drills share."""

    name: str
    title: str
    stages: tuple[Stage, ...]
    needs: tuple[str, ...] = ()
    needs_root: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    rehearsal: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table. Seconds are None where that never came; ``verdict`` is green, failed or skipped."""

    drill: str
    alert: str
    verdict: str
    detected_after_s: float | None = None
    recovered_after_s: float | None = None
    tally: Tally | None = None
    incident: str | None = None
    why: str = ""
    notes: tuple[str, ...] = ()


def fault_in(tally: Tally, stage: Stage) -> str | None:
    """Why what an incident cost is too much, or None."""
    if tally.rounds_lost:
        return f"{tally.rounds_lost} rounds are lost"
    if tally.updates_doubled or tally.uncharged:
        return f"{tally.updates_doubled} updates count twice, {tally.uncharged} are not on the ledger"
    if tally.updates_lost and not stage.may_lose_updates:
        return f"{tally.updates_lost} updates are lost"
    # Equal sums are equal floats: where nothing is lost, nothing may differ.
    if tally.epsilon_difference < 0 or (tally.epsilon_difference and not tally.updates_lost):
        return f"the ledger says {tally.epsilon_difference:+.6f} epsilon more than was released"
    return None
