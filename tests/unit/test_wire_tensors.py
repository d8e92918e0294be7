from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from raises import raises_naming
from safetensors.numpy import save

from fedvit.errors import UpdateRejectedError
from fedvit.types import FloatArray
from fedvit.wire.tensors import decode_weights, encode_weights

LIMIT = 10_000
# The format keeps this one name for itself.
names = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
finite_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def weights() -> dict[str, FloatArray]:
    return {
        "head.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "head.bias": np.ones(2, dtype=np.float32),
        "scale": np.array(0.5, dtype=np.float32),
    }


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in weights().items()}


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), finite_arrays, max_size=4)
)
@settings(max_examples=50, deadline=None)
def test_a_round_trip_changes_nothing(original: dict[str, FloatArray]) -> None:
    content = encode_weights(original)
    decoded = decode_weights(content, expected={n: a.shape for n, a in original.items()}, max_bytes=10**6)
    assert decoded.keys() == original.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(decoded[name], array)
        assert decoded[name].shape == array.shape


def test_equal_weights_give_equal_bytes_whatever_their_order_and_layout() -> None:
    backwards = dict(reversed(weights().items()))
    backwards["head.weight"] = np.asfortranarray(backwards["head.weight"])
    assert encode_weights(backwards) == encode_weights(weights())


def test_decoded_arrays_can_be_written_to() -> None:
    decoded = decode_weights(encode_weights(weights()), max_bytes=LIMIT)
    decoded["head.bias"] += 1
    assert decoded["head.bias"].tolist() == [2, 2]


def test_encoding_refuses_what_it_would_have_to_round() -> None:
    with raises_naming(ValueError, "'a'", "float64"):
        encode_weights({"a": np.zeros(2)})  # type: ignore[dict-item]


def test_a_pickle_is_not_opened() -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return pytest.fail, ("the pickle was run",)

    with pytest.raises(UpdateRejectedError):
        decode_weights(pickle.dumps(Bomb()), max_bytes=LIMIT)


def test_every_truncation_is_refused() -> None:
    content = encode_weights(weights())
    for length in range(len(content)):
        with pytest.raises(UpdateRejectedError):
            decode_weights(content[:length], expected=shapes(), max_bytes=LIMIT)


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_noise_is_refused(content: bytes) -> None:
    with pytest.raises(UpdateRejectedError):
        decode_weights(content, expected=shapes(), max_bytes=LIMIT)


def header_only(header: object) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        header_only({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header_only({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}),
        header_only([1, 2]),
    ],
    ids=["huge header", "huge tensor", "offsets reversed", "a list"],
)
def test_lying_headers_are_refused(content: bytes) -> None:
    with pytest.raises(UpdateRejectedError):
        decode_weights(content, max_bytes=LIMIT)


def test_too_many_bytes_are_not_parsed() -> None:
    content = encode_weights(weights())
    with raises_naming(UpdateRejectedError, f"{len(content)} bytes", f"{len(content) - 1}"):
        decode_weights(content, max_bytes=len(content) - 1)
    assert decode_weights(content, max_bytes=len(content))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(value: float) -> None:
    bad = weights()
    bad["head.bias"][1] = value
    with raises_naming(UpdateRejectedError, "'head.bias'"):
        decode_weights(encode_weights(bad), expected=shapes(), max_bytes=LIMIT)


def test_a_wrong_shape_is_named_even_with_the_right_number_of_values() -> None:
    bad = weights() | {"head.weight": np.zeros((3, 2), dtype=np.float32)}
    with raises_naming(UpdateRejectedError, "'head.weight'", "[3, 2]", "[2, 3]"):
        decode_weights(encode_weights(bad), expected=shapes(), max_bytes=LIMIT)


def test_a_missing_and_a_strange_parameter_are_named() -> None:
    missing = weights()
    del missing["scale"]
    with raises_naming(UpdateRejectedError, "'scale'"):
        decode_weights(encode_weights(missing), expected=shapes(), max_bytes=LIMIT)
    strange = weights() | {"extra": np.zeros(1, dtype=np.float32)}
    with raises_naming(UpdateRejectedError, "'extra'"):
        decode_weights(encode_weights(strange), expected=shapes(), max_bytes=LIMIT)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int32, np.bool_])
def test_another_type_is_refused(dtype: type[np.generic]) -> None:
    content = save({"a": np.zeros(4, dtype=dtype)})
    with raises_naming(UpdateRejectedError, "'a'"):
        decode_weights(content, max_bytes=LIMIT)


def test_a_type_that_numpy_lacks_is_refused() -> None:
    content = header_only({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4)
    with raises_naming(UpdateRejectedError, "float32"):
        decode_weights(content, max_bytes=LIMIT)
