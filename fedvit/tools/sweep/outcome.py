"""Outcomes of trials, their Pareto front, and the choice of a configuration. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fedvit.tools.sweep.halving import Score

STOPPED_EARLY = "stopped_early"
FAILED = "failed"
FINISHED = frozenset({"completed", "budget_exhausted", "stopped"})
"""Statuses of a complete simulated run; ``stopped`` is by ``simulation.max_hours`` or ``target_accuracy``."""


@dataclass(frozen=True)
class TrialOutcome:
    """The outcome of a trial.

    Attributes:
        status: the status of the run, ``stopped_early`` or ``failed``.
        epsilon: the spend of the most exposed unit; None without privacy.
        planned_epsilon: the maximum spend of the whole run.
        score: the mean accuracy of the last versions; None if none was evaluated.
        hours: virtual hours to the last version.
        seconds: real seconds of work.
        startup_s: real seconds from the end of the worker's previous trial, or the worker's start, to the first
            client's work.
        warm: whether the worker had loaded data and model before.
        rungs: (score, standard error) at the rungs that it reached, by round.
        curve: (virtual hours, round, accuracy) of every evaluated version.
        staleness: accepted updates by staleness in versions.
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
        """The outcome as JSON types."""
        rungs = {name: list(score) for name, score in self.rungs.items()}
        return asdict(self) | {"curve": [list(point) for point in self.curve], "rungs": rungs}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> TrialOutcome:
        """The inverse of :meth:`to_json`.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**fields)

    @property
    def mean_staleness(self) -> float | None:
        """The mean staleness of the accepted updates, in versions."""
        total = sum(self.staleness.values())
        return sum(int(late) * count for late, count in self.staleness.items()) / total if total else None


@dataclass(frozen=True)
class Configuration:
    """A configuration: means over its seeds, and the largest epsilon."""

    trial_ids: tuple[str, ...]
    parameters: Mapping[str, Any]
    score: Score
    epsilon: float
    hours: float


def configurations(outcomes: Sequence[TrialOutcome]) -> list[Configuration]:
    """The configurations whose trials are all complete, in the order of the trials."""
    groups: dict[str, list[TrialOutcome]] = {}
    for one in outcomes:
        groups.setdefault(repr(sorted(one.parameters.items())), []).append(one)
    return [mean for group in groups.values() if (mean := _configuration(group)) is not None]


def _configuration(group: Sequence[TrialOutcome]) -> Configuration | None:
    scores = [Score(o.score, o.standard_error or 0.0) for o in group if o.score is not None and o.status in FINISHED]
    if len(scores) < len(group):
        return None
    return Configuration(
        trial_ids=tuple(o.trial_id for o in group),
        parameters=group[0].parameters,
        score=_mean(scores),
        epsilon=max(math.inf if o.epsilon is None else o.epsilon for o in group),
        hours=statistics.fmean(o.hours for o in group),
    )


def _mean(scores: Sequence[Score]) -> Score:
    """The mean score; its error is the larger of two estimates, since all seeds share the test images."""
    values = [s.value for s in scores]
    between = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Score(statistics.fmean(values), max(between, statistics.fmean(s.error for s in scores)))


def pareto_front(results: Sequence[Configuration]) -> list[Configuration]:
    """The configurations that no other dominates in epsilon, score and virtual hours, by epsilon."""
    front = [c for c in results if not any(_dominates(other, c) for other in results)]
    return sorted(front, key=lambda c: (c.epsilon, c.hours))


def _dominates(one: Configuration, other: Configuration) -> bool:
    ours = (one.epsilon, -one.score.value, one.hours)
    theirs = (other.epsilon, -other.score.value, other.hours)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def choose(results: Sequence[Configuration], target_epsilon: float, margin: float) -> Configuration | None:
    """The most private of the configurations that are not clearly below the best, then the fastest.

    That is the rule of one standard error (Breiman et al. 1984): the highest of many noisy scores is partly due to
    chance, and its cost in privacy is certain. Configurations beyond the budget are excluded.
    """
    allowed = [c for c in results if c.epsilon <= target_epsilon or math.isinf(c.epsilon)]
    if not allowed:
        return None
    best = max(allowed, key=lambda c: c.score.value)
    alike = [c for c in allowed if not c.score.clearly_below(best.score, margin)]
    return min(alike, key=lambda c: (c.epsilon, c.hours, -c.score.value))
