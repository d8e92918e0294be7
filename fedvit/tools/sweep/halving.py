"""Early stopping by asynchronous successive halving, with two changes for noisy training.

After Li et al. 2020 (ASHA, arXiv:1810.05934); the changes are:

- A trial is compared only with trials that are at least as private. Trials with less noise learn faster, so that a
  comparison with all would stop every private trial at its first rung.
- Each score has a standard error, and a trial is stopped only if it is clearly behind: a small difference between
  accuracies on a few hundred images, of weights with new noise in every round, is not significant.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

# Spends that differ by less are equal, since numerical composition computes them.
_SAME_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """An accuracy and its standard error."""

    value: float
    error: float

    def clearly_below(self, other: Score, margin: float) -> bool:
        """Whether it is lower by more than ``margin`` standard errors of the difference."""
        return self.value + margin * math.hypot(self.error, other.error) < other.value


def score_of(accuracies: Sequence[float], num_test: int, window: int) -> Score:
    """The mean of the last ``window`` accuracies.

    Its variance is the sum of that of an accuracy on ``num_test`` images, which all versions share, and that of the
    versions' mean, since every round adds new noise.

    Raises:
        ValueError: there is no accuracy.
    """
    last = accuracies[-window:]
    mean = statistics.fmean(last)
    of_images = mean * (1 - mean) / max(1, num_test)
    of_rounds = statistics.variance(last) / len(last) if len(last) > 1 else 0.0
    return Score(mean, math.sqrt(of_images + of_rounds))


@dataclass(slots=True)
class Halving:
    """The decision at every rung; results may be recorded in any order, and repeatedly.

    Args:
        reduction_factor: one of so many trials continues.
        margin: see :meth:`Score.clearly_below`.
    """

    reduction_factor: int
    margin: float
    _results: dict[int, dict[str, tuple[float, Score]]] = field(default_factory=dict)

    def record(self, trial_id: str, rung: int, epsilon: float, score: Score) -> None:
        """Record the score of a trial at a rung."""
        self._results.setdefault(rung, {})[trial_id] = (epsilon, score)

    def goes_on(self, trial_id: str, rung: int, epsilon: float, score: Score) -> bool:
        """Record the score and return whether the trial continues; the first few always do."""
        self.record(trial_id, rung, epsilon, score)
        limit = epsilon * (1 + _SAME_EPSILON)
        scores = [s for spent, s in self._results[rung].values() if spent <= limit]
        if len(scores) < self.reduction_factor:
            return True
        scores.sort(key=lambda s: -s.value)
        last_in = scores[math.ceil(len(scores) / self.reduction_factor) - 1]
        return not score.clearly_below(last_in, self.margin)
