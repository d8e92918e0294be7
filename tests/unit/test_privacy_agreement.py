"""Agreement with dp-accounting and with Opacus, each asked for itself: a grid, and the values that they publish.

``PRIVACY_GRID=full`` asks on a larger grid (minutes).
"""

from __future__ import annotations

import itertools
import os
import warnings

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier

from fedvit.privacy.epsilon import (
    PoissonGaussian,
    calibrate_noise_multiplier,
    epsilon_pld,
    epsilon_rdp,
    rounds_left,
)

DELTA = 1e-5
FULL = os.environ.get("PRIVACY_GRID") == "full"
NOISE = (0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0) if FULL else (2.0, 3.0, 4.0, 6.0, 10.0)
SAMPLING = (0.002, 0.01, 0.04, 0.1, 0.5, 1.0) if FULL else (0.01, 0.1, 0.3)
STEPS = (1, 10, 200, 3000) if FULL else (1, 200)
GRID = list(itertools.product(NOISE, SAMPLING, STEPS))
OPACUS_GRID = GRID if FULL else [(2.0, 0.1, 200), (4.0, 0.3, 200), (3.0, 0.01, 200)]


def dp_accounting_says(accountant: dp_accounting.PrivacyAccountant, setting: tuple[float, float, int]) -> float:
    noise_multiplier, sampling_prob, steps = setting
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    event = dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian)
    return float(accountant.compose(dp_accounting.SelfComposedDpEvent(event, steps)).get_epsilon(DELTA))


def ours(setting: tuple[float, float, int]) -> dict[PoissonGaussian, int]:
    noise_multiplier, sampling_prob, steps = setting
    return {PoissonGaussian(noise_multiplier, sampling_prob): steps}


def test_the_grid_has_at_least_thirty_settings() -> None:
    assert len(set(GRID)) >= 30


@pytest.mark.parametrize("setting", GRID)
def test_both_accountants_agree_with_dp_accounting_and_pld_is_never_above(setting: tuple[float, float, int]) -> None:
    pld, rdp = epsilon_pld(ours(setting), DELTA), epsilon_rdp(ours(setting), DELTA)
    # Asked on a coarser raster, which costs a tenth and moves the answer by less than a thousandth.
    assert pld == pytest.approx(
        dp_accounting_says(PLDAccountant(value_discretization_interval=1e-3), setting), abs=0.02
    )
    assert rdp == pytest.approx(dp_accounting_says(RdpAccountant(), setting), abs=1e-6)
    assert pld <= rdp


@pytest.mark.parametrize("setting", OPACUS_GRID)
def test_both_accountants_agree_with_those_of_opacus(setting: tuple[float, float, int]) -> None:
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [setting]
    # PRV brackets its answer to 0.01 and reports the upper end; Opacus' RDP looks at other orders than dp-accounting's.
    assert epsilon_pld(ours(setting), DELTA) == pytest.approx(prv.get_epsilon(DELTA), abs=0.02)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")
        theirs = rdp.get_epsilon(DELTA)
    assert epsilon_rdp(ours(setting), DELTA) == pytest.approx(theirs, rel=0.02)


def test_the_values_that_opacus_publishes_in_its_tests() -> None:
    # opacus/tests/accountants_test.py: 90 epochs at 0.04 with noise 1.5; and the noise that its RDP finds for 8.
    published, steps = 7.32911117143, int(90 / 0.04)
    assert epsilon_rdp(ours((1.5, 0.04, steps)), DELTA) == pytest.approx(published, abs=0.03)
    assert epsilon_pld(ours((1.5, 0.04, steps)), DELTA) < published
    assert epsilon_rdp(ours((1.3562, 0.04, 2000)), DELTA) == pytest.approx(8.0, abs=0.03)
    assert epsilon_rdp(ours((1.416, 0.04, steps)), DELTA) == pytest.approx(8.0, abs=0.03)


def test_calibration_asks_for_less_noise_than_opacus_by_rdp_and_hardly_less() -> None:
    multiplier = calibrate_noise_multiplier(target_epsilon=8.0, target_delta=DELTA, sampling_prob=0.04, steps=2000)
    theirs = get_noise_multiplier(target_epsilon=8.0, target_delta=DELTA, sample_rate=0.04, steps=2000)
    assert 0.85 * theirs < multiplier < theirs
    assert (
        epsilon_pld(ours((multiplier, 0.04, 2000)), DELTA)
        <= 8.0
        < epsilon_pld(ours((multiplier - 0.001, 0.04, 2000)), DELTA)
    )


@pytest.mark.parametrize("spent", [0, 3, 30])
def test_the_rounds_left_fit_and_not_one_more(spent: int) -> None:
    a_round, budget = PoissonGaussian(4.0, 0.3), 2.0
    left = rounds_left({a_round: spent}, a_round, target_epsilon=budget, target_delta=DELTA)
    assert epsilon_pld({a_round: spent + left}, DELTA) <= budget < epsilon_pld({a_round: spent + left + 1}, DELTA)
    assert left + spent == rounds_left({}, a_round, target_epsilon=budget, target_delta=DELTA)


def test_no_round_is_left_where_the_next_one_would_pass_the_budget() -> None:
    a_round = PoissonGaussian(4.0, 0.3)
    spent = epsilon_pld({a_round: 5}, DELTA)
    assert rounds_left({a_round: 5}, a_round, target_epsilon=spent, target_delta=DELTA) == 0
    assert rounds_left({a_round: 5}, a_round, target_epsilon=spent / 2, target_delta=DELTA) == 0
    assert rounds_left({}, PoissonGaussian(900.0, 0.01), target_epsilon=8.0, target_delta=DELTA, most=50) == 50


def test_the_rounds_left_of_a_large_budget_are_those_by_rdp_because_pld_takes_half_a_minute() -> None:
    a_round, budget = PoissonGaussian(1.0, 0.5), 10_000.0
    left = rounds_left({a_round: 7}, a_round, target_epsilon=budget, target_delta=DELTA)
    assert epsilon_rdp({a_round: 7 + left}, DELTA) <= budget < epsilon_rdp({a_round: 7 + left + 1}, DELTA)
