"""What shows of a client's data, or of its honesty, in the update that it sends: a function of what is noised already.

Two numbers, both in units that the noise is known in:

- ``update_norm``: the update's norm over the largest that DP-SGD can have made of so many records, but for one chance
  in a million: above 1 it was not made by DP-SGD as it was ordered.
- ``alignment``: the projection of the update of the linear head on the head that the fleet has learned so far, in
  standard deviations of its noise. A step of cross entropy along ``W`` is, summed over records, the logit of the
  record's own label minus the mean logit under the model's own probabilities: positive or about 0 where the labels are
  what the model has learned to expect, negative round after round where they contradict it.

Privacy: post-processing of a release that is charged. Where the client is the unit, the update reaches its host without
noise, and nothing may be looked at.
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
"""Standard deviations: one normal number in three million lies further out."""


@dataclass(frozen=True, slots=True)
class UpdateStatisticsMonitor:
    """Looks at single updates of one model.

    Args:
        head: the name of the linear head's weight [classes, width]; None where it is not trained.
        initial: the head that training starts from.
    """

    head: str | None
    initial: FloatArray | None

    def seen(self, task: TrainTask, base: Weights, answer: ClientAnswer) -> ClientAnswer:
        """One client's answer with what shows of it in its outcome; as it is, where nothing may be looked at."""
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
        # What all classes have in common changes no answer.
        learned -= learned.mean(axis=0)
        length = float(np.linalg.norm(learned))
        return float(np.sum(sums[self.head] * learned)) / (length * deviation) if length > 0 else None


def step_deviation(task: TrainTask, num_examples: int) -> float:
    """The standard deviation of the noise in each number of an update."""
    batch = task.sampling_prob * num_examples
    return task.learning_rate * task.noise_multiplier * task.l2_clip_norm * math.sqrt(task.local_steps) / batch


def largest_norm(task: TrainTask, num_examples: int, base: Weights) -> float:
    """What the norm of an update does not exceed: every record drawn in every step, all pulling one way, and noise."""
    size = sum(array.size for array in base.values())
    pull = task.learning_rate * task.local_steps * task.l2_clip_norm / task.sampling_prob
    return pull + step_deviation(task, num_examples) * (math.sqrt(size) + _TAIL)
