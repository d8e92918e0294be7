"""Packed vectors of ring integers: ``bits`` bits a value, least significant bit first, zeros at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedvit.errors import UpdateRejectedError

Ring = npt.NDArray[np.uint32]
_GROUP = 8
"""So many values fill whole bytes, whatever the width."""
# Fits the processor's cache.
_AT_ONCE = 1 << 14


def packed_bytes(length: int, bits: int) -> int:
    """The size of a packed vector."""
    return -(-length // _GROUP) * bits


def pack_ring(vector: Ring, bits: int) -> bytes:
    """Ring integers [length] below 2^bits as :func:`packed_bytes` bytes.

    Raises:
        ValueError: a value is not below 2^bits.
    """
    if len(vector) and int(vector.max()) >> bits:
        raise ValueError(f"a ring integer has more than {bits} bits")
    size = packed_bytes(len(vector), bits)
    values = np.zeros(size * 8 // bits, np.uint32)
    values[: len(vector)] = vector
    # A value is written as eight bytes; the last one reaches beyond the end.
    packed = np.zeros(size + 8, np.uint8)
    for chosen, offset, shift, count, stride in _columns(len(values), bits):
        column: npt.NDArray[np.uint64] = np.ndarray((count,), "<u8", packed.data, offset, (stride,))
        column |= values[chosen].astype(np.uint64) << np.uint64(shift)
    return packed[:size].tobytes()


def unpack_ring(content: bytes, length: int, bits: int) -> Ring:
    """The ring integers [length] in a packed vector.

    Raises:
        UpdateRejectedError: it has another size, or anything but zeros behind the last value.
    """
    expected = packed_bytes(length, bits)
    if len(content) != expected:
        raise UpdateRejectedError(
            f"A masked vector has {len(content)} bytes.", cure=f"{length} values of {bits} bits have {expected}."
        )
    values = np.empty(expected * 8 // bits, np.uint32)
    # A value and the bits before it fit into four bytes up to a width of 25.
    wide: np.dtype[np.unsignedinteger] = np.dtype("<u4") if bits <= 25 else np.dtype("<u8")
    padded, mask = content + bytes(8), wide.type(2**bits - 1)
    for chosen, offset, shift, count, stride in _columns(len(values), bits):
        column = np.ndarray((count,), wide, padded, offset, (stride,))
        values[chosen] = (column >> wide.type(shift)) & mask
    if values[length:].any():
        raise UpdateRejectedError("A masked vector has bits behind its last value.", cure="They have to be zero.")
    return values[:length]


def _columns(length: int, bits: int) -> Iterator[tuple[slice, int, int, int, int]]:
    """Values at regular distances: which ones, the first byte, the bit in it, how many, and the bytes to the next."""
    period = _GROUP // math.gcd(bits, _GROUP)
    stride, groups = bits * period // 8, length // period
    for start in range(0, groups, _AT_ONCE):
        count = min(_AT_ONCE, groups - start)
        for value in range(period):
            chosen = slice(start * period + value, (start + count) * period, period)
            yield chosen, start * stride + value * bits // 8, value * bits % 8, count, stride
