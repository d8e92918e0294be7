"""Strict JSON and safetensors of anybody: what is read, and that nothing is read in part or guessed."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from fedvit.api.problems import error_of
from fedvit.errors import ControlApiError, NotFoundError, StateError, UpdateRejectedError
from fedvit.types import MAX_EXAMPLES, ClientOutcome
from fedvit.updates import ClientFailures, ClientUpdate
from fedvit.wire.histograms import MAX_CELLS, MAX_CLASSES, HistogramSpec
from fedvit.wire.tensors import MAX_HEADER_BYTES, read_tensors, shapes_of
from fedvit.wire.untrusted import (
    MAX_DEPTH,
    MAX_REASON,
    errors_as_rejection,
    fields_of,
    integer,
    number,
    one_line,
    parse_json,
    text,
)
from fedvit.wire.updates import decode_claim, encode_update, largest_update

# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [{}, {"a": [1, -2.5, True, None, 'é\n"\\']}, [[]] * 3, "x", 12345678901234567890, {"pair": "\U0001f600"}]
)
def test_json_of_our_own_is_read(value: Any) -> None:
    for ensure_ascii in (True, False):
        content = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        assert parse_json(content, max_bytes=len(content)) == value
    with pytest.raises(ValueError, match="bytes"):
        parse_json(content, max_bytes=len(content) - 1)


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"{}x",
            b"\xff",
            b"\xef\xbb\xbf{}",
            "{}".encode("utf-16"),
            b'{"a": 1, "a": 2}',
            b'{"a":{"b":1,"b":1}}',
        ),
        *(b"NaN", b"[Infinity]", b"-Infinity", b"1e999", b"9" * 21, b"-" + b"9" * 20, b"0." + b"1" * 40, b"9" * 10_000),
        *(b'"\\ud800"', b'{"\\udfff": 1}', b"[" * 10_000, b"[" * (MAX_DEPTH + 1) + b"1" + b"]" * (MAX_DEPTH + 1)),
    ],
)
def test_json_that_another_reader_would_understand_otherwise_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(content, max_bytes=2**20)


def test_json_of_the_deepest_nesting_is_read() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, max_bytes=100)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 11, 10**400, [1]])
def test_an_integer_is_no_other_value(value: object) -> None:
    assert [integer(good, 0, 10) for good in (0, 10)] == [0, 10]
    with pytest.raises(ValueError):
        integer(value, 0, 10)


@pytest.mark.parametrize("value", [True, "1", None, -0.1, 10.1, 10**400, float("nan"), float("inf")])
def test_a_number_is_no_other_value(value: object) -> None:
    assert [number(good, 0.0, 10.0) for good in (0, 2.5, 10)] == [0.0, 2.5, 10.0]
    with pytest.raises(ValueError):
        number(value, 0.0, 10.0)


def test_texts_and_fields_are_exactly_what_is_asked_for() -> None:
    assert text("ab", 2) == "ab"
    assert fields_of({"a": 1, "b": 2}, {"a"}, {"b"}) == {"a": 1, "b": 2}
    for wrong in ({}, {"b": 1}, {"a": 1, "x": 1}, [], None, "a"):
        with pytest.raises(ValueError):
            fields_of(wrong, {"a"}, {"b"})
    for words in ("abc", 1, None, ["a"]):
        with pytest.raises(ValueError):
            text(words, 2)


def test_a_reason_is_one_printable_line() -> None:
    assert one_line("a\nb\x1b[31m\0\ud800é") == "a b [31m  é"
    assert len(one_line("x" * 10_000)) == MAX_REASON


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError(), OverflowError(), MemoryError(), RecursionError(), KeyError("a")]
)
def test_a_fault_of_the_program_is_a_rejection_with_a_traceback(fault: Exception, caplog: Any) -> None:
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(UpdateRejectedError) as caught,
        errors_as_rejection("The update"),
    ):
        raise fault
    assert type(fault).__name__ in caught.value.message
    assert caplog.records[0].exc_info[1] is fault


@pytest.mark.parametrize("error", [UpdateRejectedError("no"), StateError("no"), OSError("no"), KeyboardInterrupt()])
def test_what_is_not_about_the_bytes_passes(error: BaseException, caplog: Any) -> None:
    with pytest.raises(type(error)), errors_as_rejection("The update"):
        raise error
    assert caplog.records == []


# --- safetensors -----------------------------------------------------------------------------------------------------


def packed(header: Any, body: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + body


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32", **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_arrays_are_views_of_the_bytes_in_whatever_order_the_header_has() -> None:
    content = packed({"b": entry((1,), (8, 12)), "a": entry(), "none": entry((0, 7), (12, 12))}, bytes(range(12)))
    arrays = read_tensors(content).arrays
    assert {name: (array.shape, array.tobytes()) for name, array in arrays.items()} == {
        "a": ((2,), bytes(range(8))),
        "b": ((1,), bytes(range(8, 12))),
        "none": ((0, 7), b""),
    }
    with pytest.raises(ValueError, match="read-only"):
        arrays["a"][0] = 1
    assert shapes_of(content) == {"a": (2,), "b": (1,), "none": (0, 7)}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.uint32, np.uint16, np.int8])
def test_every_type_that_is_sent_is_read_as_safetensors_writes_it(dtype: Any) -> None:
    array = np.arange(6, dtype=dtype).reshape(2, 3)
    read = read_tensors(save({"a": array, "s": np.asarray(dtype(1))}, metadata={"k": "v"}))
    assert read.metadata == {"k": "v"}
    np.testing.assert_array_equal(read.arrays["a"], array)
    assert (read.arrays["a"].dtype, read.arrays["s"].shape) == (array.dtype, ())


HOSTILE: dict[str, bytes] = {
    "no length": bytes(7),
    "header beyond the end": (100).to_bytes(8, "little") + b"{}",
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "header is no object": packed([]),
    "header is no JSON": packed(b"{"),
    "name twice": packed(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "overlap": packed({"a": entry(), "b": entry((1,), (4, 8))}, bytes(8)),
    "same place": packed({"a": entry(), "b": entry()}, bytes(8)),
    "gap": packed({"a": entry(), "b": entry((1,), (12, 16))}, bytes(16)),
    "begins late": packed({"a": entry((1,), (4, 8))}, bytes(8)),
    "bytes left over": packed({"a": entry()}, bytes(9)),
    "too few bytes": packed({"a": entry()}, bytes(7)),
    "offsets reversed": packed({"a": entry((2,), (8, 0))}, bytes(8)),
    "negative offset": packed({"a": entry((2,), (-8, 0))}, bytes(8)),
    "offset is a float": packed({"a": entry((2,), (0, 8.0))}, bytes(8)),
    "three offsets": packed({"a": entry((2,), (0, 8, 8))}, bytes(8)),
    "negative length": packed({"a": entry((-2, -1))}, bytes(8)),
    "length is true": packed({"a": entry((True, 2))}, bytes(8)),
    "product overflows 64 bits": packed({"a": entry((2**32, 2**32, 2))}, bytes(8)),
    "product overflows to the right size": packed({"a": entry((2**33, 2**31, 2))}, bytes(8)),
    "empty and huge": packed({"a": entry((0, 2**40, 2**40), (0, 0))}),
    "too many dimensions": packed({"a": entry((1,) * 9 + (2,))}, bytes(8)),
    "shape is no list": packed({"a": entry("2")}, bytes(8)),
    "unknown type": packed({"a": entry(dtype="O")}, bytes(8)),
    "type is a list": packed({"a": entry(dtype=["F32"])}, bytes(8)),
    "field too many": packed({"a": entry(x=1)}, bytes(8)),
    "field missing": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "entry is no object": packed({"a": 1}),
    "name too long": packed({"a" * 257: entry()}, bytes(8)),
    "metadata is no object": packed({"__metadata__": 1}),
    "metadata holds a number": packed({"__metadata__": {"a": 1}}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_header_that_says_something_else_than_the_bytes_is_refused(content: bytes) -> None:
    with pytest.raises(UpdateRejectedError) as caught:
        read_tensors(content)
    assert len(caught.value.message) < MAX_REASON


def test_headers_and_numbers_of_arrays_are_bounded() -> None:
    content = packed({f"t{i}": entry((0,), (0, 0)) for i in range(10)})
    assert len(read_tensors(content, max_tensors=10, max_header_bytes=len(content) - 8).arrays) == 10
    for bounds in ({"max_tensors": 9}, {"max_header_bytes": len(content) - 9}):
        with pytest.raises(UpdateRejectedError):
            read_tensors(content, **bounds)
    with pytest.raises(UpdateRejectedError):
        read_tensors(packed(b" " * MAX_HEADER_BYTES + b"{}"))


# --- updates ---------------------------------------------------------------------------------------------------------


def test_no_update_of_a_model_is_larger_than_the_largest() -> None:
    shapes = {f"blocks.{i}.weight": (2, 3) for i in range(40)} | {"é\0": (), "none": (0, 4)}
    sums = {name: np.zeros(shape) for name, shape in shapes.items()}
    reason = "\U0001f600" * 2 * MAX_REASON
    failed = encode_update(ClientFailures.of(3, ["c" * 64], reason))
    whole = encode_update(ClientUpdate(3, ClientOutcome("c" * 64, MAX_EXAMPLES), sums, float(MAX_EXAMPLES)))
    for content in (failed, whole):
        assert len(content) <= largest_update(shapes)
        claim, encoding = decode_claim(content, max_bytes=2**30, shapes=shapes)
        assert (claim.round_index, encoding) == (3, "exact")
    too_large = whole[:8] + whole[8:] + bytes(largest_update(shapes))
    with pytest.raises(UpdateRejectedError):
        decode_claim(too_large, max_bytes=2**30, shapes=shapes)


FACTS = {"round_index": 1, "total_weight": 1.0, "within_clip": 0, "outcomes": [["a", 1, None]]}


@pytest.mark.parametrize(
    "change",
    [
        *({"round_index": value} for value in (-1, 2**31, 1.0, True, None)),
        *({"total_weight": value} for value in (-1.0, MAX_EXAMPLES + 1.0, 10**400, "1", True)),
        *({"within_clip": value} for value in (-1, 2, 0.0)),
        *(
            {"outcomes": value}
            for value in (None, {}, [[]], [["a", 1]], [["a", -1, None]], [["a", MAX_EXAMPLES + 1, None]])
        ),
        *(
            {"outcomes": [outcome]}
            for outcome in (["a" * 65, 1, None], [1, 1, None], ["a", 1, 1], ["a", 0, "x" * 9000])
        ),
        *({"encoding": value} for value in (None, "zip", ["int8"], "x" * 100)),
        {"unknown": 1},
    ],
)
def test_facts_beyond_their_bounds_are_refused(change: dict[str, Any]) -> None:
    def update(facts: dict[str, Any]) -> bytes:
        return save({}, metadata={"update": json.dumps(facts)})

    decode_claim(update(FACTS), max_bytes=10_000, shapes={})
    with pytest.raises(UpdateRejectedError):
        decode_claim(update(FACTS | change), max_bytes=10_000, shapes={})


# --- what a vehicle downloads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"edges": {"a": [10**400]}, "classes": 3, "risk_votes": []},
        {"edges": {"a": ["x", 1]}, "classes": 3, "risk_votes": []},
        {"edges": {"label": [1.0]}, "classes": 3, "risk_votes": []},
        {"edges": {f"a{i}": [] for i in range(MAX_CELLS + 1)}, "classes": 3, "risk_votes": []},
        {"edges": {"a" * 65: [1.0]}, "classes": 3, "risk_votes": []},
        {"edges": [], "classes": 3, "risk_votes": []},
        {"edges": {}, "classes": MAX_CLASSES + 1, "risk_votes": []},
        {"edges": {}, "classes": 3.0, "risk_votes": []},
        {"edges": {}, "classes": 2, "risk_votes": [True, 0]},
        {"edges": {}, "classes": 2, "risk_votes": [10**400, 0]},
        {"edges": {}, "classes": 2, "risk_votes": "00"},
        {"edges": {}, "classes": 2, "risk_votes": [], "x": 1},
        None,
    ],
)
def test_a_hostile_specification_of_histograms_is_refused(value: Any) -> None:
    with pytest.raises(UpdateRejectedError):
        HistogramSpec.from_json(value)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[[[1], 2]]", '[["type", {}]]', '{"type": 7, "cure": {}}', "\ud800", "9" * 10_000, "{"]
)
def test_a_problem_document_of_a_hostile_server_is_an_error_of_its_status(content: str) -> None:
    error = error_of(502, content, "Bad Gateway")
    assert isinstance(error, ControlApiError)
    assert error.status == 502
    assert isinstance(error_of(404, '{"type": "/problems/not-found", "detail": "none", "details": 1}'), NotFoundError)
