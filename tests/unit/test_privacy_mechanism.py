"""Clip, add up, noise once, divide by a constant: against sums worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedvit.aggregation.staleness import discounted, staleness_weight
from fedvit.errors import UpdateRejectedError
from fedvit.privacy import mechanism
from fedvit.types import ClientOutcome
from fedvit.updates import PartialSum

BASE = {"b": np.array([[1.0, 2.0]], dtype=np.float32), "a": np.array(3.0, dtype=np.float32)}


def partial(point: float, clients: int, *, within: int = 0, weight: float | None = None) -> PartialSum:
    outcomes = tuple(ClientOutcome(f"c{i}", 1) for i in range(clients))
    sums = {"b": np.array([[point, 0.0]]), "a": np.array(0.0)}
    return PartialSum(1, outcomes, sums, clients if weight is None else weight, within)


def test_the_norm_is_over_all_arrays_and_those_without_dimensions_count() -> None:
    assert mechanism.l2_norm({"a": np.array(3.0), "b": np.array([[0.0, 4.0]], dtype=np.float32)}) == 5.0
    clipped, within = mechanism.clip_update({"a": np.array(3.0), "b": np.array([[0.0, 4.0]])}, 1.0)
    assert not within
    assert clipped["a"].shape == ()
    assert float(clipped["a"]) == pytest.approx(0.6)
    np.testing.assert_allclose(clipped["b"], [[0.0, 0.8]])


def test_what_is_within_the_bound_stays_bit_for_bit() -> None:
    update = {"a": np.array(0.3, dtype=np.float32), "b": np.array([[0.1, 0.2]], dtype=np.float32)}
    clipped, within = mechanism.clip_update(update, 1.0)
    assert within
    for name, array in update.items():
        np.testing.assert_array_equal(clipped[name], array.astype(np.float64))


def test_a_zero_update_survives() -> None:
    clipped, within = mechanism.clip_update({"a": np.array(0.0), "b": np.zeros((1, 2))}, 0.5)
    assert within
    assert mechanism.l2_norm(clipped) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e3, 1e30])
@pytest.mark.parametrize("l2_clip_norm", [1e-4, 1.0, 7.5])
def test_no_update_is_longer_than_the_bound(scale: float, l2_clip_norm: float) -> None:
    rng = np.random.default_rng(0)
    update = {"w": (scale * rng.standard_normal((40, 7))).astype(np.float32), "s": np.float32(scale) * np.ones(())}
    clipped, _ = mechanism.clip_update(update, l2_clip_norm)
    assert mechanism.l2_norm(clipped) <= l2_clip_norm * (1 + 1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_without_a_norm_is_no_update(bad: float) -> None:
    with pytest.raises(UpdateRejectedError):
        mechanism.clip_update({"a": np.array([1.0, bad])}, 1.0)


@pytest.mark.parametrize(
    ("update", "fault"),
    [
        (partial(2.0, 2), None),
        (partial(0.0, 0), None),
        (partial(2.001, 2), "2 clipped updates allow 2"),
        (partial(0.1, 0), "0 clipped updates allow 0"),
        (partial(math.nan, 2), "norm nan"),
        (partial(1.0, 2, weight=20.0), "weight is 20"),
        (partial(1.0, 2, within=3), "3 of its 2 clients"),
    ],
)
def test_a_partial_sum_is_believed_as_far_as_its_clients_allow(update: PartialSum, fault: str | None) -> None:
    reason = mechanism.fault_of(update, 1.0)
    assert (reason is None) if fault is None else (reason is not None and fault in reason)


def test_a_client_that_failed_allows_nothing() -> None:
    update = partial(1.5, 2)
    failed = PartialSum(1, (update.outcomes[0], ClientOutcome("c1", 0, "it failed")), update.weighted_sum, 1.0)
    assert mechanism.fault_of(update, 1.0) is None
    assert "1 clipped updates allow 1" in str(mechanism.fault_of(failed, 1.0))


def test_the_mean_is_the_noised_sum_over_a_constant() -> None:
    sums = mechanism.total(BASE, [(partial(2.0, 2), 1.0), (partial(-0.5, 1), 1.0)], 1.0)
    # The order of names: a, then b.
    mean = mechanism.noised_mean(sums, np.array([10.0, 20.0, 30.0]), divisor=4.0)
    assert list(mean) == ["b", "a"]
    assert mean["a"].shape == ()
    assert float(mean["a"]) == 10.0 / 4
    np.testing.assert_array_equal(mean["b"], [[(1.5 + 20.0) / 4, 30.0 / 4]])


def test_the_divisor_is_what_it_was_said_to_be_however_many_came() -> None:
    noise = np.zeros(3)
    moved = [
        mechanism.noised_mean(mechanism.total(BASE, updates, 1.0), noise, divisor=10.0)["b"][0, 0]
        for updates in ([], [(partial(1.0, 1), 1.0)], [(partial(1.0, 1), 1.0)] * 2)
    ]
    assert moved == pytest.approx([0.0, 0.1, 0.2])


def test_noise_that_does_not_fit_is_refused() -> None:
    sums = mechanism.total(BASE, [], 1.0)
    with pytest.raises(ValueError, match="noise of shape"):
        mechanism.noised_mean(sums, np.zeros(2), divisor=1.0)
    with pytest.raises(ValueError, match="divisor 0"):
        mechanism.noised_mean(sums, np.zeros(3), divisor=0.0)


def test_one_clipped_to_a_larger_norm_is_scaled_down_and_one_to_a_smaller_is_left() -> None:

    large, small = (partial(2.0, 1), 2.0), (partial(0.5, 1), 0.5)
    assert mechanism.total(BASE, [large, small], 1.0)["b"][0, 0] == 1.0 + 0.5


@pytest.mark.parametrize("staleness", range(12))
def test_staleness_never_weighs_an_update_up(staleness: int) -> None:
    assert 0 < staleness_weight(staleness) <= 1
    assert abs(discounted(partial(1.0, 1), staleness).weighted_sum["b"][0, 0]) <= 1.0


def test_there_is_no_negative_staleness() -> None:
    with pytest.raises(ValueError):
        discounted(partial(1.0, 1), -1)


def test_the_digest_tells_bits_names_and_shapes_apart() -> None:
    sums = {"a": np.array([1.0, 2.0]), "b": np.array(3.0)}
    others = [
        {"a": np.array([1.0, np.nextafter(2.0, 3.0)]), "b": np.array(3.0)},
        {"a": np.array([[1.0, 2.0]]), "b": np.array(3.0)},
        {"a": np.array([1.0]), "b": np.array([2.0, 3.0])},
        {"a": np.array([1.0, 2.0]), "c": np.array(3.0)},
    ]
    assert mechanism.digest(sums) == mechanism.digest(dict(reversed(sums.items())))
    assert len({mechanism.digest(reason) for reason in [sums, *others]}) == 5
