"""Going back to a backup, without ever getting privacy budget back that was spent.

What is restored is proven before the state folder is touched, and put in force by one rename: whenever the process
dies, the folder holds the old state or the new one. The old one is kept inside it, under ``before-restore-<time>``.
Logs, and what else lies in the folder, stay.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from fedvit.atomic_write import fsync_folder
from fedvit.errors import FedvitError, IntegrityError, StateError, UsageError
from fedvit.store.archive import DATABASE, refused, unpack
from fedvit.store.backup import KEPT_FOLDERS, sha256_of
from fedvit.store.blobs import FileBlobStore
from fedvit.store.chain import AUDIT_CHAIN, BUDGET_CHAIN, LEDGER_CHAIN, Chain
from fedvit.store.database import Database, open_database
from fedvit.store.locks import opening_lock, system_lock
from fedvit.store.metadata import COPY_KEY, FREEZE_KEY, RELEASE_FLOOR_KEY, get_value, set_value
from fedvit.store.records import AuditFacts
from fedvit.store.releases import next_sequence
from fedvit.store.store import Repositories
from fedvit.store.tables import ClientRow, TokenRow
from fedvit.types import LedgerFreeze, utc_now

STAGING = ".restore"
_ROOT_KEY = Path("keys") / "root.key"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        ledger_lines: on the privacy ledger now.
        carried_lines: of them, those that the backup did not have.
        frozen: why nothing may be charged now, or None.
        aside: where the state lies that was there before, if there was one.
    """

    ledger_lines: int
    carried_lines: int
    frozen: LedgerFreeze | None
    aside: Path | None


def restore_backup(home: Path, archive: Path, *, actor: str, nothing_since: bool = False) -> Restored:
    """Put the state of an archive of :func:`~fedvit.store.backup.write_backup` in force at ``home``.

    Where the present state's ledger goes on from the backup's, it proves what was charged since: it is carried over,
    with the budgets that were granted, the freeze, revoked tokens and quarantines. Otherwise nobody knows what was
    charged since, and the ledger stays frozen.

    Args:
        actor: who restores, for the audit trail.
        nothing_since: the operator answers for it that nothing was released after the backup.

    Raises:
        IntegrityError: the archive is not one, or not intact; nothing was changed.
        StateError: something uses the folder, or its ledger and the backup's are of two histories; nothing was changed.
        UsageError: the archive cannot be read, or there is no room.
    """
    if not archive.is_file():
        raise UsageError(f"There is no archive {archive}.", cure="Name a file that `fedvit backup` wrote.")
    was_there = home.exists()
    try:
        with system_lock(home), _staging(home) as staging:
            unpack(archive, staging)
            with refused(archive):
                _verify(staging)
            with opening_lock(home):
                ledger_lines, carried, frozen = _prepare(home, staging, archive, actor, nothing_since)
                return Restored(ledger_lines, carried, frozen, _swap(home, staging))
    except OSError as error:
        raise UsageError(f"Nothing can be restored at {home}: {error.strerror or error}.") from error
    finally:
        if not was_there and not (home / DATABASE).exists():
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    """Inside the folder, so that a rename does it, also where the folder is a mounted volume."""
    folder = home / STAGING
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _opened(folder: Path) -> Iterator[Database]:
    database = open_database(folder)
    try:
        yield database
    finally:
        database.close()


def _verify_chains(folder: Path, *chains: Chain) -> None:
    """Raises FedvitError when the database or one of its chains is not whole."""
    with _opened(folder) as database, database.read() as session:
        for chain in chains:
            chain.verify(session)


def _verify(folder: Path) -> None:
    """Raises FedvitError when the unpacked state is not whole: database, schema, chains, blobs."""
    _verify_chains(folder, LEDGER_CHAIN, BUDGET_CHAIN, AUDIT_CHAIN)
    with _opened(folder) as database:
        blobs = FileBlobStore(folder / "blobs")
        for digest in Repositories(database).versions.blob_digests():
            # Its content was hashed when it was unpacked.
            blobs.size(digest)


# --- what is restored ------------------------------------------------------------------------------------------------


def _prepare(
    home: Path, staging: Path, archive: Path, actor: str, nothing_since: bool
) -> tuple[int, int, LedgerFreeze | None]:
    """Make the unpacked state what it shall be: nothing of what may never be undone is undone by it."""
    with ExitStack() as stack:
        present = _present_session(home, staging / "present", stack)
        transaction = stack.enter_context(stack.enter_context(_opened(staging)).transaction())
        session, restored = stack.enter_context(transaction.write()), Repositories(transaction)
        restored.ledger.freeze_as_copy(utc_now())
        carried = 0
        if present is not None and _goes_on(session, present, _same_key(home, staging)):
            carried = _carry_over(session, present)
        elif nothing_since:
            restored.ledger.unfreeze_copy()
        frozen = restored.ledger.current_freeze()
        params = {
            "archive": archive.name,
            "sha256": sha256_of(archive),
            "nothing_since": nothing_since,
            "carried_ledger_lines": carried,
            "frozen": frozen is not None,
        }
        restored.audit.append(AuditFacts(actor, (), "local", "cli", "CLI restore", params, None, None, 200))
        BUDGET_CHAIN.verify(session)
        return LEDGER_CHAIN.verify(session), carried, frozen


