"""Backup and restore: what is not proven touches nothing, and no privacy budget that was spent ever comes back."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fedvit.access.tokens import create_token
from fedvit.cli.main import app
from fedvit.errors import FedvitError, IntegrityError, LedgerFrozenError, NotFoundError, StateError, UsageError
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.privacy.secrets import load_or_create_root_secret
from fedvit.settings import load_settings
from fedvit.store import archive as archives
from fedvit.store import restore as restoring
from fedvit.store.backup import write_backup
from fedvit.store.records import RoundCommit
from fedvit.store.restore import Restored, restore_backup
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import Cohort, LedgerFreeze, utc_now

WHY = "The privacy officer approved one more run."


def cost(rounds: int) -> float:
    return epsilon_pld({PoissonGaussian(4.0, 0.5): rounds}, 1e-5)


def charge(store: Store, round_index: int) -> None:
    store.ledger.append([Charge("run-0001", round_index, unit, f"{round_index:064x}", 4.0, 0.5, 1) for unit in "ab"])


def trained(home: Path, rounds: int = 1) -> Path:
    """A closed state folder with a root key, a fleet, a released version and so many charged rounds."""
    load_or_create_root_secret(home)
    with Store.open(home) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        store.clients.register(seeded_fleet(3))
        store.runs.create(rounds_total=9, noise_multiplier=4.0, config={}, config_digest="", data_digest="")
        store.rounds.open("run-0001", 1, Cohort(1, ("a",)))
        weights, frozen, model = (store.blobs.put(content) for content in (b"weights", b"frozen", b"model"))
        store.rounds.commit("run-0001", 1, RoundCommit(weights, frozen, 0.5, 1.0, 0.5, {}, {}, (), 1.0))
        store.releases.add("v1.1.1", {"standard": model}, {"standard": "{}"}, "first")
        for round_index in range(1, rounds + 1):
            charge(store, round_index)
    (home / "logs").mkdir()
    (home / "logs" / "control.log").write_text("a line")
    return home


def backed_up(home: Path, folder: Path | None = None) -> Path:
    return write_backup(home, folder or home.parent / "backups")[0]


def restore(home: Path, archive: Path, **more: Any) -> Restored:
    return restore_backup(home, archive, actor="local:test", **more)


def remaining(home: Path, target_epsilon: float = 8.0) -> float:
    config = load_settings(environ={}, overrides={"privacy": {"target_epsilon": target_epsilon}})
    with Store.open(home) as store:
        store.ledger.verify()
        return PrivacyAccountant(store, config).get_remaining_epsilon()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the locks, which are made and stay."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def execute(home: Path, *statements: str) -> None:
    with closing(sqlite3.connect(home / "state.db")) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


@pytest.fixture(scope="module")
def files(template: Path) -> dict[str, bytes]:
    """What an archive of ``home`` holds."""
    return contents(backed_up(template))


# --- without a present state -----------------------------------------------------------------------------------------


def test_after_a_disaster_all_is_back_and_nothing_may_be_charged(home: Path) -> None:
    archive = backed_up(home)
    key, blob = (home / "keys" / "root.key").read_bytes(), hashlib.sha256(b"model").hexdigest()
    shutil.rmtree(home)
    restored = restore(home, archive)
    assert (restored.ledger_lines, restored.carried_lines, restored.aside) == (2, 0, None)
    assert restored.frozen is not None
    assert restored.frozen.incident_id == "restore"
    assert (home / "keys" / "root.key").read_bytes() == key
    assert [os.stat(home / part).st_mode & 0o777 for part in ("keys", "keys/root.key")] == [0o700, 0o600]
    assert sorted(path.name for path in home.iterdir()) == ["blobs", "keys", "state.db", "state.lock", "system.lock"]
    assert remaining(home) == 0.0
    with Store.open(home) as store:
        assert store.blobs.get(blob) == b"model"
        assert (store.clients.count(), store.versions.all()[0].version) == (3, "v1.1.1")
        with pytest.raises(LedgerFrozenError, match="unfreeze"):
            charge(store, 2)
        (line,) = store.audit.entries()
        assert (line.facts.action, line.facts.actor, line.facts.params["frozen"]) == ("CLI restore", "local:test", True)
        assert line.facts.params["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()


def test_who_answers_for_it_that_nothing_was_released_may_go_on(home: Path) -> None:
    archive = backed_up(home)
    shutil.rmtree(home)
    assert restore(home, archive, nothing_since=True).frozen is None
    assert remaining(home) == pytest.approx(8 - cost(1))
    with Store.open(home) as store:
        charge(store, 2)
        assert store.audit.entries()[0].facts.params["nothing_since"] is True
        assert store.audit.verify() == 1


# --- over a present state --------------------------------------------------------------------------------------------


def test_what_the_present_state_spent_since_stays_spent(home: Path) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        for round_index in (2, 3):
            charge(store, round_index)
        store.clients.register(seeded_fleet(5))
    before = tree(home)
    restored = restore(home, archive)
    assert (restored.ledger_lines, restored.carried_lines, restored.frozen) == (6, 4, None)
    assert remaining(home) == pytest.approx(8 - cost(3))
    assert restored.aside is not None
    # What was there before is a whole state folder.
    assert {name: content for name, content in tree(restored.aside).items() if "db-" not in name} == {
        name: content for name, content in before.items() if name.split("/")[0] in ("state.db", "keys", "blobs")
    }
    assert (home / "logs" / "control.log").read_text() == "a line"
    with Store.open(home) as store, Store.open(restored.aside) as old:
        assert (store.clients.count(), old.clients.count()) == (3, 5)
        charge(store, 4)
        assert store.ledger.verify() == 8
        assert old.ledger.verify() == 6


def test_what_must_not_be_undone_is_carried_over(home: Path) -> None:
    freeze = LedgerFreeze("PB-1", "images leaked", "token:a:Ana", utc_now())
    with Store.open(home) as store:
        made = [create_token(store, name, ["admin"], now=utc_now()).token.token_id for name in ("Ana", "Bo")]
        wish = store.budget.request(3.0, WHY, "Ana", utc_now())
    archive = backed_up(home)
    with Store.open(home) as store:
        store.budget.approve(wish.request_id, "Bo", utc_now())
        period = store.budget.grant(1.0, WHY, "Ana", "Bo")
        charge(store, 2)
        store.releases.add("v1.1.1", {"standard": store.blobs.put(b"other")}, {"standard": "{}"}, "second")
        store.ledger.freeze(freeze)
        store.tokens.revoke(made[0], utc_now())
        store.clients.quarantine(["vehicle-0001"], "it lied", utc_now())
    assert restore(home, archive).frozen == freeze
    with Store.open(home) as store:
        assert store.budget.periods() == [period]
        assert [bool(store.tokens.get(token_id).revoked_at) for token_id in made] == [True, False]
        assert store.clients.get("vehicle-0001").quarantine_reason == "it lied"
        assert not store.clients.get("vehicle-0000").quarantined
        assert (len(store.releases.all()), store.releases.next_sequence()) == (1, 3)
        with pytest.raises(NotFoundError):
            store.budget.approve(wish.request_id, "Bo", utc_now())
        store.ledger.unfreeze("PB-1")
    assert remaining(home) == pytest.approx(1 - cost(1))


def test_a_freeze_that_was_lifted_since_stays_lifted(home: Path) -> None:
    with Store.open(home) as store:
        store.ledger.freeze(LedgerFreeze("PB-1", "images leaked", "Ana", utc_now()))
    archive = backed_up(home)
    with Store.open(home) as store:
        store.ledger.unfreeze("PB-1")
    assert restore(home, archive).frozen is None


def test_the_audit_trail_does_not_go_back_either(home: Path) -> None:
    from fedvit.cli.state import audit_local

    with Store.open(home) as store:
        audit_local(store, "before", {})
    archive = backed_up(home)
    with Store.open(home) as store:
        audit_local(store, "since", {})
    restore(home, archive)
    with Store.open(home) as store:
        assert [line.facts.action for line in store.audit.entries()] == ["before", "since", "CLI restore"]
        assert store.audit.verify() == 3


def test_a_present_state_with_another_history_is_refused_untouched(home: Path, tmp_path: Path) -> None:
    archive, other = backed_up(home), trained(tmp_path / "other", 4)
    before = tree(other)
    with pytest.raises(StateError, match="two histories"):
        restore(other, archive, nothing_since=True)
    assert tree(other) == before


def test_a_present_state_that_forked_is_refused(home: Path) -> None:
    with Store.open(home) as store:
        charge(store, 2)
    shutil.copytree(home, home.parent / "fork")
    with Store.open(home) as store:
        store.budget.grant(1.0, WHY, "Ana")
    with Store.open(home.parent / "fork") as store:
        charge(store, 3)
    with pytest.raises(StateError, match="two histories"):
        restore(home.parent / "fork", backed_up(home))


def test_a_present_state_that_is_older_proves_nothing(home: Path) -> None:
    old = shutil.copytree(home, home.parent / "old")
    with Store.open(home) as store:
        charge(store, 2)
    restored = restore(old, backed_up(home))
    assert restored.ledger_lines == 4
    assert restored.frozen is not None
    assert remaining(old) == 0.0


@pytest.mark.parametrize("same_key", [False, True])
def test_an_empty_ledger_is_continued_by_its_own_state_only(tmp_path: Path, same_key: bool) -> None:
    archive = backed_up(trained(tmp_path / "lost", 0))
    fresh = trained(tmp_path / "fresh", 2)
    if same_key:
        shutil.copy(tmp_path / "lost" / "keys" / "root.key", fresh / "keys" / "root.key")
    restored = restore(fresh, archive)
    assert (restored.frozen is None, restored.carried_lines) == (same_key, 4 if same_key else 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda home: (home / "state.db").write_bytes(b"no database" * 1000),
        lambda home: (home / "state.db").write_bytes(b""),
        lambda home: os.truncate(home / "state.db", 8192),
        lambda home: execute(home, "UPDATE privacy_ledger SET steps = 0 WHERE sequence = 1"),
        lambda home: execute(home, "DELETE FROM privacy_ledger"),
        lambda home: execute(home, "UPDATE alembic_version SET version_num = 'tomorrow'"),
        lambda home: execute(home, "DROP TABLE privacy_ledger"),
    ],
)
def test_a_damaged_present_state_is_replaced_kept_aside_and_proves_nothing(
    home: Path, damage: Callable[[Path], object]
) -> None:
    archive = backed_up(home)
    damage(home)
    damaged = (home / "state.db").read_bytes()
    restored = restore(home, archive)
    assert restored.frozen is not None
    assert restored.aside is not None
    assert (restored.aside / "state.db").read_bytes() == damaged
    assert remaining(home) == 0.0


def test_a_state_whose_process_was_killed_is_folded_in_first(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        charge(store, 2)
        # As kill -9 leaves it: the last charge is in the write-ahead log alone.
        killed = shutil.copytree(home, tmp_path / "killed")
    assert (killed / "state.db-wal").stat().st_size > 0
    restored = restore(killed, archive)
    assert (restored.ledger_lines, restored.carried_lines) == (4, 2)
    assert remaining(killed) == pytest.approx(8 - cost(2))
    assert restored.aside is not None
    with Store.open(restored.aside) as old:
        assert old.ledger.verify() == 4


# --- in use ----------------------------------------------------------------------------------------------------------


def test_a_running_system_is_left_alone(home: Path) -> None:
    archive, before = backed_up(home), tree(home)
    with (home / "system.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="fedvit down"):
            restore(home, archive)
    assert tree(home) == before


def test_a_state_that_some_process_has_open_is_left_alone(home: Path) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        assert store.clients.count() == 3
        with pytest.raises(StateError, match="uses the state"):
            restore(home, archive)
        assert not list(home.glob("before-restore-*"))
        charge(store, 2)
    assert restore(home, archive).carried_lines == 2


# --- archives --------------------------------------------------------------------------------------------------------


Files = dict[str, bytes]


def contents(archive: Path) -> Files:
    with tarfile.open(archive) as members:
        return {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def packed(path: Path, files: Files, *extra: tarfile.TarInfo, sums: bool = True) -> Path:
    """An archive of these files, with checksums that fit unless they are among them; then ``extra``."""
    if sums:
        told = {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "checksums.json"
        }
        files = {**files, "checksums.json": json.dumps(told).encode()}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return path


def special(name: str, kind: bytes, **more: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in more.items():
        setattr(info, key, value)
    return info


def with_database(files: Files, folder: Path, *statements: str) -> Files:
    """The files with their database changed by somebody who knows that checksums are only checksums."""
    folder.mkdir(exist_ok=True)
    (folder / "state.db").write_bytes(files["state.db"])
    execute(folder, *statements)
    with closing(sqlite3.connect(folder / "state.db")) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return {**files, "state.db": (folder / "state.db").read_bytes()}


def raw(content: bytes) -> Callable[[Files, Path], Path]:
    """An archive of just these bytes."""

    def write(_: Files, to: Path) -> Path:
        to.write_bytes(content)
        return to

    return write


BLOB = f"blobs/sha256/{hashlib.sha256(b'model').hexdigest()[:2]}/{hashlib.sha256(b'model').hexdigest()}"
HOSTILE: dict[str, Callable[[Files, Path], Path]] = {
    "an absolute path": lambda files, to: packed(to, {**files, "/tmp/x": b"x"}),
    "a way out": lambda files, to: packed(to, {**files, "keys/../../x": b"x"}),
    "a dot before": lambda files, to: packed(to, {**files, "./keys/x": b"x"}),
    "a file nobody knows": lambda files, to: packed(to, {**files, "run/system.json": b"{}"}),
    "a hidden key": lambda files, to: packed(to, {**files, "keys/.x": b"x"}),
    "a symbolic link": lambda files, to: packed(to, files, special("keys/x", tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a hard link": lambda files, to: packed(to, files, special("keys/x", tarfile.LNKTYPE, linkname="state.db")),
    "a device": lambda files, to: packed(to, files, special("keys/x", tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a pipe": lambda files, to: packed(to, files, special("keys/x", tarfile.FIFOTYPE)),
    "a folder": lambda files, to: packed(to, files, special("keys", tarfile.DIRTYPE)),
    "a sparse file": lambda files, to: packed(
        to, files, special("keys/x", tarfile.REGTYPE, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})
    ),
    "a file twice": lambda files, to: packed(to, files, special("state.db", tarfile.REGTYPE, size=10)),
    "a file without a checksum": lambda files, to: packed(to, files, special("keys/x", tarfile.REGTYPE)),
    "a checksum without a file": lambda files, to: packed(
        to,
        {**files, "checksums.json": json.dumps({**json.loads(files["checksums.json"]), "keys/x": "0" * 64}).encode()},
        sums=False,
    ),
    "another key": lambda files, to: packed(to, {**files, "keys/root.key": b"x" * 32}, sums=False),
    "no checksums": lambda files, to: packed(
        to, {name: content for name, content in files.items() if name != "checksums.json"}, sums=False
    ),
    "checksums that are none": lambda files, to: packed(to, {**files, "checksums.json": b"[" * 100_000}, sums=False),
    "no database": lambda files, to: packed(
        to, {name: content for name, content in files.items() if name != "state.db"}
    ),
    "a blob under another's name": lambda files, to: packed(to, {**files, BLOB: b"evil"}),
    "a blob in another folder": lambda files, to: packed(to, {**files, f"blobs/sha256/zz/{'0' * 64}": b""}),
    "a released blob is missing": lambda files, to: packed(
        to, {name: content for name, content in files.items() if name != BLOB}
    ),
    "a log to be replayed": lambda files, to: packed(to, {**files, "state.db-wal": b"x" * 4096}),
    "a database that is none": lambda files, to: packed(to, {**files, "state.db": b"x" * 8192}),
    "an empty database": lambda files, to: packed(to, {**files, "state.db": b""}),
    "a schema of tomorrow": lambda files, to: packed(
        to, with_database(files, to.parent / "x", "UPDATE alembic_version SET version_num = 'tomorrow'")
    ),
    "a cheaper ledger": lambda files, to: packed(
        to, with_database(files, to.parent / "x", "UPDATE privacy_ledger SET noise_multiplier = 99")
    ),
    "a shorter ledger": lambda files, to: packed(
        to, with_database(files, to.parent / "x", "DELETE FROM privacy_ledger WHERE sequence = 2")
    ),
    "a head that is none": lambda files, to: packed(
        to, with_database(files, to.parent / "x", "UPDATE meta SET value = '7' WHERE key = 'ledger_head'")
    ),
    "a table less": lambda files, to: packed(to, with_database(files, to.parent / "x", "DROP TABLE audit")),
    "nothing": raw(b""),
    "no gzip": raw(b"x" * 4096),
    "gzip of no tar": raw(gzip.compress(b"x" * 4096)),
    "a header that claims 8 GB": raw(gzip.compress(special("x", tarfile.XHDTYPE, size=8 * 2**30 - 1).tobuf())),
    "headers without end": raw(
        gzip.compress((special("x", tarfile.GNUTYPE_LONGNAME, size=1).tobuf() + bytes(512)) * 5000)
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_is_not_one_of_ours_touches_nothing(
    home: Path, files: Files, tmp_path: Path, name: str
) -> None:
    archive = HOSTILE[name](files, tmp_path / "hostile.tar.gz")
    before = tree(home)
    with pytest.raises(IntegrityError, match="refused") as caught:
        restore(home, archive, nothing_since=True)
    assert caught.value.cure is not None
    assert tree(home) == before
    with pytest.raises(IntegrityError, match="refused"):
        restore(tmp_path / "new" / "home", archive)
    assert not (tmp_path / "new" / "home").exists()
    assert not Path("/tmp/x").exists()


def test_an_archive_that_was_cut_or_changed_anywhere_is_refused(home: Path, tmp_path: Path) -> None:
    whole, before = backed_up(home).read_bytes(), tree(home)
    # The first ten bytes are gzip's header; its time and its system say nothing about the content.
    for place in range(10, len(whole), max(1, len(whole) // 25)):
        flipped = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        for content in (flipped, whole[:place]):
            (tmp_path / "bad.tar.gz").write_bytes(content)
            with pytest.raises(IntegrityError, match="refused"):
                restore(home, tmp_path / "bad.tar.gz")
    assert tree(home) == before


def test_an_archive_with_more_than_there_is_room_for_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = backed_up(home)
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    with pytest.raises(IntegrityError, match="too much"):
        restore(home, archive)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 0, 10_000))  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError, match="too much"):
        restore(home, archive)


def test_an_archive_with_something_behind_its_files_is_refused(home: Path, tmp_path: Path) -> None:
    longer = gzip.decompress(backed_up(home).read_bytes()) + bytes(2**21)
    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(longer))
    with pytest.raises(IntegrityError, match="follows"):
        restore(home, tmp_path / "bomb.tar.gz")


def test_an_archive_that_is_not_there_or_a_folder_that_is_none(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no archive"):
        restore(home, tmp_path / "nothing.tar.gz")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError):
        restore(tmp_path / "file", backed_up(home))


def test_an_archive_from_before_there_were_marks_is_frozen_all_the_same(tmp_path: Path, files: Files) -> None:
    unmarked = with_database(files, tmp_path / "x", "DELETE FROM meta WHERE key = 'ledger_copy'")
    del unmarked["state.db-wal"]
    assert restore(tmp_path / "home", packed(tmp_path / "old.tar.gz", unmarked)).frozen is not None


# --- a crash at any moment -------------------------------------------------------------------------------------------

DIE_AT = """
import os, signal, sys
from pathlib import Path
from fedvit.store import restore

