"""Noise that cancels later: the matrix mechanism with a banded strategy, for cohorts that claim no amplification.

With a lower-triangular strategy C the mechanism releases ``x + C^-1 z``, a post-processing of ``C x + z``: what one
client can move is how far it moves ``C x``. A client that takes part at most once in as many rounds as there are bands
meets disjoint rows of C, so k participations move it by ``sqrt(sum of k squared column norms)``: exactly k Gaussian
mechanisms when the columns have norm 1 (Choquette-Choo et al. 2023, arXiv:2306.08153; adaptive inputs: Denisov et al.
2022, arXiv:2202.08312). The gain is in what adds up: the sum over rounds of ``C^-1 z`` is far smaller than that of z.

The strategy is the square root of the prefix-sum matrix, cut off after ``bands`` bands (Kalinin and Lampert 2024,
arXiv:2405.13763), with columns of norm 1. It needs to know neither the number of rounds nor an optimiser.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fedvit.errors import ConfigError

Vector = npt.NDArray[np.float64]
Draw = Callable[[int, str], Vector]
"""``draw(round_index, key)``: the standard normals of one round, [size]."""


def band_coefficients(bands: int) -> Vector:
    """A column of the strategy from its diagonal down, [bands], of norm 1: ``binomial(2k, k) / 4^k``, scaled."""
    k = np.arange(1, bands, dtype=np.float64)
    coefficients = np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])
    return np.asarray(coefficients / np.linalg.norm(coefficients))


def strategy_matrix(bands: int, rounds: int) -> npt.NDArray[np.float64]:
    """The strategy for a run of that many rounds, [rounds, rounds], lower triangular; late columns are cut short."""
    coefficients = band_coefficients(bands)
    matrix = np.zeros((rounds, rounds))
    for k in range(min(bands, rounds)):
        matrix += np.diag(np.full(rounds - k, coefficients[k]), -k)
    return matrix


def sensitivity(strategy: npt.NDArray[np.float64], *, min_separation: int, max_participations: int) -> float:
    """How far one client can move ``strategy @ x``, with shapes [n, n] and [n, d].

    It adds a vector of norm 1 at most to each of at most ``max_participations`` rows, ``min_separation`` apart.

    Raises:
        ConfigError: columns so far apart share a row; their common effect is no sum of squares.
    """
    if _bands(strategy) > min_separation:
        raise ConfigError(
            f"The strategy has {_bands(strategy)} bands, more than min_separation {min_separation}.",
            cure="Use no more bands than there are rounds between two participations.",
        )
    squares = np.square(strategy).sum(axis=0)
    # best[i]: the most that columns before i give with the participations counted so far.
    best = np.zeros(len(squares) + 1)
    for _ in range(max_participations):
        following = best.copy()
        for i, square in enumerate(squares):
            taken = square + best[max(0, i - min_separation + 1)]
            following[i + 1] = max(following[i], best[i + 1], taken)
        best = following
    return float(np.sqrt(best[-1]))


def _bands(strategy: npt.NDArray[np.float64]) -> int:
    rows, columns = np.nonzero(strategy)
    return int((rows - columns).max(initial=0)) + 1


class BandedNoise:
    """The noise ``y`` with ``C y = z``, round after round: ``y_t = (z_t - sum_k c_k y_(t-k)) / c_0``.

    A process that begins in the middle of a run makes the earlier noises again from their keys.

    Args:
        bands: of the strategy; with 1 the noise is z itself.
        draw: gives the same z for the same round and key, and unrelated ones for any other.
    """

    def __init__(self, bands: int, draw: Draw) -> None:
        self._coefficients = band_coefficients(bands)
        self._draw = draw
        self._keys: list[str] = []
        self._recent: deque[Vector] = deque(maxlen=bands - 1)

    def at(self, keys: Sequence[str]) -> Vector:
        """The noise of round ``len(keys)``, [size]; ``keys`` name the draws of all rounds so far, its own last."""
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
