"""The state folder: repositories over one database, and the blobs."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from fedvit.clock import SYSTEM_CLOCK
from fedvit.errors import StateError
from fedvit.ports import BlobStorePort, ClockPort
from fedvit.private_files import open_private_folder
from fedvit.store.access import Audit, Idempotency, Tokens
from fedvit.store.blobs import FileBlobStore
from fedvit.store.clients import Clients
from fedvit.store.database import Database, NewId, Sessions, open_database
from fedvit.store.histograms import Histograms
from fedvit.store.incidents import Incidents, Remediations
from fedvit.store.ledger import Budget, Ledger
from fedvit.store.metadata import Metadata
from fedvit.store.operations import Operations
from fedvit.store.rounds import Rounds, Runs
from fedvit.store.timeline import Timeline
from fedvit.store.versions import Releases, Versions


class Repositories:
    """All repositories over one database, or inside one transaction.

    Every method that writes is one transaction: when it returns, its changes are durable; when it raises, none are
    made. Any method raises :class:`~fedvit.errors.StateError` when the file cannot be used (locked too long, disk full,
    damaged).
    """

    def __init__(self, sessions: Sessions) -> None:
        self.metadata = Metadata(sessions)
        self.clients = Clients(sessions)
        self.runs = Runs(sessions)
        self.rounds = Rounds(sessions)
        self.histograms = Histograms(sessions)
        self.versions = Versions(sessions)
        self.releases = Releases(sessions)
        self.ledger = Ledger(sessions)
        self.budget = Budget(sessions)
        self.tokens = Tokens(sessions)
        self.audit = Audit(sessions)
        self.idempotency = Idempotency(sessions)
        self.operations = Operations(sessions)
        self.incidents = Incidents(sessions)
        self.remediations = Remediations(sessions)
        self.timeline = Timeline(sessions)


class Store(Repositories):
    """A state folder, opened with :meth:`open`. Safe for threads and for several processes at once.

    Attributes:
        home: the state folder.
        blobs: its content-addressed bytes.
    """

    def __init__(self, home: Path, database: Database, blobs: BlobStorePort) -> None:
        super().__init__(database)
        self.home = home
        self.blobs = blobs
        self._database = database

    @classmethod
    def open(
        cls,
        home: Path,
        *,
        blobs: BlobStorePort | None = None,
        clock: ClockPort = SYSTEM_CLOCK,
        new_id: NewId = secrets.token_hex,
    ) -> Store:
        """Open the state folder ``home``, created where missing, migrated where old, and closed to other users.

        Args:
            home: the state folder.
            blobs: where blobs are stored; by default in the state folder.
            clock: dates what is written.
            new_id: makes identifiers of so many random bytes, hex.

        Raises:
            StateError: ``home`` cannot be written, or is another user's; its database is damaged, or a newer fedvit
                wrote it; the database file is left byte-identical.
        """
        try:
            open_private_folder(home)
            return cls(home, open_database(home, clock, new_id), blobs or FileBlobStore(home / "blobs"))
        except OSError as error:
            raise StateError(
                f"The state folder {home} cannot be used: {error.strerror or error}.",
                cure="Name a folder that this user may write to with --home.",
            ) from error

    @contextmanager
    def transaction(self) -> Iterator[Repositories]:
        """Repositories in one transaction: committed at the end of the block, rolled back by any exception.

        The transaction holds the write lock from its beginning, so that what it reads stays true until it is committed.
        Inside the block, write with the repositories that it yields: this store would wait for the lock.
        """
        with self._database.transaction() as sessions:
            yield Repositories(sessions)

    def change_counter(self) -> int:
        """A number that differs from an earlier one if anything was committed in between, by any process.

        Cheap enough for every request; while it is equal, nothing that was read has changed.
        """
        return self._database.change_counter()

    def close(self) -> None:
        """Close the database; harmless when done twice."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
