"""Adaptive server optimisers: FedAdagrad, FedAdam, FedYogi (Reddi et al. 2021, arXiv:2003.00295).

One algorithm, three second moments. With delta the mean update of FedAvg, element by element::

    m <- beta_1 m + (1 - beta_1) delta            m = 0 at first
    v <- v + delta^2                              FedAdagrad
    v <- beta_2 v + (1 - beta_2) delta^2          FedAdam
    v <- v - (1 - beta_2) delta^2 sign(v - delta^2)   FedYogi
    w <- w + eta m / (sqrt(v) + tau)              v = tau^2 at first

As in the paper there is no bias correction for the first rounds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated

import numpy as np
from pydantic import Field

from fedvit.aggregation.rule import Array, Fold, MeanRule, Options, RoundFacts, State, moved
from fedvit.types import Weights


class AdaptiveOptions(Options):
    """``tau`` limits adaptivity: the smaller, the more adaptive. eta is ``training.server_learning_rate``."""

    beta_1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3


class DecayingOptions(AdaptiveOptions):
    """``beta_2`` is the decay of the second moment."""

    beta_2: Annotated[float, Field(ge=0, lt=1)] = 0.99


class _Adaptive(MeanRule):
    options: AdaptiveOptions

    def step(self, base: Weights, delta: Mapping[str, Array], state: State, facts: RoundFacts) -> Fold:
        beta_1, tau = self.options.beta_1, self.options.tau
        next_state: dict[str, Array] = {}
        direction: dict[str, Array] = {}
        for name, d in delta.items():
            first = beta_1 * state.get(f"m/{name}", np.zeros_like(d)) + (1 - beta_1) * d
            second = self.second_moment(state.get(f"v/{name}", np.full_like(d, tau**2)), d * d)
            next_state |= {f"m/{name}": np.asarray(first), f"v/{name}": np.asarray(second)}
            direction[name] = np.asarray(first / (np.sqrt(second) + tau))
        return Fold(moved(base, direction, self.server_learning_rate), next_state)

    @abstractmethod
    def second_moment(self, before: Array, square: Array) -> Array:
        """The next v, from the present one and the square of delta."""


class FedAdagrad(_Adaptive):
    """``v <- v + delta^2``; see the module."""

    name = "fedadagrad"
    options_type = AdaptiveOptions

    def second_moment(self, before: Array, square: Array) -> Array:
        return before + square


class FedAdam(_Adaptive):
    """``v <- beta_2 v + (1 - beta_2) delta^2``; see the module."""

    name = "fedadam"
    options_type = DecayingOptions
    options: DecayingOptions

    def second_moment(self, before: Array, square: Array) -> Array:
        return self.options.beta_2 * before + (1 - self.options.beta_2) * square


class FedYogi(_Adaptive):
    """``v <- v - (1 - beta_2) delta^2 sign(v - delta^2)``; see the module."""

    name = "fedyogi"
    options_type = DecayingOptions
    options: DecayingOptions

    def second_moment(self, before: Array, square: Array) -> Array:
        """A step towards the square that is no longer than the square."""
        moved: Array = before - (1 - self.options.beta_2) * square * np.sign(before - square)
        return moved
