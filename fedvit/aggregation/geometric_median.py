"""Geometric median by the smoothed Weiszfeld algorithm (RFA, Pillutla et al. 2022, arXiv:1912.13445)."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.robust import Matrix, MixingOptions, MixingRule, Vector


class WeiszfeldOptions(MixingOptions):
    """``smoothing`` is nu; iterations end when a step is shorter than ``tolerance`` of the way made so far.

    See :class:`MixingOptions` for ``mixing``.
    """

    smoothing: Annotated[float, Field(gt=0, le=1)] = 1e-6
    max_iterations: Annotated[int, Field(ge=1, le=10_000)] = 100
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-6


class GeometricMedian(MixingRule):
    """``w <- w + eta v``, v being where the sum of distances to all updates is least::

        v <- sum_k b_k delta_k / sum_k b_k,   b_k = 1 / max(nu, ||v - delta_k||)

    It begins at the coordinate-wise median, which no minority can move far away.
    """

    name = "geometric_median"
    options_type = WeiszfeldOptions
    options: WeiszfeldOptions

    def centre(self, deltas: Matrix) -> Vector:
        here = np.asarray(np.median(deltas, axis=0), dtype=np.float64)
        for _ in range(self.options.max_iterations):
            before = here
            away = np.array([float(np.linalg.norm(here - delta)) for delta in deltas])
            weights = 1 / np.maximum(self.options.smoothing, away)
            here = np.asarray(weights @ deltas / weights.sum(), dtype=np.float64)
            if np.linalg.norm(here - before) <= self.options.tolerance * np.linalg.norm(here):
                break
        return here
