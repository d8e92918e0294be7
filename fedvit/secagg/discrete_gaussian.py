"""Exact sampling of the discrete Gaussian: integers k with probabilities proportional to ``exp(-k^2 / (2 sigma^2))``.

Canonne et al. 2020 (arXiv:2004.00010) define it. It is sampled by inversion: a random number of 128 bits is compared
with a table of the cumulative probabilities, computed in integers of 192 bits, so that each probability is exact to
2^-120. Floating-point numbers decide nothing. A value beyond 14 standard deviations (probability 2^-140) never occurs.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedvit.privacy.randomness import SecretStream

LARGEST_DEVIATION = 2.0**17
_TAIL = 14
_PRECISION, _TABLE_BITS, _GUIDE_BITS = 192, 128, 20
_AT_ONCE = 1 << 17
_UNDECIDED = np.int32(2**31 - 1)


class DiscreteGaussian:
    """The discrete Gaussian of mean 0 and parameter ``deviation``, which is its standard deviation from 3 on.

    Raises:
        ValueError: the deviation is not between 0.5 and :data:`LARGEST_DEVIATION`.
    """

    def __init__(self, deviation: float) -> None:
        if not 0.5 <= deviation <= LARGEST_DEVIATION:
            raise ValueError(f"a deviation of {deviation} is not between 0.5 and {LARGEST_DEVIATION:g}")
        self._largest = math.ceil(_TAIL * deviation)
        weights = _weights(deviation, self._largest)
        cumulative, whole, bounds = 0, weights[0] + 2 * sum(weights[1:]), []
        for weight in (*weights[:0:-1], *weights):
            cumulative += weight
            bounds.append(min((cumulative << _TABLE_BITS) // whole, 2**_TABLE_BITS - 1))
        # A number below bounds[i], and not below bounds[i - 1], gives i - largest.
        self._high = np.array([bound >> 64 for bound in bounds], np.uint64)
        self._low = np.array([bound & (2**64 - 1) for bound in bounds], np.uint64)
        # By the first bits of a number: the value, unless a bound lies among the numbers that begin with them.
        first = np.arange(2**_GUIDE_BITS + 1, dtype=np.float64) * 2.0 ** (64 - _GUIDE_BITS)
        edges = np.searchsorted(self._high, first[:-1].astype(np.uint64), side="left").astype(np.int32)
        last = np.append(edges[1:], np.int32(len(bounds)))
        self._guide = np.where(edges == last, edges, _UNDECIDED)

    def sample(self, stream: SecretStream, count: int) -> npt.NDArray[np.int32]:
        """``count`` independent values; equal streams give equal values."""
        values = np.empty(count, np.int32)
        for start in range(0, count, _AT_ONCE):
            words = stream.words(min(_AT_ONCE, count - start))
            found = self._guide[words >> np.uint64(64 - _GUIDE_BITS)]
            open_ = np.flatnonzero(found == _UNDECIDED)
            if len(open_):
                found[open_] = self._search(words[open_], stream)
            values[start : start + len(words)] = found
        values -= np.int32(self._largest)
        return values

    def _search(self, words: npt.NDArray[np.uint64], stream: SecretStream) -> npt.NDArray[np.int32]:
        index = np.searchsorted(self._high, words, side="right").astype(np.int32)
        # The first 64 bits are those of a bound: the next ones decide.
        for tie in np.flatnonzero(np.searchsorted(self._high, words, side="left") != index):
            word, low = words[tie], stream.words(1)[0]
            first = int(np.searchsorted(self._high, word, side="left"))
            tied = self._low[first : index[tie]]
            index[tie] = first + int(np.searchsorted(tied, low, side="right"))
        return np.minimum(index, len(self._high) - 1).astype(np.int32)


@lru_cache(maxsize=4)
def discrete_gaussian(deviation: float) -> DiscreteGaussian:
    """The sampler of a deviation; making one takes a second for large ones."""
    return DiscreteGaussian(deviation)


def _weights(deviation: float, largest: int) -> list[int]:
    """``exp(-k^2 / (2 deviation^2))`` for k from 0 to ``largest``, times 2^192."""
    exact, context = Decimal(deviation), Context(prec=80)
    half = context.divide(Decimal(-1), context.multiply(2 * exact, exact))
    scale = Decimal(2) ** _PRECISION

    def fixed(value: Decimal) -> int:
        return int(context.multiply(value, context.create_decimal(scale)))

    # exp(-(k + 1)^2 / 2s^2) = exp(-k^2 / 2s^2) * ratio, and the ratio shrinks by the same factor at each step.
    weight, ratio, factor = 2**_PRECISION, fixed(context.exp(half)), fixed(context.exp(2 * half))
    weights = [weight]
    for _ in range(largest):
        weight = weight * ratio >> _PRECISION
        ratio = ratio * factor >> _PRECISION
        weights.append(weight)
    return weights
