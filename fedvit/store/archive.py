"""Unpacking of a backup's tar.gz: bounded in size, and limited to files that a backup can hold."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedvit.errors import FedvitError, IntegrityError, UsageError
from fedvit.private_files import FILE_MODE, FOLDER_MODE

DATABASE = "state.db"
WRITE_AHEAD_LOG = "state.db-wal"
CHECKSUMS = "checksums.json"
MAX_FILES = 1_000_000
MAX_CHECKSUMS_BYTES = 256 * 2**20
_CHUNK = 2**20
_NAME = re.compile(
    r"state\.db|state\.db-wal|checksums\.json|keys/[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
    r"|blobs/sha256/([0-9a-f]{2})/(?P<digest>\1[0-9a-f]{62})"
)


def unpack(payload: IO[bytes], folder: Path) -> None:
    """Unpack a tar.gz into the empty ``folder``, each file durably and with its checksum verified.

    Raises:
        IntegrityError: it is not as :func:`~fedvit.store.backup.write_backup` writes it.
    """
    digests = dict(_unpacked(payload, folder))
    if DATABASE not in digests or CHECKSUMS not in digests:
        raise IntegrityError("it holds no database, or no checksums")
    del digests[CHECKSUMS]
    if json.loads((folder / CHECKSUMS).read_bytes()) != digests:
        raise IntegrityError("its files are not those that its checksums name")


@contextmanager
def refused(archive: Path) -> Iterator[None]:
    """Report any fault of the archive in one form.

    Raises:
        IntegrityError: it is no archive of :func:`~fedvit.store.backup.write_backup`, or not as it was written.
        UsageError: it cannot be read, or the disk is full.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise UsageError(f"The archive {archive} cannot be unpacked: {error.strerror or error}.") from error
        # Unchecked content can fail in any way.
        why = error.message if isinstance(error, FedvitError) else str(error) or type(error).__name__
        cure = "Nothing was changed. Take another backup, or name the key that signed this one with --verify-key."
        raise IntegrityError(f"The archive {archive} is refused: {why.rstrip('.')}.", cure=cure) from error


def _unpacked(payload: IO[bytes], folder: Path) -> Iterator[tuple[str, str]]:
    """Write each file below ``folder``; yield its name and the SHA-256 of its content."""
    room = shutil.disk_usage(folder).free
    names: set[str] = set()
    with gzip.open(payload) as raw, tarfile.open(fileobj=_Bounded(raw), mode="r:") as members:
        for member in members:
            digest = _check(member)
            room -= member.size
            if member.name in names or len(names) >= MAX_FILES or room < 0:
                raise IntegrityError(f"{member.name} is there twice, or there is too much in it")
            names.add(member.name)
            content = members.extractfile(member)
            assert content is not None
            actual = _write(content, folder / member.name)
            if digest not in (None, actual):
                raise IntegrityError(f"{member.name} holds something else")
            yield member.name, actual
        # Read to its end, where gzip has its own checksum; after the files there is only padding.
        if len(raw.read(_CHUNK)) == _CHUNK:
            raise IntegrityError("something follows its files")


def _check(member: tarfile.TarInfo) -> str | None:
    """Admit only a plain file under a name that a backup has; return the digest that its name states, if any."""
    named = _NAME.fullmatch(member.name)
    if named is None or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise IntegrityError(f"{member.name[:100]!r} is nothing that a backup holds")
    # SQLite would replay a log that is not empty into the database.
    if (member.name == WRITE_AHEAD_LOG and member.size) or (
        member.name == CHECKSUMS and member.size > MAX_CHECKSUMS_BYTES
    ):
        raise IntegrityError(f"{member.name} is too large")
    return named["digest"]


def _write(content: IO[bytes], target: Path) -> str:
    target.parent.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
    digest = hashlib.sha256()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


class _Bounded:
    """A file that is never read in large pieces: a header that claims to be long must not fill the memory."""

    def __init__(self, raw: gzip.GzipFile) -> None:
        self._raw = raw

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise IntegrityError("one of its headers is too long")
        return self._raw.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)
