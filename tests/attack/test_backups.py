"""Attacks on backups: what one shows without its key, and forged ones that are to be restored."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tiny_release import manifest_of
from trained_home import backed_up, execute, key_beside, plain_tar, restore, trained, tree

from fedvit.access.tokens import create_token
from fedvit.atomic_write import write_atomically
from fedvit.config import BackupConfig
from fedvit.errors import FedvitError, IntegrityError, StateError, UsageError
from fedvit.store import restore as restoring
from fedvit.store.archive import CHECKSUMS, DATABASE
from fedvit.store.backup import write_backup
from fedvit.store.backup_header import HEADER_BYTES, BackupHeader
from fedvit.store.backup_keys import BACKUP_KEY, RestoreKeys
from fedvit.store.restore import NEW_KEYS_REASON
from fedvit.store.store import Store
from fedvit.types import RunStatus, utc_now
from fedvit.wire.manifest import load_or_create_signing_key, sign_manifest
from tests.attack.table import AttackTable

ATTACKER = Ed25519PrivateKey.generate()
CHUNK = 64 * 2**10 + 16
"""A chunk of the age format with its tag."""


@dataclass(frozen=True)
class Stolen:
    """What an attacker has who can read and replace backups, and knows the public keys: not the private ones."""

    header: bytes
    payload: bytes
    plain: bytes
    """The tar.gz: an insider may know the state without having the keys."""
    earlier: bytes
    release: str

    @property
    def whole(self) -> bytes:
        return self.header + self.payload

    @property
    def fields(self) -> dict[str, Any]:
        return json.loads(self.header)["signed"]  # type: ignore[no-any-return]

    def encrypted(self, plain: bytes) -> bytes:
        """Anything, encrypted as a genuine backup is: that needs the public key only."""
        recipients = [pyrage.x25519.Recipient.from_str(name) for name in self.fields["recipients"]]
        return pyrage.encrypt(plain, recipients)

    def header_for(self, payload: bytes, signer: Ed25519PrivateKey = ATTACKER) -> bytes:
        """A header whose digest fits a payload, signed by the attacker."""
        fields = {name: value for name, value in self.fields.items() if name in BackupHeader.model_fields}
        fields |= {"payload_sha256": hashlib.sha256(payload).hexdigest(), "payload_bytes": len(payload)}
        return BackupHeader(**fields).signed(signer)

    def forged(self, plain: bytes) -> bytes:
        """A backup that is perfect but for its signature."""
        payload = self.encrypted(plain)
        return self.header_for(payload) + payload

    def with_genuine_signature(self, payload: bytes) -> bytes:
        """The signature of the genuine backup on a header whose digest fits another payload."""
        envelope = json.loads(self.header)
        digest = hashlib.sha256(payload).hexdigest()
        envelope["signed"] |= {"payload_sha256": digest, "payload_bytes": len(payload)}
        return json.dumps(envelope).encode().ljust(HEADER_BYTES - 1) + b"\n" + payload


def files_of(plain: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(plain)) as members:
        return {member.name: members.extractfile(member).read() for member in members}  # type: ignore[union-attr]


def packed(files: dict[str, bytes], *extra: tarfile.TarInfo) -> bytes:
    """A tar.gz with checksums that fit."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != CHECKSUMS}
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w:gz") as archive:
        for name, content in {**files, CHECKSUMS: json.dumps(sums).encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return result.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def with_admin(plain: bytes, folder: Path) -> bytes:
    """The state with a token of the attacker's in it, and checksums that fit."""
    files = files_of(plain)
    folder.mkdir()
    (folder / DATABASE).write_bytes(files[DATABASE])
    with Store.open(folder) as store:
        create_token(store, "attacker", ["admin"], now=utc_now())
    execute(folder, "PRAGMA wal_checkpoint(TRUNCATE)", "PRAGMA journal_mode = DELETE")
    return packed({**files, DATABASE: (folder / DATABASE).read_bytes()})


def changed(plain: bytes, name: str) -> bytes:
    """One file of the state with another byte, and checksums that fit."""
    files = files_of(plain)
    content = files[name] or b"x"
    return packed({**files, name: content[:-1] + bytes([content[-1] ^ 1])})


def chunks(payload: bytes) -> tuple[bytes, list[bytes]]:
    """The header of age with the nonce behind it, and the encrypted chunks."""
    start = payload.index(b"\n--- ")
    body = payload.index(b"\n", start + 1) + 1 + 16
    return payload[:body], [payload[i : i + CHUNK] for i in range(body, len(payload), CHUNK)]


def reordered(stolen: Stolen, order: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """The genuine header in front of the chunks in another order."""
    start, pieces = chunks(stolen.payload)
    assert len(pieces) > 2
    return stolen.header + start + b"".join(order(pieces))


def envelope(**fields: Any) -> bytes:
    return json.dumps(fields).encode().ljust(HEADER_BYTES - 1) + b"\n"


BOMB = gzip.compress(bytes(64 * 2**20))
FORGERIES: dict[str, Callable[[Stolen, Path], bytes]] = {
    "an admin's token is put into state.db": lambda s, to: s.forged(with_admin(s.plain, to)),
    "the same, with the genuine signature": lambda s, to: s.with_genuine_signature(
        s.encrypted(with_admin(s.plain, to))
    ),
    "the same, behind the genuine header": lambda s, to: s.header + s.encrypted(with_admin(s.plain, to)),
    "the same state, encrypted anew": lambda s, _: s.header + s.encrypted(s.plain),
    "the payload of an earlier backup": lambda s, _: s.header + s.earlier[HEADER_BYTES:],
    "a header without signatures": lambda s, _: envelope(signed=s.fields, signatures=[]) + s.payload,
    "a header that is no object": lambda s, _: b"[" * (HEADER_BYTES - 1) + b"\n" + s.payload,
    "the signature of a release": lambda s, _: s.release.encode().ljust(HEADER_BYTES)[:HEADER_BYTES] + s.payload,
    "another key signs the genuine content": lambda s, _: s.header_for(s.payload) + s.payload,
    "a signature of zeros under the genuine key's name": lambda s, _: (
        envelope(
            signed=s.fields,
            signatures=[{**json.loads(s.header)["signatures"][0], "sig": base64.b64encode(bytes(64)).decode()}],
        )
        + s.payload
    ),
    "it says that it is not encrypted": lambda s, _: (
        envelope(signed={**s.fields, "recipients": []}, signatures=json.loads(s.header)["signatures"]) + s.plain
    ),
    "a plain tar.gz of an earlier version": lambda s, _: s.plain,
    "the payload without a header": lambda s, _: s.payload,
    "nothing but the header": lambda s, _: s.header,
    "the last chunk is missing": lambda s, _: reordered(s, lambda pieces: pieces[:-1]),
    "half of it": lambda s, _: s.whole[: len(s.whole) // 2],
    "chunks in another order": lambda s, _: reordered(s, lambda pieces: [pieces[1], pieces[0], *pieces[2:]]),
    "a chunk twice": lambda s, _: reordered(s, lambda pieces: [pieces[0], *pieces]),
    "something behind it": lambda s, _: s.whole + b"x" * CHUNK,
    "another backup behind it": lambda s, _: s.whole + s.earlier,
    "a symbolic link": lambda s, _: s.forged(
        packed(files_of(s.plain), member("keys/x", tarfile.SYMTYPE, "/etc/passwd"))
    ),
    "a way out of the folder": lambda s, _: s.forged(packed({**files_of(s.plain), "keys/../../x": b"x"})),
    "an absolute path": lambda s, _: s.forged(packed({**files_of(s.plain), "/tmp/fedvit-attack": b"x"})),
    "a gzip bomb": lambda s, _: s.forged(BOMB),
    "a tar bomb": lambda s, _: s.forged(packed(files_of(s.plain), member("keys/x", size=64 * 2**20))),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = trained(tmp_path_factory.mktemp("template") / "home")
    with Store.open(home) as store:
        # Random bytes are not compressed: the payload has several chunks.
        store.blobs.put(hashlib.shake_256(b"weights").digest(200_000))
    return home


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


@pytest.fixture
def stolen(home: Path, tmp_path: Path) -> Stolen:
    earlier = backed_up(home, tmp_path / "earlier", include_keys=False)
    archive = backed_up(home, tmp_path / "backups", include_keys=False)
    whole = archive.read_bytes()
    release = sign_manifest(manifest_of(b"model"), load_or_create_signing_key(home / "keys"))
    return Stolen(whole[:HEADER_BYTES], whole[HEADER_BYTES:], plain_tar(archive), earlier.read_bytes(), release)


def test_a_forged_backup_is_refused_before_anything_is_written(
    home: Path, stolen: Stolen, tmp_path: Path, attack_table: AttackTable
) -> None:
    files = files_of(stolen.plain)
    forgeries = {**FORGERIES}
    for name in files:
        forgeries[f"{name} is changed"] = lambda s, _, name=name: s.forged(changed(s.plain, name))  # type: ignore[misc]
    before, inodes = tree(home), {path: path.stat().st_ino for path in home.rglob("*")}
    for number, (name, forge) in enumerate(forgeries.items()):
        archive = tmp_path / "forged.bak"
        archive.write_bytes(forge(stolen, tmp_path / f"scratch-{number}"))
        for place in (home, tmp_path / "new" / "home"):
            keys = RestoreKeys(key_beside(tmp_path / "backups" / "x"))
            with pytest.raises(IntegrityError):
                restore(place, archive, keys=keys, nothing_since=True, new_keys=True)
            assert not (tmp_path / "new").exists(), name
        assert {path: path.stat().st_ino for path in home.rglob("*")} == inodes, name
        assert tree(home) == before, name
    assert not Path("/tmp/fedvit-attack").exists()
    assert len(forgeries) > 30
    attack_table.add(
        "backups",
        "restore a forged backup: each file changed with its checksum, signatures stripped, foreign and moved from "
        "another document, chunks cut, moved and repeated, links, ways out, bombs",
        achieved=f"0 of {len(forgeries)} restored, 0 bytes written",
        bound="0 restored, 0 bytes written",
    )


def test_an_archive_that_is_replaced_while_it_is_restored_is_not_put_in_force(
    home: Path, stolen: Stolen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack_table: AttackTable
) -> None:
    archive, evil = tmp_path / "swapped.bak", stolen.encrypted(with_admin(stolen.plain, tmp_path / "scratch"))
    archive.write_bytes(stolen.whole)
    genuine = restoring.read_header

    def read_then_replace(file: Any, trusted: Any) -> BackupHeader:
        header = genuine(file, trusted)
        with archive.open("r+b") as same_file:
            same_file.seek(HEADER_BYTES)
            same_file.truncate()
            same_file.write(evil)
        return header

    monkeypatch.setattr(restoring, "read_header", read_then_replace)
    before = tree(home)
    with pytest.raises(IntegrityError):
        restore(home, archive, keys=RestoreKeys(key_beside(tmp_path / "backups" / "x")))
    assert tree(home) == before
    attack_table.add(
        "backups",
        "replace the file between its verification and its use",
        achieved="not restored",
        bound="not restored",
    )


def test_a_backup_shows_nothing_without_its_key_and_holds_no_keys(
    home: Path, stolen: Stolen, tmp_path: Path, attack_table: AttackTable
) -> None:
    secrets = [path.read_bytes().strip() for path in (home / "keys").iterdir()]
    secrets += [b"SQLite format 3", b"vehicle-0001", b"weights", b"ustar"]
    assert [secret for secret in secrets if secret in stolen.whole] == []
    assert not any(name.startswith("keys/") for name in files_of(stolen.plain))
    other = tmp_path / "other.key"
    write_atomically(other, f"{pyrage.x25519.Identity.generate()}\n")
    signer = load_or_create_signing_key(home / "keys").public_key()
    archive = tmp_path / "backups.bak"
    archive.write_bytes(stolen.whole)
    for keys in (RestoreKeys(verify_keys=(signer,)), RestoreKeys(other, verify_keys=(signer,))):
        with pytest.raises(UsageError):
            restore(tmp_path / "elsewhere", archive, keys=keys, new_keys=True)
    with pytest.raises(pyrage.DecryptError):
        pyrage.decrypt(stolen.payload, [pyrage.x25519.Identity.generate()])
    assert not (tmp_path / "elsewhere").exists()
    attack_table.add(
        "backups",
        "read a stolen backup: keys, database, client names, weights",
        achieved=f"0 of {len(secrets)} secrets",
        bound="0 secrets",
    )


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_state_without_its_keys_is_not_restored_unless_that_is_asked_for(home: Path, tmp_path: Path) -> None:
    with Store.open(home) as store:
        store.runs.set_status("run-0001", RunStatus.STOPPED)
    archive, fresh = backed_up(home, include_keys=False), tmp_path / "fresh"
    with pytest.raises(StateError) as caught:
        restore(fresh, archive)
    assert "--new-keys" in str(caught.value.cure)
    assert not fresh.exists()
    restored = restore(fresh, archive, new_keys=True)
    assert restored.new_keys
    with Store.open(fresh) as store:
        run = store.runs.get("run-0001")
        # It is neither continued nor found by its settings: with another root key it would draw other noise.
        assert (run.status, run.reason, run.status.resumable) == (RunStatus.SUPERSEDED, NEW_KEYS_REASON, False)
        assert store.audit.entries()[-1].facts.params["new_keys"] is True


def test_the_keys_put_back_the_state_goes_on_as_it_was(home: Path, tmp_path: Path) -> None:
    archive, fresh = backed_up(home, include_keys=False), tmp_path / "fresh"
    shutil.copytree(home / "keys", fresh / "keys")
    restored = restore(fresh, archive, keys=RestoreKeys())
    assert not restored.new_keys
    with Store.open(fresh) as store:
        assert store.runs.get("run-0001").status.resumable
    assert {path.name: path.read_bytes() for path in (fresh / "keys").iterdir()} == {
        path.name: path.read_bytes() for path in (home / "keys").iterdir()
    }


@pytest.mark.parametrize("name", ["root.key", "signing_key.pem"])
def test_the_keys_of_another_system_are_not_taken_for_those_of_the_archive(
    home: Path, tmp_path: Path, name: str
) -> None:
    archive, fresh = backed_up(home, include_keys=False), tmp_path / "fresh"
    other = trained(tmp_path / "other")
    load_or_create_signing_key(other / "keys")
    shutil.copytree(home / "keys", fresh / "keys")
    shutil.copy(other / "keys" / name, fresh / "keys" / name)
    with pytest.raises(StateError):
        restore(fresh, archive)
    assert not (fresh / DATABASE).exists()


def test_a_passphrase_opens_what_it_encrypted_and_no_other_does(home: Path, tmp_path: Path) -> None:
    good, wrong, short = (tmp_path / name for name in ("good", "wrong", "short"))
    for path, text in ((good, "correct horse battery staple\n"), (wrong, "correct horse battery stapl3"), (short, "x")):
        path.write_text(text)
    archive = write_backup(home, tmp_path, BackupConfig(passphrase_file=good)).archive
    assert not (home / BACKUP_KEY).exists()
    for passphrase_file in (None, wrong, short):
        with pytest.raises(UsageError):
            restore(home, archive, keys=RestoreKeys(passphrase_file=passphrase_file))
    assert restore(home, archive, keys=RestoreKeys(passphrase_file=good)).ledger_lines == 2


def test_recipients_whose_private_key_is_elsewhere(home: Path, tmp_path: Path) -> None:
    identity = pyrage.x25519.Identity.generate()
    result = write_backup(home, tmp_path, BackupConfig(recipients=(str(identity.to_public()),)), include_keys=True)
    assert (result.encrypted, result.key_file) == (True, None)
    with pytest.raises(UsageError):
        restore(home, result.archive, keys=RestoreKeys())
    (tmp_path / "offline.key").write_text(f"# created: today\n{identity}\n")
    assert restore(home, result.archive, keys=RestoreKeys(tmp_path / "offline.key")).frozen is None


def test_only_an_encrypted_backup_holds_keys(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        write_backup(home, tmp_path / "backups", include_keys=True, encrypt=False)
    assert not (tmp_path / "backups").exists()
    plain = write_backup(home, tmp_path / "backups", encrypt=False)
    assert (plain.encrypted, plain.archive.read_bytes()[HEADER_BYTES:][:2]) == (False, b"\x1f\x8b")
    assert restore(home, plain.archive, keys=RestoreKeys()).ledger_lines == 2
    plain.archive.write_bytes(plain.archive.read_bytes()[:-1] + b"x")
    with pytest.raises(FedvitError):
        restore(home, plain.archive, keys=RestoreKeys())
