"""In-memory double of the blob store."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from fedvit.errors import NotFoundError


class MemoryBlobStore:
    """Implements :class:`fedvit.ports.BlobStorePort` in memory."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def put(self, content: bytes) -> str:
        """See :meth:`fedvit.ports.BlobStorePort.put`."""
        digest = hashlib.sha256(content).hexdigest()
        self._contents[digest] = bytes(content)
        return digest

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        """See :meth:`fedvit.ports.BlobStorePort.put_pieces`."""
        return self.put(b"".join(pieces))

    def get(self, digest: str) -> bytes:
        """See :meth:`fedvit.ports.BlobStorePort.get`. Nothing can damage a blob in memory."""
        if digest not in self._contents:
            raise NotFoundError(f"There is no blob {digest[:80]!r}.", cure="Store it first.")
        return self._contents[digest]

    def get_range(self, digest: str, start: int, stop: int) -> bytes:
        """See :meth:`fedvit.ports.BlobStorePort.get_range`."""
        return self.get(digest)[start:stop]

    def size(self, digest: str) -> int:
        """See :meth:`fedvit.ports.BlobStorePort.size`."""
        return len(self.get(digest))
