"""Coordinate-wise median (Yin et al. 2018, arXiv:1803.01498)."""

from __future__ import annotations

import numpy as np

from fedvit.aggregation.robust import Matrix, MixingRule, Vector


class Median(MixingRule):
    """``w <- w + eta * median_k(delta_k)``, coordinate by coordinate; of an even number, the mean of the middle two."""

    name = "median"

    def centre(self, deltas: Matrix) -> Vector:
        return np.asarray(np.median(deltas, axis=0), dtype=np.float64)
