"""Krum and Multi-Krum (Blanchard et al. 2017, arXiv:1703.02757)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.robust import ByzantineOptions, Matrix, RobustRule, Vector, squared_distances
from fedvit.errors import UpdateRejectedError


class Krum(RobustRule):
    """``w <- w + eta delta_i``, i being the client with the lowest score.

    ``score(k)`` is the sum of the squared distances of delta_k to its n - f - 2 nearest neighbours. n >= 2f + 3; equal
    scores go to the first in the order of the clients.
    """

    name = "krum"
    options_type = ByzantineOptions
    options: ByzantineOptions

    @property
    def least_updates(self) -> int:
        return 2 * self.options.num_byzantine + 3

    def what(self) -> str:
        return f"{self.name} with num_byzantine {self.options.num_byzantine}"

    def centre(self, deltas: Matrix) -> Vector:
        best: Vector = deltas[int(np.argmin(scores(squared_distances(deltas), self.options.num_byzantine)))]
        return best


class MultiKrumOptions(ByzantineOptions):
    """``num_selected`` is m; left out it is n - f - 2."""

    num_selected: Annotated[int, Field(ge=1)] | None = None


class MultiKrum(Krum):
    """``w <- w + eta * mean(delta_i)`` over the m clients with the lowest scores of :class:`Krum`."""

    name = "multi_krum"
    options_type = MultiKrumOptions
    options: MultiKrumOptions

    def centre(self, deltas: Matrix) -> Vector:
        most = len(deltas) - self.options.num_byzantine - 2
        selected = most if self.options.num_selected is None else self.options.num_selected
        if selected > most:
            raise UpdateRejectedError(
                f"multi_krum can select {most} of {len(deltas)} updates, not {selected}.",
                cure="Lower training.aggregation_options.num_selected, or leave it out.",
            )
        order = np.argsort(scores(squared_distances(deltas), self.options.num_byzantine), kind="stable")
        return np.asarray(deltas[np.sort(order[:selected])].mean(axis=0), dtype=np.float64)


def scores(distances: Matrix, byzantine: int) -> Vector:
    """[n]: the sum of the squared distances to the n - f - 2 nearest, or to the nearest one where that is none."""
    nearest = max(1, len(distances) - byzantine - 2)
    return np.asarray(np.sort(distances, axis=1)[:, :nearest].sum(axis=1), dtype=np.float64)