def _present_session(home: Path, folder: Path, stack: ExitStack) -> Session | None:
    """A copy of the present database, its privacy chains verified; None where there is none, or none that can be read.

    Raises:
        StateError: a process has it open.
    """
    if not (home / DATABASE).exists():
        return None
    try:
        _copy_exclusively(home / DATABASE, folder)
        _verify_chains(folder, LEDGER_CHAIN, BUDGET_CHAIN)
    except sqlite3.OperationalError as error:
        if "locked" not in str(error):
            return None
        raise StateError(f"A process uses the state at {home}.", cure="Stop it: `fedvit down`.") from None
    except (sqlite3.DatabaseError, FedvitError):
        return None
    return stack.enter_context(stack.enter_context(_opened(folder)).read())


def _copy_exclusively(path: Path, folder: Path) -> None:
    """Copy a database that nobody else has open; its write-ahead log is folded in on the way."""
    folder.mkdir()
    with closing(sqlite3.connect(path, timeout=1.0)) as live, closing(sqlite3.connect(folder / DATABASE)) as copy:
        live.execute("PRAGMA locking_mode = EXCLUSIVE")
        live.execute("SELECT count(*) FROM sqlite_master").fetchone()
        live.backup(copy)


def _goes_on(session: Session, present: Session, same_key: bool) -> bool:
    """Whether the present state proves what was charged since the backup.

    Raises:
        StateError: the two have charged different things.
    """
    ends = []
    for chain in (LEDGER_CHAIN, BUDGET_CHAIN):
        ours, theirs = chain.length(session), chain.length(present)
        common = min(ours, theirs)
        if chain.hash_at(session, common) != chain.hash_at(present, common):
            raise _parted()
        ends.append((ours, theirs))
    longer = [theirs > ours for ours, theirs in ends]
    shorter = [theirs < ours for ours, theirs in ends]
    if any(longer) and any(shorter):
        raise _parted()
    # An empty chain goes on to anything: then the key, or the audit trail, must say that it is the same state.
    known = same_key or any(ours for ours, _ in ends) or _trail_goes_on(session, present)
    return known and not any(shorter)


def _parted() -> StateError:
    return StateError(
        "The privacy ledger of the present state and that of the backup are of two histories.",
        cure="Restore into another folder with --home; what this one has spent is spent all the same.",
    )


def _trail_goes_on(session: Session, present: Session) -> bool:
    """Whether the present audit trail, if it is intact, holds all of the backup's, which is not empty."""
    try:
        AUDIT_CHAIN.verify(present)
    except IntegrityError:
        return False
    end = AUDIT_CHAIN.length(session)
    return 0 < end <= AUDIT_CHAIN.length(present) and (
        AUDIT_CHAIN.hash_at(session, end) == AUDIT_CHAIN.hash_at(present, end)
    )


def _same_key(home: Path, staging: Path) -> bool:
    ours, theirs = staging / _ROOT_KEY, home / _ROOT_KEY
    return ours.exists() and theirs.exists() and ours.read_bytes() == theirs.read_bytes()


def _carry_over(session: Session, present: Session) -> int:
    """Take from the present state what going back must not undo; return the number of ledger lines."""
    if _trail_goes_on(session, present):
        AUDIT_CHAIN.adopt(session, present)
    for key in (FREEZE_KEY, COPY_KEY):
        set_value(session, key, get_value(present, key))
    BUDGET_CHAIN.adopt(session, present)
    set_value(session, RELEASE_FLOOR_KEY, next_sequence(present) - 1)
    for token in present.scalars(select(TokenRow).where(TokenRow.revoked_at.is_not(None))):
        ours = session.get(TokenRow, token.token_id)
        if ours is not None:
            ours.revoked_at = ours.revoked_at or token.revoked_at
    for client in present.scalars(select(ClientRow).where(ClientRow.quarantined_at.is_not(None))):
        known = session.get(ClientRow, client.client_id)
        if known is not None and known.quarantined_at is None:
            known.quarantined_at, known.quarantine_reason = client.quarantined_at, client.quarantine_reason
    return LEDGER_CHAIN.adopt(session, present)


# --- putting it in force ---------------------------------------------------------------------------------------------


def _swap(home: Path, staging: Path) -> Path | None:
    """Put the unpacked state in force; the database comes last, and with it everything."""
    aside = _set_aside(home)
    for name in KEPT_FOLDERS:
        _move(staging / name, home / name)
    for leftover in (home / f"{DATABASE}-wal", home / f"{DATABASE}-shm"):
        # Of a database that could not be read: a log that is left would be replayed into the new one.
        leftover.unlink(missing_ok=True)
    os.replace(staging / DATABASE, home / DATABASE)
    fsync_folder(home)
    return aside


def _move(source: Path, target: Path) -> None:
    """Move every file below ``source`` to its place below ``target``; others there stay."""
    if not source.is_dir():
        return
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        if path.is_file():
            os.replace(path, place)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        fsync_folder(folder)


def _set_aside(home: Path) -> Path | None:
    """Keep the present state under another name as well; only names are made, nothing is moved."""
    if not (home / DATABASE).exists():
        return None
    aside = home / f"before-restore-{utc_now():%Y%m%d-%H%M%S-%f}"
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
