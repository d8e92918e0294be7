"""Whom a sweep stops early: asynchronous successive halving between equals, with room for chance.

After Li et al. 2020 (ASHA, arXiv:1810.05934), with two changes that noise asks for:

- A trial is compared only with those that are at least as private. Less noise learns faster; compared with all, a sweep
  would stop every private trial at its first rung, and the Pareto front would lose its better half.
- A score comes with its standard error, and a trial goes only if it lies clearly behind: that an accuracy on a few
  hundred images, of weights that are noised anew in every round, is a little lower says nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

# Spends that differ by less are equal: they are found by numerical composition.
_SAME_EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """How good a trial is, as far as can be told: an accuracy and its standard error."""

    value: float
    error: float

    def clearly_below(self, other: Score, margin: float) -> bool:
        """Whether it is lower by more than ``margin`` standard errors of the difference."""
        return self.value + margin * math.hypot(self.error, other.error) < other.value


def score_of(accuracies: Sequence[float], num_test: int, window: int) -> Score:
    """The mean of the last ``window`` accuracies.

    Its variance has two parts: that of an accuracy on ``num_test`` images, which all versions share, and that of
    the versions' mean, since every round brings new noise.

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
    """Decides at every rung; what it has seen may be given to it again in any order, and twice.

    Args:
        reduction_factor: one of so many goes on.
        margin: see :meth:`Score.clearly_below`.
    """

    reduction_factor: int
    margin: float
    _seen: dict[int, dict[str, tuple[float, Score]]] = field(default_factory=dict)

    def record(self, trial_id: str, rung: int, epsilon: float, score: Score) -> None:
        """Remember what a trial came to at a rung."""
        self._seen.setdefault(rung, {})[trial_id] = (epsilon, score)

    def goes_on(self, trial_id: str, rung: int, epsilon: float, score: Score) -> bool:
        """Record it, and tell whether it is worth its further rounds; the first few always are."""
        self.record(trial_id, rung, epsilon, score)
        limit = epsilon * (1 + _SAME_EPSILON)
        rivals = [s for spent, s in self._seen[rung].values() if spent <= limit]
        if len(rivals) < self.reduction_factor:
            return True
        rivals.sort(key=lambda s: -s.value)
        last_in = rivals[math.ceil(len(rivals) / self.reduction_factor) - 1]
        return not score.clearly_below(last_in, self.margin)
