"""Distributed noise: the sampler, the rotation, the plan, and the sum of encoded contributions."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from scipy import stats

from fedvit.errors import ConfigError, UpdateRejectedError
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian, event_from_json, event_to_json
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.discrete_gaussian import DiscreteGaussian
from fedvit.secagg.noise import Plan, decode, encode, event_of, plan_for
from fedvit.secagg.rotation import Vector, padded_length, rotate, rotate_back

FULL = os.environ.get("SECAGG") == "full"
SEED = b"r" * 32


def stream_of(name: object) -> SecretStream:
    return SecretStream(b"s" * 32, "test", {"name": str(name)})


def plan_of(clients: int = 30, honest: int = 27, *, length: int = 1_000, max_bits: int = 20, z: float = 1.0) -> Plan:
    return plan_for(
        length=length,
        sensitivity=2.0,
        largest_norm=2.0,
        total_norm=2.0 * clients,
        participants=clients,
        honest=honest,
        noise_multiplier=z,
        max_bits=max_bits,
        rotation=SEED,
    )


def clipped(rng: np.random.Generator, length: int, norm: float = 2.0) -> Vector:
    vector = rng.normal(size=length)
    return np.asarray(vector * norm / np.linalg.norm(vector) * (1 - 1e-12))


@pytest.mark.parametrize("deviation", [0.5, 3.0, 206.3])
def test_the_sampler_is_exact(deviation: float) -> None:
    """Chi-square against the definition of the discrete Gaussian."""
    drawn = DiscreteGaussian(deviation).sample(stream_of(deviation), 10**6 if FULL else 2 * 10**5)
    most = math.ceil(4 * deviation)
    values = np.arange(-most, most + 1)
    weights = np.exp(-(values.astype(float) ** 2) / (2 * deviation**2))
    inside = drawn[np.abs(drawn) <= most]
    counts = np.bincount(inside + most, minlength=len(values))
    few = weights / weights.sum() * len(inside) < 5
    counts, expected = counts[~few], (weights / weights.sum() * len(inside))[~few]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 12, 13, 1_000, 1_025, 5_000])
def test_the_rotation_is_orthonormal_and_flat_and_can_be_undone(length: int) -> None:
    rng = np.random.default_rng(length)
    one, other = rng.normal(size=(2, length))
    turned = rotate(one, SEED), rotate(other, SEED)
    assert turned[0].shape == (padded_length(length),)
    assert turned[0] @ turned[1] == pytest.approx(one @ other)
    np.testing.assert_allclose(rotate_back(turned[0], SEED, length), one, atol=1e-12)
    assert np.allclose(np.abs(rotate(np.eye(length)[length // 2], SEED)), padded_length(length) ** -0.5)


def test_padding_costs_little() -> None:
    assert padded_length(5_500_000) == 84 << 16
    assert max(padded_length(length) / length for length in range(1_000, 70_000)) < 1.12


@pytest.mark.parametrize("clients", [30, 100, 1_000] if FULL else [30, 100])
def test_the_error_of_the_sum_is_that_of_central_noise(clients: int) -> None:
    """Within 3% where as many clients answer as the noise is made for; local noise has a factor of ``clients``."""
    honest, length = clients * 9 // 10, 4_096
    plan, rng = plan_of(clients, honest, length=length), np.random.default_rng(clients)
    total, plain = np.zeros(plan.padded, np.uint32), np.zeros(length)
    for client in range(honest):
        contribution = clipped(rng, length)
        plain += contribution
        total += encode(plan, contribution, stream_of((clients, client)))
    error = float(np.mean((decode(plan, total & np.uint32(2**plan.bits - 1)) - plain) ** 2))
    analytical = (honest * plan.client_deviation**2 + honest / 4) / plan.scale**2
    central = 2.0**2
    assert analytical < 1.03 * central
    # 4,096 squares have a relative standard deviation of 2.2%.
    assert error == pytest.approx(central, rel=0.03 + 4 * math.sqrt(2 / length))


def test_the_event_is_a_gaussian_with_the_noise_multiplier_asked_for() -> None:
    event = event_of(plan_of(z=1.3))
    assert 1.3 <= event.noise_multiplier < 1.3 * 1.002
    five: dict[Event, int] = {event: 5}
    central: dict[Event, int] = {Gaussian(event.noise_multiplier): 5}
    assert epsilon_pld(five, 1e-5) == epsilon_pld(central, 1e-5)
    assert event_from_json(event_to_json(event)) == event


def test_rounding_moves_a_neighbour_no_further_than_the_sensitivity() -> None:
    """Two contributions that differ by one protected unit, rounded with the same coins."""
    plan, rng = plan_of(length=500), np.random.default_rng(5)
    for trial in range(20):
        change = clipped(rng, 500)
        other = clipped(rng, 500) * 50
        a, b = (rotate(x, SEED, plan.scale) for x in (other, other + change))
        coins = stream_of(trial).uniform(plan.padded)
        moved = np.linalg.norm(np.floor(b + coins) - np.floor(a + coins))
        assert plan.scale * 2.0 * 0.9 < moved <= plan.sensitivity


def test_what_is_larger_than_its_bound_is_not_encoded() -> None:
    plan, rng = plan_of(), np.random.default_rng(0)
    with pytest.raises(UpdateRejectedError):
        encode(plan, clipped(rng, 1_000, 2.3), stream_of("large"))
    with pytest.raises(UpdateRejectedError):
        encode(plan, np.full(1_000, np.nan), stream_of("nan"))


def test_a_ring_that_is_too_narrow_is_refused_with_the_width_needed() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(max_bits=2)
    needed = refused.value.details["bits"]
    assert plan_of(max_bits=needed).bits == needed
    with pytest.raises(ConfigError):
        plan_of(max_bits=needed - 1)
