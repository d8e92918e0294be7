"""A state folder with a run, charges and a release; its backup, its restore and what it may still spend."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pyrage
from typer.testing import CliRunner

from fedvit.cli.main import app
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import load_settings
from fedvit.store.backup import write_backup
from fedvit.store.backup_header import HEADER_BYTES
from fedvit.store.backup_keys import BACKUP_KEY, RestoreKeys
from fedvit.store.records import RoundCommit
from fedvit.store.restore import Restored, restore_backup
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import Cohort

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


def backed_up(home: Path, folder: Path | None = None, *, include_keys: bool = True) -> Path:
    """A backup; the key that opens it lies beside it, as an operator keeps it."""
    archive = write_backup(home, folder or home.parent / "backups", include_keys=include_keys).archive
    shutil.copy(home / BACKUP_KEY, key_beside(archive))
    return archive


def key_beside(archive: Path) -> Path:
    return archive.with_name("backup.key")


def restore(home: Path, archive: Path, **more: Any) -> Restored:
    return restore_backup(home, archive, actor="local:test", **{"keys": RestoreKeys(key_beside(archive)), **more})


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


def plain_tar(archive: Path, key_file: Path | None = None) -> bytes:
    """The tar.gz in a backup, as ``tail -c +4097 | age -d -i KEY_FILE`` gives it."""
    secret = (key_file or key_beside(archive)).read_text().splitlines()[-1]
    return pyrage.decrypt(archive.read_bytes()[HEADER_BYTES:], [pyrage.x25519.Identity.from_str(secret)])


def untar(archive: Path, folder: Path, key_file: Path | None = None) -> Path:
    """Unpack a backup by hand, without fedvit."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["tar", "xz", "-C", str(folder)], input=plain_tar(archive, key_file), check=True)
    return folder


def fedvit(home: Path, *words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--home", str(home)])
