"""FedProx (Li et al. 2020, arXiv:1812.06127)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.rule import ClientHalf, GradientCorrection, Options
from fedvit.config import TrainingConfig
from fedvit.types import Weights


class ProximalOptions(Options):
    """``proximal_mu`` is mu; with 0, or with one local step a round, the rule is FedAvg."""

    proximal_mu: Annotated[float, Field(ge=0, le=100)] = 0.01


class _Proximal(ClientHalf):
    def __init__(self, mu: float) -> None:
        self._mu = mu

    def before_training(self, base: Weights, broadcast: Weights, client_state: Weights) -> GradientCorrection | None:
        """Every step is pulled to the weights at the start of the round."""
        return GradientCorrection(pull=self._mu, anchor=base)


class FedProx(FedAvg):
    """Clients minimise ``F_k(w) + mu/2 ||w - w_t||^2``: a step is ``w <- w - lr (g_k(w) + mu (w - w_t))``.

    The server half is FedAvg's.
    """

    name = "fedprox"
    options_type = ProximalOptions

    def __init__(self, options: ProximalOptions, training: TrainingConfig) -> None:
        super().__init__(options, training)
        self.client = _Proximal(options.proximal_mu)
