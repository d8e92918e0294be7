"""Drills, their stages and their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedvit.incidents.drills.losses import Losses
from fedvit.incidents.drills.prometheus import ExpectedAlert
from fedvit.incidents.drills.stage_run import StageRun

# Programs that every drill needs.
PROGRAMS = ("make", "curl", "jq", "prometheus", "prometheus-alertmanager")


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
