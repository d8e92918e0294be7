"""Folders and files of secrets: created for their owner alone, and checked before they are used."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fedvit.errors import StateError

_LOG = logging.getLogger(__name__)
FOLDER_MODE = 0o700
FILE_MODE = 0o600
_OTHERS = 0o077


def open_private_folder(folder: Path) -> None:
    """Create a folder, and the folders above it, with mode 0700; or make sure that it admits its owner alone.

    Raises:
        StateError: see :func:`ensure_private`.
        OSError: it cannot be created.
    """
    for above in (*reversed(folder.parents), folder):
        if not above.exists():
            above.mkdir(mode=FOLDER_MODE, exist_ok=True)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    ensure_private([folder])


def open_own_folder(folder: Path) -> None:
    """The same for a folder in a place such as /tmp, where another user may have taken its name.

    Raises:
        StateError: it belongs to another user, or is no folder.
        OSError: it cannot be created.
    """
    with suppress(FileExistsError):
        folder.mkdir(FOLDER_MODE)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise StateError(f"{folder} is not a folder of this user.", cure="Remove it, or set TMPDIR to another place.")
    ensure_private([folder])


def ensure_private(paths: Iterable[Path]) -> None:
    """Take access to these files and folders from everybody but their owner; those that are missing are passed over.

    What belongs to this user is repaired, and each repair is logged.

    Raises:
        StateError: others have access to something that belongs to another user, or to a shared folder such as /tmp.
    """
    for path in paths:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        mode = stat.S_IMODE(status.st_mode)
        if not mode & _OTHERS:
            continue
        if status.st_uid != os.geteuid() or mode & stat.S_ISVTX:
            raise StateError(
                f"Other users have access to {path} (mode {mode:04o}), and it is not this user's to change.",
                cure=f"Let its owner run `chmod {mode & ~_OTHERS & 0o700:o} {path}`, or name another place.",
            )
        path.chmod(mode & ~_OTHERS)
        _LOG.warning("Other users had access to %s (mode %04o); they have none now.", path, mode)
