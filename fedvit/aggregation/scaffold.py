"""SCAFFOLD (Karimireddy et al. 2020, arXiv:1910.06378)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedvit.aggregation.rule import (
    BROADCAST,
    NO_FACTS,
    Array,
    ClientHalf,
    Fold,
    GradientCorrection,
    Options,
    RoundFacts,
    Rule,
    State,
    Updates,
    mean,
    moved,
)
from fedvit.aggregation.update_bounds import CorrectionEffect
from fedvit.config import TrainingConfig
from fedvit.types import FloatArray, TrainTask, Weights

_C = f"{BROADCAST}c/"


class _Controlled(ClientHalf):
    """The client state is c_k, the client's control variate."""

    keeps_state = True

    def __init__(self, way: float) -> None:
        self._way = way

    def before_training(self, base: Weights, broadcast: Weights, client_state: Weights) -> GradientCorrection | None:
        """``c - c_k`` is added to every gradient."""
        shift = {n: broadcast[_C + n] - client_state[n] if n in client_state else broadcast[_C + n] for n in base}
        return GradientCorrection(shift=shift)

    def after_training(
        self, delta: Mapping[str, FloatArray], broadcast: Weights, client_state: Weights
    ) -> Mapping[str, FloatArray]:
        """``c_k <- c_k - c - delta_k / (K lr)``."""
        return {
            n: np.asarray(client_state.get(n, np.float32(0)) - broadcast[_C + n] - d / self._way, dtype=np.float32)
            for n, d in delta.items()
        }

    def effect(self, task: TrainTask, broadcast: Weights) -> CorrectionEffect:
        """``K lr (c_k - c)`` is added; ``K lr c_k`` is an earlier update without its correction, noise included."""
        shift = {name.removeprefix(_C): -np.float32(self._way) * array for name, array in broadcast.items()}
        return CorrectionEffect(signal=2.0, noise=math.sqrt(2), shift=shift)


class Scaffold(Rule):
    """Control variates against the divergence of K local steps of rate lr (the paper's option II)::

        client:  w <- w - lr (g_k(w) - c_k + c);   c_k' = c_k - c - delta_k / (K lr)
        server:  w <- w + eta mean(delta_k);       c <- c + |S|/N mean(c_k' - c_k)

    ``c_k' - c_k = -c - delta_k / (K lr)`` follows from what the client releases anyway: nothing more is sent, and under
    record-level privacy nothing more is spent. c_k stays with the client. N is how many clients could be drawn when the
    run began; means are uniform.
    """

    name = "scaffold"
    weighting = "uniform"
    needs_one_base = True
    client_level = "its control variates follow each client's own update, not a noised sum of them"

    def __init__(self, options: Options, training: TrainingConfig) -> None:
        super().__init__(options, training)
        self._way = training.local_steps * training.learning_rate
        self.client = _Controlled(self._way)

    def broadcast(self, base: Weights, state: State) -> dict[str, FloatArray]:
        zeros = {n: np.zeros_like(array, dtype=np.float64) for n, array in base.items()}
        return {_C + n: np.asarray(state.get(f"c/{n}", zeros[n]), dtype=np.float32) for n in base}

    def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
        delta = mean(base, updates, facts.least_divisor)
        share = min(1.0, sum(update.total_weight for update in updates) / facts.population)
        sent = self.broadcast(base, state)
        control: dict[str, Array] = {}
        for name, d in delta.items():
            before = state.get(f"c/{name}", np.zeros_like(d))
            control[f"c/{name}"] = np.asarray(before - share * (sent[_C + name] + d / self._way))
        return Fold(moved(base, delta, self.server_learning_rate), control)
