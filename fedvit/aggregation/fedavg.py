"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping

from fedvit.aggregation.rule import Array, Fold, MeanRule, RoundFacts, State, moved
from fedvit.types import Weights


class FedAvg(MeanRule):
    """``w <- w + eta * sum_k n_k (w_k - w) / sum_k n_k`` over the clients k that answered; eta is the server's rate."""

    name = "fedavg"

    def step(self, base: Weights, delta: Mapping[str, Array], state: State, facts: RoundFacts) -> Fold:
        return Fold(moved(base, delta, self.server_learning_rate), {})
