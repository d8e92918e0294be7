"""The SQLite database: opening, schema migration, sessions and transactions.

Each write is one ``BEGIN IMMEDIATE`` transaction with ``synchronous=FULL``: when it returns, it survives a power cut;
when the process dies before, nothing of it is there.
"""

from __future__ import annotations

import secrets
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from fedvit.atomic_write import write_atomically
from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import DataError, StateError
from fedvit.ports import ClockPort
from fedvit.private_files import FILE_MODE, ensure_private
from fedvit.store.locks import opening_lock

if TYPE_CHECKING:
    from alembic.config import Config

BUSY_TIMEOUT_S = 10.0
_RESET = "Restore it from a backup, or run `make reset` to begin anew."


NewId: TypeAlias = Callable[[int], str]
"""Makes an identifier that nobody can guess, of so many random bytes, hex."""


class Sessions(Protocol):
    """Source of the sessions of a repository: a database, or a transaction that is already open."""

    clock: ClockPort
    new_id: NewId

    def read(self) -> AbstractContextManager[Session]:
        """A session on one consistent snapshot."""

    def write(self) -> AbstractContextManager[Session]:
        """A session that holds the write lock."""

    def transaction(self) -> AbstractContextManager[Sessions]:
        """One transaction, for several repositories: committed at the end, rolled back by any exception."""

    def change_counter(self) -> int | None:
        """A number that every commit of any process changes; None inside a transaction, where nothing may be cached."""


class Database:
    """One open state database; its threads share a small pool of connections. Implements :class:`Sessions`.

    Args:
        path: an existing, migrated file.
        clock: dates what is written.
        new_id: makes identifiers.
    """

    def __init__(self, path: Path, clock: ClockPort = SYSTEM_CLOCK, new_id: NewId = secrets.token_hex) -> None:
        self.clock = clock
        self.new_id = new_id
        self._path = path
        self._engine = make_engine(path)
        # Shares the pool; only the word behind BEGIN differs.
        self._writer = self._engine.execution_options(begin="IMMEDIATE")
        self._watcher: sqlite3.Connection | None = None
        self._watching = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """See :meth:`Sessions.read`; raises StateError where the file cannot be read."""
        with _explained(self._path), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session that holds the write lock; committed at the end, rolled back by any exception.

        Raises:
            StateError: the file cannot be written, or another process held the lock for ten seconds.
        """
        with _explained(self._path), Session(self._writer, close_resets_only=False) as session, session.begin():
            session.connection()  # Takes the lock now, so that nothing is read before it.
            yield session

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """See :meth:`Sessions.transaction`. It holds the write lock from its beginning: what it reads stays true."""
        with self.write() as session:
            yield Transaction(session, self.clock, self.new_id)

    def change_counter(self) -> int:
        """See :meth:`Sessions.change_counter`; some microseconds. Raises StateError where the file cannot be read.

        SQLite counts the commits of other connections, in any process, for a connection that only watches.
        """
        with self._watching:
            try:
                if self._watcher is None:
                    # Outside the pool: it must never write, and no transaction may stay open on it.
                    self._watcher = sqlite3.connect(
                        self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
                    )
                ((version,),) = self._watcher.execute("PRAGMA data_version").fetchall()
            except sqlite3.Error as error:
                raise StateError(f"The state database {self._path} cannot be used: {_one_line(error)}.") from error
            return int(version)

    def close(self) -> None:
        """Give all connections back; the last one to close folds the write-ahead log into the file."""
        with self._watching:
            if self._watcher is not None:
                self._watcher.close()
            self._watcher = None
        self._engine.dispose()


class Transaction:
    """An open session that several repositories share. Implements :class:`Sessions`."""

    def __init__(self, session: Session, clock: ClockPort, new_id: NewId) -> None:
        self.clock = clock
        self.new_id = new_id
        self._session = session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """The open session."""
        yield self._session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """The open session. What was written is read anew afterwards: bulk statements bypass its mapped objects."""
        yield self._session
        self._session.flush()
        self._session.expire_all()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """This transaction: what is done inside is committed with everything else."""
        yield self

    def change_counter(self) -> None:
        """Nothing: this transaction sees its own writes, which no counter counts."""


def open_database(home: Path, clock: ClockPort = SYSTEM_CLOCK, new_id: NewId = secrets.token_hex) -> Database:
    """Check, or create, ``home/state.db`` and migrate it to the newest schema.

    Raises:
        StateError: the file is no intact database of this program, or was written by a newer one; it is left as it was.
            Or another user owns it, and others can read it.
    """
    path = home / "state.db"
    with opening_lock(home):
        if path.exists():
            # SQLite gives its other files the mode of the database.
            ensure_private([path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")])
            _migrate_existing(path)
        else:
            _create(path)
    return Database(path, clock, new_id)


def make_engine(path: Path, *, foreign_keys: bool = True) -> Engine:
    """An engine on a SQLite file, with transactions begun by us and not by the driver."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=QueuePool,
        pool_size=4,
        max_overflow=-1,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver would begin by itself, late and DEFERRED: two writers would then both read before either locks.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options().get('begin', 'DEFERRED')}")

    return engine


