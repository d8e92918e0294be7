"""The clipping norm that follows a quantile: by hand, by simulation, and by what it is charged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedvit.errors import ConfigError
from fedvit.privacy.adaptive_clip import AdaptiveClip
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Composed, Gaussian

CLIP = AdaptiveClip(target_quantile=0.5, learning_rate=0.2, count_noise_multiplier=10.0)


def test_the_share_of_unclipped_updates_by_hand() -> None:
    # 3 of 8 were within: 3 - 8/2 = -1; noise of deviation 10/2 adds 5 * 0.4 = 2; a tenth of +1 beside a half.
    assert CLIP.share(3, 8, noise=0.4, expected=10.0) == pytest.approx(0.6)
    assert CLIP.share(0, 0, noise=0.0, expected=10.0) == 0.5
    assert CLIP.share(0, 10, noise=-99.0, expected=10.0) == 0.0
    assert CLIP.share(10, 10, noise=99.0, expected=10.0) == 1.0


@pytest.mark.parametrize("within", [0, 1])
@pytest.mark.parametrize("added", [0, 1])
def test_one_client_moves_the_count_by_a_half(within: int, added: int) -> None:
    expected = 100.0
    moved = CLIP.share(40 + added, 81, 0.0, expected) - CLIP.share(40, 80, 0.0, expected)
    assert abs(moved) * expected == pytest.approx(0.5)


def test_the_norm_moves_against_the_excess() -> None:
    assert CLIP.next_norm(2.0, 0.5) == 2.0
    assert CLIP.next_norm(2.0, 1.0) == pytest.approx(2.0 * math.exp(-0.1))
    assert CLIP.next_norm(2.0, 0.0) == pytest.approx(2.0 * math.exp(0.1))


@pytest.mark.parametrize("start", [0.05, 40.0])
def test_it_finds_the_quantile_of_the_norms(start: float) -> None:
    rng = np.random.default_rng(3)
    norm = start
    for _ in range(200):
        norms = rng.lognormal(mean=1.0, sigma=0.4, size=400)
        share = CLIP.share(int((norms <= norm).sum()), len(norms), float(rng.standard_normal()), 400.0)
        norm = CLIP.next_norm(norm, share)
    assert norm == pytest.approx(math.e, rel=0.1)


def test_sum_and_count_together_cost_the_noise_multiplier_that_was_asked_for() -> None:
    asked = 1.2
    parts = Gaussian(CLIP.sum_noise_multiplier(asked)), Gaussian(CLIP.count_noise_multiplier)
    assert parts[0].noise_multiplier > asked
    assert epsilon_pld({Composed(parts): 3}, 1e-5) == pytest.approx(epsilon_pld({Gaussian(asked): 3}, 1e-5), abs=1e-6)
    # The count has a charge of its own: without it the sum would be cheaper.
    assert epsilon_pld({parts[0]: 3}, 1e-5) < epsilon_pld({Composed(parts): 3}, 1e-5)


def test_a_count_that_costs_everything_is_refused() -> None:
    with pytest.raises(ConfigError):
        CLIP.sum_noise_multiplier(10.0)
