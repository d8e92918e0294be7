"""State machine of the training loop, pure: ``step(state, event) -> (state, effects)``.

It has no clock, no I/O and no randomness: the coordinator performs the effects and feeds the results back as events.
Each effect is idempotent, so a process that dies between two of them starts again from the store with :class:`Started`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from fedvit.types import Cohort, RunStatus


class Phase(StrEnum):
    """What the loop is doing."""

    IDLE = "idle"
    DRAWING = "drawing"
    CHARGING = "charging"
    TRAINING = "training"
    COMMITTING = "committing"
    RELEASING = "releasing"
    RESTING = "resting"


@dataclass(frozen=True, slots=True)
class RunPlan:
    """The length of a run and the conditions of its rounds.

    Cohorts that are ``sampled`` in secret may have any size: whether a round takes place must not depend on the clients
    that it drew. No client of such a cohort may be late, either.
    """

    rounds_total: int
    min_clients: int
    release_every_rounds: int
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class LoopState:
    """The state of the loop. ``round_index`` is the round under way, from 1."""

    plan: RunPlan
    phase: Phase = Phase.IDLE
    round_index: int = 0
    cohort: Cohort | None = None
    unreleased: str | None = None
    """The last committed version, until it is offered to replicas and vehicles."""
    stop_requested: bool = False
    ending: EndRun | None = None
    """How the loop ends once the last version is released."""


# --- events: what happened -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The loop begins, or begins again, after ``rounds_done`` committed rounds."""

    rounds_done: int
    unreleased: str | None = None


@dataclass(frozen=True, slots=True)
class CohortDrawn:
    """The cohort is drawn and recorded. ``min_clients``, where given, replaces the plan's: an operator changed it.

    ``in_flight`` more clients still work on an earlier round; the round takes their answers as well.
    """

    cohort: Cohort
    min_clients: int | None = None
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Charged:
    """The ledger holds the round's charges."""


@dataclass(frozen=True, slots=True)
class ChargeRefused:
    """The budget does not admit the round, or no client may take part in the run any more."""

    reason: str


@dataclass(frozen=True, slots=True)
class Trained:
    """Enough clients answered, or all, or the deadline passed."""

    num_updates: int
    num_failed: int
    first_error: str | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """The round and its model version are durable."""

    version: str


@dataclass(frozen=True, slots=True)
class Released:
    """The version is exported, judged, signed and offered."""


@dataclass(frozen=True, slots=True)
class ReleaseRefused:
    """The version did not pass the gate; what served before keeps serving."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The loop is to end after the round under way."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An effect could not be performed."""

    reason: str


RoundEvent = CohortDrawn | Charged | ChargeRefused | Trained | Committed | Released | ReleaseRefused
Event = Started | RoundEvent | StopRequested | Failed


# --- effects: what to do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DrawCohort:
    """Draw the round's cohort and record it."""

    round_index: int


@dataclass(frozen=True, slots=True)
class ChargeRound:
    """Write the round's privacy charges; nothing is released before."""

    cohort: Cohort


@dataclass(frozen=True, slots=True)
class TrainRound:
    """Send the global weights to the cohort and fold the answers, ``min_clients`` of them or more.

    The last round waits for all that are in flight, in whatever mode: no later one would take their answers.
    """

    cohort: Cohort
    min_clients: int
    wait_for_all: bool


@dataclass(frozen=True, slots=True)
class CommitRound:
    """Write round, outcomes and model version in one transaction."""

    round_index: int


@dataclass(frozen=True, slots=True)
class ReleaseVersion:
    """Export, check, sign and offer the version."""

    version: str


@dataclass(frozen=True, slots=True)
class EndRun:
    """End the loop and record why."""

    status: RunStatus
    reason: str | None


RoundEffect = DrawCohort | ChargeRound | TrainRound | CommitRound | ReleaseVersion
Effect = RoundEffect | EndRun

Step = tuple[LoopState, tuple[Effect, ...]]


class ImpossibleEventError(RuntimeError):
    """An event arrived in a phase that cannot have caused it: a fault of the program, never of its input."""


def step(state: LoopState, event: Event) -> Step:
    """The next state, and what to do now.

    Raises:
        ImpossibleEventError: the event does not belong to the phase.
    """
    match state.phase, event:
        case _, StopRequested():
            return replace(state, stop_requested=True), ()
        case _, Failed(reason):
            return _end(state, EndRun(RunStatus.FAILED, reason))
        case Phase.IDLE, Started(rounds_done, unreleased):
            return _next(replace(state, round_index=rounds_done, unreleased=unreleased))
        case Phase.DRAWING, CohortDrawn(cohort, min_clients, in_flight):
            if min_clients is not None:
                state = replace(state, plan=replace(state.plan, min_clients=min_clients))
            short = _too_few(state, len(cohort.client_ids) + in_flight, "eligible clients")
            charging = replace(state, phase=Phase.CHARGING, cohort=cohort)
            return _finish(state, short) if short else (charging, (ChargeRound(cohort),))
        case Phase.CHARGING, Charged() if state.cohort:
            last = state.round_index >= state.plan.rounds_total
            effect = TrainRound(state.cohort, _needed(state), wait_for_all=last or state.plan.sampled)
            return replace(state, phase=Phase.TRAINING), (effect,)
        case Phase.DRAWING | Phase.CHARGING, ChargeRefused(reason):
            return _finish(state, EndRun(RunStatus.BUDGET_EXHAUSTED, reason))
        case Phase.TRAINING, Trained(num_updates, num_failed, first_error):
            first = f", the first with: {first_error}" if first_error else ""
            short = _too_few(state, num_updates, f"updates ({num_failed} clients failed{first})")
            committing = replace(state, phase=Phase.COMMITTING)
            return _finish(state, short) if short else (committing, (CommitRound(state.round_index),))
        case Phase.COMMITTING, Committed(version):
            state = replace(state, unreleased=version)
            due = state.round_index % state.plan.release_every_rounds == 0
            return _release(state, version) if due else _next(state)
        case Phase.RELEASING, Released() | ReleaseRefused():
            state = replace(state, unreleased=None)
            return _end(state, state.ending) if state.ending else _next(state)
    raise ImpossibleEventError(f"{type(event).__name__} in phase {state.phase}")


def _too_few(state: LoopState, count: int, what: str) -> EndRun | None:
    needed = _needed(state)
    if count >= needed:
        return None
    return EndRun(RunStatus.FAILED, f"Round {state.round_index} has {count} {what}; at least {needed} are needed.")


def _needed(state: LoopState) -> int:
    return 0 if state.plan.sampled else max(1, state.plan.min_clients)


def _next(state: LoopState) -> Step:
    if state.round_index >= state.plan.rounds_total:
        return _finish(state, EndRun(RunStatus.COMPLETED, None))
    if state.stop_requested:
        return _finish(state, EndRun(RunStatus.STOPPED, f"Stopped on request after round {state.round_index}."))
    following = state.round_index + 1
    return replace(state, phase=Phase.DRAWING, round_index=following, cohort=None), (DrawCohort(following),)


def _finish(state: LoopState, ending: EndRun) -> Step:
    """End, after the last committed version is released."""
    if state.unreleased is None:
        return _end(state, ending)
    return _release(replace(state, ending=ending), state.unreleased)


def _release(state: LoopState, version: str) -> Step:
    return replace(state, phase=Phase.RELEASING), (ReleaseVersion(version),)


def _end(state: LoopState, ending: EndRun) -> Step:
    return replace(state, phase=Phase.RESTING, ending=ending), (ending,)
