"""Epsilon: against published values, against an independent formula, and against its own laws."""

from __future__ import annotations

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedvit.errors import ConfigError
from fedvit.privacy.epsilon import (
    PoissonGaussian,
    calibrate_noise_multiplier,
    epsilon_pld,
    epsilon_rdp,
)

DELTA = 1e-5


def analytic_gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle & Wang 2018 (arXiv:1805.06530), exact for the Gaussian mechanism; composition is noise / sqrt(steps)."""
    sigma = noise_multiplier / math.sqrt(steps)

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (2.0, 5), (4.0, 30), (8.0, 200)])
def test_without_sampling_pld_is_the_exact_gaussian(noise_multiplier: float, steps: int) -> None:
    composition = {PoissonGaussian(noise_multiplier, 1.0): steps}
    exact = analytic_gaussian_epsilon(noise_multiplier, steps, DELTA)
    assert exact - 1e-9 <= epsilon_pld(composition, DELTA) <= exact + 1e-6
    # And privacy loss distributions, a little above it, as soon as anything beside it is sampled.
    beside = composition | {PoissonGaussian(500.0, 1e-6): 1}
    assert epsilon_pld(composition, DELTA) <= epsilon_pld(beside, DELTA) <= exact + 0.02


@pytest.mark.parametrize("noise_multiplier", [0.8, 1.56, 3.0])
@pytest.mark.parametrize("sampling_prob", [0.01, 0.5])
@pytest.mark.parametrize("steps", [1, 100])
def test_pld_never_exceeds_rdp(noise_multiplier: float, sampling_prob: float, steps: int) -> None:
    composition = {PoissonGaussian(noise_multiplier, sampling_prob): steps}
    assert 0 < epsilon_pld(composition, DELTA) <= epsilon_rdp(composition, DELTA)


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.56, 20), (1.56, 30), (1.829, 30)])
def test_pld_agrees_with_the_independent_accountant_of_opacus(noise_multiplier: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant

    reference = PRVAccountant()
    reference.history = [(noise_multiplier, 0.5, steps)]
    # PRV brackets its answer to 0.01 and reports the upper end.
    assert epsilon_pld({PoissonGaussian(noise_multiplier, 0.5): steps}, DELTA) == pytest.approx(
        reference.get_epsilon(DELTA), abs=0.02
    )


def test_composition_is_the_same_in_pieces() -> None:
    whole = epsilon_pld({PoissonGaussian(1.5, 0.3): 20}, DELTA)
    more = epsilon_pld({PoissonGaussian(1.5, 0.3): 20, PoissonGaussian(9.0, 0.3): 1}, DELTA)
    assert whole < more < whole + 0.5


def test_nothing_spent_is_zero() -> None:
    assert epsilon_pld({}, DELTA) == 0.0


@pytest.mark.parametrize(("noise_multiplier", "sampling_prob"), [(0.0, 0.5), (-1.0, 0.5), (math.nan, 0.5), (1.0, 1.5)])
def test_an_impossible_mechanism_is_refused(noise_multiplier: float, sampling_prob: float) -> None:
    with pytest.raises(ConfigError):
        PoissonGaussian(noise_multiplier, sampling_prob)


@pytest.mark.parametrize(("target", "steps"), [(8.0, 30), (1.0, 30), (3.0, 100)])
def test_calibration_meets_its_target_and_is_not_wasteful(target: float, steps: int) -> None:
    sigma = calibrate_noise_multiplier(target_epsilon=target, target_delta=DELTA, sampling_prob=0.5, steps=steps)
    assert epsilon_pld({PoissonGaussian(sigma, 0.5): steps}, DELTA) <= target
    assert epsilon_pld({PoissonGaussian(sigma - 0.003, 0.5): steps}, DELTA) > target


def test_an_unreachable_target_is_said() -> None:
    with pytest.raises(ConfigError):
        calibrate_noise_multiplier(target_epsilon=1e-6, target_delta=1e-9, sampling_prob=1.0, steps=10_000)
