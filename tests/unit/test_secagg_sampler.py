"""The sampler of the discrete Gaussian is exact."""

from __future__ import annotations

import hashlib
import math
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.discrete_gaussian import LARGEST_DEVIATION, DiscreteGaussian, discrete_gaussian


def stream_of(name: object) -> SecretStream:
    return SecretStream(b"s" * 32, "test", {"name": str(name)})


class Scripted(SecretStream):
    """A stream that begins with given words, and fails where none is left."""

    def __init__(self, words: list[int]) -> None:
        super().__init__(bytes(32), "test", {})
        self.left = words

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        given, self.left = self.left[:count], self.left[count:]
        assert len(given) == count
        return np.array(given, dtype=np.uint64)


def distribution(deviation: float, largest: int) -> list[Decimal]:
    """P(|k| <= v) for v up to ``largest``, from the definition, in 60 digits."""
    with localcontext() as context:
        context.prec = 60
        sigma = Decimal(deviation)
        weights = [(-Decimal(k * k) / (2 * sigma * sigma)).exp() for k in range(math.ceil(17 * deviation) + 2)]
        whole = weights[0] + 2 * sum(weights[1:])
        return [(weights[0] + 2 * sum(weights[1 : v + 1])) / whole for v in range(largest + 1)]


@pytest.mark.parametrize("deviation", [0.5, 3.0, 27.35, 206.3, 5_120.0])
def test_chi_square_and_moments(deviation: float) -> None:
    count = 300_000
    drawn = DiscreteGaussian(deviation).sample(stream_of(deviation), count)
    assert abs(drawn.mean()) < 4.5 * deviation / math.sqrt(count)
    square = deviation**2 if deviation >= 3 else float(np.sum(np.arange(-9, 10) ** 2 * pmf(deviation, 9)))
    assert np.mean(drawn.astype(float) ** 2) == pytest.approx(square, rel=4.5 * math.sqrt(4 / count))
    # Bins of several values where the deviation is large.
    width = max(1, round(deviation / 20))
    largest = math.ceil(6 * deviation / width) * width + width // 2
    expected = pmf(deviation, largest) * count
    bins = (np.arange(-largest, largest + 1) + largest) // width
    expected = np.bincount(bins, expected)
    observed = np.bincount((drawn[np.abs(drawn) <= largest] + largest) // width, minlength=len(expected)).astype(float)
    many = expected >= 20
    # All rare ones together are one more bin.
    observed, expected = (np.append(part[many], count - part[many].sum()) for part in (observed, expected))
    assert stats.chisquare(observed, expected).pvalue > 1e-4


def pmf(deviation: float, largest: int) -> npt.NDArray[np.float64]:
    values = np.arange(-largest, largest + 1, dtype=float)
    weights = np.exp(-(values**2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("deviation", [0.5, 3.0, 40.5])
def test_159_bits_at_each_boundary_decide_as_the_definition_says(deviation: float) -> None:
    """Just below and just above each boundary, to 2^-129, the magnitudes are v and v + 1."""
    sampler = DiscreteGaussian(deviation)
    largest = math.ceil(8 * deviation)
    with localcontext() as context:
        context.prec = 60
        points = [int(part * 2**159) for part in distribution(deviation, largest)]
    for value, point in enumerate(points):
        for sign, beside, magnitude in ((0, -(1 << 30), value), (1, 1 << 30, value + 1)):
            bits, more = divmod(point + beside, 1 << 128)
            if bits >= 1 << 31:
                continue
            words = [bits << 1 | sign]
            tail = more.to_bytes(16, "big")
            words += [int.from_bytes(tail[:8], "little"), int.from_bytes(tail[8:], "little")]
            drawn = sampler.sample(Scripted(words), 1)[0]
            assert drawn == (-magnitude if sign else magnitude)


def test_31_bits_away_from_boundaries_draw_no_more() -> None:
    stream = Scripted([0, 2**30])
    assert DiscreteGaussian(3.0).sample(stream, 1)[0] == 0
    assert DiscreteGaussian(3.0).sample(stream, 1)[0] == 1
    assert not stream.left


def test_equal_streams_give_equal_samples_on_every_machine() -> None:
    drawn = discrete_gaussian(27.35).sample(stream_of("pinned"), 100_000)
    assert drawn.dtype == np.int32
    assert (
        hashlib.sha256(drawn.astype("<i4").tobytes()).hexdigest()
        == "dd3cbfb05019fac8530079f492818970a78766c2647521eb45e3bd5ca12c774e"
    )


@pytest.mark.parametrize("deviation", [0.0, 0.49, LARGEST_DEVIATION * 1.01, math.nan])
def test_a_deviation_out_of_range_is_refused(deviation: float) -> None:
    with pytest.raises(ValueError, match=r"deviation"):
        DiscreteGaussian(deviation)
