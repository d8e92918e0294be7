"""Opening a state folder: created, continued, migrated, or refused without a byte changed."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect

from fedvit.errors import ConflictError, StateError
from fedvit.store import database, locks
from fedvit.store.store import Store
from fedvit.store.tables import Base, UtcDateTime
from fedvit.types import Client, ClientKind


def filled(home: Path) -> Path:
    """A closed state folder with 500 clients; the path of its database."""
    clients = [Client(f"c{i:04d}", ClientKind.VIRTUAL, 10) for i in range(500)]
    with Store.open(home) as store:
        store.clients.register(clients)
    return home / "state.db"


def execute(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def refused(home: Path) -> StateError:
    """The refusal to open ``home``, which must leave the database as it was."""
    before = (home / "state.db").read_bytes()
    with pytest.raises(StateError) as caught:
        Store.open(home)
    assert (home / "state.db").read_bytes() == before
    assert caught.value.cure is not None
    return caught.value


def test_a_migration_is_in_a_file_that_begins_with_its_revision_and_the_last_name_is_the_newest() -> None:
    """A state of the newest schema is opened without Alembic, by these names."""
    scripts = ScriptDirectory.from_config(database.migration_config())
    named = {script.revision: Path(script.path).name.partition("_")[0] for script in scripts.walk_revisions()}
    assert named == {revision: revision for revision in named}
    assert scripts.get_current_head() == max(named)


def test_a_state_of_the_newest_schema_is_opened_without_alembic(tmp_path: Path) -> None:
    home = filled(tmp_path).parent
    script = (
        "import sys; from pathlib import Path; from fedvit.store.store import Store\n"
        "with Store.open(Path(sys.argv[1])) as store: print(store.clients.population(), 'alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(home)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["500", "False"]


def test_a_new_folder_is_created_with_its_parents_and_is_empty(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "va r?#%41"
    with Store.open(home) as store:
        assert store.home == home
        assert store.metadata.fleet() is None
        listings = (store.clients.all, store.runs.all, store.versions.all, store.releases.all, store.ledger.entries)
        assert [listing() for listing in listings] == [[]] * 5
        assert [newest() for newest in (store.runs.latest, store.versions.latest, store.releases.current)] == [None] * 3
        assert store.ledger.verify() == 0
    assert sorted(path.name for path in home.iterdir()) == ["state.db", "state.lock"]


def test_reopening_continues(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        store.metadata.set("answer", {"is": [42, None, "é"]})
        digest = store.blobs.put(b"blob")
    with Store.open(tmp_path) as store:
        assert store.metadata.get("answer") == {"is": [42, None, "é"]}
        assert store.blobs.get(digest) == b"blob"
        store.metadata.set("answer", 43)
        assert store.metadata.get("answer") == 43
        assert store.metadata.get("question") is None


def test_a_fact_that_is_polled_is_seen_as_soon_as_somebody_else_has_changed_it(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, Store.open(tmp_path) as other:
        assert store.metadata.get("answer") is None
        other.metadata.set("answer", {"is": [42]})
        result = store.metadata.get("answer")
        assert result == {"is": [42]}
        # What a caller does to it is his own.
        result["is"].append(43)
        assert store.metadata.get("answer") == {"is": [42]}
        other.metadata.set("answer", 44)
        assert store.metadata.get("answer") == 44


def test_keys_of_the_store_itself_cannot_be_overwritten(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        for key in ("fleet", "ledger_head", "audit_head"):
            with pytest.raises(ConflictError):
                store.metadata.set(key, {})
            assert store.metadata.get(key) is None


def test_connections_are_durable_and_enforce_references(tmp_path: Path) -> None:
    path = filled(tmp_path)
    engine = database.make_engine(path)
    with engine.connect() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        results = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    engine.dispose()
    assert results == ["wal", 2, 1, 10_000]


def test_the_migrated_schema_is_the_declared_one(tmp_path: Path) -> None:
    engine = database.make_engine(filled(tmp_path))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        for table in Base.metadata.sorted_tables:  # Alembic compares no primary keys.
            result = inspect(connection).get_pk_constraint(table.name)["constrained_columns"]
            assert result == [column.name for column in table.primary_key]
    engine.dispose()


def test_the_schema_can_be_undone_and_redone(tmp_path: Path) -> None:
    engine = database.make_engine(filled(tmp_path), foreign_keys=False)
    config = database.migration_config()
    declared = len(Base.metadata.tables)
    for revise, revision, expected in ((command.downgrade, "base", 0), (command.upgrade, "head", declared)):
        with engine.begin() as connection:
            config.attributes["connection"] = connection
            revise(config, revision)
        tables = set(inspect(engine).get_table_names()) - {"alembic_version"}
        assert len(tables) == expected
    engine.dispose()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    database.empty_database.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", die)
        with pytest.raises(RuntimeError):
            Store.open(tmp_path)
    assert not (tmp_path / "state.db").exists()
    with Store.open(tmp_path) as store:
        assert store.runs.all() == []


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_what_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state.db").write_bytes(content)
    error = refused(tmp_path)
    assert "state.db" in str(error)
    assert "make reset" in str(error)


def test_a_truncated_database_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "make reset" in str(refused(tmp_path))


def test_a_database_with_a_damaged_page_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    content = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'clients'").fetchone()
        (page_size,) = connection.execute("PRAGMA page_size").fetchone()
    start = (root - 1) * page_size
    content[start : start + 512] = b"\xa5" * 512
    path.write_bytes(content)
    assert "make reset" in str(refused(tmp_path))


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    execute(tmp_path / "state.db", "CREATE TABLE bookmarks (url TEXT)")
    assert "alembic_version" in str(refused(tmp_path))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    execute(path, "UPDATE alembic_version SET version_num = '9999'")
    error = refused(tmp_path)
    assert "'9999'" in error.message
    assert "newer" in error.message


def test_a_newer_schema_still_in_the_write_ahead_log_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("UPDATE alembic_version SET version_num = '9999'")
        writer.commit()
        assert "'9999'" in refused(tmp_path).message


def test_refusing_what_a_killed_writer_left_does_not_fold_its_log_into_the_file(tmp_path: Path) -> None:
    path = filled(tmp_path / "live")
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("UPDATE alembic_version SET version_num = '9999'")
        writer.commit()
        for name in ("state.db", "state.db-wal"):
            (crashed / name).write_bytes((path.parent / name).read_bytes())
    assert "'9999'" in refused(crashed).message
    assert "'9999'" in refused(crashed).message


def test_a_missing_revision_is_refused(tmp_path: Path) -> None:
    execute(filled(tmp_path), "DELETE FROM alembic_version")
    assert "0 schema revisions" in refused(tmp_path).message


def test_a_database_that_vanished_beside_its_log_is_not_silently_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "state.db-wal").write_bytes(b"the last commits")
    with pytest.raises(StateError):
        Store.open(tmp_path)
    assert [path.name for path in tmp_path.glob("state.db*")] == ["state.db-wal"]


def test_a_draft_left_by_a_killed_creator_is_replaced(tmp_path: Path) -> None:
    leftover = tmp_path / ".tmp-0123456789abcdef"
    leftover.write_bytes(b"half a database")
    with Store.open(tmp_path) as store:
        assert store.runs.all() == []
    assert not leftover.exists()


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "var"
    home.write_text("")
    with pytest.raises(StateError):
        Store.open(home)


def test_a_folder_that_somebody_else_is_opening_is_refused_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(locks, "LOCK_TIMEOUT_S", 0.0)
    with (tmp_path / "state.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError):
            Store.open(tmp_path)
    with Store.open(tmp_path) as store:
        assert store.runs.all() == []


def test_a_write_lock_held_too_long_is_a_state_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.0)
    path = filled(tmp_path)
    with Store.open(tmp_path) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateError):
            store.metadata.set("a", 1)
        assert store.clients.count() == 500  # Readers do not wait for a writer.
        other.execute("ROLLBACK")
        store.metadata.set("a", 1)
        assert store.metadata.get("a") == 1


def test_threads_share_one_store(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        barrier = threading.Barrier(8)

        def register(thread: int) -> None:
            barrier.wait()
            for i in range(10):
                store.clients.register([Client(f"t{thread}-{i}", ClientKind.VIRTUAL, 1)])
                store.clients.count()

        threads = [threading.Thread(target=register, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.clients.count() == 80


def test_moments_come_back_aware_and_naive_ones_are_refused(tmp_path: Path) -> None:
    moment = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    with Store.open(tmp_path) as store:
        store.clients.register([Client("a", ClientKind.SILO, 1, registered_at=moment)])
        result = store.clients.get("a").registered_at
    assert result == moment
    assert result.tzinfo is UTC
    dialect = database.make_engine(tmp_path / "state.db").dialect
    with pytest.raises(ValueError):
        UtcDateTime().process_bind_param(datetime(2026, 3, 1), dialect)
