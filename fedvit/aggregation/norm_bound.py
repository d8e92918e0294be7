"""Norm bounding (Sun et al. 2019, arXiv:1911.07963) with a bound that follows a quantile of the norms.

The bound moves as in Andrew et al. 2021 (arXiv:1905.03871); no noise is added, so this protects no privacy.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.rule import NO_FACTS, Fold, Options, RoundFacts, Rule, State, Updates, moved, singles, too_few
from fedvit.privacy.mechanism import l2_norm
from fedvit.types import Weights


class BoundOptions(Options):
    """``initial_bound`` left out is the median norm of the first round; ``adaptation_rate`` 0 keeps the bound."""

    initial_bound: Annotated[float, Field(gt=0)] | None = None
    target_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    adaptation_rate: Annotated[float, Field(ge=0, le=5)] = 0.2


class NormBound(Rule):
    """``w <- w + eta * mean_k(delta_k * min(1, M / ||delta_k||))``, then ``M <- M exp(-rate (b - quantile))``.

    b is the share of updates whose norm was at most M. Every client weighs the same.
    """

    name = "norm_bound"
    options_type = BoundOptions
    options: BoundOptions
    needs = "single_updates"
    weighting = "uniform"
    client_level = "it looks at single updates, and each of them would need noise of its own"
    instead = "Use fedavg with privacy.adaptive_clip, which bounds norms the same way, with noise."

    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        deltas = singles(updates)
        if not deltas:
            raise too_few("A round of norm_bound", 0, 1)
        norms = [l2_norm(delta) for delta in deltas]
        bound = self._bound(state, norms)
        sums = {name: np.zeros(array.shape, dtype=np.float64) for name, array in base.items()}
        for delta, norm in zip(deltas, norms, strict=True):
            for name, array in delta.items():
                sums[name] += array * (1.0 if norm <= bound else bound / norm)
        within = sum(norm <= bound for norm in norms) / len(norms)
        following = bound * np.exp(-self.options.adaptation_rate * (within - self.options.target_quantile))
        rate = self.server_learning_rate / len(deltas)
        return Fold(moved(base, sums, rate), {"bound": np.asarray(following, dtype=np.float64)})

    def _bound(self, state: State, norms: list[float]) -> float:
        if "bound" in state:
            return float(state["bound"])
        return float(np.median(norms)) if self.options.initial_bound is None else self.options.initial_bound