replace, left = os.replace, int(sys.argv[3])

def replace_or_die(source, target):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

restore.os.replace = replace_or_die
restore.restore_backup(Path(sys.argv[1]), Path(sys.argv[2]), actor="local:test")
"""


@pytest.mark.parametrize("step", [0, 4])
def test_a_process_killed_in_the_middle_leaves_the_old_state(home: Path, step: int) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        charge(store, 2)
        store.clients.register(seeded_fleet(5))
    before = tree(home)
    died = subprocess.run(
        [sys.executable, "-c", DIE_AT, str(home), str(archive), str(step)], check=False, capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    after = tree(home)
    assert {name: after.get(name) for name in before} == before
    with Store.open(home) as store:
        assert (store.clients.count(), store.ledger.verify()) == (5, 4)
    assert restore(home, archive).carried_lines == 2
    assert not (home / restoring.STAGING).exists()


def test_whatever_rename_fails_the_folder_holds_the_old_state_or_the_new(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        store.clients.register(seeded_fleet(5))
    replace, done = os.replace, []

    def fail_at(step: int) -> Callable[[Any, Any], None]:
        def replace_or_fail(source: Any, target: Any) -> None:
            if len(done) == step:
                raise KeyboardInterrupt
            done.append(target)
            replace(source, target)

        return replace_or_fail

    for step in range(20):
        done.clear()
        with monkeypatch.context() as patch:
            patch.setattr(restoring.os, "replace", fail_at(step))
            try:
                restore(home, archive)
                break
            except KeyboardInterrupt:
                pass
        with Store.open(home) as store:
            assert (store.clients.count(), store.ledger.verify()) == (5, 2)
            assert all(store.blobs.get(digest) for digest in store.versions.blob_digests())
    assert step == len(done) == 5
    with Store.open(home) as store:
        assert store.clients.count() == 3


# --- plain tar -------------------------------------------------------------------------------------------------------


def untar(archive: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    subprocess.run(["tar", "xzf", str(archive), "-C", str(folder)], check=True)
    return folder


def fedvit(home: Path, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--home", str(home)])


def test_plain_tar_gives_a_state_folder_that_spends_nothing_until_somebody_answers_for_it(
    home: Path, tmp_path: Path
) -> None:
    data = untar(backed_up(home), tmp_path / "data")
    assert remaining(data) == 0.0
    shown = json.loads(fedvit(data, "privacy", "show", "--json").stdout)
    assert (shown["frozen"]["incident_id"], shown["epsilon_remaining"], shown["ledger_entries"]) == ("restore", 0, 2)
    assert fedvit(data, "privacy", "unfreeze", "--justification", "...").exit_code == 2
    assert remaining(data) == 0.0
    lifted = fedvit(data, "privacy", "unfreeze", "--justification", "Ana saw that no round ran after the backup.")
    assert lifted.exit_code == 0, lifted.output
    assert remaining(data) == pytest.approx(8 - cost(1))
    with Store.open(data) as store:
        assert [line.facts.action for line in store.audit.entries()] == ["CLI privacy unfreeze"]
    assert fedvit(data, "privacy", "unfreeze", "--justification", "Ana wants to do it again.").exit_code == 2


def test_a_new_budget_lifts_the_freeze_of_a_restored_state_but_not_an_incidents(home: Path, tmp_path: Path) -> None:
    with Store.open(untar(backed_up(home), tmp_path / "data")) as store:
        store.ledger.freeze(LedgerFreeze("PB-1", "images leaked", "Ana", utc_now()))
        store.ledger.unfreeze("PB-1")
        freeze = store.ledger.current_freeze()
        assert freeze is not None
        assert freeze.incident_id == "restore"
        assert PrivacyAccountant(store, load_settings(environ={})).reset_budget(1.0, WHY, "Ana").frozen is None
        charge(store, 2)
    assert remaining(tmp_path / "data") == pytest.approx(1 - cost(1))


def test_plain_tar_over_a_killed_state_replays_none_of_its_log(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        charge(store, 2)
        store.clients.register(seeded_fleet(500))
        killed = shutil.copytree(home, tmp_path / "killed")
    assert (killed / "state.db-wal").stat().st_size > 0
    with Store.open(untar(archive, killed)) as store:
        assert (store.clients.count(), store.ledger.verify()) == (3, 2)
    assert remaining(killed) == 0.0


def test_a_backup_of_a_restored_state_keeps_the_first_mark_and_gives_no_release_number_twice(
    home: Path, tmp_path: Path
) -> None:
    once = untar(backed_up(home), tmp_path / "once")
    twice = untar(backed_up(once, tmp_path), tmp_path / "twice")
    with Store.open(once) as first, Store.open(twice) as second:
        assert first.ledger.current_freeze() == second.ledger.current_freeze()
        assert 2 + 100 < first.releases.next_sequence() < second.releases.next_sequence()
    with Store.open(home) as store:
        assert (store.ledger.current_freeze(), store.releases.next_sequence()) == (None, 2)


def test_a_mark_of_the_present_state_is_not_lifted_by_going_back(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    data = untar(archive, tmp_path / "data")
    assert restore(data, archive, nothing_since=True).frozen is not None


# --- while it is in use, and on the command line ---------------------------------------------------------------------

CHARGE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from fedvit.ports import Charge
from fedvit.store.store import Store

store = Store.open(Path(sys.argv[1]))
for i in itertools.count(100):
    store.blobs.put(str(i).encode())
    store.ledger.append([Charge("run-0001", i, unit, f"{i}", 4.0, 0.5, 1) for unit in "ab"])
    print(i, flush=True)
"""


