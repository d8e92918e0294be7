"""Advisory locks on a state folder. They die with their process, so none has to be cleaned up after a crash."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedvit.errors import StateError
from fedvit.private_files import open_private_folder

LOCK_TIMEOUT_S = 60.0


@contextmanager
def system_lock(home: Path) -> Iterator[None]:
    """One system to a state folder.

    Raises:
        StateError: another one runs on it, or it is another user's.
    """
    open_private_folder(home)
    with (home / "system.lock").open("w") as file:
        if not _try_lock(file.fileno()):
            raise StateError(
                f"Another fedvit is using the state folder {home}.",
                cure="Stop it with `fedvit down`, or choose another folder with --home.",
            )
        yield


@contextmanager
def opening_lock(home: Path) -> Iterator[None]:
    """One opener at a time checks and migrates; while it is held, nobody else opens the folder's store.

    Raises:
        StateError: another process has held it for a minute.
    """
    path = home / "state.lock"
    with path.open("ab") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise StateError(
                    f"Another process has held {path} for {LOCK_TIMEOUT_S:.0f} s.",
                    cure="End the process that is opening this state folder, then try again.",
                )
            time.sleep(0.02)
        yield


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
