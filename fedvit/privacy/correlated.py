"""Correlated noise: the matrix mechanism with a banded strategy, for cohorts without amplification.

With a lower-triangular strategy C the mechanism outputs ``x + C^-1 z``, a post-processing of ``C x + z``, so the
sensitivity is that of ``C x``. A client that takes part at most once in as many rounds as there are bands affects
disjoint rows of C. Then k participations have the sensitivity ``sqrt(sum of k squared column norms)``: exactly k
Gaussian mechanisms with columns of norm 1 (Choquette-Choo et al. 2023, arXiv:2306.08153; adaptive inputs: Denisov et
al. 2022, arXiv:2202.08312). The gain: the sum over rounds of ``C^-1 z`` is far smaller than that of z.

The strategy is the square root of the prefix-sum matrix, truncated to ``bands`` bands (Kalinin and Lampert 2024,
arXiv:2405.13763), with columns of norm 1. It depends neither on the number of rounds nor on an optimiser.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Draw = Callable[[int, str], Vector]
"""``draw(round_index, key)``: the standard normals of one round, [size]."""


def band_coefficients(bands: int) -> Vector:
    """A column of the strategy from the diagonal down, [bands]: ``binomial(2k, k) / 4^k``, scaled to norm 1."""
    k = np.arange(1, bands, dtype=np.float64)
    coefficients = np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])
    return np.asarray(coefficients / np.linalg.norm(coefficients))


class BandedNoise:
    """Noise ``y`` with ``C y = z``, round by round: ``y_t = (z_t - sum_k c_k y_(t-k)) / c_0``.

    A process that starts in the middle of a run recomputes the earlier noise from its keys.

    Args:
        bands: of the strategy; with 1 the noise is z itself.
        draw: returns the same z for the same round and key, and unrelated ones for any other.
    """

    def __init__(self, bands: int, draw: Draw) -> None:
        self._coefficients = band_coefficients(bands)
        self._draw = draw
        self._keys: list[str] = []
        self._recent: deque[Vector] = deque(maxlen=bands - 1)

    def at(self, keys: Sequence[str]) -> Vector:
        """Noise of round ``len(keys)``, [size]; ``keys`` are those of all rounds so far, its own last."""
        before = list(keys[:-1])
        if self._keys != before[: len(self._keys)]:
            self._keys.clear()
            self._recent.clear()
        for position in range(len(self._keys), len(before)):
            self._recent.appendleft(self._next(position + 1, before[position]))
            self._keys.append(before[position])
        return self._next(len(keys), keys[-1])

    def _next(self, round_index: int, key: str) -> Vector:
        noise = self._draw(round_index, key).copy()
        for coefficient, earlier in zip(self._coefficients[1:], self._recent, strict=False):
            noise -= coefficient * earlier
        return np.asarray(noise / self._coefficients[0])
