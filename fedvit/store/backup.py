"""One consistent backup of a state folder, taken while the folder is in use: signed, and encrypted unless asked not to.

A backup that was unpacked by hand is a valid state folder, too. What its original has charged since is then unknown, so
the privacy ledger in every backup is frozen (incident ``restore``). Four things lift that freeze: ``fedvit restore``
where the ledger that it replaces proves what was charged; ``fedvit privacy unfreeze`` or ``fedvit restore
--nothing-since``, by which an operator vouches for it; and a new budget.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import IO, Any

from fedvit.atomic_write import draft_in
from fedvit.clock import SYSTEM_CLOCK
from fedvit.config import BackupConfig
from fedvit.errors import StateError, UsageError
from fedvit.ports import ClockPort
from fedvit.private_files import FILE_MODE, FOLDER_MODE
from fedvit.store.archive import CHECKSUMS, DATABASE, WRITE_AHEAD_LOG
from fedvit.store.backup_header import HEADER_BYTES, BackupHeader, PayloadReader, PayloadWriter, root_key_id
from fedvit.store.backup_keys import KEYS, Recipients, decrypted, recipients_of, write_encrypted
from fedvit.store.store import Store
from fedvit.store.versions import RELEASE_MARGIN
from fedvit.wire.manifest import load_or_create_signing_key
from fedvit.wire.signatures import key_id

BLOBS = "blobs"
KEPT_FOLDERS = (BLOBS, KEYS)
SUFFIX = ".bak"
DEFAULTS = BackupConfig()
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was written.

    Attributes:
        archive: its file.
        sha256: of the file, hex.
        encrypted: whether it is.
        key_file: the key in the state folder, where nothing else opens it.
    """

    archive: Path
    sha256: str
    encrypted: bool
    key_file: Path | None


def write_backup(
    home: Path,
    folder: Path,
    config: BackupConfig = DEFAULTS,
    *,
    include_keys: bool = False,
    encrypt: bool = True,
    clock: ClockPort = SYSTEM_CLOCK,
) -> Backup:
    """Write ``fedvit-backup-<UTC time>.bak`` into ``folder``.

    The database is copied by SQLite's online backup first; blobs are immutable and written before the rows that name
    them, so whatever the copy refers to is there. Inside, ``checksums.json`` holds each file's SHA-256; an empty
    ``state.db-wal`` replaces one that unpacking by hand would otherwise leave beside another state's database.

    Args:
        config: whom the backup is encrypted to.
        include_keys: put the keys of the system into it, too.
        encrypt: False writes a backup that everybody can read, and that nobody can change unnoticed.

    Raises:
        StateError: there is no state at ``home``, or its database is damaged.
        UsageError: ``folder`` cannot be written to, the passphrase cannot be read, or keys would be written in the
            clear.
    """
    if not (home / DATABASE).exists():
        raise StateError(f"There is no fedvit state at {home}.", cure="Name its folder with --home.")
    if include_keys and not encrypt:
        raise UsageError("Keys are written into encrypted backups only.", cure="Leave out one of the two options.")
    recipients = recipients_of(home, config) if encrypt else Recipients()
    now = clock.now()
    target = folder / f"fedvit-backup-{now:%Y%m%d-%H%M%S}{SUFFIX}"
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        # Inside the state folder: nothing of it lies elsewhere unencrypted, not even for a moment.
        with tempfile.TemporaryDirectory(dir=home, prefix=".backup-") as scratch:
            _copy_database(home / DATABASE, Path(scratch) / DATABASE, now)
            with draft_in(folder, FILE_MODE) as draft:
                folders = KEPT_FOLDERS if include_keys else (BLOBS,)
                _write_signed(draft.file, home, Path(scratch), folders, recipients, now)
                draft.publish(target)
    except OSError as error:
        raise UsageError(
            f"The backup cannot be written to {folder}: {error.strerror}.", cure="Name a folder with room and access."
        ) from None
    except sqlite3.Error as error:
        raise StateError(f"The state database {home / DATABASE} cannot be copied: {error}.") from None
    return Backup(target, sha256_of(target), encrypt, recipients.key_file)


@contextmanager
def open_payload(file: IO[bytes], header: BackupHeader, identities: Sequence[Any]) -> Iterator[IO[bytes]]:
    """The tar.gz of a backup whose header was just read from ``file``, to be read to its end.

    At the end of the block the digest is verified once more: the file may have been replaced meanwhile.

    Raises:
        IntegrityError: it was, or the payload cannot be decrypted.
    """
    payload: Any = PayloadReader(file)
    if header.recipients:
        with decrypted(payload, identities) as plain:
            yield plain
    else:
        yield payload
    while payload.read(_CHUNK):
        pass
    payload.check(header)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_database(source: Path, target: Path, at: datetime) -> None:
    target.touch(FILE_MODE)
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
    with Store.open(target.parent) as store, store.transaction() as transaction:
        transaction.ledger.freeze_as_copy(at)
        transaction.releases.reserve(RELEASE_MARGIN)
        transaction.budget.withdraw_requests()


def _write_signed(
    file: IO[bytes], home: Path, scratch: Path, folders: Sequence[str], recipients: Recipients, at: datetime
) -> None:
    """Write room for the header, then the payload, and at last the header, which needs the digest of the payload."""
    key = load_or_create_signing_key(home / KEYS)
    file.write(bytes(HEADER_BYTES))
    payload: Any = PayloadWriter(file)
    fill = partial(_write_archive, home=home, scratch=scratch, folders=folders)
    if recipients.names:
        write_encrypted(fill, payload, recipients.names)
    else:
        fill(payload)
    header = BackupHeader(
        created_at=at.isoformat(),
        payload_sha256=payload.sha256(),
        payload_bytes=payload.bytes_written,
        recipients=list(recipients.names),
        locked_identity=recipients.locked_identity,
        holds_keys=KEYS in folders,
        root_key_id=root_key_id(home),
        signing_key_id=key_id(key.public_key()),
    )
    file.seek(0)
    file.write(header.signed(key))


def _write_archive(file: IO[bytes], *, home: Path, scratch: Path, folders: Sequence[str]) -> None:
    (scratch / WRITE_AHEAD_LOG).touch()
    files = {name: scratch / name for name in (DATABASE, WRITE_AHEAD_LOG)}
    for folder in folders:
        # A dot file is still being written.
        paths = (p for p in (home / folder).rglob("*") if p.is_file() and not p.name.startswith("."))
        files |= {str(p.relative_to(home)): p for p in sorted(paths)}
    checksums = scratch / CHECKSUMS
    checksums.write_text(json.dumps({name: sha256_of(p) for name, p in files.items()}, indent=1))
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(checksums, CHECKSUMS)
        for name, path in files.items():
            archive.add(path, name)
