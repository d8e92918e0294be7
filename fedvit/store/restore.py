"""Restoring a backup without regaining privacy budget that was spent.

Signature and digest are verified before anything else is read, and the content before the state folder is touched. One
rename puts it in force: whenever the process dies, the folder holds the old state or the new one. The old one stays
inside the folder, under ``before-restore-<time>``, as do logs and everything else in it.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.atomic_write import fsync_folder
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import FedvitError, IntegrityError, StateError, UsageError
from fedvit.ports import ClockPort
from fedvit.private_files import FILE_MODE, FOLDER_MODE
from fedvit.store.archive import DATABASE, refused, unpack
from fedvit.store.backup import KEPT_FOLDERS, open_payload, sha256_of
from fedvit.store.backup_header import BackupHeader, read_header, root_key_id
from fedvit.store.backup_keys import KEYS, RestoreKeys
from fedvit.store.blobs import FileBlobStore
from fedvit.store.chain import AUDIT_CHAIN, BUDGET_CHAIN, LEDGER_CHAIN, Chain
from fedvit.store.database import Database, open_database
from fedvit.store.locks import opening_lock, system_lock
from fedvit.store.metadata import COPY_KEY, FREEZE_KEY, RELEASE_FLOOR_KEY, get_value, set_value
from fedvit.store.records import AuditFacts
from fedvit.store.store import Repositories
from fedvit.store.tables import ClientRow, TokenRow
from fedvit.store.versions import next_sequence
from fedvit.types import LedgerFreeze
from fedvit.wire.manifest import SIGNING_KEY_FILE, load_or_create_signing_key
from fedvit.wire.signatures import key_id

STAGING = ".restore"
NEW_KEYS_REASON = "The state was restored without its root key."
_DEFAULT_KEYS = RestoreKeys()


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of a restore.

    Attributes:
        ledger_lines: the lines of the privacy ledger now.
        carried_lines: those of them that the backup did not have.
        frozen: why nothing may be charged now, or None.
        aside: the folder of the state that was there before, if there was one.
        new_keys: whether the state goes on with other keys than it had; an unfinished run was then ended.
    """

    ledger_lines: int
    carried_lines: int
    frozen: LedgerFreeze | None
    aside: Path | None
    new_keys: bool


@dataclass(frozen=True, slots=True)
class _Source:
    """A verified archive, open behind its header."""

    archive: Path
    file: IO[bytes]
    header: BackupHeader
    identities: list[Any]
    new_keys: bool

    def unpack(self, folder: Path) -> None:
        with open_payload(self.file, self.header, self.identities) as payload:
            unpack(payload, folder)


def restore_backup(
    home: Path,
    archive: Path,
    *,
    actor: str,
    keys: RestoreKeys = _DEFAULT_KEYS,
    new_keys: bool = False,
    nothing_since: bool = False,
    clock: ClockPort = SYSTEM_CLOCK,
) -> Restored:
    """Put the state of an archive of :func:`~fedvit.store.backup.write_backup` in force at ``home``.

    Where the present state's ledger continues the backup's, it proves what was charged since: it is carried over, with
    the budgets that were granted, the freeze, revoked tokens and quarantines. Otherwise nobody knows what was charged
    since, and the ledger stays frozen.

    Args:
        actor: who restores, for the audit trail.
        keys: what opens the archive, and whose signature on it is trusted.
        new_keys: go on without the root key and the signing key of the system, where neither the archive nor the state
            folder has them. An unfinished run is ended: with another root key a round that is repeated would draw other
            noise for outputs that were charged already. Vehicles trust no release until they get the new public key.
        nothing_since: the operator vouches that nothing was released after the backup.

    Raises:
        IntegrityError: the archive is not one, no trusted key signed it, or it is not intact; nothing was changed.
        StateError: another process uses the folder, its ledger and the backup's have diverged, or the keys of the
            system are missing; nothing was changed.
        UsageError: the archive cannot be read or decrypted, or there is no room.
    """
    if not archive.is_file():
        raise UsageError(f"There is no archive {archive}.", cure="Name a file that `fedvit backup` wrote.")
    was_there = home.exists()
    try:
        with archive.open("rb") as file:
            source = _verified(home, archive, file, keys, new_keys)
            with system_lock(home), _staging(home) as staging:
                with refused(archive):
                    source.unpack(staging)
                    _verify(staging, LEDGER_CHAIN, BUDGET_CHAIN, AUDIT_CHAIN)
                    _check_blobs(staging)
                with opening_lock(home):
                    ledger_lines, carried, frozen = _prepare(home, staging, source, actor, nothing_since, clock)
                    aside = _swap(home, staging, clock.now())
            return Restored(ledger_lines, carried, frozen, aside, source.new_keys)
    except OSError as error:
        raise UsageError(f"Nothing can be restored at {home}: {error.strerror or error}.") from error
    finally:
        if not was_there and not (home / DATABASE).exists():
            shutil.rmtree(home, ignore_errors=True)


