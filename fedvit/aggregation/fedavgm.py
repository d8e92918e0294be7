"""Federated averaging with server momentum (Hsu et al. 2019, arXiv:1909.06335)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.rule import Array, Fold, MeanRule, Options, RoundFacts, State, moved
from fedvit.types import Weights


class MomentumOptions(Options):
    """``momentum`` is beta."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9


class FedAvgM(MeanRule):
    """``v <- beta v + delta``, ``w <- w + eta v``; delta is FedAvg's mean update and v its memory, 0 at first."""

    name = "fedavgm"
    options_type = MomentumOptions
    options: MomentumOptions

    def step(self, base: Weights, delta: Mapping[str, Array], state: State, facts: RoundFacts) -> Fold:
        velocity = {n: np.asarray(self.options.momentum * state.get(f"v/{n}", 0.0) + d) for n, d in delta.items()}
        remembered = {f"v/{n}": v for n, v in velocity.items()}
        return Fold(moved(base, velocity, self.server_learning_rate), remembered)
