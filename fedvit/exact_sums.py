"""Sums of arrays whose bits do not depend on the order of the addends or their grouping into partial sums.

Pre-rounding (Demmel and Nguyen 2015, IEEE Trans. Computers 64(7)): every addend is rounded once, to a multiple of
:data:`QUANTUM`. From then on float64 addition makes no error while the sum stays below :data:`ROOM`, so that it is
associative; what grows beyond is carried into a second, coarser array, exactly again. A sum takes these two arrays,
however many addends it has and however large they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Sums = dict[str, npt.NDArray[np.float64]]
Arrays = Mapping[str, npt.NDArray[np.floating]]

QUANTUM = 2.0**-40
"""The unit to which an addend is rounded: a hundred-thousandth of the last bit of a float32 weight of 0.01."""
ROOM = 2.0**11
"""The maximum sum of the addends' magnitudes before a carry."""
_COARSE = 2.0**9
# Adding 1.5 * 2^52 of a unit to a float64 leaves no bits below that unit.
_ROUND, _ROUND_COARSE = 1.5 * 2.0**52 * QUANTUM, 1.5 * 2.0**52 * _COARSE
_BLOCK = 1 << 16
"""How many numbers, with intermediate results, fit the processor's cache."""


def peak_of(update: Arrays) -> float:
    """The largest magnitude in an update; NaN or infinity if there is one, 0 without numbers."""
    return largest(float(bound) for array in update.values() if array.size for bound in (array.max(), -array.min()))


def largest(numbers: Iterable[float]) -> float:
    """The largest of them and 0; NaN if there is one, which max() would drop."""
    top = 0.0
    for number in numbers:
        if number != number:
            return number
        if number > top:
            top = number
    return top


def zeros(shapes: Mapping[str, tuple[int, ...]], dtype: npt.DTypeLike = np.float64) -> dict[str, npt.NDArray[Any]]:
    """Arrays of zeros by name, in one piece of memory.

    The system maps a large piece in huge pages. Mapping small pages one by one would take longer than the sum itself.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = np.split(np.zeros(sum(sizes), dtype), np.cumsum(sizes)[:-1]) if sizes else []
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def blocks(size: int) -> Iterator[slice]:
    """Slices that divide so many numbers into pieces for the processor's cache."""
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def subtract(
    local: npt.ArrayLike, base: npt.NDArray[np.float32], out: npt.NDArray[np.float32], *, squares: bool = False
) -> tuple[float, float]:
    """Write ``local - base`` to ``out``, piece by piece in the processor's cache.

    Args:
        out: C-contiguous; ``local`` and ``base`` may have any order.
        squares: whether their sum is wanted.

    Returns:
        The peak of ``out``, and its :func:`squared_norm`, or 0 where that is not wanted.

    Raises:
        ValueError: ``out`` is not C-contiguous, so that a flat view of it would be a copy.
    """
    if not out.flags.c_contiguous:
        raise ValueError("out is not C-contiguous")
    one, other, target = np.asarray(local).reshape(-1), base.reshape(-1), out.reshape(-1)
    extremes, sums, buffer = list[float](), list[float](), np.empty(min(_BLOCK, target.size) if squares else 0)
    for at in blocks(target.size):
        piece = np.subtract(one[at], other[at], out=target[at], casting="same_kind")
        extremes += [float(piece.max()), -float(piece.min())]
        if squares:
            sums.append(_sum_of_squares(piece, buffer[: piece.size]))
    return largest(extremes), sum(sums)


def squared_norm(array: npt.NDArray[np.floating]) -> float:
    """The sum of an array's squares, in float64; NaN and infinity stay what they are."""
    flat, buffer = array.reshape(-1), np.empty(min(_BLOCK, array.size))
    return sum(_sum_of_squares(flat[at], buffer[: at.stop - at.start]) for at in blocks(flat.size))


def _sum_of_squares(piece: npt.NDArray[np.floating], buffer: npt.NDArray[np.float64]) -> float:
    return float(np.square(_float64(piece, buffer), out=buffer).sum())


class ExactSums:
    """The sum of updates by name, float64, exact after the one rounding of each addend.

    That holds while all magnitudes together stay below 2^60, which no training reaches; beyond it, sums round.

    Args:
        shapes: of the arrays, by name.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._low: Sums = zeros(shapes)
        self._high: Sums | None = None
        self._used = 0.0

    def add(self, update: Arrays, weight: float = 1.0, *, peak: float | None = None) -> None:
        """Add ``weight * update``.

        Args:
            update: finite, by the names of the sums; a name that is missing adds nothing.
            peak: at least the largest magnitude of ``weight * update``, where that is known already.
        """
        peak = abs(weight) * peak_of(update) if peak is None else peak
        if self._used + peak + QUANTUM > ROOM:
            self._carry()
        coarse = self._used + peak + QUANTUM > ROOM
        self._used += (_COARSE / 2 if coarse else peak) + QUANTUM
        buffer = np.empty(min(_BLOCK, max((array.size for array in update.values()), default=0)))
        for name, array in update.items():
            high = self._upper(name) if coarse else None
            flat, low = array.reshape(-1), self._low[name].reshape(-1)
            for at in blocks(flat.size):
                _add_block(flat[at], weight, low[at], None if high is None else high[at], buffer[: at.stop - at.start])

    def parts(self) -> tuple[Sums, Sums]:
        """Two arrays for each name, whose sum is exact; the second ones are empty where nothing was carried.

        The caller may keep them, and adds nothing afterwards.
        """
        return self._low, self._high or {}

    def totals(self) -> Sums:
        """The sums, each rounded once; the caller may keep them, and adds nothing afterwards."""
        if self._high is None:
            return self._low
        return {name: np.asarray(low + self._high[name]) for name, low in self._low.items()}

    def _carry(self) -> None:
        for name, low in self._low.items():
            moved = (low + _ROUND_COARSE) - _ROUND_COARSE
            self._upper(name).reshape(low.shape)[...] += moved
            low -= moved
        self._used = _COARSE / 2

    def _upper(self, name: str) -> npt.NDArray[np.float64]:
        if self._high is None:
            self._high = zeros({name: low.shape for name, low in self._low.items()})
        return self._high[name].reshape(-1)


def _float64(piece: npt.NDArray[np.floating], buffer: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """A piece as float64: itself, or a copy in the buffer."""
    if piece.dtype == np.float64:
        return piece.astype(np.float64, copy=False)
    buffer[...] = piece
    return buffer


def _add_block(
    piece: npt.NDArray[np.floating],
    weight: float,
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64] | None,
    buffer: npt.NDArray[np.float64],
) -> None:
    """Add ``weight * piece`` to ``low`` and ``high``."""
    addend = _float64(piece, buffer)
    if weight != 1.0:
        addend = np.multiply(addend, weight, out=buffer)
    if high is not None:
        moved = (addend + _ROUND_COARSE) - _ROUND_COARSE
        high += moved
        addend = np.subtract(addend, moved, out=buffer)
    np.add(addend, _ROUND, out=buffer)
    buffer -= _ROUND
    low += buffer
