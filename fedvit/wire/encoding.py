"""Compressed encodings of an update's arrays, unbiased or with error feedback.

=========  ============  =======================================================================================
encoding   bytes         encoded value
=========  ============  =======================================================================================
float32    4             itself, to 24 bits
float16    2             rounded up or down at random, unbiased; refused beyond 65504
bfloat16   2             rounded away from zero or towards it at random, unbiased
int8       1 + 4 / 256   one of 255 levels of its block of 256, at random, unbiased
top_k      8 * fraction  the largest ``fraction`` of all values as they are, the rest not at all
=========  ============  =======================================================================================

Random rounding in blocks with a scale each follows Alistarh et al. 2017 (arXiv:1610.02132). Top-k is biased: the sender
adds what was dropped to the next update, which is called error feedback (Stich et al. 2018, arXiv:1809.07599;
Karimireddy et al. 2019, arXiv:1901.09847). Encoding uses only the given arrays: applied to a noised update it costs no
privacy, and applied before the noise it may increase the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedvit.errors import UpdateRejectedError
from fedvit.types import Encoding

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Decoded: TypeAlias = dict[str, npt.NDArray[np.float64]]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Uniforms: TypeAlias = Callable[[int], npt.NDArray[np.float64]]
"""Returns the given number of independent uniforms in (0, 1)."""
BLOCK = 256
_LEVELS = 127
_SCALE, _INDEX, _VALUE = "#scale", "#index", "#value"


def encode_arrays(arrays: Arrays, encoding: Encoding, uniforms: Uniforms, top_k_fraction: float) -> Arrays:
    """The encoded arrays by name; some encodings need several for one parameter.

    Args:
        uniforms: the random numbers of this update.
        top_k_fraction: the share of all values that ``top_k`` keeps; at least one is.

    Raises:
        UpdateRejectedError: a value does not fit.
    """
    ordered = {name: np.asarray(arrays[name], np.float64) for name in sorted(arrays)}
    if encoding is Encoding.TOP_K:
        return _largest(ordered, top_k_fraction)
    encoded: dict[str, npt.NDArray[Any]] = {}
    for name, array in ordered.items():
        match encoding:
            case Encoding.FLOAT32:
                encoded[name] = _fitting(name, array, np.float32)
            case Encoding.FLOAT16:
                encoded[name] = _randomly_rounded(_fitting(name, array, np.float16), array, uniforms)
            case Encoding.BFLOAT16:
                encoded[name] = _to_bfloat16(_fitting(name, array, np.float32), uniforms)
            case Encoding.INT8:
                encoded[name], encoded[name + _SCALE] = _to_levels(array, uniforms)
    return encoded


def decode_arrays(stored: Arrays, encoding: Encoding, shapes: Shapes) -> Decoded:
    """The inverse, float64, for untrusted arrays: no array larger than ``shapes`` is created.

    Raises:
        UpdateRejectedError: a part is missing, or of another type or size than it must be.
    """
    try:
        return {name: _decoded(stored, encoding, name, tuple(shape)) for name, shape in shapes.items()}
    except KeyError as error:
        raise UpdateRejectedError(f"The update lacks {error}.") from None


def names_of(stored: Arrays, encoding: Encoding) -> set[str]:
    """The names of the parameters of which there are encoded arrays."""
    endings = {Encoding.INT8: (_SCALE,), Encoding.TOP_K: (_INDEX, _VALUE)}.get(encoding, ())
    names = set(stored)
    for ending in endings:
        names = {name.removesuffix(ending) for name in names}
    return names


def _fitting(name: str, array: npt.NDArray[np.float64], kind: type[np.floating[Any]]) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        converted = np.asarray(array.astype(kind))
    if not np.isfinite(converted).all():
        raise UpdateRejectedError(
            f"A value of {name!r} does not fit into {np.dtype(kind)}.", cure="Use bfloat16 or int8, or a smaller step."
        )
    return converted


def _randomly_rounded(
    nearest: npt.NDArray[Any], array: npt.NDArray[np.float64], uniforms: Uniforms
) -> npt.NDArray[Any]:
    """Each value to one of its two neighbours in the type of ``nearest``, so that it is right on average."""
    infinity = nearest.dtype.type(np.inf)
    with np.errstate(over="ignore"):
        below = np.where(nearest > array, np.nextafter(nearest, -infinity), nearest)
        above = np.where(nearest < array, np.nextafter(nearest, infinity), nearest)
    gap = np.maximum(above.astype(np.float64) - below, np.finfo(np.float64).tiny)
    up = uniforms(array.size).reshape(array.shape) < (array - below) / gap
    rounded = np.where(up, above, below)
    # Beyond the largest finite value there is no neighbour.
    return np.asarray(np.where(np.isfinite(rounded), rounded, nearest))


def _to_bfloat16(array: npt.NDArray[np.float32], uniforms: Uniforms) -> npt.NDArray[np.uint16]:
    """The upper half of each float32, after a random number below one unit of it was added to the lower half."""
    coins = (uniforms(array.size).reshape(array.shape) * 65536).astype(np.uint32)
    bits = array.view(np.uint32)
    lifted = (bits + coins) >> 16
    # Next to the largest value, a carry would make it infinite.
    return np.asarray(np.where((lifted & 0x7F80) == 0x7F80, bits >> 16, lifted).astype(np.uint16))


def _to_levels(
    array: npt.NDArray[np.float64], uniforms: Uniforms
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    blocks = _in_blocks(array)
    largest = np.abs(blocks).max(axis=1, initial=0.0)
    scales = _fitting("scale", largest, np.float32)
    # Not below the largest value, which would be cut off.
    scales = np.where(scales < largest, np.nextafter(scales, np.float32(np.inf)), scales)
    steps = scales.astype(np.float64)[:, None] / _LEVELS
    exact = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    levels = np.floor(exact + uniforms(blocks.size).reshape(blocks.shape)).clip(-_LEVELS, _LEVELS)
    return levels.astype(np.int8).reshape(-1)[: array.size].reshape(array.shape), scales


def _in_blocks(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    padded = np.zeros((_blocks(array.size), BLOCK))
    padded.reshape(-1)[: array.size] = array.reshape(-1)
    return padded


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def _largest(arrays: Mapping[str, npt.NDArray[np.float64]], fraction: float) -> Arrays:
    flat = np.concatenate([array.reshape(-1) for array in arrays.values()])
    count = max(1, round(fraction * flat.size))
    # Stable, so that equal values are chosen alike everywhere.
    chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:count])
    encoded: dict[str, npt.NDArray[Any]] = {}
    begin = 0
    for name, array in arrays.items():
        own = chosen[(chosen >= begin) & (chosen < begin + array.size)]
        encoded[name + _INDEX] = (own - begin).astype(np.uint32)
        encoded[name + _VALUE] = _fitting(name, flat[own], np.float32)
        begin += array.size
    return encoded


def _decoded(stored: Arrays, encoding: Encoding, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    match encoding:
        case Encoding.FLOAT32:
            return _checked(name, stored[name], np.float32, shape).astype(np.float64)
        case Encoding.FLOAT16:
            return _checked(name, stored[name], np.float16, shape).astype(np.float64)
        case Encoding.BFLOAT16:
            bits = _checked(name, stored[name], np.uint16, shape).astype(np.uint32) << 16
            return np.asarray(bits.view(np.float32).astype(np.float64))
        case Encoding.INT8:
            return _from_levels(stored, name, shape)
        case Encoding.TOP_K:
            return _from_largest(stored, name, shape)


def _from_levels(stored: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    levels = _checked(name, stored[name], np.int8, shape)
    scales = _checked(name + _SCALE, stored[name + _SCALE], np.float32, (_blocks(levels.size),))
    with np.errstate(invalid="ignore"):
        values = _in_blocks(levels) * (scales.astype(np.float64)[:, None] / _LEVELS)
    return np.asarray(values.reshape(-1)[: levels.size].reshape(shape))


def _from_largest(stored: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    index, value = stored[name + _INDEX], stored[name + _VALUE]
    index = _checked(name + _INDEX, index, np.uint32, (index.size,))
    value = _checked(name + _VALUE, value, np.float32, (index.size,))
    if index.size > math.prod(shape):
        raise UpdateRejectedError(f"The update's {name + _INDEX!r} has {index.size} places, more than the parameter.")
    values = np.zeros(shape)
    if index.size and (int(index[-1]) >= values.size or (np.diff(index.astype(np.int64)) <= 0).any()):
        raise UpdateRejectedError(f"The places in {name + _INDEX!r} are not in order, or not of this model.")
    values.reshape(-1)[index] = value
    return values


def _checked(name: str, array: npt.NDArray[Any], kind: type[np.generic], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if array.dtype != kind or array.shape != shape:
        raise UpdateRejectedError(
            f"The update's {name!r} is {array.dtype} of the shape {list(array.shape)}.",
            cure=f"It must be {np.dtype(kind)} of the shape {list(shape)}.",
        )
    return array
