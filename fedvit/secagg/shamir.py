"""Secret sharing over a prime field of 256 bits (Shamir 1979): ``threshold`` shares give the secret, fewer nothing."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 - 189
"""The largest prime below 2^256."""
SECRET_BYTES = 32


def random_secret(entropy: Callable[[int], bytes] = secrets.token_bytes) -> bytes:
    """32 random bytes below :data:`PRIME`, big-endian."""
    while int.from_bytes(drawn := entropy(SECRET_BYTES), "big") >= PRIME:
        pass
    return drawn


def split(
    secret: bytes, threshold: int, places: Sequence[int], entropy: Callable[[int], bytes] = secrets.token_bytes
) -> dict[int, bytes]:
    """A share of 32 bytes for each place, a number from 1 on.

    Raises:
        ValueError: the secret is none of :func:`random_secret`, or there are fewer places than the threshold.
    """
    value = int.from_bytes(secret, "big")
    if len(secret) != SECRET_BYTES or value >= PRIME or not 1 <= threshold <= len(places) or min(places) < 1:
        raise ValueError("this secret cannot be shared among these places")
    coefficients = [value, *(int.from_bytes(random_secret(entropy), "big") for _ in range(threshold - 1))]
    return {place: _at(coefficients, place).to_bytes(SECRET_BYTES, "big") for place in places}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly ``threshold`` shares, by place; other shares give other bytes.

    Raises:
        ValueError: a share is no element of the field.
    """
    places = tuple(sorted(shares))
    values = [int.from_bytes(shares[place], "big") for place in places]
    if not places or any(len(shares[place]) != SECRET_BYTES for place in places) or max(values) >= PRIME:
        raise ValueError("a share is no element of the field")
    weights = _weights(places)
    return (sum(w * v for w, v in zip(weights, values, strict=True)) % PRIME).to_bytes(SECRET_BYTES, "big")


def _at(coefficients: list[int], place: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * place + coefficient) % PRIME
    return value


@lru_cache(maxsize=1024)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's weights of these places for the value at 0."""
    weights = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above, below = above * other % PRIME, below * (other - place) % PRIME
        weights.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(weights)
