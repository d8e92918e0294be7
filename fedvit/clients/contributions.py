"""What a client contributes where it adds noise to its whole update: all of it, or a share in integers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedvit.config import Settings
from fedvit.privacy.mechanism import digest, noised_mean, size_of
from fedvit.privacy.randomness import SecretStream, output_id
from fedvit.secagg.noise import Plan, encode
from fedvit.secagg.task_plan import flat, plan_of
from fedvit.types import ClientOutcome, TrainTask
from fedvit.updates import ClientFailures, ClientUpdate, RingSum


def with_own_noise(task: TrainTask, update: ClientUpdate, secret: bytes) -> ClientUpdate:
    """A clipped update with noise of ``noise_multiplier * l2_clip_norm`` a coordinate, from the client's secret.

    How many updates were within the norm is not told: this has no noise.
    """
    stream = _stream(task, update, secret, "client-noise")
    noise = task.noise_multiplier * task.l2_clip_norm * stream.normal(size_of(update.weighted_sum))
    clipped = {name: array.astype(np.float64) for name, array in update.weighted_sum.items()}
    return replace(update, weighted_sum=noised_mean(clipped, noise, divisor=1.0), within_clip=0)


class RingEncoder:
    """Encodes the contributions to one task whose noise is distributed.

    Args:
        settings: of the run.
        shapes: of the trainable parameters, by name.

    Attributes:
        plan: of the contributions.

    Raises:
        ConfigError, SecureAggregationError: see :func:`fedvit.secagg.task_plan.plan_of`.
    """

    def __init__(self, task: TrainTask, settings: Settings, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._task, self._names = task, tuple(shapes)
        self.plan: Plan = plan_of(task, settings, sum(math.prod(shape) for shape in shapes.values()))

    def encode(self, update: ClientUpdate, secret: bytes) -> RingSum:
        """The client's contribution, with its share of the noise; the same one for equal arguments.

        Args:
            update: without noise, multiplied by its weight.
            secret: the client's key.

        Raises:
            UpdateRejectedError: it is larger than its noise is made for, or not finite.
        """
        stream = _stream(self._task, update, secret, "distributed-noise")
        vector = encode(self.plan, flat(update.weighted_sum, self._names), stream)
        task = self._task
        return RingSum(task.round_index, (update.outcome,), vector, update.total_weight, task.attempt)


class RingAggregator:
    """Sums the contributions of one call modulo ``2^bits``, with the outcomes of clients that failed."""

    def __init__(self, task: TrainTask, plan: Plan) -> None:
        self._task, self._mask = task, np.uint32(2**plan.bits - 1)
        self._vector, self._weight = np.zeros(plan.padded, np.uint32), 0.0
        self._outcomes = list[ClientOutcome]()

    def add(self, own: RingSum | ClientFailures) -> None:
        """Add one client's contribution; of a failure, only the outcome."""
        self._outcomes += own.outcomes
        if isinstance(own, RingSum):
            self._vector += own.vector
            self._weight += own.total_weight

    def message(self) -> RingSum:
        """Everything that was added, as one message."""
        outcomes, task = tuple(self._outcomes), self._task
        return RingSum(task.round_index, outcomes, self._vector & self._mask, self._weight, task.attempt)


def _stream(task: TrainTask, update: ClientUpdate, secret: bytes, purpose: str) -> SecretStream:
    # Of the update as well: the noise of one value must not be used for another.
    outcome, whole = update.outcome, update.weighted_sum
    output = output_id(task, outcome.client_id, outcome.num_examples)
    return SecretStream(secret, purpose, {"release": output, "update": digest(whole)})
