"""Federated averaging (McMahan et al. 2017, arXiv:1602.05629)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedvit.types import FloatArray, PartialUpdate, Weights


class FedAvg:
    """``w <- w + eta * sum_k n_k (w_k - w) / sum_k n_k`` over the clients k that answered.

    Needs partial sums only. Summation is in float64.

    Args:
        server_learning_rate: eta.
    """

    def __init__(self, server_learning_rate: float = 1.0) -> None:
        self._server_learning_rate = server_learning_rate

    def fold(self, base: Weights, updates: Iterable[PartialUpdate]) -> dict[str, FloatArray]:
        """The next weights, by name, float32.

        Raises:
            ValueError: no client contributed (total weight 0).
        """
        total = 0.0
        sums = {name: np.zeros(array.shape, dtype=np.float64) for name, array in base.items()}
        for update in updates:
            total += update.total_weight
            for name, array in update.weighted_sum.items():
                sums[name] += array
        if total <= 0:
            raise ValueError("no client contributed to this round")
        scale = self._server_learning_rate / total
        return {name: (base[name] + scale * sums[name]).astype(np.float32) for name in base}
