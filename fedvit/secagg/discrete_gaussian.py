"""Exact sampler of the discrete Gaussian: P(k) proportional to ``exp(-k^2 / (2 deviation^2))`` over the integers.

The distribution function of |k| is tabulated with 159 bits in integer arithmetic. A sample compares secret random bits
with the table (inversion, with a guide table: Chen and Asau 1974): one bit is the sign, 31 bits decide nearly always,
and 128 more are drawn where these 31 equal those of a boundary. No floating point decides anything, so that equal
streams give equal samples on every machine. The distribution of a sample differs from the discrete Gaussian by less
than 2^-128 in total variation: the tail beyond 13.5 deviations is left out.
"""

from __future__ import annotations

from bisect import bisect_right
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedvit.privacy.randomness import SecretStream

LEAST_DEVIATION = 0.5
LARGEST_DEVIATION = float(1 << 17)
"""The table of this deviation has 1.8 million entries."""

_FIRST_BITS = 31
_MORE_BITS = 128
_BITS = _FIRST_BITS + _MORE_BITS
_WIDTH = -(-_BITS // 8)
_TAIL = 13.6
"""Deviations tabulated: twice the tail bound ``exp(-_TAIL^2 / 2)`` is below 2^-132."""
_WORKING_BITS = 256
_PIECE = 1 << 14


class DiscreteGaussian:
    """Sampler of one deviation.

    Args:
        deviation: standard deviation of the Gaussian, between 0.5 and 2^17; that of the samples is equal to it but for
            ``exp(-2 pi^2 deviation^2)``.

    Raises:
        ValueError: the deviation is out of range.
    """

    def __init__(self, deviation: float) -> None:
        if not LEAST_DEVIATION <= deviation <= LARGEST_DEVIATION:
            raise ValueError(f"a deviation of {deviation} is not between {LEAST_DEVIATION} and {LARGEST_DEVIATION:.0f}")
        boundaries = _distribution(deviation)
        self._table = b"".join(boundary.to_bytes(_WIDTH, "big") for boundary in boundaries)
        first = np.fromiter((b >> _MORE_BITS for b in boundaries), dtype=np.uint32, count=len(boundaries))
        # Greater than any 31 bits, so that the search ends.
        self._first = np.append(first, np.uint32(1 << _FIRST_BITS))
        # About 32 buckets a deviation, so that few contain a boundary.
        bucket_bits = min(22, int(deviation).bit_length() + 5)
        self._shift = np.uint32(_FIRST_BITS - bucket_bits)
        starts = np.arange(1 << bucket_bits, dtype=np.uint32) << self._shift
        self._guide = np.searchsorted(self._first, starts).astype(np.int32)
        self._next = self._first[self._guide]

    def sample(self, stream: SecretStream, count: int) -> npt.NDArray[np.int32]:
        """``count`` independent samples from the bits of a secret stream."""
        samples = np.empty(count, dtype=np.int32)
        for start in range(0, count, _PIECE):
            piece = samples[start : start + _PIECE]
            words = stream.words(-(-len(piece) // 2)).view("<u4")[: len(piece)]
            bits = words >> np.uint32(1)
            bucket = bits >> self._shift
            magnitude = self._guide[bucket]
            unsure = np.flatnonzero(self._next[bucket] <= bits)
            magnitude[unsure] = self._searched(bits[unsure], stream)
            np.multiply(magnitude, 1 - 2 * (words & np.uint32(1)).view(np.int32), out=piece)
        return samples

    def _searched(self, bits: npt.NDArray[np.uint32], stream: SecretStream) -> npt.NDArray[np.int64]:
        """Magnitudes by bisection; where 31 bits do not decide, 128 more are drawn."""
        magnitude = np.searchsorted(self._first, bits)
        for tied in np.flatnonzero(self._first[magnitude] == bits):
            more = int.from_bytes(stream.words(2).tobytes(), "big")
            magnitude[tied] = self._exactly((int(bits[tied]) << _MORE_BITS) | more)
        return magnitude

    def _exactly(self, point: int) -> int:
        """Number of boundaries that are at most ``point``."""

        def boundary(index: int) -> int:
            return int.from_bytes(self._table[_WIDTH * index : _WIDTH * (index + 1)], "big")

        return bisect_right(range(len(self._first) - 1), point, key=boundary)


@lru_cache(maxsize=4)
def discrete_gaussian(deviation: float) -> DiscreteGaussian:
    """The sampler of a deviation; building its table takes about a microsecond for each of its 13.6 deviations."""
    return DiscreteGaussian(deviation)


def _distribution(deviation: float) -> list[int]:
    """``P(|k| <= v)`` for v = 0, 1, ... below the largest value, as multiples of 2^-159, rounded down."""
    unit = 1 << _WORKING_BITS
    with localcontext() as context:
        context.prec = 90
        exact = Fraction(deviation)
        exponent = Decimal(exact.denominator**2) / Decimal(2 * exact.numerator**2)
        ratio = int((-exponent).exp() * unit)
    # weight(v + 1) = weight(v) * growth, and growth shrinks by the square of the first ratio.
    weight, growth, shrink = unit, ratio, ratio * ratio >> _WORKING_BITS
    sums = [weight]
    for _ in range(int(_TAIL * deviation) + 1):
        weight = weight * growth >> _WORKING_BITS
        growth = growth * shrink >> _WORKING_BITS
        sums.append(sums[-1] + 2 * weight)
    return [(part << _BITS) // sums[-1] for part in sums[:-1]]
