"""Partial aggregation of clients' updates: exact sums, whose bits do not depend on the assignment to proxies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedvit.errors import FedvitError, IntegrityError, UpdateRejectedError
from fedvit.exact_sums import QUANTUM, ROOM, ExactSums, peak_of
from fedvit.types import ClientOutcome, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientFailures, PartialSum, UpdateBundle, WeightedUpdate
from fedvit.wire.tensors import weights_digest


class PartialAggregator:
    """Sums the updates of one call; single updates are not kept.

    Each sum is exact (:mod:`fedvit.exact_sums`), so the aggregator may add those of all proxies in any order. If
    updates are too large to be summed exactly, the message is a bundle of several sums.

    Args:
        shapes: of the trainable parameters, by name.
    """

    def __init__(self, task: TrainTask, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._task, self._shapes = task, shapes
        self._closed: list[WeightedUpdate] = []
        self._begin()

    def add(self, own: ClientAnswer, scale: float = 1.0, *, peak: float | None = None) -> None:
        """Add one client's answer, its arrays multiplied by ``scale``; of a failure, only the outcome.

        Args:
            peak: the largest magnitude in its arrays, if known.
        """
        if isinstance(own, ClientFailures):
            self._outcomes += own.outcomes
            return
        peak = scale * (peak_of(own.weighted_sum) if peak is None else peak)
        if peak + QUANTUM > ROOM:
            sums = {n: np.multiply(array, scale, dtype=np.float64) for n, array in own.weighted_sum.items()}
            self._closed.append(replace(own, weighted_sum=sums))
            return
        if not self._sums.has_room(peak):
            self._closed.append(self._end())
            self._begin()
        self._sums.add(own.weighted_sum, scale, peak=peak)
        self._outcomes.append(own.outcome)
        self._total_weight += own.total_weight
        self._within_clip += own.within_clip

    def message(self) -> WeightedUpdate | UpdateBundle:
        """Everything that was added, as one message."""
        parts = tuple([*self._closed, self._end()] if self._outcomes or not self._closed else self._closed)
        return parts[0] if len(parts) == 1 else UpdateBundle(self._task.round_index, parts)

    def _begin(self) -> None:
        self._sums, self._outcomes = ExactSums(self._shapes), list[ClientOutcome]()
        self._total_weight, self._within_clip = 0.0, 0

    def _end(self) -> PartialSum:
        outcomes, sums = tuple(self._outcomes), self._sums.totals()
        return PartialSum(self._task.round_index, outcomes, sums, self._total_weight, self._within_clip)


def failed(task: TrainTask, client_id: str, error: Exception) -> ClientFailures:
    """The answer of a client whose training failed; it does not affect the other clients of the call."""
    reason = str(error) if isinstance(error, FedvitError) else f"{type(error).__name__}: {error}"
    outcome = ClientOutcome(client_id, 0, reason, counted_against_client=isinstance(error, UpdateRejectedError))
    return ClientFailures(task.round_index, (outcome,))


def check_base(task: TrainTask, weights: Weights) -> None:
    """Check the weights against the task: two bases with the same noise would reveal the difference of gradients.

    Raises:
        IntegrityError: the task is for other weights.
    """
    digest = weights_digest(weights)
    if digest != task.base_digest:
        raise IntegrityError(
            f"Round {task.round_index} starts from weights {task.base_digest[:12]}, but {digest[:12]} arrived.",
            cure="Nothing was trained; the round is repeated.",
        )
