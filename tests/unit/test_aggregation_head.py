"""The head in a round: where it learns, and how far one client moves it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedvit.aggregation.head import Head, principal_directions
from fedvit.aggregation.update_bounds import CorrectionEffect, MechanismBounds, spectral_norm
from fedvit.settings import load_settings
from fedvit.types import ClientOutcome, TrainTask
from fedvit.updates import ClientUpdate

SHAPES: dict[str, tuple[int, ...]] = {"embed": (48, 20), "head.weight": (4, 96), "head.bias": (4,)}
TASK = TrainTask("run-0001", 1, "b" * 64, "d" * 64, 1.9, 0.5, 1.0, 1, 2.0)
BASIS = np.linalg.qr(np.random.default_rng(7).normal(size=(96, 8)))[0].T.astype(np.float32)
BASE = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def head(basis: Any = None, **limits: float) -> Head:
    return Head("head.weight", "head.bias", basis, **{"max_gradient": 0.25, **limits})


def gaussian(deviation: float, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {name: deviation * draw.normal(size=shape) for name, shape in SHAPES.items()}


def update_of(arrays: dict[str, Any], weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(1, ClientOutcome("a", 39), {n: weight * a for n, a in arrays.items()}, weight)


def seen(update: ClientUpdate, basis: Any) -> Any:
    """What the round takes of the head of the update itself, weight and bias side by side."""
    weight, bias = (update.weighted_sum[f"head.{part}"] / update.total_weight for part in ("weight", "bias"))
    return np.column_stack([weight if basis is None else weight @ basis.T, bias])


@pytest.mark.parametrize("basis", [None, BASIS])
@pytest.mark.parametrize("weight", [1.0, 39.0])
def test_an_update_moves_the_head_no_further_than_noise_and_a_share_of_the_gradients(weight: float, basis: Any) -> None:
    bounds, draw = MechanismBounds(TASK, SHAPES), np.random.default_rng(0)
    width, own = (96 if basis is None else 8), bounds.of(39)
    limit = own.deviation * (math.sqrt(4) + math.sqrt(width + 1))
    pointed = np.outer(draw.normal(size=4), draw.normal(size=width + 1))
    pointed *= 3 * limit / spectral_norm(pointed)
    weights = pointed[:, :-1] if basis is None else pointed[:, :-1] @ basis
    update = update_of(gaussian(0.1) | {"head.weight": weights, "head.bias": pointed[:, -1]}, weight)
    clipped = head(basis).clipped(bounds, update)
    most = head(basis).largest_number(own)
    np.testing.assert_allclose(seen(clipped, basis), np.clip(pointed / 3, -most, most), rtol=1e-5)
    assert clipped.weighted_sum["embed"] is update.weighted_sum["embed"]
    assert (clipped.total_weight, clipped.outcome) == (weight, update.outcome)


@pytest.mark.parametrize("basis", [None, BASIS])
def test_noise_is_hardly_clipped(basis: Any) -> None:
    bounds, lost = MechanismBounds(TASK, SHAPES), list[float]()
    for seed in range(50):
        update = update_of(gaussian(bounds.of(39).deviation, seed))
        before, after = (seen(each, basis) for each in (update, head(basis).clipped(bounds, update)))
        lost.append(float(np.linalg.norm(before - after) / np.linalg.norm(before)))
    assert np.mean(lost) <= 0.05
    assert max(lost) <= 0.2


@pytest.mark.parametrize("basis", [None, BASIS])
def test_no_class_is_raised_further_than_two_deviations_or_the_fastest_number_of_the_fleet(basis: Any) -> None:
    bounds = MechanismBounds(TASK, SHAPES)
    deviation = bounds.of(39).deviation
    arrays = gaussian(0.0)
    arrays["head.bias"][2], arrays["head.bias"][3] = 4 * deviation, -deviation
    arrays["head.weight"][1] = -4 * deviation * (np.eye(96) if basis is None else BASIS)[0]
    for fastest, most in ((0.0, 2 * deviation), (3 * deviation, 3 * deviation)):
        clipped = seen(head(basis, pace=0.0, fastest=fastest).clipped(bounds, update_of(arrays, 39.0)), basis)
        expected = np.zeros_like(clipped)
        expected[2, -1], expected[3, -1], expected[1, 0] = most, -deviation, -most
        np.testing.assert_allclose(clipped, expected, atol=1e-5 * deviation)


def test_most_of_a_small_signal_remains() -> None:
    bounds, kept = MechanismBounds(TASK, SHAPES), list[float]()
    deviation = bounds.of(39).deviation
    signal = 0.3 * deviation * np.random.default_rng(1).normal(size=(4, 9))
    for seed in range(200):
        update = update_of(gaussian(deviation, seed))
        for sign in (1, -1):
            arrays = dict(update.weighted_sum)
            arrays["head.weight"] = arrays["head.weight"] + sign * signal[:, :-1] @ BASIS
            arrays["head.bias"] = arrays["head.bias"] + sign * signal[:, -1]
            clipped = head(BASIS, pace=0.0, fastest=0.0).clipped(bounds, update_of(arrays))
            kept.append(sign * float(np.sum(seen(clipped, BASIS) * signal) / np.sum(signal**2)))
    assert np.mean(kept) >= 0.9


def test_what_every_client_adds_is_not_clipped() -> None:
    shift = {"head.weight": np.full((4, 96), 5.0, np.float32), "head.bias": np.full(4, 5.0, np.float32)}
    bounds = MechanismBounds(TASK, SHAPES, CorrectionEffect(shift=shift))
    update = update_of(gaussian(0.0) | shift, 2.0)
    assert head().clipped(bounds, update) is update


def test_a_step_goes_into_the_directions_of_the_basis_and_damps_the_body() -> None:
    delta = gaussian(1.0)
    weights = {name: (BASE[name] + array).astype(np.float32) for name, array in delta.items()}
    stepped = head(BASIS, body_learning_rate=0.1).step(BASE, weights)
    np.testing.assert_allclose(stepped["embed"] - 1, 0.1 * delta["embed"], atol=1e-6)
    np.testing.assert_allclose(stepped["head.bias"], weights["head.bias"])
    moved = stepped["head.weight"] - 1
    np.testing.assert_allclose(moved @ BASIS.T, delta["head.weight"] @ BASIS.T, atol=1e-5)
    np.testing.assert_allclose(moved - moved @ BASIS.T @ BASIS, 0.0, atol=1e-5)


def test_without_limits_a_step_is_the_whole_step_bit_for_bit() -> None:
    weights = {name: (BASE[name] + array).astype(np.float32) for name, array in gaussian(1e-3).items()}
    stepped = head().step(BASE, weights)
    assert {n: a.tobytes() for n, a in stepped.items()} == {n: a.tobytes() for n, a in weights.items()}


def test_the_directions_of_inputs_are_their_principal_ones() -> None:
    draw = np.random.default_rng(0)
    inputs = draw.normal(size=(200, 5)) @ np.linalg.qr(draw.normal(size=(40, 5)))[0].T
    basis = principal_directions(inputs, 5)
    assert basis is not None
    np.testing.assert_allclose(basis @ basis.T, np.eye(5), atol=1e-6)
    np.testing.assert_allclose(inputs @ basis.T @ basis, inputs, atol=1e-5)


@pytest.mark.parametrize(("inputs", "count"), [(31, 8), (200, 40), (200, 50), (0, 1)])
def test_too_few_inputs_or_all_directions_limit_nothing(inputs: int, count: int) -> None:
    assert principal_directions(np.ones((inputs, 40)), count) is None


def test_a_model_without_a_known_head_is_not_limited() -> None:
    assert Head.of(None, BASE, None, body_learning_rate=0.1, max_gradient=0.25) is None
    found = Head.of("head.weight", {"head.weight": BASE["head.weight"]}, None, body_learning_rate=1, max_gradient=1)
    assert found is not None
    assert found.bias is None


@pytest.mark.parametrize(
    ("training", "privacy", "expected"),
    [
        ({}, {}, (8, 43)),
        ({"head_directions": "all"}, {}, (None, None)),
        ({"head_directions": 5}, {}, (5, 5)),
        ({"cohort": {"selection": "poisson", "sampling_prob": 0.5}}, {"privacy_unit": "client"}, (None, None)),
    ],
)
def test_the_default_follows_the_classes_where_records_are_protected(
    training: Any, privacy: Any, expected: tuple[int | None, int | None]
) -> None:
    settings = load_settings(environ={}, overrides={"training": training, "privacy": privacy})
    assert (settings.head_directions(3), settings.head_directions(43)) == expected


def test_an_update_of_many_records_keeps_twice_the_pace_of_the_fleet() -> None:
    bounds = MechanismBounds(TASK, SHAPES)
    many, shape = bounds.of(100_000), (4, 97)
    first = Head.of("head.weight", BASE, None, max_gradient=0.25, initial=BASE["head.weight"])
    base = BASE | {"head.weight": BASE["head.weight"] + np.full((4, 96), 0.01, np.float32)}
    later = Head.of("head.weight", base, None, max_gradient=0.25, initial=BASE["head.weight"], rounds=5)
    assert first is not None
    assert later is not None
    assert first.largest(many, shape) == pytest.approx(0.25 * many.signal)
    pace = 0.01 * math.sqrt(4 * 96) / 5
    assert later.largest(many, shape) == pytest.approx(2 * pace, rel=1e-5)
    assert first.largest_number(many) == pytest.approx(0.25 * many.signal)
    assert later.largest_number(many) == pytest.approx(0.01 / 5, rel=1e-5)
    # What noise explains, an update keeps in any case.
    few = bounds.of(39)
    assert later.largest(few, shape) == pytest.approx(few.deviation * (2 + math.sqrt(97)))
    assert later.largest_number(few) == pytest.approx(2 * few.deviation)
