"""Sums that do not depend on the order or the grouping of their addends, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvit.aggregation.rule import mean
from fedvit.aggregation.staleness import discounted
from fedvit.aggregation.validation import UpdateValidator
from fedvit.clients.partial_aggregator import PartialAggregator
from fedvit.config import StalenessConfig
from fedvit.exact_sums import QUANTUM, ROOM, ExactSums, peak_of, squared_norm, subtract, zeros
from fedvit.privacy import mechanism
from fedvit.types import ClientOutcome, TrainTask
from fedvit.updates import ClientFailures, ClientUpdate, WeightedUpdate

SHAPES: dict[str, tuple[int, ...]] = {"a": (3,), "b": ()}
TASK = TrainTask("run-0001", 1, "base", "data", 1.0, 0.5, 1.0, 1, 1.0)
# From far below the quantum to far above the room, as a hostile or a diverging client might send them.
NUMBERS = (
    st.floats(-(2.0**40), 2.0**40, width=32)
    | st.floats(-1.0, 1.0, width=32)
    | st.sampled_from([2.0**-100, 2.0**-41, 2048.0])
)
CLIENTS = st.lists(st.tuples(st.lists(NUMBERS, min_size=4, max_size=4), st.integers(1, 500)), min_size=1, max_size=12)


def own(index: int, numbers: list[float], weight: int) -> ClientUpdate:
    delta = {"a": np.array(numbers[:3], np.float32), "b": np.array(numbers[3], np.float32)}
    return ClientUpdate(1, ClientOutcome(f"c{index:02d}", weight), delta, float(weight))


def through(groups: list[list[ClientUpdate]]) -> dict[str, npt.NDArray[np.float64]]:
    """What a round makes of clients that were summed in these groups."""
    updates: list[WeightedUpdate] = []
    for group in groups:
        summing = PartialAggregator(TASK, SHAPES)
        for update in group:
            summing.add(update, scale=update.total_weight)
        updates.append(summing.message())
    return mean({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}, updates)


@settings(max_examples=150, deadline=None)
@given(clients=CLIENTS, data=st.data())
def test_a_round_comes_to_the_same_bits_however_its_clients_were_grouped(
    clients: list[tuple[list[float], int]], data: st.DataObject
) -> None:
    updates = [own(index, numbers, weight) for index, (numbers, weight) in enumerate(clients)]
    alone = through([updates])
    proxies = data.draw(st.integers(1, 5))
    homes = data.draw(st.lists(st.integers(0, proxies - 1), min_size=len(updates), max_size=len(updates)))
    shuffled = data.draw(st.permutations(list(zip(updates, homes, strict=True))))
    grouped = through([[u for u, home in shuffled if home == index] for index in range(proxies)])
    for name in SHAPES:
        assert alone[name].tobytes() == grouped[name].tobytes()


@settings(max_examples=150, deadline=None)
@given(clients=CLIENTS)
def test_a_sum_is_off_by_half_a_quantum_a_client_at_most(clients: list[tuple[list[float], int]]) -> None:
    sums = ExactSums(SHAPES)
    for index, (numbers, weight) in enumerate(clients):
        sums.add(own(index, numbers, weight).weighted_sum, weight)
    for position in range(3):
        exact = sum(Fraction(float(np.float32(numbers[position]))) * weight for numbers, weight in clients)
        result = Fraction(float(sums.totals()["a"][position]))
        rounding = abs(exact) * Fraction(2) ** -52
        assert abs(result - exact) <= len(clients) * Fraction(QUANTUM) / 2 + rounding


def test_ordinary_addition_would_depend_on_the_grouping() -> None:
    # Or the tests above could not fail.
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 100))
    assert not np.array_equal((a + b) + c, a + (b + c))


def test_a_message_is_one_sum_of_two_arrays_whatever_the_number_and_size_of_updates() -> None:
    for size in (1e-3, ROOM / 3, 4 * ROOM, 2.0**40):
        summing = PartialAggregator(TASK, SHAPES)
        for index in range(400):
            summing.add(own(index, [size] * 4, 1))
        message = summing.message()
        assert len(message.outcomes) == message.total_weight == 400
        assert [addend.keys() for addend in message.addends] in ([SHAPES.keys()], [SHAPES.keys()] * 2)
        exact = 400 * Fraction(float(np.float32(size)))
        parts = sum((Fraction(float(addend["a"][0])) for addend in message.addends), Fraction(0))
        assert abs(parts - exact) <= 400 * Fraction(QUANTUM) / 2


def test_the_parts_of_a_large_sum_are_validated_discounted_and_bounded_alike() -> None:
    summing = PartialAggregator(TASK, SHAPES)
    for index in range(8):
        summing.add(own(index, [ROOM] * 4, 1))
    message = summing.message()
    assert len(message.addends) == 2
    validator = UpdateValidator(SHAPES, by_examples=True, single=False, max_update_norm=2 * ROOM)
    assert validator.fault_of(message) is None
    tight = UpdateValidator(SHAPES, by_examples=True, single=False, max_update_norm=ROOM)
    assert tight.fault_of(message) is not None
    broken = replace(message, carried_sum={"a": np.full(3, np.nan), "b": np.zeros(())})
    assert validator.fault_of(broken) is not None
    assert validator.fault_of(replace(message, carried_sum={"a": np.zeros(3)})) is not None
    half = discounted(message, 3, StalenessConfig(exponent=0.5))
    np.testing.assert_array_equal(half.total()["a"], message.total()["a"] / 2)
    assert mechanism.fault_of(message, 2 * ROOM) is None
    assert mechanism.fault_of(message, ROOM) is not None


def test_a_round_of_failures_is_one_empty_sum() -> None:
    summing = PartialAggregator(TASK, SHAPES)
    summing.add(ClientFailures(1, (ClientOutcome("c00", 0, "it failed"),)))
    message = summing.message()
    assert (message.total_weight, message.weighted_sum.keys()) == (0.0, SHAPES.keys())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_a_peak_tells_of_numbers_that_are_not_finite(bad: float, position: int) -> None:
    array = np.array([1.0, 2.0, 3.0])
    array[position] = bad
    assert not np.isfinite(peak_of({"x": np.ones(3), "y": array}))
    assert not np.isfinite(squared_norm(array))


def test_peak_and_norm_of_arrays_that_take_several_blocks() -> None:
    array = np.random.default_rng(1).standard_normal((300, 301)).astype(np.float32)
    assert peak_of({"x": array, "empty": np.zeros((0, 3))}) == np.abs(array).max()
    assert squared_norm(array) == pytest.approx(float(np.square(array, dtype=np.float64).sum()), rel=1e-12)
    sums = ExactSums({"x": array.shape})
    sums.add({"x": array}, 3.0)
    np.testing.assert_allclose(sums.totals()["x"], 3.0 * array.astype(np.float64), atol=QUANTUM)


def test_a_difference_comes_with_its_peak_and_its_norm() -> None:
    draw = np.random.default_rng(2)
    local, base, out = (draw.standard_normal((300, 301), dtype=np.float32) for _ in range(3))
    assert subtract(local, base, out=out, squares=True) == (np.abs(local - base).max(), squared_norm(local - base))
    np.testing.assert_array_equal(out, local - base)
    assert subtract(local, base, out=out) == (np.abs(local - base).max(), 0.0)
    out[0, 0] = local[0, 0] = np.nan
    assert not np.isfinite(subtract(local, base, out=out, squares=True)).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("weight", "size"), [(1.0, 1.0), (3.0, 1.0), (1.0, ROOM), (3.0, ROOM)])
def test_addends_stay_as_they_are(dtype: type[np.floating], weight: float, size: float) -> None:
    addend = {"x": (size * np.random.default_rng(3).standard_normal(70_000)).astype(dtype)}
    before = addend["x"].copy()
    sums = ExactSums({"x": (70_000,)})
    for _ in range(3):
        sums.add(addend, weight)
    np.testing.assert_array_equal(addend["x"], before)
    np.testing.assert_allclose(sums.totals()["x"], 3 * weight * before.astype(np.float64), atol=3 * QUANTUM)


@pytest.mark.parametrize("shapes", [{}, {"a": ()}, {"a": (2, 3), "none": (0, 4), "b": (5,)}])
def test_arrays_in_one_piece_of_memory_do_not_overlap(shapes: dict[str, tuple[int, ...]]) -> None:
    arrays = zeros(shapes, np.float32)
    assert {name: array.shape for name, array in arrays.items()} == shapes
    for number, array in enumerate(arrays.values()):
        assert (array.dtype, array.any()) == (np.dtype(np.float32), False)
        array += number + 1
    assert [float(array.sum()) for array in arrays.values()] == [
        array.size * (number + 1) for number, array in enumerate(arrays.values())
    ]