def _verified(home: Path, archive: Path, file: IO[bytes], keys: RestoreKeys, new_keys: bool) -> _Source:
    """The archive, once its signature and digest are verified, and it is known that it can be opened and continued."""
    trusted = keys.signers(home)
    with refused(archive):
        header = read_header(file, trusted)
    missing = None if header.holds_keys else _missing_keys(home, header)
    if missing and not new_keys:
        raise StateError(
            f"The archive holds no keys, and {missing}.",
            cure=f"Put the copy of the system's keys into {home / KEYS} first. Without them: --new-keys ends an "
            "unfinished run, and vehicles have to be given the new public key.",
        )
    return _Source(archive, file, header, keys.identities(home, header), missing is not None)


def _missing_keys(home: Path, header: BackupHeader) -> str | None:
    """Which keys of the archive's system are not in the state folder; None where it has them."""
    present = root_key_id(home)
    if header.root_key_id not in (None, present):
        return f"{home / KEYS} has {'another' if present else 'no'} root key"
    path = home / KEYS / SIGNING_KEY_FILE
    if not path.exists():
        return f"{home / KEYS} has no signing key"
    if key_id(load_or_create_signing_key(home / KEYS).public_key()) != header.signing_key_id:
        return f"{home / KEYS} has another signing key"
    return None


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    """A folder inside ``home``: a rename moves its files into place also where ``home`` is a mounted volume."""
    folder = home / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(FOLDER_MODE)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path, clock: ClockPort = SYSTEM_CLOCK) -> Iterator[Database]:
    with closing(open_database(folder, clock)) as database:
        yield database


def _verify(folder: Path, *chains: Chain) -> None:
    """Raises FedvitError when the database or one of its chains is not whole."""
    with _opened(folder) as database, database.read() as session:
        for chain in chains:
            chain.verify(session)


def _check_blobs(folder: Path) -> None:
    """Raises FedvitError when a blob that the database names is missing; its content was hashed on unpacking."""
    blobs = FileBlobStore(folder / "blobs")
    with _opened(folder) as database:
        for digest in Repositories(database).versions.blob_digests():
            blobs.size(digest)


def _prepare(
    home: Path, staging: Path, source: _Source, actor: str, nothing_since: bool, clock: ClockPort
) -> tuple[int, int, LedgerFreeze | None]:
    """Carry over to the unpacked state what a restore must not undo.

    Returns:
        The lines of its ledger, those of them that were carried over, and why the ledger is frozen, or None.
    """
    with ExitStack() as stack:
        present = _present_session(home, staging / "present", stack)
        transaction = stack.enter_context(stack.enter_context(_opened(staging, clock)).transaction())
        backup, restored = stack.enter_context(transaction.write()), Repositories(transaction)
        restored.ledger.freeze_as_copy(clock.now())
        carried = 0
        same_key = source.header.root_key_id is not None and source.header.root_key_id == root_key_id(home)
        if present is not None and _continues(backup, present, same_key):
            carried = _carry_over(backup, present)
        elif nothing_since:
            restored.ledger.unfreeze_copy()
        if source.new_keys:
            restored.runs.abandon(NEW_KEYS_REASON)
        frozen = restored.ledger.current_freeze()
        params = {"archive": source.archive.name, "sha256": sha256_of(source.archive), "nothing_since": nothing_since}
        params |= {"carried_ledger_lines": carried, "frozen": frozen is not None, "new_keys": source.new_keys}
        restored.audit.append(AuditFacts(actor, (), "local", "cli", "CLI restore", params, None, None, 200))
        return restored.ledger.verify(), carried, frozen


def _present_session(home: Path, folder: Path, stack: ExitStack) -> Session | None:
    """A copy of the present database, its privacy chains verified; None where there is none, or none that can be read.

    Raises:
        StateError: a process has it open.
    """
    if not (home / DATABASE).exists():
        return None
    try:
        _copy_exclusively(home / DATABASE, folder)
        _verify(folder, LEDGER_CHAIN, BUDGET_CHAIN)
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            return None
        raise StateError(f"A process uses the state at {home}.", cure="Stop it: `fedvit down`.") from None
    except (sqlite3.DatabaseError, FedvitError):
        return None
    return stack.enter_context(stack.enter_context(_opened(folder)).read())


