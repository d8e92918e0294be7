"""Randomised Hadamard rotation in blocks: it spreads a vector evenly over its coordinates and keeps all distances."""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Vector = npt.NDArray[np.float64]
# Larger ones take more arithmetic, smaller ones more passes over memory.
_LARGEST_FACTOR = 64


def rotate(vector: Vector, seed: bytes, block: int, padded: int) -> Vector:
    """``H D x``: random signs D, then the Hadamard matrix over each block, scaled to be orthonormal.

    Args:
        vector: [length]; zeros are added up to ``padded``.
        seed: public; the same for all whose vectors are added up.
        block: a power of two.
        padded: a multiple of ``block``.

    Returns:
        [padded], with the norm of ``vector``.
    """
    rotated = np.zeros(padded)
    rotated[: len(vector)] = vector
    rotated *= _signs(seed, padded)
    return _hadamard(rotated, block)


def rotate_back(rotated: Vector, seed: bytes, block: int, length: int) -> Vector:
    """The inverse of :func:`rotate`: [length]."""
    vector = _hadamard(rotated, block)
    vector *= _signs(seed, len(vector))
    return vector[:length]


def _hadamard(vector: Vector, block: int) -> Vector:
    """The product with the Hadamard matrix of each block, as a Kronecker product of small ones."""
    rest = block
    while rest > 1:
        factor = min(rest, _LARGEST_FACTOR)
        rest //= factor
        shaped = vector.reshape(-1, factor, rest)
        vector = (shaped[:, :, 0] @ _matrix(factor) if rest == 1 else _matrix(factor) @ shaped).reshape(-1)
    return vector


@cache
def _matrix(size: int) -> Vector:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def _signs(seed: bytes, count: int) -> npt.NDArray[np.int8]:
    key = hashlib.sha256(b"fedvit-rotation/" + seed).digest()
    random = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(-(-count // 8)))
    bits = np.unpackbits(np.frombuffer(random, np.uint8), count=count).view(np.int8)
    return np.asarray(1 - 2 * bits, np.int8)
