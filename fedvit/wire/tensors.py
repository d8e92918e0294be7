"""Encoding and decoding of model weights as safetensors, a format that cannot contain code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedvit.errors import IntegrityError, UpdateRejectedError
from fedvit.types import FloatArray, Weights

_LENGTH_BYTES = _ALIGNMENT = 8


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
        return load(content)
    except SafetensorError as error:
        cure = "Restore the state folder from a backup."
        raise IntegrityError(f"A rule's state cannot be read: {error}.", cure=cure) from None


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


def _prefix(named: Mapping[str, FloatArray]) -> bytes:
    """The prefix of a safetensors file: the length of the JSON header, and the header."""
    header, end = dict[str, object](), 0
    for name, array in named.items():
        if array.dtype != np.float32:
            raise ValueError(f"parameter {name!r} is {array.dtype}, not float32")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


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
    arrays = _load(content)
    if expected is not None:
        _check_names(arrays.keys(), expected.keys())
    for name in sorted(arrays):
        _check_array(name, arrays[name], None if expected is None else expected[name])
    return {name: np.require(arrays[name], np.float32, "W") for name in sorted(arrays)}


def _load(content: bytes) -> dict[str, FloatArray]:
    try:
        return load(content)
    except SafetensorError as error:
        reason = " ".join(str(error).split())
    except (KeyError, ValueError, TypeError) as error:
        reason = f"it holds a type that is not a float32 ({error})"
    raise UpdateRejectedError(f"The update is not safetensors: {reason}.", cure="Send what encode_weights makes.")


def _check_names(names: Set[str], expected: Set[str]) -> None:
    if missing := sorted(expected - names):
        raise UpdateRejectedError(f"The update lacks the parameter {missing[0]!r} ({len(missing)} are missing).")
    if unknown := sorted(names - expected):
        raise UpdateRejectedError(f"The update holds {unknown[0]!r}, which is no parameter of this model.")


def _check_array(name: str, array: FloatArray, shape: tuple[int, ...] | None) -> None:
    if array.dtype != np.float32:
        raise UpdateRejectedError(f"Parameter {name!r} is {array.dtype}.", cure="Send float32.")
    if shape is not None and array.shape != tuple(shape):
        raise UpdateRejectedError(
            f"Parameter {name!r} has the shape {list(array.shape)}.", cure=f"Its shape is {list(shape)}."
        )
    if not np.isfinite(array).all():
        raise UpdateRejectedError(f"Parameter {name!r} holds a value that is not finite.")
