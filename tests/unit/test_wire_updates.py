"""Updates as bytes: what comes back is what was sent, and what nobody of ours sent is refused in words."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save

from fedvit.errors import UpdateRejectedError
from fedvit.types import ClientOutcome
from fedvit.updates import PartialSum
from fedvit.wire.updates import decode_update, encode_update

UPDATE = PartialSum(
    3,
    (ClientOutcome("a", 7), ClientOutcome("b", 0, "it failed")),
    {"w": np.array([[1.5, -2.0]]), "b": np.asarray(0.25, dtype=np.float32)},
    7.0,
    1,
)


def test_an_update_survives_the_wire_bit_for_bit() -> None:
    result = decode_update(encode_update(UPDATE), max_bytes=10_000)
    assert (result.round_index, result.outcomes, result.total_weight, result.within_clip) == (
        3,
        UPDATE.outcomes,
        7.0,
        1,
    )
    for name, array in UPDATE.weighted_sum.items():
        other = result.weighted_sum[name]
        assert (other.dtype, other.shape, other.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert encode_update(result) == encode_update(UPDATE)


def test_one_byte_above_the_bound_is_refused_before_it_is_read() -> None:
    content = encode_update(UPDATE)
    decode_update(content, max_bytes=len(content))
    with pytest.raises(UpdateRejectedError):
        decode_update(content, max_bytes=len(content) - 1)


def with_header(**changes: object) -> bytes:
    facts = {"round_index": 1, "total_weight": 1.0, "within_clip": 0, "outcomes": [["a", 1, None]], **changes}
    return save({"w": np.zeros(1)}, metadata={"update": json.dumps(facts)})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not safetensors"),
        (b"\x80\x04pickle", "not safetensors"),
        (encode_update(UPDATE)[:-1], "not safetensors"),
        (save({"w": np.zeros(1)}), "does not say whose it is"),
        (save({"w": np.zeros(1)}, metadata={"update": "[" * 100_000}), "does not say whose it is"),
        (with_header(outcomes=[["a", "many", None]]), "does not say whose it is"),
        (with_header(outcomes=[["a", True, None]]), "does not say whose it is"),
        (with_header(outcomes="a"), "does not say whose it is"),
        (with_header(round_index="1"), "does not say whose it is"),
        (with_header(total_weight=None), "does not say whose it is"),
    ],
)
def test_what_is_no_update_is_refused_in_words(content: bytes, words: str) -> None:
    with pytest.raises(UpdateRejectedError, match=words):
        decode_update(content, max_bytes=10**7)
