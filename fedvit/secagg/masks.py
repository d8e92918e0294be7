"""Masks: pseudo-random vectors in the ring, expanded from secrets of 32 bytes by AES-256 in counter mode.

A key encrypts one stream only: it is derived by HKDF-SHA256 (RFC 5869) from the secret, the session and the purpose.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

Ring = npt.NDArray[np.uint32]
"""A vector of integers modulo ``2^bits``."""
_KEY_BYTES = 32
# Fits the processor's cache, so that every mask is added to words that are there.
_WORDS_AT_ONCE = 1 << 15
_BLOCK = 16


def derived_key(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose; ``purpose`` names the session and all whom the key concerns."""
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=purpose.encode()).derive(secret)


def agreed_secret(own: bytes, other: bytes) -> bytes:
    """The secret of two key pairs, from one's private and the other's public key (X25519, RFC 7748).

    Raises:
        ValueError: the public key has a small order: the secret would be known to everybody.
    """
    return X25519PrivateKey.from_private_bytes(own).exchange(X25519PublicKey.from_public_bytes(other))


def public_key(private: bytes) -> bytes:
    """The public X25519 key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def apply_masks(vector: Ring, bits: int, keys: Iterable[tuple[bytes, int]]) -> None:
    """Add, or subtract where the sign is -1, the mask of each key to ``vector``, in place, modulo ``2^bits``.

    Args:
        vector: [length], values of any size.
        keys: of :func:`derived_key`, each with its sign, 1 or -1.
    """
    streams = [(_stream(key), sign) for key, sign in keys]
    zeros = bytes(4 * _WORDS_AT_ONCE)
    buffer = bytearray(4 * _WORDS_AT_ONCE + _BLOCK)
    words = np.frombuffer(buffer, "<u4", count=_WORDS_AT_ONCE)
    reduce = np.uint32(2**bits - 1)
    for start in range(0, len(vector), _WORDS_AT_ONCE):
        piece = vector[start : start + _WORDS_AT_ONCE]
        source, mask = memoryview(zeros)[: 4 * len(piece)], words[: len(piece)]
        for stream, sign in streams:
            stream.update_into(source, buffer)
            (np.add if sign > 0 else np.subtract)(piece, mask, out=piece)
        piece &= reduce


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK))).encryptor()