def migration_config() -> Config:
    """Alembic's configuration for the revisions shipped in this package."""
    # Imported here: a state of the newest schema is opened without these eleven megabytes.
    from alembic.config import Config

    config = Config()
    folder = str(resources.files("fedvit.store").joinpath("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))
    return config


def _create(path: Path) -> None:
    """Create it atomically, so that an empty or partial ``state.db`` is always damage."""
    wal, *others = (path.with_name(path.name + ending) for ending in ("-wal", "-shm", "-journal"))
    if wal.exists() and wal.stat().st_size:
        raise StateError(f"{path} is missing, yet its write-ahead log {wal.name} is there.", cure=_RESET)
    # What a creator that was killed has left.
    for leftover in (wal, *others, *path.parent.glob(".tmp-*")):
        leftover.unlink(missing_ok=True)
    with _explained(path):
        content = empty_database()
    try:
        write_atomically(path, content, mode=FILE_MODE)
    except OSError as error:
        cure = "Check the disk and the folder's permissions."
        raise StateError(f"The state database {path} cannot be made: {error.strerror}.", cure=cure) from error


@cache
def empty_database() -> bytes:
    """An empty database of the newest schema. It is cached: a migration takes a tenth of a second."""
    with tempfile.TemporaryDirectory(prefix="fedvit-schema-") as folder:
        path = Path(folder) / "state.db"
        _upgrade(path)
        return path.read_bytes()


def _migrate_existing(path: Path) -> None:
    revision, (known, newest) = _checked_revision(path), _revisions()
    if revision not in known:
        raise StateError(
            f"{path} has schema revision {revision!r}, newer than this program's {newest!r}.",
            cure="Use the fedvit release that wrote it, restore a backup, or run `make reset`.",
        )
    if revision != newest:
        with _explained(path):
            _upgrade(path)


@cache
def _revisions() -> tuple[frozenset[str], str]:
    """All schema revisions that this program knows, and the newest: each is in a file that begins with its number."""
    files = resources.files("fedvit.store").joinpath("migrations", "versions").iterdir()
    known = frozenset(file.name.partition("_")[0] for file in files if file.name[0].isdigit())
    return known, max(known)


def _checked_revision(path: Path) -> str:
    """The schema revision of an intact file, read without writing a byte to it."""
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise StateError(f"The state database {path} is corrupt: {_one_line(verdict)}.", cure=_RESET)
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.DatabaseError as error:
        message = f"{path} cannot be read as a fedvit state database: {_one_line(error)}."
        raise StateError(message, cure=_RESET) from error
    if len(rows) != 1:
        raise StateError(f"{path} names {len(rows)} schema revisions instead of one.", cure=_RESET)
    return str(rows[0][0])


def _upgrade(path: Path) -> None:
    from alembic import command

    # Rebuilding a table under enforced foreign keys would delete what refers to it.
    engine = make_engine(path, foreign_keys=False)
    try:
        with engine.execution_options(begin="IMMEDIATE").begin() as connection:
            config = migration_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    finally:
        engine.dispose()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors about the file (locked, full, read-only, malformed) into a StateError of one sentence.

    Violated constraints and faulty SQL are mistakes in this program and pass unchanged; a number that is too large is a
    mistake of the caller.
    """
    try:
        yield
    except OverflowError:
        raise DataError("A number does not fit into the database's 64 bits.", cure="Send a smaller one.") from None
    except DatabaseError as error:
        if type(error) not in (DatabaseError, OperationalError):
            raise
        cause = _one_line(error.orig)
        busy = "locked" in cause
        cure = "Try again when the other process is done." if busy else "Check the disk, or restore a backup."
        raise StateError(f"The state database {path} cannot be used: {cause}.", cure=cure) from error


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
