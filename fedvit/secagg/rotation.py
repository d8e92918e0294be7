"""Randomised Hadamard rotation: signs from a public seed, then an orthogonal matrix whose entries are equal in size.

Ailon and Chazelle 2009 (SIAM J. Comput. 39) and, for distributed sums, Suresh et al. 2017 (arXiv:1611.00429). All
entries of the matrix are ``+-1/sqrt(n)``, so that each coordinate of a rotated vector x is sub-Gaussian with variance
``|x|^2 / n`` over the signs (Hoeffding's lemma). The matrix is the Kronecker product of a matrix by Paley 1933, of
order q + 1 for a prime q = 3 mod 4, and of matrices by Sylvester. Such orders lie close together: 5.5 million values
are padded by 0.1%, where a power of two would pad them by 53%.
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Vector = npt.NDArray[np.float64]

_PALEY_ORDERS = (1, 12, 20, 44, 60, 68, 72, 84, 104, 108)
"""q + 1 for each prime q = 3 mod 4 below 128, without those that are another times a power of two."""
_MOST_DOUBLINGS = 6
"""Largest Sylvester factor, as a power of two: the least arithmetic without more passes over memory."""


def padded_length(length: int) -> int:
    """The smallest order of a known Hadamard matrix ``p * 2^k`` that is at least ``length``; at most 60% above it.

    From 1,000 values on, at most 12% above it.
    """
    return min(_order(length, paley) for paley in _PALEY_ORDERS)


def rotate(values: Vector, seed: bytes, factor: float = 1.0) -> Vector:
    """``factor`` times the rotated ``values`` [length], padded to [:func:`padded_length`].

    The computed vector differs from the exact one by less than ``2^-40 * factor * |values|`` in L2 norm.

    Args:
        values: float64, finite.
        seed: public; decides the signs.
        factor: multiplies the result, at no cost.
    """
    padded = np.zeros(padded_length(values.size))
    np.multiply(values, _signs(seed, values.size), out=padded[: values.size])
    padded[: values.size] *= factor / math.sqrt(padded.size)
    return _multiply(padded, inverse=False)


def rotate_back(rotated: Vector, seed: bytes, length: int, factor: float = 1.0) -> Vector:
    """The first ``length`` values of ``factor`` times the vector that :func:`rotate` turned into ``rotated``."""
    values = _multiply(rotated, inverse=True)[:length]
    values *= factor / math.sqrt(rotated.size)
    values *= _signs(seed, length)
    return values


def _order(length: int, paley: int) -> int:
    return paley << max(0, (-(-length // paley) - 1).bit_length())


def _signs(seed: bytes, count: int) -> npt.NDArray[np.int8]:
    """``count`` public signs, +1 or -1: AES-256 in counter mode, keyed by the seed's SHA-256."""
    cipher = Cipher(algorithms.AES(hashlib.sha256(b"rotation" + seed).digest()), modes.CTR(bytes(16))).encryptor()
    bits = np.unpackbits(np.frombuffer(cipher.update(bytes(-(-count // 8))), dtype=np.uint8), count=count)
    signs = bits.view(np.int8)
    return 1 - 2 * signs


def _multiply(values: Vector, *, inverse: bool) -> Vector:
    """Product of the Hadamard matrix, entries +-1, or of its transpose with ``values``: one factor after another."""
    paley = next(order for order in reversed(_PALEY_ORDERS) if _order(values.size, order) == values.size)
    factors, doublings = [paley], (values.size // paley).bit_length() - 1
    steps = -(-doublings // _MOST_DOUBLINGS)
    factors += [1 << ((doublings + step) // steps) for step in range(steps)]
    before = 1
    for order in factors:
        matrix = _hadamard(order).T if inverse else _hadamard(order)
        after = values.size // (before * order)
        if after == 1:
            values = values.reshape(before, order) @ matrix.T
        elif order > 1:
            values = matrix @ values.reshape(before, order, after)
        before *= order
    return values.reshape(-1)


@cache
def _hadamard(order: int) -> Vector:
    """A Hadamard matrix [order, order]: Sylvester's for a power of two, else Paley's first construction."""
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix
    prime = order - 1
    residues = np.full(prime, -1.0)
    residues[np.arange(1, prime) ** 2 % prime] = 1.0
    residues[0] = 0.0
    matrix = np.eye(order)
    matrix[0, 1:], matrix[1:, 0] = 1.0, -1.0
    matrix[1:, 1:] += residues[np.subtract.outer(np.arange(prime), np.arange(prime)) % prime]
    return matrix