def test_backups_taken_while_charges_are_written_are_whole(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHARGE_FOR_EVER, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        reported, made = [], []
        for i in range(3):
            reported.append(int(process.stdout.readline()) - 99)
            made.append(backed_up(home, tmp_path / str(i)))
        process.kill()
    for i, archive in enumerate(made):
        restored = restore(tmp_path / f"restored-{i}", archive)
        assert restored.ledger_lines % 2 == 0
        assert restored.ledger_lines >= 2 + 2 * reported[i]
    assert restore(home, made[0]).frozen is None


def test_a_damaged_state_is_not_backed_up(home: Path, tmp_path: Path) -> None:
    (home / "state.db").write_bytes(b"no database" * 1000)
    with pytest.raises(FedvitError):
        backed_up(home, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


def test_the_command_says_what_it_did(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    done = json.loads(fedvit(home, "restore", str(archive), "--json").stdout)
    assert (done["ledger_lines"], done["carried_lines"], done["frozen"]) == (2, 0, None)
    lost = fedvit(tmp_path / "lost", "restore", str(archive))
    assert lost.exit_code == 0
    assert "frozen" in lost.stdout
    (tmp_path / "bad.tar.gz").write_bytes(archive.read_bytes()[:-100])
    bad = fedvit(home, "restore", str(tmp_path / "bad.tar.gz"))
    assert (bad.exit_code, bad.stderr.startswith("Error: ")) == (1, True)
    with Store.open(home) as store:
        assert store.audit.entries()[-1].facts.actor.startswith("local:")


# --- whatever happens, in whatever order -----------------------------------------------------------------------------

STEPS = st.lists(
    st.sampled_from(["charge", "charge", "grant", "backup", "restore", "lose and restore", "untar", "attest"]),
    min_size=3,
    max_size=8,
)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=STEPS)
def test_no_order_of_events_shows_more_budget_than_was_left(template: Path, steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = shutil.copytree(template, Path(folder) / "home")
        # What was really charged in the present period, whatever became of the state folder.
        target, rounds = 8.0, 1
        archive, at_backup = None, (target, rounds)
        for number, step in enumerate(steps):
            match step:
                case "charge":
                    with Store.open(home) as store:
                        if store.ledger.current_freeze() is None:
                            charge(store, 100 + number)
                            rounds += 1
                case "grant":
                    with Store.open(home) as store:
                        store.budget.grant(3.0, WHY, "Ana")
                    target, rounds = 3.0, 0
                case "backup":
                    archive = backed_up(home, Path(folder) / str(number))
                    at_backup = target, rounds
                case "restore" if archive is not None:
                    restore(home, archive)
                case "lose and restore" if archive is not None:
                    shutil.rmtree(home)
                    # An honest operator answers for it only where it is so.
                    restore(home, archive, nothing_since=at_backup == (target, rounds))
                case "untar" if archive is not None:
                    untar(archive, home)
                case "attest":
                    if at_backup == (target, rounds):
                        with Store.open(home) as store:
                            store.ledger.unfreeze_copy()
            left = target - (cost(rounds) if rounds else 0.0)
            assert remaining(home) <= max(0.0, left) + 1e-9, steps[: number + 1]
