"""Lower bounds on epsilon: against numbers worked out by hand, and against mechanisms whose epsilon is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian
from fedvit.tools.audit.bounds import (
    Errors,
    best_threshold,
    clopper_pearson_upper,
    epsilon_of_mu,
    epsilon_without_assumptions,
    errors_at,
    mu_of,
    one_run_epsilon,
    one_run_p_value,
)
from fedvit.tools.audit.released import TIGHTNESS, draws_for


def test_no_hits_in_n_trials_leave_the_root_of_alpha() -> None:
    assert clopper_pearson_upper(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson_upper(7, 7, 0.05) == 1.0


def test_the_upper_end_is_where_so_few_hits_have_probability_alpha() -> None:
    upper = clopper_pearson_upper(30, 200, 1e-4)
    assert binom.cdf(30, 200, upper) == pytest.approx(1e-4, rel=1e-6)
    with pytest.raises(ValueError):
        clopper_pearson_upper(3, 2, 0.1)


@pytest.mark.parametrize(("sigma", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (1.0, 1e-3), (3.0, 1e-6)])
def test_gaussian_epsilon_is_what_the_accountant_says(sigma: float, delta: float) -> None:
    spent: dict[Event, int] = {Gaussian(sigma): 1}
    # The accountant rounds up, in steps of 1e-4.
    assert epsilon_of_mu(1 / sigma, delta) == pytest.approx(epsilon_pld(spent, delta), abs=2e-4)
    assert epsilon_of_mu(1 / sigma, delta) <= epsilon_pld(spent, delta)


def test_little_noise_needs_no_epsilon_where_delta_is_large() -> None:
    assert epsilon_of_mu(0.1, 0.5) == 0.0
    assert epsilon_of_mu(0.0, 1e-5) == 0.0


def test_bounds_of_a_test_that_is_right_or_wrong_half_of_the_time_are_nothing() -> None:
    chance = Errors(500, 1000, 500, 1000)
    assert mu_of(chance, 1e-4) == 0.0
    assert epsilon_without_assumptions(chance, 1e-5, 1e-4) == 0.0


def test_the_bound_without_assumptions_is_the_ratio_of_power_and_size() -> None:
    errors = Errors(10, 1000, 400, 1000)
    size, misses = clopper_pearson_upper(10, 1000, 5e-5), clopper_pearson_upper(400, 1000, 5e-5)
    assert epsilon_without_assumptions(errors, 0.01, 1e-4) == pytest.approx(math.log((1 - misses - 0.01) / size))


def test_bounds_of_a_real_gaussian_mechanism_are_below_its_epsilon_and_not_by_far() -> None:
    generator = np.random.default_rng(0)
    claimed = epsilon_of_mu(1.0, 1e-5)
    results = []
    for _ in range(100):
        pilot = generator.normal(size=2000), generator.normal(1.0, size=2000)
        scores = generator.normal(size=10_000), generator.normal(1.0, size=10_000)
        errors = errors_at(best_threshold(*pilot), *scores)
        results.append(epsilon_of_mu(mu_of(errors, 1e-4), 1e-5))
        assert epsilon_without_assumptions(errors, 1e-5, 1e-4) <= claimed
    assert max(results) <= claimed
    assert np.quantile(results, 0.02) >= TIGHTNESS * claimed


def test_more_noise_takes_more_releases() -> None:
    assert draws_for(0.5) == draws_for(1.0) == 10_000
    assert draws_for(2.0) == 40_000


def test_without_delta_the_p_value_is_that_of_randomised_response() -> None:
    # P[Binomial(4, 3/4) >= 3] = 4 * (3/4)^3 / 4 + (3/4)^4 = 189/256.
    p = one_run_p_value(canaries=9, guesses=4, correct=3, epsilon=math.log(3), delta=0.0)
    assert p == pytest.approx(189 / 256)


def test_delta_pays_for_near_misses() -> None:
    # W ~ Binomial(2, 1/2): P[W = 2] = 1/4; of 2 > W >= 2 - i: 1/2 for i = 1, (1/2 + 1/4) / 2 for i = 2.
    p = one_run_p_value(canaries=5, guesses=2, correct=2, epsilon=0.0, delta=0.01)
    assert p == pytest.approx(1 / 4 + 2 * 5 * 0.01 * 1 / 2)


def test_impossible_guesses_are_refused() -> None:
    with pytest.raises(ValueError):
        one_run_p_value(canaries=9, guesses=4, correct=5, epsilon=1.0, delta=0.0)


def test_all_guesses_right_is_worked_out_by_hand() -> None:
    # q^100 = 0.05 at the bound: epsilon = log(q / (1 - q)).
    q = 0.05 ** (1 / 100)
    result = one_run_epsilon(canaries=100, guesses=100, correct=100, delta=0.0, alpha=0.05)
    assert result == pytest.approx(math.log(q / (1 - q)), abs=1e-5)
    assert one_run_epsilon(canaries=100, guesses=100, correct=50, delta=0.0, alpha=0.05) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomised_response_is_refuted_no_more_often_than_alpha(epsilon: float) -> None:
    generator = np.random.default_rng(1)
    correct = generator.binomial(200, 1 / (1 + math.exp(-epsilon)), size=2000)
    bounds = {
        c: one_run_epsilon(canaries=200, guesses=200, correct=c, delta=1e-6, alpha=0.05) for c in map(int, set(correct))
    }
    too_high = np.mean([bounds[int(c)] > epsilon for c in correct])
    assert too_high <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert np.median([bounds[int(c)] for c in correct]) > epsilon - 0.6
