"""One consistent archive of a state folder, taken while the folder is in use.

An archive that was unpacked with plain ``tar`` is a valid state folder, too. What its original has charged since is
then unknown, so the privacy ledger in every archive is frozen (incident ``restore``). Four things lift that freeze:
``fedvit restore`` where the ledger that it replaces proves what was charged; ``fedvit privacy unfreeze`` or ``fedvit
restore --nothing-since``, by which an operator vouches for it; and a new budget.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import IO

from fedvit.atomic_write import draft_in
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import StateError, UsageError
from fedvit.ports import ClockPort
from fedvit.store.archive import CHECKSUMS, DATABASE, WRITE_AHEAD_LOG
from fedvit.store.store import Store
from fedvit.store.versions import RELEASE_MARGIN

KEPT_FOLDERS = ("blobs", "keys")


def write_backup(home: Path, folder: Path, clock: ClockPort = SYSTEM_CLOCK) -> tuple[Path, str]:
    """Write ``fedvit-backup-<UTC time>.tar.gz`` into ``folder``; return its path and its SHA-256.

    The database is copied by SQLite's online backup first; blobs are immutable and written before the rows that name
    them, so whatever the copy refers to is there. Inside, ``checksums.json`` holds each file's SHA-256; an empty
    ``state.db-wal`` replaces one that ``tar`` would otherwise leave beside another state's database.

    Raises:
        StateError: there is no state at ``home``, or its database is damaged.
        UsageError: ``folder`` cannot be written to.
    """
    if not (home / DATABASE).exists():
        raise StateError(f"There is no fedvit state at {home}.", cure="Name its folder with --home.")
    now = clock.now()
    target = folder / f"fedvit-backup-{now:%Y%m%d-%H%M%S}.tar.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _copy_database(home / DATABASE, Path(scratch) / DATABASE, now)
            with draft_in(folder, 0o600) as draft:
                _write_archive(draft.file, home, Path(scratch))
                draft.publish(target)
    except OSError as error:
        raise UsageError(
            f"The backup cannot be written to {folder}: {error.strerror}.", cure="Name a folder with room and access."
        ) from None
    except sqlite3.Error as error:
        raise StateError(f"The state database {home / DATABASE} cannot be copied: {error}.") from None
    return target, sha256_of(target)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_database(source: Path, target: Path, at: datetime) -> None:
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
    with Store.open(target.parent) as store, store.transaction() as transaction:
        transaction.ledger.freeze_as_copy(at)
        transaction.releases.reserve(RELEASE_MARGIN)
        transaction.budget.withdraw_requests()


def _write_archive(file: IO[bytes], home: Path, scratch: Path) -> None:
    (scratch / WRITE_AHEAD_LOG).touch()
    files = {name: scratch / name for name in (DATABASE, WRITE_AHEAD_LOG)}
    for folder in KEPT_FOLDERS:
        # A dot file is still being written.
        paths = (p for p in (home / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
        files |= {str(p.relative_to(home)): p for p in sorted(paths)}
    checksums = scratch / CHECKSUMS
    checksums.write_text(json.dumps({name: sha256_of(p) for name, p in files.items()}, indent=1))
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(checksums, CHECKSUMS)
        for name, path in files.items():
            archive.add(path, name)
