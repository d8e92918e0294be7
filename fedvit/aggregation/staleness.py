"""Weights of stale updates (Xie et al. 2019, arXiv:1903.03934, section 5.2)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedvit.config import StalenessConfig
from fedvit.updates import ClientUpdate, RingSum, Summand

DEFAULT = StalenessConfig()


def staleness_weight(staleness: int, config: StalenessConfig = DEFAULT) -> float:
    """The weight of an update: 1 when it is fresh, and never more. With s the staleness, a and b of the settings::

        constant    1
        polynomial  (1 + s)^-a
        hinge       1 up to s = b, then 1 / (1 + a (s - b))

    Raises:
        ValueError: the staleness is negative.
    """
    if staleness < 0:
        raise ValueError(f"a staleness of {staleness} would weigh an update up")
    if config.weight == "polynomial":
        return float((1 + staleness) ** -config.exponent)
    if config.weight == "hinge" and staleness > config.hinge_from:
        return 1 / (1 + config.hinge_slope * (staleness - config.hinge_from))
    return 1.0


def discounted(update: Summand, staleness: int, config: StalenessConfig = DEFAULT) -> Summand:
    """An update multiplied by its staleness weight; its ``total_weight`` stays.

    Raises:
        ValueError: a sum of integers is late.
    """
    weight = staleness_weight(staleness, config)
    if weight == 1:
        return update
    if isinstance(update, RingSum):
        raise ValueError("a secure sum cannot be discounted")
    sums = [{n: np.multiply(a, weight, dtype=np.float64) for n, a in addend.items()} for addend in update.addends]
    if isinstance(update, ClientUpdate):
        return replace(update, weighted_sum=sums[0])
    return replace(update, weighted_sum=sums[0], carried_sum=sums[1] if len(sums) > 1 else {})
