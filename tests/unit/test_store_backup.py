"""Backups: unpacked by hand, backups of a state in use, and any order of charges, backups and restores."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trained_home import WHY, backed_up, charge, cost, fedvit, key_beside, remaining, restore, trained, untar

from fedvit.errors import FedvitError
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import seeded_fleet
from fedvit.types import LedgerFreeze, utc_now


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("template") / "home")


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "home")


# --- unpacked by hand ------------------------------------------------------------------------------------------------


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
        reported, result = [], []
        for i in range(3):
            reported.append(int(process.stdout.readline()) - 99)
            result.append(backed_up(home, tmp_path / str(i)))
        process.kill()
    for i, archive in enumerate(result):
        restored = restore(tmp_path / f"restored-{i}", archive)
        assert restored.ledger_lines % 2 == 0
        assert restored.ledger_lines >= 2 + 2 * reported[i]
    assert restore(home, result[0]).frozen is None


def test_a_damaged_state_is_not_backed_up(home: Path, tmp_path: Path) -> None:
    (home / "state.db").write_bytes(b"no database" * 1000)
    with pytest.raises(FedvitError):
        backed_up(home, tmp_path / "backups")
    assert list((tmp_path / "backups").iterdir()) == []


def test_the_command_says_what_it_did(home: Path, tmp_path: Path) -> None:
    archive = backed_up(home)
    done = json.loads(fedvit(home, "restore", str(archive), "--json").stdout)
    assert (done["ledger_lines"], done["carried_lines"], done["frozen"]) == (2, 0, None)
    lost = fedvit(tmp_path / "lost", "restore", str(archive), "--key", str(key_beside(archive)))
    assert lost.exit_code == 0
    assert "frozen" in lost.stdout
    (tmp_path / "bad.bak").write_bytes(archive.read_bytes()[:-100])
    bad = fedvit(home, "restore", str(tmp_path / "bad.bak"))
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
