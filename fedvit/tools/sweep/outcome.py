"""What trials came to, which of them are worth considering, and which one is taken. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedvit.tools.sweep.halving import Score

STOPPED_EARLY = "stopped_early"
FINISHED = frozenset({"completed", "budget_exhausted", "stopped"})
"""Ways in which a simulated run ends by itself; ``stopped`` is by ``simulation.max_hours`` or ``target_accuracy``."""


@dataclass(frozen=True)
class TrialOutcome:
    """A trial at its end.

    Attributes:
        status: of the run, ``stopped_early`` or ``failed``.
        epsilon: what the most exposed unit has spent; None where nothing is private.
        planned_epsilon: what the whole run would have spent at most.
        score: mean accuracy of the last versions; None where none was evaluated.
        hours: virtual ones, to the last version.
        seconds: real ones, of work.
        startup_s: real seconds between the end of the trial before it on its worker, or the worker's own beginning,
            and its first client's work.
        warm: whether that worker had its data and model already.
        rungs: scores at the rungs that it came to, by round.
        curve: (virtual hours, round, accuracy) of every evaluated version.
        staleness: accepted updates by how many versions late.
    """

    trial_id: str
    parameters: Mapping[str, Any]
    seed: int
    status: str
    reason: str | None = None
    epsilon: float | None = None
    planned_epsilon: float | None = None
    score: float | None = None
    standard_error: float | None = None
    rounds: int = 0
    hours: float = 0.0
    seconds: float = 0.0
    startup_s: float = 0.0
    warm: bool = True
    rungs: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    curve: Sequence[tuple[float, int, float]] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)
    staleness: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        rungs = {name: list(score) for name, score in self.rungs.items()}
        return asdict(self) | {"curve": [list(point) for point in self.curve], "rungs": rungs}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> TrialOutcome:
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**found)

    @property
    def mean_staleness(self) -> float | None:
        """Of the accepted updates, in versions."""
        total = sum(self.staleness.values())
        return sum(int(late) * count for late, count in self.staleness.items()) / total if total else None


@dataclass(frozen=True)
class Candidate:
    """One configuration over all its seeds: means, and the largest epsilon."""

    trial_ids: tuple[str, ...]
    parameters: Mapping[str, Any]
    score: Score
    epsilon: float
    hours: float


def candidates(outcomes: Sequence[TrialOutcome]) -> list[Candidate]:
    """Every configuration of which all seeds ran to their end, in the order of the trials."""
    groups: dict[str, list[TrialOutcome]] = {}
    for one in outcomes:
        groups.setdefault(repr(sorted(one.parameters.items())), []).append(one)
    return [found for group in groups.values() if (found := _candidate(group)) is not None]


def _candidate(group: Sequence[TrialOutcome]) -> Candidate | None:
    scores = [Score(o.score, o.standard_error or 0.0) for o in group if o.score is not None and o.status in FINISHED]
    if len(scores) < len(group):
        return None
    return Candidate(
        trial_ids=tuple(o.trial_id for o in group),
        parameters=group[0].parameters,
        score=_mean(scores),
        epsilon=max(math.inf if o.epsilon is None else o.epsilon for o in group),
        hours=statistics.fmean(o.hours for o in group),
    )


def _mean(scores: Sequence[Score]) -> Score:
    """Seeds share the test images, whose part of the error does not average out: the larger of the two estimates."""
    values = [s.value for s in scores]
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), max(between, statistics.fmean(s.error for s in scores)))


def pareto_front(found: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one equals or betters in epsilon, score and virtual hours at once, by epsilon."""
    front = [c for c in found if not any(_dominates(other, c) for other in found)]
    return sorted(front, key=lambda c: (c.epsilon, c.hours))


def _dominates(one: Candidate, other: Candidate) -> bool:
    ours = (one.epsilon, -one.score.value, one.hours)
    theirs = (other.epsilon, -other.score.value, other.hours)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def choose(found: Sequence[Candidate], target_epsilon: float, margin: float) -> Candidate | None:
    """The one to take: the most private of those that cannot be told from the best, then the fastest.

    That is the rule of one standard error (Breiman et al. 1984): the highest of many noisy scores is so by luck as
    well, and what it costs more in privacy is certain. Those beyond the budget are left out, unless nothing is private.
    """
    allowed = [c for c in found if c.epsilon <= target_epsilon or math.isinf(c.epsilon)]
    if not allowed:
        return None
    best = max(allowed, key=lambda c: c.score.value)
    alike = [c for c in allowed if not c.score.clearly_below(best.score, margin)]
    return min(alike, key=lambda c: (c.epsilon, c.hours, -c.score.value))
