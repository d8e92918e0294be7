"""Partial aggregation of clients' updates: exact sums, whose bits do not depend on the assignment to proxies."""

from __future__ import annotations

from collections.abc import Mapping

from fedvit.clients.tracebacks import traceback_of
from fedvit.errors import FedvitError, IntegrityError, UpdateRejectedError
from fedvit.exact_sums import ExactSums, peak_of
from fedvit.types import ClientOutcome, TrainTask, Weights
from fedvit.updates import ClientAnswer, ClientFailures, PartialSum
from fedvit.wire.tensors import weights_digest


class PartialAggregator:
    """Sums the updates of one call; single updates are not kept.

    The sum is exact (:mod:`fedvit.exact_sums`), so the aggregator may add those of all proxies in any order. It takes
    one float64 array for each parameter, and a second one where updates are large: at most 16 bytes a parameter,
    whatever the number of clients and the magnitude of their updates.

    Args:
        shapes: of the trainable parameters, by name.
    """

    def __init__(self, task: TrainTask, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._task, self._sums, self._outcomes = task, ExactSums(shapes), list[ClientOutcome]()
        self._total_weight, self._within_clip = 0.0, 0

    def add(self, own: ClientAnswer, scale: float = 1.0, *, peak: float | None = None) -> None:
        """Add one client's answer, its arrays multiplied by ``scale``; of a failure, only the outcome.

        Args:
            peak: the largest magnitude in its arrays, if known.
        """
        if isinstance(own, ClientFailures):
            self._outcomes += own.outcomes
            return
        peak = scale * (peak_of(own.weighted_sum) if peak is None else peak)
        self._sums.add(own.weighted_sum, scale, peak=peak)
        self._outcomes.append(own.outcome)
        self._total_weight += own.total_weight
        self._within_clip += own.within_clip

    def message(self) -> PartialSum:
        """Everything that was added, as one message; nothing is added afterwards."""
        low, carried = self._sums.parts()
        outcomes = tuple(self._outcomes)
        return PartialSum(self._task.round_index, outcomes, low, self._total_weight, self._within_clip, carried)


def failed(task: TrainTask, client_id: str, error: Exception) -> ClientFailures:
    """The answer of a client whose training failed; it does not affect the other clients of the call."""
    known = isinstance(error, FedvitError)
    outcome = ClientOutcome(
        client_id,
        0,
        str(error) if known else f"{type(error).__name__}: {error}",
        counted_against_client=isinstance(error, UpdateRejectedError),
        traceback=None if known else traceback_of(error),
    )
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
