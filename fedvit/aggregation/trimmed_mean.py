"""Coordinate-wise trimmed mean (Yin et al. 2018, arXiv:1803.01498)."""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.robust import Matrix, MixingOptions, MixingRule, Vector


class TrimOptions(MixingOptions):
    """``trim_fraction`` of the clients is left out at either end of every coordinate; see :class:`MixingOptions`."""

    trim_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.2


class TrimmedMean(MixingRule):
    """``w <- w + eta * mean of the values between``: of n in a coordinate, floor(trim_fraction n) at either end go."""

    name = "trimmed_mean"
    options_type = TrimOptions
    options: TrimOptions

    def centre(self, deltas: Matrix) -> Vector:
        # 0.29 * 100 is a little less than 29.
        trimmed = math.floor(self.options.trim_fraction * len(deltas) + 1e-9)
        between = np.sort(deltas, axis=0)[trimmed : len(deltas) - trimmed]
        return np.asarray(between.mean(axis=0), dtype=np.float64)
