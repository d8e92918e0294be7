"""Buffered asynchronous aggregation (FedBuff, Nguyen et al. 2022, arXiv:2106.06639)."""

from __future__ import annotations

from dataclasses import replace

from fedvit.types import PartialUpdate


def staleness_weight(staleness: int) -> float:
    """``(1 + s)^-0.5``: a fresh update, s = 0, has weight exactly 1, and none has more.

    Raises:
        ValueError: the staleness is negative.
    """
    if staleness < 0:
        raise ValueError(f"a staleness of {staleness} would weigh an update up")
    return float((1 + staleness) ** -0.5)


def discounted(update: PartialUpdate, staleness: int) -> PartialUpdate:
    """An update as it counts ``staleness`` versions after the one it started from.

    Folded by federated averaging, ``w <- w + eta * sum_k a(s_k) n_k (w_k - w_start_k) / sum_k n_k``. As in the paper
    the divisor is not discounted: a buffer of old updates takes a smaller step.
    """
    if not staleness:
        return update
    weight = staleness_weight(staleness)
    return replace(update, weighted_sum={name: weight * array for name, array in update.weighted_sum.items()})
