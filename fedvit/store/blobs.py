"""Content-addressed bytes in a folder: ``<root>/sha256/ab/<digest>``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedvit.atomic_write import draft_in, fsync_folder
from fedvit.errors import IntegrityError, NotFoundError

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODE = 0o600


class FileBlobStore:
    """Implements :class:`fedvit.ports.BlobStorePort` on a local file system.

    Safe for several processes at once: a blob appears whole under its name or not at all. Putting a blob again mends a
    copy that has been damaged.

    Args:
        root: the folder of the blobs; created with the first blob.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, content: bytes) -> str:
        """Store ``content`` durably and return its SHA-256, hex."""
        digest = hashlib.sha256(content).hexdigest()
        target = self._locate(digest)
        if not _holds(target, content):
            self._make_folder(target.parent)
            with draft_in(target.parent, _MODE) as draft:
                draft.file.write(content)
                draft.publish(target)
        return digest

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        """Store the pieces durably as one blob; one thread computes the digest while another writes."""
        folder = self._root / "sha256"
        self._make_folder(folder)
        with ThreadPoolExecutor(max_workers=1) as other, draft_in(folder, _MODE) as draft:
            hashing = other.submit(_hash, pieces)
            for piece in pieces:
                draft.file.write(piece)
            digest = hashing.result()
            target = self._locate(digest)
            self._make_folder(target.parent)
            draft.publish(target)
        return digest

    def get(self, digest: str) -> bytes:
        target = self._locate(digest)
        try:
            content = target.read_bytes()
        except FileNotFoundError:
            raise _missing(digest) from None
        actual = hashlib.sha256(content).hexdigest()
        if actual != digest:
            raise IntegrityError(
                f"Blob {target} no longer matches its name: its bytes hash to {actual}.",
                cure="Restore that file from a backup.",
                digest=digest,
            )
        return content

    def get_range(self, digest: str, start: int, stop: int) -> bytes:
        try:
            with self._locate(digest).open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except FileNotFoundError:
            raise _missing(digest) from None

    def size(self, digest: str) -> int:
        target = self._locate(digest)
        if not target.is_file():
            raise _missing(digest)
        return target.stat().st_size

    def _locate(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFoundError(
                f"{digest[:80]!r} names no blob.", cure="A blob is named by its SHA-256: 64 lowercase hex digits."
            )
        return self._root / "sha256" / digest[:2] / digest

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and flush the entries of its parents up to the root: a power cut must not lose the path."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        while folder != self._root:
            folder = folder.parent
            fsync_folder(folder)


def _missing(digest: str) -> NotFoundError:
    return NotFoundError(f"There is no blob {digest}.", cure="Store it first, or restore it from a backup.")


def _holds(target: Path, content: bytes) -> bool:
    try:
        return target.stat().st_size == len(content) and target.read_bytes() == content
    except FileNotFoundError:
        return False


def _hash(pieces: Sequence[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
