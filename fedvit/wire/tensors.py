"""Encoding and decoding of model weights as safetensors, a format that cannot contain code.

Bytes that anybody may have written are read with bounds: the length of the header before it is parsed, and counts,
sizes and offsets, as Python integers, before an array is made.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from fedvit.errors import IntegrityError, UpdateRejectedError
from fedvit.types import FloatArray, Weights
from fedvit.wire.untrusted import fields_of, integer, parse_json, text

LENGTH_BYTES = _ALIGNMENT = 8
MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 16_384
TENSOR_TYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
}
"""The types that fedvit writes, by their names in the format."""
_MAX_NAME, _MAX_DIMENSIONS, _MAX_ELEMENTS = 256, 8, 2**40
_ENTRY = {"dtype", "shape", "data_offsets"}
# Longer names and offsets of broadcast arrays.
_HEADER_SPARE_BYTES = 64


def encode_weights(weights: Weights) -> bytes:
    """Weights as safetensors. Equal weights give equal bytes, so that their hash names them.

    Raises:
        ValueError: an array is not float32.
    """
    return _save("parameter", weights, np.dtype(np.float32))


def encode_rule_state(state: Mapping[str, npt.NDArray[np.float64]]) -> bytes:
    """The state of an aggregation rule as safetensors. Equal states give equal bytes.

    Raises:
        ValueError: an array is not float64; a restart would not continue bit for bit.
    """
    return _save("the rule's state", state, np.dtype(np.float64))


def _save(kind: str, arrays: Mapping[str, npt.NDArray[np.floating]], dtype: np.dtype[np.floating]) -> bytes:
    for name, array in arrays.items():
        if array.dtype != dtype:
            raise ValueError(f"{kind} {name!r} is {array.dtype}, not {dtype}")
    # ascontiguousarray would turn a 0-d parameter into a 1-d one.
    return save({name: np.asarray(arrays[name], order="C") for name in sorted(arrays)})


def decode_rule_state(content: bytes) -> dict[str, npt.NDArray[np.float64]]:
    """The inverse of :func:`encode_rule_state`.

    Raises:
        IntegrityError: these bytes hold no state.
    """
    try:
        arrays = read_tensors(content, types=("F64",)).arrays
    except UpdateRejectedError as error:
        cure = "Restore the state folder from a backup."
        raise IntegrityError(f"A rule's state cannot be read: {error.message}", cure=cure) from None
    return {name: np.array(array) for name, array in arrays.items()}


def shapes_of(content: bytes) -> dict[str, tuple[int, ...]]:
    """The shapes of encoded weights by name, without a copy of the weights; errors as of :func:`decode_weights`."""
    return {name: array.shape for name, array in read_tensors(content, types=("F32",)).arrays.items()}


def weights_digest(weights: Weights) -> str:
    """SHA-256, hex, of :func:`encode_weights`, with its errors, without encoding them as a whole."""
    digest = hashlib.sha256()
    for piece in encoded_pieces(weights):
        digest.update(piece)
    return digest.hexdigest()


def encoded_pieces(weights: Weights) -> list[bytes | memoryview]:
    """:func:`encode_weights` piece by piece, with its errors, without a copy of the numbers."""
    named = {name: np.asarray(weights[name], order="C") for name in sorted(weights)}
    return [_prefix(named), *(array.reshape(-1).view(np.uint8).data for array in named.values())]


def largest_task_weights(weights: Weights) -> int:
    """The most bytes that a task's weights can have; a rule may broadcast three arrays beside each of ``weights``."""
    return 4 * (sum(map(len, encoded_pieces(weights))) + _HEADER_SPARE_BYTES * len(weights))


def _prefix(named: Mapping[str, FloatArray]) -> bytes:
    """The prefix of a safetensors file: the length of the JSON header, and the header."""
    header, end = dict[str, object](), 0
    for name, array in named.items():
        if array.dtype != np.float32:
            raise ValueError(f"parameter {name!r} is {array.dtype}, not float32")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % _ALIGNMENT)
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def decode_weights(
    content: bytes, *, expected: Mapping[str, tuple[int, ...]] | None = None, max_bytes: int
) -> dict[str, FloatArray]:
    """The inverse of :func:`encode_weights`, for untrusted bytes. The arrays are writable.

    Args:
        content: safetensors bytes.
        expected: the shape of every parameter by name; no parameter may be missing, and no other may be present.
        max_bytes: the largest length that is read.

    Raises:
        UpdateRejectedError: names the first error: size, format, name, type, shape, or a value that is not finite.
    """
    if len(content) > max_bytes:
        raise UpdateRejectedError(f"The update has {len(content)} bytes; at most {max_bytes} are accepted.")
    arrays = read_tensors(content, types=("F32",)).arrays
    if expected is not None:
        _check_names(arrays.keys(), expected.keys())
    for name in sorted(arrays):
        _check_array(name, arrays[name], None if expected is None else expected[name])
    return {name: np.require(arrays[name], np.float32, "W") for name in sorted(arrays)}


