"""Weights of a version, read back from the store."""

from __future__ import annotations

from collections.abc import Mapping

from fedvit.store.store import Store
from fedvit.types import FloatArray
from fedvit.wire.tensors import decode_weights

MAX_WEIGHTS_BYTES = 8 * 2**30


def stored_weights(
    store: Store, digest: str, expected: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, FloatArray]:
    """The weights blob ``digest``.

    Raises:
        NotFoundError, IntegrityError: the blob is missing or damaged.
        UpdateRejectedError: it does not have the names and shapes that are ``expected``.
    """
    return decode_weights(store.blobs.get(digest), expected=expected, max_bytes=MAX_WEIGHTS_BYTES)
