"""One consistent archive of a state folder, taken while it is in use."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

from fedvit.errors import StateError, UsageError
from fedvit.types import utc_now

DATABASE = "state.db"
CHECKSUMS = "checksums.json"
KEPT_FOLDERS = ("blobs", "keys")


def write_backup(home: Path, folder: Path) -> tuple[Path, str]:
    """Write ``fedvit-backup-<UTC time>.tar.gz`` into ``folder``; return its path and its SHA-256.

    The database is copied by SQLite's online backup first; blobs are immutable and written before the rows that name
    them, so whatever the copy refers to is there. Inside, ``checksums.json`` holds each file's SHA-256.

    Raises:
        StateError: there is no state at ``home``.
        UsageError: ``folder`` cannot be written to.
    """
    if not (home / DATABASE).exists():
        raise StateError(f"There is no fedvit state at {home}.", cure="Name its folder with --home.")
    target = folder / f"fedvit-backup-{utc_now():%Y%m%d-%H%M%S}.tar.gz"
    draft = target.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _copy_database(home / DATABASE, Path(scratch) / DATABASE)
            _write_archive(draft, home, Path(scratch))
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise UsageError(
            f"The backup cannot be written to {folder}: {error.strerror}.", cure="Name a folder with room and access."
        ) from None
    draft.replace(target)
    return target, _sha256(target)


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)


def _write_archive(path: Path, home: Path, scratch: Path) -> None:
    files = {DATABASE: scratch / DATABASE}
    for folder in KEPT_FOLDERS:
        # A dot file is one that is still being written.
        found = (p for p in (home / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
        files |= {str(p.relative_to(home)): p for p in sorted(found)}
    checksums = scratch / CHECKSUMS
    checksums.write_text(json.dumps({name: _sha256(p) for name, p in files.items()}, indent=1))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as archive:
        archive.add(checksums, CHECKSUMS)
        for name, file in files.items():
            archive.add(file, name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
