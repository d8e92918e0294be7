"""Smaller updates: right on average, off by one step at most, and closed to what nobody of ours sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load, save

from fedvit.errors import UpdateRejectedError
from fedvit.types import ClientOutcome, Encoding
from fedvit.updates import ClientFailures, ClientUpdate
from fedvit.wire.encoding import BLOCK, decode_arrays, encode_arrays
from fedvit.wire.updates import decode_claim, decode_update, encode_smaller

Coins = Callable[[int], npt.NDArray[np.float64]]
LOSSY = [Encoding.FLOAT16, Encoding.BFLOAT16, Encoding.INT8]
DRAW = np.random.default_rng(7)
# Several scales in one array, a scalar, an empty one, and values that each form has exactly.
ARRAYS: dict[str, npt.NDArray[Any]] = {
    "a": DRAW.normal(size=(30, 20)) * 10.0 ** DRAW.integers(-4, 2, size=(30, 1)),
    "b": np.asarray(-0.3),
    "c": np.array([0.0, 1.0, -1.0]),
    "d": np.zeros((0, 3)),
}
SHAPES = {name: array.shape for name, array in ARRAYS.items()}


def coins(seed: int) -> Coins:
    return np.random.default_rng(seed).random


def there_and_back(encoding: Encoding, seed: int = 0, fraction: float = 0.1) -> dict[str, npt.NDArray[np.float64]]:
    return decode_arrays(encode_arrays(ARRAYS, encoding, coins(seed), fraction), encoding, SHAPES)


def step_of(encoding: Encoding, array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """How far apart the two values are that each may be rounded to, at most."""
    if encoding is Encoding.INT8:
        flat = np.abs(array.reshape(-1))
        blocks = np.array([flat[i : i + BLOCK].max() for i in range(0, flat.size, BLOCK)])
        return np.asarray(np.repeat(blocks, BLOCK)[: flat.size].reshape(array.shape) / 127 * (1 + 1e-6))
    bits, least = (10, 2.0**-24) if encoding is Encoding.FLOAT16 else (7, 2.0**-133)
    return np.asarray(np.maximum(np.abs(array) * 2.0**-bits, least))


@pytest.mark.parametrize("encoding", LOSSY)
def test_rounding_by_coins_is_right_on_average_and_off_by_one_step_at_most(encoding: Encoding) -> None:
    repetitions = 400
    sums = {name: np.zeros(array.shape) for name, array in ARRAYS.items()}
    for seed in range(repetitions):
        for name, item in there_and_back(encoding, seed).items():
            assert (np.abs(item - ARRAYS[name]) <= step_of(encoding, ARRAYS[name])).all()
            sums[name] += item
    for name, array in ARRAYS.items():
        # A coin between two values deviates by half their distance at most; five deviations of the mean.
        allowed = 5 * 0.5 * step_of(encoding, array) / np.sqrt(repetitions)
        assert (np.abs(sums[name] / repetitions - array) <= allowed).all(), name


def test_rounding_to_the_nearest_would_not_pass_for_unbiased() -> None:
    """The test above can fail: half of a coin is as good as always the same side."""
    stored = encode_arrays(
        {"x": np.full(BLOCK, 0.3) + np.eye(1, BLOCK)[0]}, Encoding.INT8, lambda n: np.full(n, 0.5), 1
    )
    result = decode_arrays(stored, Encoding.INT8, {"x": (BLOCK,)})["x"]
    assert abs(result[1] - 0.3) > 5 * 0.5 / 127 / np.sqrt(400)


@pytest.mark.parametrize("encoding", Encoding)
def test_what_a_form_has_exactly_stays_as_it_is(encoding: Encoding) -> None:
    exact = {"x": np.array([[1.0, -0.0], [0.0, -1.0]]), "zero": np.zeros(3)}
    stored = encode_arrays(exact, encoding, coins(1), 1.0)
    result = decode_arrays(stored, encoding, {"x": (2, 2), "zero": (3,)})
    for name, array in exact.items():
        np.testing.assert_array_equal(result[name], array)


@pytest.mark.parametrize(
    ("encoding", "share"), [("float32", 1.0), ("float16", 0.5), ("bfloat16", 0.5), ("int8", 0.2549), ("top_k", 0.1)]
)
def test_bytes_are_what_the_table_says(encoding: str, share: float) -> None:
    big = ClientUpdate(1, ClientOutcome("a", 3), {"w": DRAW.normal(size=40_000)}, 3.0)
    content = encode_smaller(big, Encoding(encoding), coins(0), 0.05)
    assert len(content) == pytest.approx(160_000 * share, rel=0.005, abs=400)
    assert decode_claim(content, max_bytes=len(content), shapes={"w": (40_000,)})[1] == encoding


def test_top_k_keeps_the_largest_of_all_arrays_together_and_nothing_else() -> None:
    result = there_and_back(Encoding.TOP_K, fraction=0.1)
    flat = np.concatenate([ARRAYS[name].reshape(-1) for name in sorted(ARRAYS)])
    kept = np.concatenate([result[name].reshape(-1) for name in sorted(result)])
    largest = np.argsort(-np.abs(flat), kind="stable")[: round(0.1 * flat.size)]
    assert set(np.nonzero(kept)[0]) == set(largest)
    np.testing.assert_allclose(kept[largest], flat[largest], rtol=1e-7)


@pytest.mark.parametrize(("encoding", "value"), [("float16", 1e5), ("float32", 1e39), ("int8", 1e39), ("top_k", 1e39)])
def test_a_value_that_does_not_fit_is_named(encoding: str, value: float) -> None:
    with pytest.raises(UpdateRejectedError):
        encode_arrays({"x": np.array([value])}, Encoding(encoding), coins(0), 1.0)


def test_next_to_the_largest_value_nothing_becomes_infinite() -> None:
    for encoding, largest in ((Encoding.FLOAT16, 65504.0), (Encoding.BFLOAT16, float(np.finfo(np.float32).max))):
        for seed in range(20):
            stored = encode_arrays({"x": np.array([largest, -largest])}, encoding, coins(seed), 1.0)
            assert np.isfinite(decode_arrays(stored, encoding, {"x": (2,)})["x"]).all()


# --- bytes from anybody ----------------------------------------------------------------------------------------------

UPDATE = ClientUpdate(3, ClientOutcome("a", 7), {"w": 7.0 * DRAW.normal(size=(4, 5))}, 7.0, 1)


@pytest.mark.parametrize("encoding", Encoding)
def test_an_update_is_opened_as_the_sum_that_was_sent(encoding: Encoding) -> None:
    content = encode_smaller(UPDATE, encoding, coins(0), 1.0)
    result = decode_update(content, max_bytes=len(content), shapes={"w": (4, 5)})
    assert (result.round_index, result.outcomes, result.total_weight, result.within_clip) == (
        3,
        UPDATE.outcomes,
        7.0,
        1,
    )
    largest = float(np.abs(UPDATE.weighted_sum["w"]).max())
    np.testing.assert_allclose(result.weighted_sum["w"], UPDATE.weighted_sum["w"], atol=largest / 100)


def test_a_client_that_failed_sends_its_reason_and_nothing_else() -> None:
    failed = ClientFailures(3, (ClientOutcome("a", 0, "it is " + "so " * 500),))
    result = decode_update(encode_smaller(failed, Encoding.INT8, coins(0), 1.0), max_bytes=9999, shapes={"w": (4, 5)})
    assert result.weighted_sum == {}
    assert str(result.outcomes[0].error).startswith("it is so so")
    assert len(str(result.outcomes[0].error)) == 500


def resaved(encoding: Encoding, **changes: Any) -> bytes:
    """A good update with some of its arrays replaced; None takes one away."""
    content = encode_smaller(UPDATE, encoding, coins(0), 0.5)
    length = int.from_bytes(content[:8], "little")
    import json

    arrays = {n: a for n, a in (load(content) | changes).items() if a is not None}
    return save(arrays, metadata=json.loads(content[8 : 8 + length])["__metadata__"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (resaved(Encoding.INT8, **{"w#scale": None}), "lacks 'w#scale'"),
        (resaved(Encoding.INT8, w=None, **{"w#scale": None}), "lacks 'w'"),
        (resaved(Encoding.INT8, x=np.zeros(1, np.int8)), "holds 'x', which is no parameter"),
        (resaved(Encoding.INT8, **{"w#scale": np.zeros(9, np.float32)}), r"'w#scale' is float32 of the shape \[9\]"),
        (resaved(Encoding.INT8, w=np.zeros((4, 5), np.float32)), "'w' is float32"),
        (resaved(Encoding.BFLOAT16, w=np.zeros((5, 4), np.uint16)), r"of the shape \[5, 4\]"),
        (resaved(Encoding.TOP_K, **{"w#index": np.array([1, 1], np.uint32)}), "'w#value' is float32 of the shape"),
        (
            resaved(Encoding.TOP_K, **{"w#index": np.array([1, 1], np.uint32), "w#value": np.zeros(2, np.float32)}),
            "not in order, or not of this model",
        ),
        (
            resaved(Encoding.TOP_K, **{"w#index": np.array([20], np.uint32), "w#value": np.zeros(1, np.float32)}),
            "not in order, or not of this model",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(content: bytes, words: str) -> None:
    with pytest.raises(UpdateRejectedError, match=words):
        decode_update(content, max_bytes=10**6, shapes={"w": (4, 5)})


def test_a_form_that_nobody_knows_and_a_model_that_is_not_known_are_refused() -> None:
    with pytest.raises(UpdateRejectedError):
        decode_update(encode_smaller(UPDATE, Encoding.INT8, coins(0), 1.0), max_bytes=10**6)
    facts = '{"round_index": 1, "total_weight": 1, "within_clip": 0, "outcomes": [], "encoding": "zip"}'
    with pytest.raises(UpdateRejectedError):
        decode_update(save({"w": np.zeros(1)}, metadata={"update": facts}), max_bytes=10**6, shapes={})
