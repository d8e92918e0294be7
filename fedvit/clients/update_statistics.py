"""Statistics of single noised updates, for the detection of anomalous clients.

- ``update_norm``: the update's norm, divided by the largest norm that DP-SGD gives for so many records (except with a
  probability of one in a million). A value above 1 means that the update is not the result of the ordered DP-SGD.
- ``alignment``: the projection of the linear head's update on the head learned so far, in standard deviations of its
  noise. A step of cross entropy along ``W`` is, summed over records, the logit of the record's label minus the mean
  logit under the model's own probabilities. It is positive or about 0 if the labels agree with the model, and negative
  in every round if they contradict it.

Privacy: both are post-processing of a charged mechanism output. If the client is the privacy unit, its update reaches
the host without noise, and no statistics are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedvit.privacy.mechanism import l2_norm
from fedvit.types import FloatArray, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientFailures

_TAIL = 5.0
"""Standard deviations; one normal number in three million is further from the mean."""


@dataclass(frozen=True, slots=True)
class UpdateStatisticsMonitor:
    """Computes the statistics of single updates of one model.

    Args:
        head: the name of the linear head's weight [classes, width]; None if it is not trained.
        initial: the head's weight at the start of training.
    """

    head: str | None
    initial: FloatArray | None

    def observe(self, task: TrainTask, base: Weights, answer: ClientAnswer) -> ClientAnswer:
        """The answer with the statistics in its outcome; unchanged if there is no noised update."""
        if task.privacy_unit != "record" or isinstance(answer, ClientFailures) or not answer.total_weight > 0:
            return answer
        outcome = answer.outcome
        deviation = step_deviation(task, outcome.num_examples)
        alignment = self._alignment(base, answer.weighted_sum, answer.total_weight * deviation)
        norm = l2_norm(answer.weighted_sum) / answer.total_weight / largest_norm(task, outcome.num_examples, base)
        return replace(answer, outcome=replace(outcome, update_norm=norm, alignment=alignment))

    def _alignment(self, base: Weights, sums: Mapping[str, np.ndarray], deviation: float) -> float | None:
        if self.head is None or self.initial is None or self.head not in sums:
            return None
        learned = base[self.head].astype(np.float64) - self.initial
        # A component that all classes share does not affect predictions.
        learned -= learned.mean(axis=0)
        length = float(np.linalg.norm(learned))
        return float(np.sum(sums[self.head] * learned)) / (length * deviation) if length > 0 else None


def step_deviation(task: TrainTask, num_examples: int) -> float:
    """Standard deviation of the noise in each number of an update."""
    batch = task.sampling_prob * num_examples
    return task.learning_rate * task.noise_multiplier * task.l2_clip_norm * math.sqrt(task.local_steps) / batch


def largest_norm(task: TrainTask, num_examples: int, base: Weights) -> float:
    """Bound on an update's norm: all records drawn in all steps, with equal directions, plus noise."""
    size = sum(array.size for array in base.values())
    pull = task.learning_rate * task.local_steps * task.l2_clip_norm / task.sampling_prob
    return pull + step_deviation(task, num_examples) * (math.sqrt(size) + _TAIL)
