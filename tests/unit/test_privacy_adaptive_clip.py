"""The clipping norm that follows a quantile: by hand, by simulation, and by what it is charged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedvit.config.privacy import AdaptiveClipConfig
from fedvit.errors import ConfigError
from fedvit.privacy.adaptive_clip import next_norm, noised_share, sum_noise_multiplier
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Composed, Gaussian

CLIP = AdaptiveClipConfig(target_quantile=0.5, learning_rate=0.2, count_noise_multiplier=10.0)


def test_the_share_of_unclipped_updates_by_hand() -> None:
    # 3 of 8 were within: 3 - 8/2 = -1; noise of deviation 10/2 adds 5 * 0.4 = 2; a tenth of +1 beside a half.
    assert noised_share(CLIP, 3, 8, noise=0.4, expected=10.0) == pytest.approx(0.6)
    assert noised_share(CLIP, 0, 0, noise=0.0, expected=10.0) == 0.5
    assert noised_share(CLIP, 0, 10, noise=-99.0, expected=10.0) == 0.0
    assert noised_share(CLIP, 10, 10, noise=99.0, expected=10.0) == 1.0


@pytest.mark.parametrize("within", [0, 1])
@pytest.mark.parametrize("added", [0, 1])
def test_one_client_moves_the_count_by_a_half(within: int, added: int) -> None:
    expected = 100.0
    moved = noised_share(CLIP, 40 + added, 81, 0.0, expected) - noised_share(CLIP, 40, 80, 0.0, expected)
    assert abs(moved) * expected == pytest.approx(0.5)


def test_the_norm_moves_against_the_excess() -> None:
    assert next_norm(CLIP, 2.0, 0.5) == 2.0
    assert next_norm(CLIP, 2.0, 1.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert next_norm(CLIP, 2.0, 0.0) == pytest.approx(2.0 * math.exp(0.1))


@pytest.mark.parametrize("start", [0.05, 40.0])
def test_it_finds_the_quantile_of_the_norms(start: float) -> None:
    rng = np.random.default_rng(3)
    norm = start
    for _ in range(200):
        norms = rng.lognormal(mean=1.0, sigma=0.4, size=400)
        share = noised_share(CLIP, int((norms <= norm).sum()), len(norms), float(rng.standard_normal()), 400.0)
        norm = next_norm(CLIP, norm, share)
    assert norm == pytest.approx(math.e, rel=0.1)


def test_sum_and_count_together_cost_the_noise_multiplier_that_was_asked_for() -> None:
    asked = 1.2
    parts = Gaussian(sum_noise_multiplier(CLIP, asked)), Gaussian(CLIP.count_noise_multiplier)
    assert parts[0].noise_multiplier > asked
    assert epsilon_pld({Composed(parts): 3}, 1e-5) == pytest.approx(epsilon_pld({Gaussian(asked): 3}, 1e-5), abs=1e-6)
    # The count has a charge of its own: without it the sum would be cheaper.
    assert epsilon_pld({parts[0]: 3}, 1e-5) < epsilon_pld({Composed(parts): 3}, 1e-5)


def test_a_count_that_costs_everything_is_refused() -> None:
    with pytest.raises(ConfigError):
        sum_noise_multiplier(CLIP, 10.0)
