"""Atomic and durable file writes: temporary file in the same folder, fsync, rename, fsync of the folder.

A reader, another process and a program that starts after a power cut find the old file or the whole new one.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_DRAFT = ".tmp-"
DEFAULT_MODE = 0o666
"""The mode of a new file, less the umask of the process."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A temporary file that gets its name when it is whole. Its own name begins with a dot."""

    path: Path
    file: BinaryIO

    def publish(self, target: Path, *, durable: bool = True) -> None:
        """Give the file the name ``target``, replacing a file that has it."""
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        os.replace(self.path, target)
        if durable:
            fsync_folder(target.parent)

    def publish_new(self, target: Path) -> bool:
        """Give the file the name ``target`` unless it is taken: of several processes, exactly one gets True."""
        self.file.flush()
        os.fsync(self.file.fileno())
        try:
            os.link(self.path, target)
        except FileExistsError:
            return False
        fsync_folder(target.parent)
        return True


@contextmanager
def draft_in(folder: Path, mode: int = DEFAULT_MODE) -> Iterator[Draft]:
    """A temporary file in ``folder``, deleted at the end of the block unless it was published."""
    path = folder / f"{_DRAFT}{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield Draft(path, file)
    finally:
        path.unlink(missing_ok=True)


def remove_drafts(folder: Path) -> None:
    """Remove the temporary files that killed processes left below ``folder``; no other process may write there now."""
    for path in folder.rglob(f"{_DRAFT}*"):
        path.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | str, *, mode: int = DEFAULT_MODE, durable: bool = True) -> None:
    """Create or replace a file with ``content``, text as UTF-8; missing folders are created.

    Args:
        durable: False leaves out the fsync: for files that need not survive a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_in(path.parent, mode) as draft:
        draft.file.write(content.encode() if isinstance(content, str) else content)
        draft.publish(path, durable=durable)


def create_atomically(path: Path, content: bytes, *, mode: int = DEFAULT_MODE) -> bool:
    """Create a file with ``content``; False where a file of that name exists, which stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_in(path.parent, mode) as draft:
        draft.file.write(content)
        return draft.publish_new(path)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk: a new name survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder; they write its entries through.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def is_unicode(name: str) -> bool:
    """Whether a file's name is valid Unicode; the name of one with other bytes, such as Latin-1, is not."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
