"""Ditto: a personal model for every client (Li et al. 2021, arXiv:2012.04221)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.rule import ClientHalf, Options
from fedvit.config import TrainingConfig


class PersonalOptions(Options):
    """``personal_lambda`` draws personal models to the global one; with 0 they are local models."""

    personal_lambda: Annotated[float, Field(ge=0, le=100)] = 0.1


class _Personal(ClientHalf):
    def __init__(self, pull: float) -> None:
        self.personal_pull = pull


class Ditto(FedAvg):
    """The global model w is FedAvg's. In each of its rounds a client takes as many steps on a model of its own as well:

    ``v_k <- v_k - lr (grad F_k(v_k) + lambda (v_k - w_t))``, from w at first and without noise: v_k stays with it.
    """

    name = "ditto"
    options_type = PersonalOptions

    def __init__(self, options: PersonalOptions, training: TrainingConfig) -> None:
        super().__init__(options, training)
        self.client = _Personal(options.personal_lambda)
