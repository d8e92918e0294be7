"""Banded noise: its sensitivity against every participation pattern there is, and its noise against matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest

from fedvit.privacy.correlated import BandedNoise, band_coefficients
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import BandedGaussian, Gaussian

Matrix = npt.NDArray[np.float64]


def strategy_matrix(bands: int, rounds: int) -> Matrix:
    """The strategy of a run, [rounds, rounds], lower triangular; late columns are cut short."""
    coefficients = band_coefficients(bands)
    return np.asarray(sum(np.diag(np.full(rounds - k, coefficients[k]), -k) for k in range(min(bands, rounds))))


def patterns(rounds: int, min_separation: int, max_participations: int) -> list[tuple[int, ...]]:
    return [
        chosen
        for count in range(max_participations + 1)
        for chosen in itertools.combinations(range(rounds), count)
        if all(later - earlier >= min_separation for earlier, later in itertools.pairwise(chosen))
    ]


def brute_force(strategy: Matrix, min_separation: int, max_participations: int) -> float:
    """Over all patterns and all signs of a one-dimensional contribution of size 1."""
    return max(
        float(np.linalg.norm(strategy[:, list(chosen)] @ np.array(signs)))
        for chosen in patterns(len(strategy), min_separation, max_participations)
        for signs in itertools.product((1.0, -1.0), repeat=len(chosen))
    )


def sum_of_squares(strategy: Matrix, min_separation: int, max_participations: int) -> float:
    """The sensitivity where participations affect disjoint rows: that of independent Gaussian mechanisms."""
    squares = np.square(strategy).sum(axis=0)
    chosen = patterns(len(strategy), min_separation, max_participations)
    return math.sqrt(max(float(squares[list(columns)].sum()) for columns in chosen))


@pytest.mark.parametrize(("bands", "min_separation"), [(1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4)])
@pytest.mark.parametrize("max_participations", [1, 2, 3])
def test_sensitivity_is_what_the_worst_pattern_gives(bands: int, min_separation: int, max_participations: int) -> None:
    strategy = strategy_matrix(bands, 9)
    worst = brute_force(strategy, min_separation, max_participations)
    assert worst == pytest.approx(sum_of_squares(strategy, min_separation, max_participations), rel=1e-12)
    # What the ledger charges: a whole column, norm 1, for every participation.
    assert worst <= math.sqrt(max_participations) * (1 + 1e-12)


def test_sensitivity_of_a_strategy_with_columns_of_any_norm() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        full = rng.standard_normal((8, 8))
        strategy = np.tril(full) - np.tril(full, -2)
        assert sum_of_squares(strategy, 2, 3) == pytest.approx(brute_force(strategy, 2, 3), rel=1e-12)


def test_more_bands_than_rounds_of_separation_have_no_such_bound() -> None:
    """Why BandedGaussian refuses them: the worst pattern is worse than the sum of squares."""
    assert brute_force(strategy_matrix(3, 6), 2, 2) > math.sqrt(2)


@pytest.mark.parametrize("bands", [1, 2, 5, 40])
def test_a_column_has_norm_one_and_all_its_bands(bands: int) -> None:
    coefficients = band_coefficients(bands)
    assert coefficients.shape == (bands,)
    assert np.linalg.norm(coefficients) == pytest.approx(1.0, rel=1e-12)
    assert np.all(np.diff(coefficients) < 0)
    ratio = coefficients[1:] / coefficients[:-1]
    np.testing.assert_allclose(ratio, [(2 * k - 1) / (2 * k) for k in range(1, bands)], rtol=1e-12)


def draw(round_index: int, key: str) -> Matrix:
    return np.random.default_rng([round_index, len(key), *key.encode()]).standard_normal(3)


@pytest.mark.parametrize("bands", [1, 2, 4])
def test_the_noise_solves_the_strategy(bands: int) -> None:
    keys = [f"k{i}" for i in range(7)]
    noise = BandedNoise(bands, draw)
    y = np.stack([noise.at(keys[: t + 1]) for t in range(7)])
    z = np.stack([draw(t + 1, key) for t, key in enumerate(keys)])
    np.testing.assert_allclose(strategy_matrix(bands, 7) @ y, z, atol=1e-12)


def test_a_process_that_begins_in_the_middle_makes_the_same_noise() -> None:
    keys = [f"k{i}" for i in range(6)]
    whole = BandedNoise(3, draw)
    steps = [whole.at(keys[: t + 1]) for t in range(6)]
    np.testing.assert_array_equal(BandedNoise(3, draw).at(keys), steps[-1])
    np.testing.assert_array_equal(whole.at(keys), steps[-1])


def test_another_sum_draws_other_noise_and_leaves_later_rounds_right() -> None:
    noise = BandedNoise(3, draw)
    noise.at(["a", "b"])
    discarded = noise.at(["a", "b", "c"])
    result = noise.at(["a", "b", "other"])
    assert not np.allclose(discarded, result)
    np.testing.assert_array_equal(noise.at(["a", "b", "other", "d"]), BandedNoise(3, draw).at(["a", "b", "other", "d"]))
    np.testing.assert_array_equal(noise.at(["x"]), BandedNoise(3, draw).at(["x"]))


def test_at_equal_privacy_what_adds_up_is_quieter_than_independent_noise() -> None:
    rounds = 64
    prefix_sums = np.tril(np.ones((rounds, rounds)))
    errors = {
        bands: float(np.linalg.norm(prefix_sums @ np.linalg.inv(strategy_matrix(bands, rounds))) ** 2)
        for bands in (1, 4, 16)
    }
    assert errors[1] == pytest.approx(rounds * (rounds + 1) / 2)
    assert errors[16] < 0.2 * errors[1]
    assert errors[16] < errors[4] < 0.4 * errors[1]


def test_participations_compose_as_the_sensitivity_says() -> None:
    event = BandedGaussian(3.0, 4, 4)
    apart = float(np.linalg.norm(strategy_matrix(4, 40)[:, [0, 4, 8, 12, 16]].sum(axis=1)))
    assert epsilon_pld({event: 5}, 1e-5) == pytest.approx(epsilon_pld({Gaussian(3.0 / apart): 1}, 1e-5), abs=1e-9)
