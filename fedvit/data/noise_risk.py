"""Classes that a private run may not learn, because its noise is large beside the gradients of their few images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedvit.config import Settings
from fedvit.data.partition import VirtualFleet
from fedvit.privacy.round_cost import round_noise_multiplier

LEAST_SIGNAL = 10.0
"""In the demonstration, the class at 9.4 has a recall of 0 after all rounds."""


@dataclass(frozen=True, slots=True)
class ClassSignal:
    """A class of few training images; ``signal_to_noise`` is that of :func:`signals` for a whole run."""

    name: str
    train: int
    signal_to_noise: float


def classes_at_risk(settings: Settings, fleet: VirtualFleet) -> list[ClassSignal]:
    """The classes whose signal is below :data:`LEAST_SIGNAL` standard deviations of the noise, weakest first.

    Raises:
        ConfigError: no noise multiplier keeps the run within the budget.
    """
    source, noise_multiplier = fleet.source, round_noise_multiplier(settings)
    counts = [[0] * len(source.classes) for _ in fleet.parts]
    for row, part in zip(counts, fleet.parts.values(), strict=True):
        for index in part:
            row[source.train[index].label] += 1
    ratios = signals(settings, counts, noise_multiplier)
    weak = [
        ClassSignal(name, sum(row[label] for row in counts), ratios[label])
        for label, name in enumerate(source.classes)
        if ratios[label] < LEAST_SIGNAL
    ]
    return sorted(weak, key=lambda each: each.signal_to_noise)


def signals(settings: Settings, counts: Sequence[Sequence[int]], noise_multiplier: float) -> Mapping[int, float]:
    """Signal-to-noise ratio of each class in the sum of all steps of a run, in one direction of the weights.

    An image adds a gradient, or with privacy unit "client" a share of an update, of at most the clipping norm C. If
    all of them point in one direction, a class with n images adds q n C to a step in which each image takes part with
    probability q, and the noise has standard deviation sigma C for each client or, with privacy unit "client", for each
    round. Both are summed over the clients and the steps. Gradients of one class point in different directions and
    become shorter than C, so this is an upper bound.

    Args:
        counts: training images by client and class.
        noise_multiplier: sigma of a step, or of a round.
    """
    privacy, training = settings.privacy, settings.training
    cohort = training.cohort
    share = cohort.sampling_prob or min(1.0, (cohort.size or len(counts)) / len(counts))
    classes = range(len(counts[0]))
    if privacy.privacy_unit == "client":
        held = {c: sum(row[c] / max(1, sum(row)) for row in counts) for c in classes}
        return {c: share * held[c] * math.sqrt(training.rounds) / noise_multiplier for c in classes}
    steps = training.rounds * training.local_steps
    noise = noise_multiplier * math.sqrt(share * len(counts) * steps)
    taken = privacy.sampling_prob * share * steps
    return {c: taken * sum(row[c] for row in counts) / noise for c in classes}
