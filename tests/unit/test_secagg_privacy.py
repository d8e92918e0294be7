"""Privacy of distributed noise: the papers' bounds, and exact sums over all outputs against the accounted epsilon.

Kairouz et al. 2021 (arXiv:2102.06387) and Canonne et al. 2020 (arXiv:2004.00010). Exact sums are in float64 over a
range of 9 deviations of each client and more, beyond which less than 1e-18 lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedvit.privacy.epsilon import epsilon_pld, epsilon_rdp
from fedvit.privacy.events import DistributedGaussian, Event, PoissonGaussian
from fedvit.secagg.noise import event_of, plan_for

Vector = npt.NDArray[np.float64]
DELTA = 1e-6


def pmf(deviation: float, largest: int) -> Vector:
    """Probabilities of the discrete Gaussian at -largest, ..., largest."""
    values = np.arange(-largest, largest + 1, dtype=float)
    weights = np.exp(-(values**2) / (2 * deviation**2))
    return np.asarray(weights / weights.sum())


def pmf_of_sum(deviation: float, count: int) -> Vector:
    """Probabilities of a sum of discrete Gaussians, by convolution."""
    return reduce(np.convolve, [pmf(deviation, math.ceil(9 * deviation))] * count)


def tau(deviation: float, count: int) -> float:
    """Theorem 1 of Kairouz et al.: log-ratio of the sum of discrete Gaussians and one of the same variance."""
    return 10 * sum(math.exp(-2 * (math.pi * deviation) ** 2 * k / (k + 1)) for k in range(1, count))


def epsilon_of(privacy_profile: Callable[[float], float]) -> float:
    """Where a decreasing privacy profile reaches DELTA."""
    return float(brentq(lambda epsilon: privacy_profile(epsilon) - DELTA, 0.0, 20.0, xtol=1e-8))


def epsilon_exact(one: Vector, other: Vector) -> float:
    """The larger of both directions, summed over all outputs."""

    def profile(epsilon: float) -> float:
        directions = one - math.exp(epsilon) * other, other - math.exp(epsilon) * one
        return max(float(np.maximum(excess, 0).sum()) for excess in directions)

    return epsilon_of(profile)


def one_moved(probabilities: Vector, shift: tuple[int, ...]) -> tuple[Vector, Vector]:
    """Joint probabilities of independent coordinates before and after they move by ``shift``."""
    before = [np.pad(probabilities, (0, step)) for step in shift]
    after = [np.pad(probabilities, (step, 0)) for step in shift]
    outer = [reduce(np.multiply.outer, parts) for parts in (before, after)]
    return outer[0].ravel(), outer[1].ravel()


def accounted(deviation: float, honest: int, shift: tuple[int, ...], sampling_prob: float = 1.0) -> float:
    sensitivity = math.isqrt(sum(step**2 for step in shift))
    assert sensitivity**2 == sum(step**2 for step in shift)
    event: dict[Event, int] = {DistributedGaussian(deviation, honest, sensitivity, sampling_prob): 1}
    return epsilon_pld(event, DELTA)


@pytest.mark.parametrize(
    ("deviation", "honest", "shift", "above"),
    [
        (3.0, 1, (1,), 0.38),
        (3.0, 2, (4,), 0.16),
        (3.3, 5, (12,), 0.05),
        (30.0, 10, (95,), 0.0003),
        (30.0, 40, (300,), 0.0001),
        (3.0, 2, (2, 2, 1), 0.16),
        (5.0, 4, (3, 4), 0.025),
        (8.0, 6, (12, 5), 0.007),
    ],
)
def test_epsilon_is_at_least_the_exact_one_and_near_it(
    deviation: float, honest: int, shift: tuple[int, ...], above: float
) -> None:
    """All of the sensitivity in one coordinate, or spread over several; both directions.

    The distance, here in the last column, is that of a variance smaller by 4; few clients with little noise pay it.
    """
    before, after = one_moved(pmf_of_sum(deviation, honest), shift)
    exact = epsilon_exact(before, after)
    assert exact <= accounted(deviation, honest, shift) < exact * (1 + above)


@pytest.mark.parametrize(("deviation", "honest", "shift", "q"), [(3.0, 3, (6,), 0.1), (20.0, 9, (40,), 0.02)])
def test_the_same_on_poisson_samples(deviation: float, honest: int, shift: tuple[int, ...], q: float) -> None:
    without, moved = one_moved(pmf_of_sum(deviation, honest), shift)
    exact = epsilon_exact((1 - q) * without + q * moved, without)
    # The accountant's discretisation allows 1e-4.
    assert exact <= accounted(deviation, honest, shift, q) < exact * 1.18 + 1e-4


@pytest.mark.parametrize("deviation", [0.5, 0.8, 1.0, 1.3])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_sum_is_as_near_to_one_discrete_gaussian_as_the_paper_says(deviation: float, count: int) -> None:
    whole = pmf_of_sum(deviation, count)
    middle, reach = len(whole) // 2, math.ceil(4 * deviation * math.sqrt(count))
    one = pmf(deviation * math.sqrt(count), middle)
    ratio = np.log(whole / one)[middle - reach : middle + reach + 1]
    assert np.max(np.abs(ratio)) <= tau(deviation, count)
    # The errors of more summands partly cancel; that of two is a fifth of the bound.
    assert count > 2 or np.max(np.abs(ratio)) > 0.19 * tau(deviation, count)


def test_at_three_deviations_this_distance_is_nothing() -> None:
    assert tau(3.0, 100_000) < 3e-38
    # In 10 million coordinates, beside the accountant's tolerance.
    assert 10_000_000 * tau(3.0, 100_000) < 1e-12 * 1e-17


@pytest.mark.parametrize("deviation", [3.0, 10.0])
def test_a_discrete_gaussian_is_a_rounded_gaussian_of_four_less_variance(deviation: float) -> None:
    """The integral over the Gaussian's value, by the trapezoidal rule, is exact for such functions."""
    step, reach = 0.05, 14 * deviation
    values = np.arange(-reach, reach + step, step)
    density = norm.pdf(values, scale=math.sqrt(deviation**2 - 4)) * step
    integers = np.arange(-math.ceil(reach), math.ceil(reach) + 1)
    kernel = np.exp(-((integers[:, None] - values) ** 2) / 8)
    rounded = (kernel / kernel.sum(axis=0)) @ density
    assert np.max(np.abs(rounded - pmf(deviation, len(integers) // 2))) < 1e-13
    # What makes it hold: the normalisation of the rounding hardly depends on the value.
    inside = np.abs(values) < reach / 2
    assert np.ptp(kernel.sum(axis=0)[inside]) < 1e-13


@pytest.mark.parametrize(("deviation", "shift"), [(1.0, 1), (3.0, 5), (20.0, 7)])
def test_concentrated_privacy_of_canonne_kamath_and_steinke(deviation: float, shift: int) -> None:
    """Their Theorem 4: the divergence of order a is at most ``a shift^2 / (2 deviation^2)``, here with equality."""
    largest = math.ceil(12 * deviation) + 20 * shift
    values = np.arange(-largest, largest + 1, dtype=float)
    exponent, moved = -(values**2) / (2 * deviation**2), -((values - shift) ** 2) / (2 * deviation**2)
    normaliser = math.log(np.exp(exponent).sum())
    for order in (1.5, 2, 8):
        terms = order * exponent + (1 - order) * moved - normaliser
        divergence = float(np.log(np.exp(terms - terms.max()).sum()) + terms.max()) / (order - 1)
        bound = order * shift**2 / (2 * deviation**2)
        assert divergence <= bound * (1 + 1e-9)
        if (order * shift) % 1 == 0:
            assert divergence == pytest.approx(bound)


@pytest.mark.parametrize(("deviation", "shift"), [(3.0, 3), (10.0, 10), (40.0, 30)])
def test_exact_delta_of_canonne_kamath_and_steinke(deviation: float, shift: int) -> None:
    """Their Theorem 7 gives delta as a difference of two tails; the accounted epsilon is at least the one it gives."""
    largest = math.ceil(14 * deviation)
    values, probabilities = np.arange(-largest, largest + 1), pmf(deviation, largest)

    def privacy_profile(epsilon: float) -> float:
        centre, half = epsilon * deviation**2 / shift, shift / 2
        tails = [float(probabilities[values > centre + side].sum()) for side in (-half, half)]
        return tails[0] - math.exp(epsilon) * tails[1]

    assert accounted(deviation, 1, (shift,)) >= epsilon_of(privacy_profile)


@pytest.mark.parametrize("length", [10, 10_000, 1_048_576])
@pytest.mark.parametrize(("clients", "honest"), [(30, 27), (1_000, 900)])
def test_sensitivity_and_renyi_divergence_are_those_of_kairouz_liu_and_steinke(
    length: int, clients: int, honest: int
) -> None:
    """Theorem 1: norm after rounding with beta = 2^-64, and Proposition 14: ``a norm^2 / (2 variance) + tau d``."""
    plan = plan_for(
        length=length,
        sensitivity=2.0,
        largest_norm=2.0,
        total_norm=2.0 * clients,
        participants=clients,
        honest=honest,
        noise_multiplier=1.0,
        max_bits=32,
        rotation=b"r",
    )
    distance, log_beta = 2.0 * plan.scale, 64 * math.log(2)
    squared = distance**2 + plan.padded / 4 + math.sqrt(2 * log_beta) * (distance + math.sqrt(plan.padded) / 2)
    assert math.sqrt(squared) <= plan.sensitivity <= math.sqrt(squared) + 2
    assert plan.sensitivity**2 <= 1.007 * distance**2
    theirs = plan.sensitivity**2 / (2 * honest * plan.client_deviation**2)
    assert plan.padded * tau(plan.client_deviation, honest) < 1e-12
    ours = 1 / (2 * event_of(plan).noise_multiplier ** 2)
    assert theirs <= ours < theirs * (1 + 1e-5)
    event, central = event_of(plan, 0.1), PoissonGaussian(event_of(plan).noise_multiplier, 0.1)
    ten: dict[Event, int] = {event: 10}
    assert epsilon_rdp(ten, 1e-5) == epsilon_rdp({central: 10}, 1e-5)
