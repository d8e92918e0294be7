"""Statistics of single noised updates, for the detection of anomalous clients.

- ``update_norm``: the update's norm, divided by the largest norm that the ordered DP-SGD gives for so many records
  (:mod:`fedvit.aggregation.update_bounds`).
- ``alignment``: the projection of the linear head's update on the head learned so far, in standard deviations of its
  noise. A step of cross entropy along ``W`` is, summed over records, the logit of the record's label minus the mean
  logit under the model's own probabilities. It is positive or about 0 if the labels agree with the model, and negative
  in every round if they contradict it.

Privacy: both are post-processing of a charged mechanism output. If the client is the privacy unit, its update reaches
the host without noise, and no statistics are computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedvit.aggregation.update_bounds import MechanismBounds, step_deviation
from fedvit.types import FloatArray, Weights
from fedvit.updates import ClientUpdate


@dataclass(frozen=True, slots=True)
class UpdateStatisticsMonitor:
    """Computes the statistics of single updates of one model.

    Args:
        head: the name of the linear head's weight [classes, width]; None if it is not trained.
        initial: the head's weight at the start of training.
    """

    head: str | None
    initial: FloatArray | None

    def observe(self, bounds: MechanismBounds, base: Weights, update: ClientUpdate) -> ClientUpdate:
        """The update with the statistics in its outcome.

        Args:
            bounds: on updates to the round's task.
            base: the weights of the round.
        """
        deviation = step_deviation(bounds.task, update.outcome.num_examples)
        alignment = self._alignment(base, update.weighted_sum, update.total_weight * deviation)
        norm = bounds.relative_norm(update)
        return replace(update, outcome=replace(update.outcome, update_norm=norm, alignment=alignment))

    def _alignment(self, base: Weights, sums: Mapping[str, np.ndarray], deviation: float) -> float | None:
        if self.head is None or self.initial is None or self.head not in sums:
            return None
        learned = base[self.head].astype(np.float64) - self.initial
        # A component that all classes share does not affect predictions.
        learned -= learned.mean(axis=0)
        length = float(np.linalg.norm(learned))
        return float(np.sum(sums[self.head] * learned)) / (length * deviation) if length > 0 else None
