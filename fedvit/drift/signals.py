"""Drift signals: held-out loss, mix of predicted classes, and clients' histograms.

Each signal has a score from 0 to 1, and says drift from :data:`THRESHOLD` on; None means unknown as yet.

The population stability index of two mixes over the same bins is ``sum((o - e) * ln(o / e))`` over the shares. It comes
from credit scoring (Siddiqi, Credit Risk Scorecards, 2006), where below 0.1 is no shift and above 0.25 a large one; for
its distribution see Yurdakul, Statistical Properties of Population Stability Index (2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedvit.drift.comparison import Comparison, Shift
from fedvit.wire.histograms import RISK

THRESHOLD = 0.5
# Relative rise of the latest loss above the best of its run that scores 1; half of it scores the threshold.
LOSS_RISE = 1.0
# Relative rises of smaller losses mean nothing.
LOSS_FLOOR = 0.1
# A stability index of 0.2 scores the threshold, twice that 1.
INDEX_OF_THRESHOLD = 0.2
# With fewer predictions the index is mostly chance: without drift it is about (classes - 1) / predictions.
MIN_ANSWERS = 100


@dataclass(frozen=True, slots=True)
class Signal:
    """One measured value, its reference, and a sentence that explains the score."""

    name: str
    value: float | None
    reference: float | None
    score: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class DriftReport:
    """All signals; the highest score counts."""

    signals: tuple[Signal, ...]

    @property
    def score(self) -> float | None:
        """Highest score; None where all are unknown."""
        return max((signal.score for signal in self.signals if signal.score is not None), default=None)

    @property
    def drifting(self) -> bool:
        """Whether any signal says drift."""
        return (self.score or 0.0) >= THRESHOLD


def loss_signal(losses: Sequence[float]) -> Signal:
    """Held-out loss of a run's latest version against the best of that run; ``losses`` by round."""
    if not losses:
        return Signal("held_out_loss", None, None, None, "No version was evaluated yet.")
    latest, best = losses[-1], min(losses)
    rise = (latest - best) / max(best, LOSS_FLOOR)
    words = f"The latest held-out loss is {rise:.0%} above the best of its run." if rise else "It is the best so far."
    return Signal("held_out_loss", latest, best, _capped(rise / LOSS_RISE), words)


def mix_signal(answers: Mapping[int, int], expected: Sequence[float] | None) -> Signal:
    """Classes that the inference replicas predict against those that the model predicts on held-out images.

    Args:
        answers: number of predictions of each class, by index, since the version serves.
        expected: those on held-out images; None where they were not recorded.
    """
    name, total = "prediction_mix", sum(answers.values())
    if expected is None or sum(expected) <= 0:
        return Signal(name, None, None, None, "The release does not say what it answers on held-out images.")
    if total < MIN_ANSWERS:
        words = f"There are not enough answers yet: {total} of the {MIN_ANSWERS} that it takes."
        return Signal(name, None, INDEX_OF_THRESHOLD, None, words)
    index = stability_index(expected, [answers.get(position, 0) for position in range(len(expected))])
    words = f"The classes answered to {total} requests have a stability index of {index:.3f} to the held-out images."
    return Signal(name, index, INDEX_OF_THRESHOLD, _capped(index / INDEX_OF_THRESHOLD * THRESHOLD), words)


def histogram_signals(comparison: Comparison | None, clients: int) -> tuple[Signal, ...]:
    """One signal for each feature of clients' histograms; ``clients`` is how many have ever sent one."""
    if comparison is None:
        words = "No client has sent a histogram before the release and another after it."
        return (Signal("histograms", None, None, None, f"{words} {clients} have sent one."),)
    worst = {feature: comparison.worst(feature) for feature in comparison.fleet}
    return tuple(
        Signal(f"histogram_{name}", *comparison.fleet[name].size, shift.score, _explanation(comparison, shift))
        for name, shift in worst.items()
    )


def _explanation(comparison: Comparison, worst: Shift) -> str:
    if worst.feature == RISK and worst.drifts:
        return (
            "Records have moved to classes that the model is bad at: of the fleet's, it is expected to get "
            f"{comparison.fleet[RISK].distance.ks:.1%} more wrong than at the release."
        )
    clients = [shift.client_ids[0] for shift in comparison.by_client[worst.feature] if shift.drifts]
    if not worst.drifts:
        return f"It has not moved by more than noise and sampling explain, at {len(comparison.client_ids)} clients."
    if clients:
        few = ", ".join(clients[:5]) + (f" and {len(clients) - 5} more" if len(clients) > 5 else "")
        return f"It has moved at {len(clients)} of {len(comparison.client_ids)} clients: {few}."
    where = "the fleet as a whole"
    if len(worst.client_ids) < len(comparison.client_ids):
        where = f"a cluster of {len(worst.client_ids)} clients, {worst.client_ids[0]} among them"
    return f"It has moved in {where}; at no single client is that certain."


def stability_index(expected: Sequence[float], observed: Sequence[float]) -> float:
    """Population stability index of two mixes; half a count is added to each bin so that none is empty."""
    return sum((o - e) * math.log(o / e) for e, o in zip(_shares(expected), _shares(observed), strict=True))


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts) + 0.5 * len(counts)
    return [(count + 0.5) / total for count in counts]


def _capped(score: float) -> float:
    return min(1.0, max(0.0, score))
