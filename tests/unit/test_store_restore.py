"""Restore: what is not proven touches nothing, and no privacy budget that was spent ever comes back."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained_home import WHY, backed_up, charge, cost, execute, remaining, restore, trained, tree

from fedvit.access.tokens import create_token
from fedvit.errors import LedgerFrozenError, NotFoundError, StateError
from fedvit.store import restore as restoring
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import LedgerFreeze, utc_now


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


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
        with pytest.raises(LedgerFrozenError):
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
        results = [create_token(store, name, ["admin"], now=utc_now()).token.token_id for name in ("Ana", "Bo")]
        wish = store.budget.request(3.0, WHY, "Ana", utc_now())
    archive = backed_up(home)
    with Store.open(home) as store:
        store.budget.approve(wish.request_id, "Bo", utc_now())
        period = store.budget.grant(1.0, WHY, "Ana", "Bo")
        charge(store, 2)
        store.releases.add("v1.1.1", {"standard": store.blobs.put(b"other")}, {"standard": "{}"}, "second")
        store.ledger.freeze(freeze)
        store.tokens.revoke(results[0], utc_now())
        store.clients.quarantine(["vehicle-0001"], "it lied", utc_now())
    assert restore(home, archive).frozen == freeze
    with Store.open(home) as store:
        assert store.budget.periods() == [period]
        assert [bool(store.tokens.get(token_id).revoked_at) for token_id in results] == [True, False]
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
    with pytest.raises(StateError):
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
    with pytest.raises(StateError):
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
        with pytest.raises(StateError):
            restore(home, archive)
    assert tree(home) == before


def test_a_state_that_some_process_has_open_is_left_alone(home: Path) -> None:
    archive = backed_up(home)
    with Store.open(home) as store:
        assert store.clients.count() == 3
        with pytest.raises(StateError):
            restore(home, archive)
        assert not list(home.glob("before-restore-*"))
        charge(store, 2)
    assert restore(home, archive).carried_lines == 2


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
    assert step == len(done) == 7
    with Store.open(home) as store:
        assert store.clients.count() == 3
