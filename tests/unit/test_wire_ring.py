"""Packed vectors of ring integers."""

from __future__ import annotations

import numpy as np
import pytest

from fedvit.errors import UpdateRejectedError
from fedvit.wire.ring import pack_ring, packed_bytes, unpack_ring


@pytest.mark.parametrize("bits", range(1, 33))
def test_a_vector_survives_packing(bits: int) -> None:
    for length in (0, 1, 7, 8, 9, 200_001):
        vector = np.random.default_rng(bits).integers(0, 2**bits, length, np.uint64).astype(np.uint32)
        content = pack_ring(vector, bits)
        assert len(content) == packed_bytes(length, bits)
        np.testing.assert_array_equal(unpack_ring(content, length, bits), vector)


def test_the_first_value_has_the_first_bits() -> None:
    assert pack_ring(np.array([1, 2, 3], np.uint32), 4) == bytes([0x21, 0x03, 0, 0])


def test_what_is_no_packed_vector_is_refused() -> None:
    content = pack_ring(np.arange(9, dtype=np.uint32), 5)
    for wrong in (content[:-1], content + b"\0", b"", content[:-1] + b"\x80"):
        with pytest.raises(UpdateRejectedError):
            unpack_ring(wrong, 9, 5)
    with pytest.raises(ValueError, match="bits"):
        pack_ring(np.array([32], np.uint32), 5)
