"""Distributed noise: the sampler, the rotation, the plan, and the sum of encoded contributions."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2

from fedvit.errors import ConfigError, UpdateRejectedError
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Composed, DistributedGaussian, Event, Gaussian, event_from_json, event_to_json
from fedvit.privacy.randomness import SecretStream
from fedvit.privacy.round_cost import charge_of, spend_of
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
    """Where one client in ten drops out, as many as the noise is made for; local noise has a factor of ``clients``."""
    honest, sums, length = clients * 9 // 10, 40 if FULL else 4, 5_000
    plan, rng = plan_of(clients, honest, length=length), np.random.default_rng(clients)
    assert plan.variance(honest) < 1.01 * 2.0**2
    squares = []
    for index in range(sums):
        total, plain = np.zeros(plan.padded, np.uint32), np.zeros(length)
        for client in range(honest):
            contribution = clipped(rng, length)
            plain += contribution
            total += encode(plan, contribution, stream_of((clients, index, client)))
        squares.append(np.mean((decode(plan, total & np.uint32(2**plan.bits - 1)) - plain) ** 2))
    sampling_error = math.sqrt(2 / (length * sums))
    assert abs(np.mean(squares) / 2.0**2 - 1) < 0.03 + (0 if FULL else 3 * sampling_error)
    assert np.mean(squares) == pytest.approx(plan.variance(honest), rel=4.5 * sampling_error)


def test_rounding_has_no_bias() -> None:
    """Over many encodings of one contribution, with the least noise, the mean is the contribution."""
    plan = plan_of(2, 2, length=40, z=0.0025)
    contribution, times = clipped(np.random.default_rng(3), 40), 2_000
    stream = stream_of("bias")
    errors = np.array([decode(plan, encode(plan, contribution, stream)) - contribution for _ in range(times)])
    assert plan.client_deviation < 4
    # In integer units; rounding adds at most 1/4 to the variance of the noise.
    mean = errors.mean(axis=0) * plan.scale
    assert float(mean @ mean) * times / (plan.client_deviation**2 + 0.25) < chi2.isf(1e-4, 40)


def test_equal_facts_give_the_plan_that_any_machine_computes() -> None:
    plan = plan_for(
        length=5_500_000,
        sensitivity=0.75,
        largest_norm=240.0,
        total_norm=7_500.0,
        participants=50,
        honest=35,
        noise_multiplier=1.0,
        max_bits=20,
        rotation=SEED,
    )
    assert plan == Plan(
        length=5_500_000,
        padded=5_505_024,
        scale=11423.190636002253,
        bits=20,
        client_deviation=1463.0,
        sensitivity=8653,
        honest=35,
        largest_norm=240.0,
        bounded=False,
        rotation=SEED,
    )


@pytest.mark.parametrize("length", [1, 10, 1_000])
@pytest.mark.parametrize("z", [0.01, 1.0, 30.0])
def test_the_noise_of_each_client_is_wide_enough_to_add_up(length: int, z: float) -> None:
    plan = plan_of(1_000, 900, length=length, z=z, max_bits=32)
    assert plan.client_deviation >= 3
    assert z <= event_of(plan).noise_multiplier < 1.002 * z
    assert plan.variance(900) < 1.03 * (2.0 * z) ** 2


def test_a_sum_of_bounded_contributions_that_all_point_one_way_does_not_wrap() -> None:
    plan = plan_of(60, 60, length=300)
    direction = np.zeros(300)
    direction[17] = 2.0
    total = np.zeros(plan.padded, np.uint32)
    for client in range(60):
        total += encode(plan, direction, stream_of(client))
    decoded = decode(plan, total & np.uint32(2**plan.bits - 1))
    assert np.max(np.abs(decoded - 60 * direction)) < 6 * math.sqrt(plan.variance(60))


@pytest.mark.parametrize(
    "wrong",
    [
        {"sensitivity": 0.0},
        {"largest_norm": math.inf},
        {"total_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"honest": 0},
        {"honest": 31},
        {"length": 0},
    ],
)
def test_facts_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    facts: dict[str, Any] = {
        "length": 10,
        "sensitivity": 1.0,
        "largest_norm": 1.0,
        "total_norm": 30.0,
        "participants": 30,
        "honest": 27,
        "noise_multiplier": 1.0,
        "max_bits": 32,
        "rotation": SEED,
    }
    assert plan_for(**facts)
    with pytest.raises(ConfigError):
        plan_for(**facts | wrong)


def test_the_event_is_a_gaussian_with_the_noise_multiplier_asked_for() -> None:
    event = event_of(plan_of(z=1.3))
    assert 1.3 <= event.noise_multiplier < 1.3 * 1.002
    five: dict[Event, int] = {event: 5}
    central: dict[Event, int] = {Gaussian(event.noise_multiplier): 5}
    assert epsilon_pld(five, 1e-5) == epsilon_pld(central, 1e-5)
    assert event_from_json(event_to_json(event)) == event


def test_a_charge_shows_the_noise_and_gives_the_event_back() -> None:
    event = event_of(plan_of(z=1.3), 0.2)
    for one, joint in ((event, event.noise_multiplier), (Composed((event, event)), event.noise_multiplier / 2**0.5)):
        charge = charge_of(one, run_id="r", round_index=1, unit_id="u", output_id="o", unit="record")
        assert charge.noise_multiplier == pytest.approx(joint)
        assert spend_of(charge) == (one, 1)
    charge = charge_of(event, run_id="r", round_index=1, unit_id="u", output_id="o", unit="record")
    assert charge.sampling_prob == 0.2


@pytest.mark.parametrize(
    "wrong",
    [
        {"client_deviation": 2.9},
        {"client_deviation": math.inf},
        {"client_deviation": math.nan},
        {"honest": 0},
        {"sensitivity": 0},
        {"sampling_prob": 0.0},
        {"sampling_prob": 1.1},
    ],
)
def test_an_event_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"client_deviation": 3.0, "honest": 1, "sensitivity": 1, "sampling_prob": 1.0}
    assert DistributedGaussian(**facts).noise_multiplier == pytest.approx(math.sqrt(5))
    with pytest.raises(ConfigError):
        DistributedGaussian(**facts | wrong)


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


def test_noise_that_no_table_holds_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        plan_of(1, 1, length=5_500_000, z=40.0, max_bits=32)
    assert "bits" not in refused.value.details
