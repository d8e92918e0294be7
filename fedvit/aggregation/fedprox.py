"""FedProx (Li et al. 2020, arXiv:1812.06127)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.rule import ClientHalf, GradientCorrection, Options
from fedvit.aggregation.update_bounds import CorrectionEffect
from fedvit.config import TrainingConfig
from fedvit.types import TrainTask, Weights


class ProximalOptions(Options):
    """``proximal_mu`` is mu; with 0, or with one local step a round, the rule is FedAvg."""

    proximal_mu: Annotated[float, Field(ge=0, le=100)] = 0.01


class _Proximal(ClientHalf):
    def __init__(self, mu: float) -> None:
        self._mu = mu

    def before_training(self, base: Weights, broadcast: Weights, client_state: Weights) -> GradientCorrection | None:
        """Every step is pulled to the weights at the start of the round."""
        return GradientCorrection(pull=self._mu, anchor=base)

    def effect(self, task: TrainTask, broadcast: Weights) -> CorrectionEffect:
        """Every step multiplies the way so far by ``1 - lr mu``, which lengthens it only where ``lr mu`` is above 2."""
        factor = max(1.0, abs(1 - task.learning_rate * self._mu)) ** (task.local_steps - 1)
        return CorrectionEffect(signal=factor, noise=factor)


class FedProx(FedAvg):
    """Clients minimise ``F_k(w) + mu/2 ||w - w_t||^2``: a step is ``w <- w - lr (g_k(w) + mu (w - w_t))``.

    The server half is FedAvg's.
    """

    name = "fedprox"
    options_type = ProximalOptions

    def __init__(self, options: ProximalOptions, training: TrainingConfig) -> None:
        super().__init__(options, training)
        self.client = _Proximal(options.proximal_mu)
