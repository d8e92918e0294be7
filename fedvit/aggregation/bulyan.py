"""Bulyan over Krum (El Mhamdi et al. 2018, arXiv:1802.07927)."""

from __future__ import annotations

import numpy as np

from fedvit.aggregation.krum import Krum, scores
from fedvit.aggregation.robust import Matrix, Vector, squared_distances


class Bulyan(Krum):
    """Krum again and again, until theta = n - 2f clients are selected; each one selected leaves the field.

    Then ``w <- w + eta * b``: every coordinate of b is the mean of the theta - 2f selected values nearest to the median
    of the selected. n >= 4f + 3.
    """

    name = "bulyan"

    @property
    def least_updates(self) -> int:
        return 4 * self.options.num_byzantine + 3

    def centre(self, deltas: Matrix) -> Vector:
        selected = deltas[self._selection(squared_distances(deltas))]
        median = np.median(selected, axis=0)
        order = np.argsort(np.abs(selected - median), axis=0, kind="stable")
        nearest = order[: len(selected) - 2 * self.options.num_byzantine]
        return np.asarray(np.take_along_axis(selected, nearest, axis=0).mean(axis=0), dtype=np.float64)

    def _selection(self, distances: Matrix) -> list[int]:
        field = list(range(len(distances)))
        for _ in range(len(distances) - 2 * self.options.num_byzantine):
            best = int(np.argmin(scores(distances[np.ix_(field, field)], self.options.num_byzantine)))
            del field[best]
        return [index for index in range(len(distances)) if index not in field]
