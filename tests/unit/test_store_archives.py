"""Backups that are damaged, hostile or too large: none touches a state folder, not even one that is signed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trained_home import backed_up, execute, key_beside, plain_tar, restore, trained, tree

from fedvit.errors import IntegrityError, UsageError
from fedvit.store import archive as archives
from fedvit.store.backup_header import BackupHeader
from fedvit.store.backup_keys import RestoreKeys

Files = dict[str, bytes]


SIGNER = Ed25519PrivateKey.generate()
TRUST = RestoreKeys(verify_keys=(SIGNER.public_key(),))


def contents(archive: Path) -> Files:
    with tarfile.open(fileobj=io.BytesIO(plain_tar(archive))) as members:
        return {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def signed(path: Path, payload: bytes) -> Path:
    """A plain backup of this payload, signed by :data:`SIGNER`: what comes next judges the payload itself."""
    header = BackupHeader(
        created_at="2030-01-01T00:00:00+00:00",
        payload_sha256=hashlib.sha256(payload).hexdigest(),
        payload_bytes=len(payload),
        recipients=[],
        locked_identity=None,
        holds_keys=True,
        root_key_id=None,
        signing_key_id="0" * 64,
    )
    path.write_bytes(header.signed(SIGNER) + payload)
    return path


def packed(path: Path, files: Files, *extra: tarfile.TarInfo, sums: bool = True) -> Path:
    """A backup of these files, with checksums that fit unless they are among them; then ``extra``."""
    if sums:
        results = {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != "checksums.json"
        }
        files = {**files, "checksums.json": json.dumps(results).encode()}
    payload = io.BytesIO()
    with tarfile.open(fileobj=payload, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return signed(path, payload.getvalue())


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
    """A backup of just these bytes."""
    return lambda _, to: signed(to, content)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


@pytest.fixture(scope="module")
def files(template: Path) -> Files:
    """What an archive of ``home`` holds."""
    return contents(backed_up(template))


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
    archive = HOSTILE[name](files, tmp_path / "hostile.bak")
    before = tree(home)
    with pytest.raises(IntegrityError) as caught:
        restore(home, archive, nothing_since=True, keys=TRUST)
    assert caught.value.cure is not None
    assert tree(home) == before
    with pytest.raises(IntegrityError):
        restore(tmp_path / "new" / "home", archive, keys=TRUST)
    assert not (tmp_path / "new" / "home").exists()
    assert not Path("/tmp/x").exists()


def test_an_archive_that_was_cut_or_changed_anywhere_is_refused(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    keys, whole, before = RestoreKeys(key_beside(archive)), archive.read_bytes(), tree(home)
    for place in range(0, len(whole), max(1, len(whole) // 25)):
        flipped = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
        for content in (flipped, whole[:place], whole + whole[:1]):
            (tmp_path / "bad.bak").write_bytes(content)
            with pytest.raises(IntegrityError):
                restore(home, tmp_path / "bad.bak", keys=keys)
    assert tree(home) == before


def test_an_archive_with_more_than_there_is_room_for_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = backed_up(home)
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    with pytest.raises(IntegrityError):
        restore(home, archive)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10_000, 0, 10_000))  # type: ignore[attr-defined]
    with pytest.raises(IntegrityError):
        restore(home, archive)


def test_an_archive_with_something_behind_its_files_is_refused(home: Path, tmp_path: Path) -> None:
    longer = gzip.decompress(plain_tar(backed_up(home))) + bytes(2**21)
    with pytest.raises(IntegrityError):
        restore(home, signed(tmp_path / "bomb.bak", gzip.compress(longer)), keys=TRUST)


def test_an_archive_that_is_not_there_or_a_folder_that_is_none(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        restore(home, tmp_path / "nothing.bak")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError):
        restore(tmp_path / "file", backed_up(home))


def test_an_archive_from_before_there_were_marks_is_frozen_all_the_same(tmp_path: Path, files: Files) -> None:
    unmarked = with_database(files, tmp_path / "x", "DELETE FROM meta WHERE key = 'ledger_copy'")
    del unmarked["state.db-wal"]
    assert restore(tmp_path / "home", packed(tmp_path / "old.bak", unmarked), keys=TRUST).frozen is not None