def _copy_exclusively(path: Path, folder: Path) -> None:
    """Copy a database that no other process has open; its write-ahead log is folded in on the way."""
    folder.mkdir(FOLDER_MODE)
    (folder / DATABASE).touch(FILE_MODE)
    with closing(sqlite3.connect(path, timeout=1.0)) as live, closing(sqlite3.connect(folder / DATABASE)) as copy:
        live.execute("PRAGMA locking_mode = EXCLUSIVE")
        live.execute("SELECT count(*) FROM sqlite_master").fetchone()
        live.backup(copy)


def _continues(backup: Session, present: Session, same_key: bool) -> bool:
    """Whether the present state proves what was charged since the backup.

    Raises:
        StateError: the two have charged different things.
    """
    diverged = StateError(
        "The privacy ledger of the present state and that of the backup are of two histories.",
        cure="Restore into another folder with --home; what this one has spent is spent all the same.",
    )
    lengths = []
    for chain in (LEDGER_CHAIN, BUDGET_CHAIN):
        length, present_length = chain.length(backup), chain.length(present)
        common = min(length, present_length)
        if chain.hash_at(backup, common) != chain.hash_at(present, common):
            raise diverged
        lengths.append((length, present_length))
    shorter = any(present_length < length for length, present_length in lengths)
    if shorter and any(present_length > length for length, present_length in lengths):
        raise diverged
    # Any chain continues an empty one: then the key, or the audit trail, must prove that it is the same state.
    known = same_key or any(length for length, _ in lengths) or _trail_continues(backup, present)
    return known and not shorter


def _trail_continues(backup: Session, present: Session) -> bool:
    """Whether the present audit trail, if it is intact, holds all of the backup's, which is not empty."""
    try:
        length = AUDIT_CHAIN.verify(present)
    except IntegrityError:
        return False
    end = AUDIT_CHAIN.length(backup)
    return 0 < end <= length and AUDIT_CHAIN.hash_at(backup, end) == AUDIT_CHAIN.hash_at(present, end)


def _carry_over(backup: Session, present: Session) -> int:
    """Copy from the present state what a restore must not undo; return the number of ledger lines."""
    if _trail_continues(backup, present):
        AUDIT_CHAIN.adopt(backup, present)
    for key in (FREEZE_KEY, COPY_KEY):
        set_value(backup, key, get_value(present, key))
    BUDGET_CHAIN.adopt(backup, present)
    set_value(backup, RELEASE_FLOOR_KEY, next_sequence(present) - 1)
    for revoked in present.scalars(select(TokenRow).where(TokenRow.revoked_at.is_not(None))):
        token = backup.get(TokenRow, revoked.token_id)
        if token is not None:
            token.revoked_at = token.revoked_at or revoked.revoked_at
    for quarantined in present.scalars(select(ClientRow).where(ClientRow.quarantined_at.is_not(None))):
        client = backup.get(ClientRow, quarantined.client_id)
        if client is not None and client.quarantined_at is None:
            client.quarantined_at, client.quarantine_reason = quarantined.quarantined_at, quarantined.quarantine_reason
    return LEDGER_CHAIN.adopt(backup, present)


def _swap(home: Path, staging: Path, at: datetime) -> Path | None:
    """Put the unpacked state in force; the rename of the database comes last and decides."""
    aside = _set_aside(home, at)
    for name in KEPT_FOLDERS:
        _move(staging / name, home / name)
    for leftover in (home / f"{DATABASE}-wal", home / f"{DATABASE}-shm"):
        # Left by a database that could not be read: SQLite would replay the log into the new one.
        leftover.unlink(missing_ok=True)
    os.replace(staging / DATABASE, home / DATABASE)
    fsync_folder(home)
    return aside


def _move(source: Path, target: Path) -> None:
    """Move every file below ``source`` to its place below ``target``; other files there stay."""
    if not source.is_dir():
        return
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        if path.is_file():
            os.replace(path, place)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        fsync_folder(folder)


def _set_aside(home: Path, at: datetime) -> Path | None:
    """Link the present state's files into another folder as well; none is moved."""
    if not (home / DATABASE).exists():
        return None
    aside = home / f"before-restore-{at:%Y%m%d-%H%M%S-%f}"
    aside.mkdir(mode=0o700)
    for file in sorted(home.glob(f"{DATABASE}*")):
        _link(str(file), str(aside / file.name))
    for folder in KEPT_FOLDERS:
        if (home / folder).is_dir():
            shutil.copytree(home / folder, aside / folder, copy_function=_link)
    fsync_folder(home)
    return aside


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # A file system without links.
        shutil.copy2(source, target)
