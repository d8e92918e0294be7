"""What choosing the best trial costs: against the paper's own bound, and against trials that are all published."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.errors import ConfigError
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Gaussian, PoissonGaussian
from fedvit.privacy.randomness import SecretStream
from fedvit.privacy.selection import draw_number_of_trials, number_of_trials, selection_cost

DELTA = 1e-5


def test_choosing_costs_more_than_one_trial_and_less_than_all_of_them() -> None:
    cost = selection_cost({PoissonGaussian(4.0, 0.3): 30}, mean_trials=30, delta=DELTA)
    assert cost.one_trial <= cost.one_trial_rdp < cost.select_best < cost.all_trials


def test_the_price_rises_with_the_trials_but_slowly() -> None:
    costs = [selection_cost({Gaussian(4.0): 1}, mean_trials=k, delta=DELTA).select_best for k in (2, 100)]
    assert costs == sorted(costs)
    assert costs[-1] < 3 * costs[0]


def test_the_geometric_bound_is_the_paper_s() -> None:
    # Theorem 2, eta = 1, mechanism rho-zCDP: RDP of order lam is at most
    # e(lam) + 2 (1 - 1/l) e(l) + 2 log(1/gamma) / l + log E[K] / (lam - 1), whatever l; E[K] = 1 / gamma.
    sigma, mean, orders = 4.0, 10.0, np.arange(1.5, 200, 0.25)
    rho = 1 / (2 * sigma**2)
    best = min(2 * (1 - 1 / order) * rho * order + 2 * math.log(mean) / order for order in orders)
    rdp = rho * orders + best + math.log(mean) / (orders - 1)
    by_hand = min(
        r + math.log1p(-1 / a) - (math.log(DELTA) + math.log(a)) / (a - 1) for a, r in zip(orders, rdp, strict=True)
    )
    epsilon = selection_cost({Gaussian(sigma): 1}, mean_trials=mean, delta=DELTA, shape=1.0).select_best
    assert epsilon == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("mean", [1.5, 10.0, 100.0])
def test_the_number_of_trials_has_the_mean_that_was_asked_for(shape: float, mean: float) -> None:
    probabilities = number_of_trials(mean, shape)
    assert probabilities.sum() == pytest.approx(1.0)
    assert float(probabilities @ np.arange(1, len(probabilities) + 1)) == pytest.approx(mean, rel=1e-6)


def test_a_geometric_number_is_geometric() -> None:
    np.testing.assert_allclose(number_of_trials(4.0, 1.0)[:6], [0.25 * 0.75**k for k in range(6)], rtol=1e-6)


def test_numbers_are_drawn_from_it_in_secret() -> None:
    drawn = [
        draw_number_of_trials(SecretStream(bytes(32), "sweep", {"sweep": i}), mean_trials=5.0, shape=1.0)
        for i in range(600)
    ]
    assert min(drawn) == 1
    assert np.mean(drawn) == pytest.approx(5.0, rel=0.2)
    assert drawn[0] == draw_number_of_trials(SecretStream(bytes(32), "sweep", {"sweep": 0}), mean_trials=5.0)


@pytest.mark.parametrize(("mean", "shape"), [(1.0, 1.0), (0.0, 1.0), (math.nan, 1.0), (5.0, -1.0), (5.0, math.nan)])
def test_what_is_no_number_of_trials_is_refused(mean: float, shape: float) -> None:
    with pytest.raises(ConfigError):
        selection_cost({Gaussian(4.0): 1}, mean_trials=mean, delta=DELTA, shape=shape)


def test_the_command_line_says_it_for_a_sweep_of_these_settings() -> None:
    sets = ("--set", "privacy.noise_multiplier=8.0", "--set", "training.rounds=10")
    done = CliRunner().invoke(app, ["privacy", "selection-cost", "--trials", "20", "--json", *sets])
    assert done.exit_code == 0, done.output
    costs = json.loads(done.output)
    # The ten rounds, and the histogram that is asked for in the first of them.
    assert costs["one_trial"] == epsilon_pld({PoissonGaussian(8.0, 0.5): 10, Gaussian(5.25): 1}, 1e-5)
    assert costs["one_trial"] < costs["select_best"] < costs["all_trials"]
    refused = CliRunner().invoke(app, ["privacy", "selection-cost", "--trials", "1"])
    assert refused.exit_code == 2
