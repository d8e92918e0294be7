"""What robust rules share: they look at every client's update as one vector, and are told how many may lie."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedvit.aggregation.rule import NO_FACTS, Array, Fold, Options, RoundFacts, Rule, State, moved, singles, too_few
from fedvit.types import PartialUpdate, Weights

Vector: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = npt.NDArray[np.float64]


class ByzantineOptions(Options):
    """``num_byzantine`` is f, how many clients of a round may send anything at all."""

    num_byzantine: Annotated[int, Field(ge=0)] = 1


class RobustRule(Rule):
    """``w <- w + eta * centre(delta_1 .. delta_n)``: every client has one voice, however many examples it claims."""

    needs = "single_updates"
    weighting = "uniform"
    needs_one_base = True
    client_level: ClassVar[str | None] = "it looks at single updates, and each of them would need noise of its own"
    instead = "Use fedavg: with privacy_unit client every update is clipped, which bounds what one client can do."

    def fold(self, base: Weights, updates: Sequence[PartialUpdate], state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        """See :meth:`Rule.fold`."""
        deltas = singles(updates)
        if len(deltas) < self.least_updates:
            raise too_few(self.what(), len(deltas), self.least_updates)
        centre = self.centre(stacked(deltas))
        return Fold(moved(base, unstacked(centre, base), self.server_learning_rate), {})

    @abstractmethod
    def centre(self, deltas: Matrix) -> Vector:
        """What stands for the updates [n, d], float64, one a row: [d]."""


def stacked(deltas: Sequence[Mapping[str, Array]]) -> Matrix:
    """The updates of n clients as rows, [n, d], in the order of the names."""
    return np.stack([np.concatenate([delta[name].ravel() for name in sorted(delta)]) for delta in deltas])


def unstacked(vector: Vector, like: Weights) -> dict[str, Array]:
    """The inverse of :func:`stacked` for one row: arrays of the names and shapes of ``like``."""
    parts, start = {}, 0
    for name in sorted(like):
        parts[name] = vector[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return parts
