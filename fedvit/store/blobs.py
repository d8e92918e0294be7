"""Content-addressed bytes in a folder: ``<root>/sha256/ab/<digest>``."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

from fedvit.errors import IntegrityError, NotFoundError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class FileBlobStore:
    """Implements :class:`fedvit.ports.BlobStorePort` on a local file system.

    Safe for several processes at once: a blob appears whole under its name or not at all.

    Args:
        root: the folder to keep blobs under; created with the first blob.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, content: bytes) -> str:
        """Store ``content`` durably and return its SHA-256, hex. Idempotent; mends a copy that has been damaged."""
        digest = hashlib.sha256(content).hexdigest()
        target = self._locate(digest)
        if not _holds(target, content):
            _make_folder(target.parent, self._root)
            write_atomically(target, content)
        return digest

    def put_pieces(self, pieces: Sequence[bytes | memoryview]) -> str:
        """Store large pieces as one blob without joining them first; hashed by one thread while another writes."""
        draft_folder = self._root / "sha256"
        _make_folder(draft_folder, self._root)
        with ThreadPoolExecutor(max_workers=1) as other:
            hashing = other.submit(_hash, pieces)
            draft = _write_draft(draft_folder, pieces)
            try:
                digest = hashing.result()
                target = self._locate(digest)
                _make_folder(target.parent, self._root)
                os.replace(draft, target)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
        fsync_folder(target.parent)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes of ``digest``, verified at every read.

        Raises:
            NotFoundError: no such blob, or ``digest`` is not a SHA-256 in lowercase hex.
            IntegrityError: the stored bytes no longer match.
        """
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

    def path(self, digest: str) -> Path:
        """Where the blob lies, for a reader that wants a file; its content is not verified.

        Raises:
            NotFoundError: no such blob, or ``digest`` is not a SHA-256 in lowercase hex.
        """
        target = self._locate(digest)
        if not target.is_file():
            raise _missing(digest)
        return target

    def _locate(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFoundError(
                f"{digest[:80]!r} names no blob.", cure="A blob is named by its SHA-256: 64 lowercase hex digits."
            )
        return self._root / "sha256" / digest[:2] / digest


def _missing(digest: str) -> NotFoundError:
    return NotFoundError(f"There is no blob {digest}.", cure="Store it first, or restore it from a backup.")


def _holds(target: Path, content: bytes) -> bool:
    try:
        return target.stat().st_size == len(content) and target.read_bytes() == content
    except FileNotFoundError:
        return False


def _make_folder(folder: Path, root: Path) -> None:
    """Create ``folder`` and flush every parent's entry up to ``root``, or a power cut could lose the path to a blob."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    while folder != root:
        folder = folder.parent
        fsync_folder(folder)


def _hash(pieces: Sequence[bytes | memoryview]) -> str:
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def write_atomically(target: Path, content: bytes) -> None:
    """Write a file so that whoever looks finds the old one or all of the new one, also after a power cut."""
    draft = _write_draft(target.parent, [content])
    try:
        os.replace(draft, target)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync_folder(target.parent)


def _write_draft(folder: Path, pieces: Sequence[bytes | memoryview]) -> Path:
    """A file beside its later place, flushed to disk."""
    handle, name = tempfile.mkstemp(prefix=".tmp-", dir=folder)
    try:
        with os.fdopen(handle, "wb", buffering=0) as file:
            for piece in pieces:
                _write_all(file, piece)
            os.fsync(file.fileno())
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Path(name)


def _write_all(file: FileIO, piece: bytes | memoryview) -> None:
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: a rename survives a power cut only after this."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
