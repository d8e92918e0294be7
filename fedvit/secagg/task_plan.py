"""The plan of a task's integer contributions, computed alike by the aggregator and by every client."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from fedvit.config import Settings
from fedvit.errors import SecureAggregationError
from fedvit.ports import POPULATION
from fedvit.privacy.mechanism import sensitivity, size_of
from fedvit.privacy.randomness import output_id
from fedvit.secagg.noise import Plan, plan_for
from fedvit.types import TrainTask

Arrays = Mapping[str, npt.NDArray[np.float64]]


def plan_of(task: TrainTask, settings: Settings, length: int) -> Plan:
    """The plan of a task whose noise is distributed over the clients.

    Args:
        settings: of the run.
        length: number of trained parameters.

    Raises:
        SecureAggregationError: the task has too few participants.
        ConfigError: no ring is wide enough; see :func:`fedvit.secagg.noise.plan_for`.
    """
    secure, largest = settings.secure_aggregation, sensitivity(task)
    survivors = secure.survivors(task.participants)
    honest = survivors - secure.max_colluding
    if task.participants < survivors or honest < 1:
        raise SecureAggregationError(
            f"Round {task.round_index} has {task.participants} participants; {survivors} must survive, and "
            f"{secure.max_colluding} of them may collude.",
            cure="Draw a larger cohort, or lower secure_aggregation.min_survivors or max_colluding.",
        )
    by_client = task.privacy_unit == "client"
    total_norm = largest * (task.participants if by_client else max(2.0, task.sum_weight))
    return plan_for(
        length=length,
        sensitivity=largest,
        largest_norm=largest if by_client else total_norm,
        total_norm=total_norm,
        participants=task.participants,
        honest=honest,
        noise_multiplier=task.noise_multiplier,
        max_bits=secure.bits,
        rotation=hashlib.sha256(f"rotation/{output_id(task, POPULATION, 1)}".encode()).digest(),
    )


def flat(arrays: Arrays, names: Iterable[str]) -> npt.NDArray[np.float64]:
    """The arrays as one vector, in the order of their sorted names."""
    return np.concatenate([np.asarray(arrays[name], np.float64).ravel() for name in sorted(names)])


def unflat(
    vector: npt.NDArray[np.float64], like: Mapping[str, npt.NDArray[np.floating]]
) -> dict[str, npt.NDArray[np.float64]]:
    """The inverse of :func:`flat`, for arrays of these names and shapes."""
    if vector.shape != (size_of(like),):
        raise ValueError(f"a vector of shape {vector.shape} for {size_of(like)} numbers")
    parts, start = {}, 0
    for name in sorted(like):
        parts[name] = vector[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return {name: parts[name] for name in like}