def _check_names(names: Set[str], expected: Set[str]) -> None:
    if missing := sorted(expected - names):
        raise UpdateRejectedError(f"The update lacks the parameter {missing[0]!r} ({len(missing)} are missing).")
    if unknown := sorted(names - expected):
        raise UpdateRejectedError(f"The update holds {unknown[0]!r}, which is no parameter of this model.")


def _check_array(name: str, array: FloatArray, shape: tuple[int, ...] | None) -> None:
    if shape is not None and array.shape != tuple(shape):
        raise UpdateRejectedError(
            f"Parameter {name!r} has the shape {list(array.shape)}.", cure=f"Its shape is {list(shape)}."
        )
    if not np.isfinite(array).all():
        raise UpdateRejectedError(f"Parameter {name!r} holds a value that is not finite.")


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The content of a safetensors file. The arrays are read-only views of its bytes."""

    arrays: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, str]


def read_tensors(
    content: bytes,
    *,
    types: Collection[str] = tuple(TENSOR_TYPES),
    max_tensors: int = MAX_TENSORS,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> TensorFile:
    """The arrays and the metadata in safetensors bytes. The arrays lie one behind another and fill the file.

    Args:
        types: those of :data:`TENSOR_TYPES` that an array may have.

    Raises:
        UpdateRejectedError: the bytes are not that; it names the first fault.
    """
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    start = LENGTH_BYTES + length
    if len(content) < LENGTH_BYTES or start > len(content):
        _refuse(f"it ends within its header, after {len(content)} bytes")
    if length > max_header_bytes:
        _refuse(f"its header has {length} bytes; at most {max_header_bytes} are read")
    try:
        header = parse_json(content[LENGTH_BYTES:start], max_bytes=max_header_bytes)
    except ValueError as error:
        _refuse(f"its header is no JSON that is read here: {error}")
    if not isinstance(header, dict):
        _refuse("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(words, str) for words in metadata.values()):
        _refuse("its metadata is no object of texts")
    if len(header) > max_tensors:
        _refuse(f"it holds {len(header)} arrays; at most {max_tensors} are expected")
    return TensorFile(_views(content, start, [_entry(name, entry, types) for name, entry in header.items()]), metadata)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An array as the header describes it: at ``begin`` to ``end`` of the bytes behind the header."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, entry: object, types: Collection[str]) -> _Entry:
    try:
        text(name, _MAX_NAME)
        facts = fields_of(entry, _ENTRY)
        kind, shape, offsets = text(facts["dtype"], 16), facts["shape"], facts["data_offsets"]
        if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
            raise ValueError(f"its shape is no list of at most {_MAX_DIMENSIONS} lengths")
        lengths = tuple(integer(length, 0, _MAX_ELEMENTS) for length in shape)
        # An array without elements counts, too: its other lengths must not overflow NumPy's integers.
        if math.prod(max(length, 1) for length in lengths) > _MAX_ELEMENTS:
            raise ValueError(f"it has more than {_MAX_ELEMENTS} elements")
        if not isinstance(offsets, list) or len(offsets) != 2:
            raise ValueError("its data_offsets are not two")
        begin, end = (integer(offset, 0, 8 * _MAX_ELEMENTS) for offset in offsets)
    except ValueError as error:
        _refuse(f"its entry {name!r:.80} is no description of an array: {error}")
    if kind not in types:
        allowed = ", ".join(str(TENSOR_TYPES[known]) for known in types)
        raise UpdateRejectedError(f"The update's {name!r} is of the type {kind!r}.", cure=f"Send {allowed}.")
    dtype = TENSOR_TYPES[kind]
    if end - begin != math.prod(lengths) * dtype.itemsize:
        _refuse(f"its array {name!r} of the shape {list(lengths)} has {end - begin} bytes")
    return _Entry(name, dtype, lengths, begin, end)


def _views(content: bytes, start: int, entries: Collection[_Entry]) -> dict[str, npt.NDArray[Any]]:
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            _refuse(f"its array {entry.name!r} begins at {entry.begin}, not at {position}")
        position = entry.end
    if position != len(content) - start:
        _refuse(f"its arrays have {position} bytes, and {len(content) - start} follow its header")
    return {
        entry.name: np.ndarray(entry.shape, entry.dtype, buffer=content, offset=start + entry.begin)
        for entry in entries
    }


def _refuse(fault: str) -> NoReturn:
    raise UpdateRejectedError(f"The update is not safetensors: {fault}.", cure="Send what fedvit writes.") from None
