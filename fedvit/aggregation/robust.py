"""Base classes of robust rules, which read every client's update as one vector and bound how many may be malicious."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedvit.aggregation.rule import NO_FACTS, Fold, Options, RoundFacts, Rule, State, Updates, moved, singles, too_few
from fedvit.types import Weights

Vector: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = npt.NDArray[np.float64]


class ByzantineOptions(Options):
    """``num_byzantine`` is f: how many clients of a round may send arbitrary updates."""

    num_byzantine: Annotated[int, Field(ge=0)] = 1


class MixingOptions(Options):
    """``mixing`` is f: each update is replaced by the mean of the n - f updates nearest to it; unset, nothing is mixed.

    Nearest-neighbour mixing, Allouah et al. 2023, arXiv:2302.01772. It makes coordinate-wise rules robust to
    heterogeneous clients. n >= 2f + 1.
    """

    mixing: Annotated[int, Field(ge=0)] | None = None


class RobustRule(Rule):
    """``w <- w + eta * centre(delta_1 .. delta_n)``: every client has the same weight, whatever its size."""

    needs = "single_updates"
    weighting = "uniform"
    needs_one_base = True
    client_level: ClassVar[str | None] = "it looks at single updates, and each of them would need noise of its own"
    instead = "Use fedavg: with privacy_unit client every update is clipped, which bounds what one client can do."

    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        deltas = singles(updates)
        if len(deltas) < self.least_updates:
            raise too_few(self.what(), len(deltas), self.least_updates)
        centre = self.centre(self.prepared(stacked(deltas)))
        return Fold(moved(base, unstacked(centre, base), self.server_learning_rate), {})

    def prepared(self, deltas: Matrix) -> Matrix:
        """The input of :meth:`centre`: by default the updates [n, d] themselves."""
        return deltas

    @abstractmethod
    def centre(self, deltas: Matrix) -> Vector:
        """The robust centre [d] of the updates [n, d], float64, one a row."""


class MixingRule(RobustRule):
    """A robust rule that may mix updates with their neighbours first; see :class:`MixingOptions`."""

    options_type = MixingOptions
    options: MixingOptions

    @property
    def least_updates(self) -> int:
        return 1 if self.options.mixing is None else 2 * self.options.mixing + 1

    def what(self) -> str:
        return self.name if self.options.mixing is None else f"{self.name} with mixing {self.options.mixing}"

    def prepared(self, deltas: Matrix) -> Matrix:
        return deltas if self.options.mixing is None else mixed(deltas, self.options.mixing)


def squared_distances(deltas: Matrix) -> Matrix:
    """[n, n]: of each two rows; infinite on the diagonal."""
    n = len(deltas)
    distances = np.full((n, n), np.inf)
    for i in range(n):
        # Row by row: all differences at once would take n times the memory of the updates.
        for j in range(i + 1, n):
            distances[i, j] = distances[j, i] = float(np.square(deltas[i] - deltas[j]).sum())
    return distances


def mixed(deltas: Matrix, byzantine: int) -> Matrix:
    """Each update [n, d] as the mean of the n - f nearest to it, itself among them (Allouah et al. 2023).

    Equal distances go to the first in the order of the clients.
    """
    distances = squared_distances(deltas)
    np.fill_diagonal(distances, -1.0)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, : len(deltas) - byzantine]
    # In the order of the clients, so that a set of neighbours has one mean.
    return np.stack([deltas[np.sort(near)].mean(axis=0) for near in nearest])


def stacked(deltas: Sequence[Mapping[str, Vector]]) -> Matrix:
    """The updates of n clients as rows, [n, d], in the order of the names."""
    return np.stack([np.concatenate([delta[name].ravel() for name in sorted(delta)]) for delta in deltas])


def unstacked(vector: Vector, like: Weights) -> dict[str, Vector]:
    """The inverse of :func:`stacked` for one row: arrays of the names and shapes of ``like``."""
    parts, start = {}, 0
    for name in sorted(like):
        parts[name] = vector[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return parts
