"""What an update of the ordered DP-SGD can look like: honest ones pass, and nothing much longer or straighter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom

from fedvit.aggregation.registry import create_rule
from fedvit.aggregation.update_bounds import (
    NO_EFFECT,
    TAIL,
    CorrectionEffect,
    MechanismBounds,
    most_drawn,
    spectral_norm,
    step_deviation,
)
from fedvit.config import TrainingConfig
from fedvit.types import ClientOutcome, Encoding, TrainTask
from fedvit.updates import ClientUpdate
from fedvit.wire.encoding import decode_arrays, encode_arrays

SHAPES: dict[str, tuple[int, ...]] = {"embed": (48, 20), "scale": (48,), "head": (4, 96), "bias": (4,)}
TASK = TrainTask("run-0001", 1, "b" * 64, "d" * 64, 1.9, 0.5, 1.0, 1, 2.0)
Arrays = dict[str, npt.NDArray[np.float64]]


def gaussian(draw: np.random.Generator, deviation: float = 1.0) -> Arrays:
    return {name: deviation * draw.normal(size=shape) for name, shape in SHAPES.items()}


def norm(arrays: Arrays) -> float:
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays.values()))


def times(arrays: Arrays, factor: float) -> Arrays:
    return {name: factor * array for name, array in arrays.items()}


def update_of(arrays: Arrays, num_examples: int, weight: float = 1.0) -> ClientUpdate:
    return ClientUpdate(1, ClientOutcome("a", num_examples), times(arrays, weight), weight)


def local_steps(
    task: TrainTask, num_examples: int, draw: np.random.Generator, direction: Arrays, correction: Any = None
) -> Arrays:
    """The update of a client all of whose records have one clipped gradient, by the formula of the local steps."""
    way = times(direction, 0.0)
    for _ in range(task.local_steps):
        drawn = draw.binomial(num_examples, task.sampling_prob)
        noise = gaussian(draw, task.noise_multiplier * task.l2_clip_norm)
        batch = task.sampling_prob * num_examples
        step = {n: -(task.l2_clip_norm * drawn * a / norm(direction) + noise[n]) / batch for n, a in direction.items()}
        added = correction(way) if correction else times(way, 0.0)
        way = {n: way[n] + task.learning_rate * (step[n] - added[n]) for n in way}
    return way


@pytest.mark.parametrize(("num_examples", "prob", "steps"), [(1, 0.5, 1), (39, 0.5, 1), (500, 0.1, 4), (20, 1.0, 3)])
def test_honest_updates_pass_whatever_their_records_are(num_examples: int, prob: float, steps: int) -> None:
    task = replace(TASK, sampling_prob=prob, local_steps=steps)
    bounds, draw = MechanismBounds(task, SHAPES), np.random.default_rng(num_examples)
    bound = bounds.of(num_examples)
    everywhere, one_weight = gaussian(draw), times(gaussian(draw), 0.0)
    one_weight["head"][0, 0] = 1.0
    for direction in (everywhere, one_weight, times(everywhere, 1e-9)):
        for _ in range(100):
            update = update_of(local_steps(task, num_examples, draw, direction), num_examples, weight=3.0)
            assert bounds.relative_norm(update) <= 1
            assert bound.excess(bounds.without_shift(update)) <= bound.signal


def test_the_bounds_are_near_to_what_honest_updates_are() -> None:
    bounds, draw = MechanismBounds(TASK, {"w": (300, 200)}), np.random.default_rng(0)
    noise = {"w": step_deviation(TASK, 39) * draw.normal(size=(300, 200))}
    assert 0.95 < bounds.relative_norm(update_of(noise, 39)) < 1
    assert bounds.relative_norm(update_of(times(noise, 1.05), 39)) > 1
    # Every record drawn, with equal directions: the signal is bounded by little more.
    all_drawn = TASK.learning_rate * TASK.l2_clip_norm / TASK.sampling_prob
    assert 0.8 * all_drawn < bounds.of(39).signal <= all_drawn * 1.01


@pytest.mark.parametrize("name", ["embed", "scale", "head"])
def test_a_vector_as_long_as_noise_that_points_somewhere_is_no_noise(name: str) -> None:
    bounds, draw = MechanismBounds(TASK, {**SHAPES, "block": (192, 96)}), np.random.default_rng(0)
    bound = bounds.of(39)
    pointed = {**times(gaussian(draw), 0.0), "block": np.zeros((192, 96))}
    pointed[name] = np.outer(draw.normal(size=SHAPES[name][0]), draw.normal(size=math.prod(SHAPES[name][1:])))
    pointed[name] = pointed[name].reshape(SHAPES[name])
    pointed = times(pointed, 0.99 * bound.norm / norm(pointed))
    assert bounds.relative_norm(update_of(pointed, 39)) < 1
    assert bound.excess(pointed) > bound.signal
    # What is left to an attacker is little more than noise and the signal of its own records.
    edge = bound.deviation * (sum(math.sqrt(n) for n in SHAPES[name]) + bound.spread)
    allowed = times(pointed, (0.99 * (bound.signal + edge)) / spectral_norm(pointed[name].reshape(SHAPES[name][0], -1)))
    assert bound.excess(allowed) <= bound.signal


@pytest.mark.parametrize(("trials", "prob"), [(1, 0.5), (39, 0.5), (10_000, 0.01), (100, 0.9), (50, 1.0)])
def test_the_number_of_drawn_records_exceeds_its_bound_as_rarely_as_stated(trials: int, prob: float) -> None:
    most = most_drawn(trials, prob, math.log(1 / TAIL))
    assert binom.sf(math.floor(most), trials, prob) <= TAIL
    assert most <= 1.2 * max(binom.isf(TAIL, trials, prob), trials * prob) + 3


@pytest.mark.parametrize("mu", [0.01, 0.4, 1.5])
def test_the_proximal_pull_is_covered(mu: float) -> None:
    task = replace(TASK, local_steps=5)
    rule = create_rule(TrainingConfig(aggregation="fedprox", aggregation_options={"proximal_mu": mu}))
    effect, draw = rule.client.effect(task, {}), np.random.default_rng(0)
    # Only a pull that overshoots lengthens the way.
    assert (effect == NO_EFFECT) == (task.learning_rate * mu <= 2)
    bounds = MechanismBounds(task, SHAPES, effect)
    for _ in range(50):
        way = local_steps(task, 39, draw, gaussian(draw), correction=lambda way: times(way, mu))
        update = update_of(way, 39)
        assert bounds.relative_norm(update) <= 1
        assert bounds.of(39).excess(bounds.without_shift(update)) <= bounds.of(39).signal


def test_control_variates_are_covered() -> None:
    task, draw = replace(TASK, local_steps=4), np.random.default_rng(0)
    rule = create_rule(TrainingConfig(aggregation="scaffold", local_steps=4))
    way, direction = task.local_steps * task.learning_rate, gaussian(draw)
    shared = {f"@c/{n}": (5 * draw.normal(size=s)).astype(np.float32) for n, s in SHAPES.items()}
    bounds = MechanismBounds(task, SHAPES, rule.client.effect(task, shared))
    own = times(direction, 0.0)
    for _ in range(20):
        shift = {n: shared[f"@c/{n}"].astype(np.float64) - own[n] for n in own}
        delta = local_steps(task, 39, draw, direction, correction=lambda _, shift=shift: shift)
        update = update_of(delta, 39, weight=1.0)
        assert bounds.relative_norm(update) <= 1
        assert bounds.of(39).excess(bounds.without_shift(update)) <= bounds.of(39).signal
        own = {n: own[n] - shared[f"@c/{n}"] - delta[n] / way for n in own}
    # Without the shift, which is larger than all noise, it would not be explained.
    assert MechanismBounds(task, SHAPES, CorrectionEffect(2.0, 2.0)).relative_norm(update) > 1


@pytest.mark.parametrize("encoding", [Encoding.FLOAT32, Encoding.FLOAT16, Encoding.BFLOAT16, Encoding.INT8])
def test_random_rounding_is_covered(encoding: Encoding) -> None:
    shapes = {"a": (256, 128), "b": (128,)}
    bounds, draw = MechanismBounds(TASK, shapes), np.random.default_rng(0)
    bound = bounds.of(39)
    for _ in range(20):
        noise = {n: step_deviation(TASK, 39) * draw.normal(size=shape) for n, shape in shapes.items()}
        noise = times(noise, math.sqrt(1 + 4 / math.sqrt(2 * bound.size)))  # two standard deviations too long already
        decoded = decode_arrays(
            encode_arrays(noise, encoding, lambda size: draw.uniform(size=size), 1.0), encoding, shapes
        )
        assert bounds.relative_norm(update_of(decoded, 39)) <= 1
        assert bound.excess(decoded) <= bound.signal
