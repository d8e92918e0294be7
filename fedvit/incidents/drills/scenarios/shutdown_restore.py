"""The system is shut down, the state is lost, and a backup restores all of it."""

from __future__ import annotations

import shutil
from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.runbook import RUNBOOK
from fedvit.incidents.drills.system import CONTROL, DrillSystem, accepts_connections
from fedvit.store.archive import DATABASE
from fedvit.store.backup import KEPT_FOLDERS, sha256_of
from fedvit.store.backup_keys import KEYS
from fedvit.store.store import Store

SHUTDOWN, RESTORE = "Complete System Shutdown", "Restore from Backup"
UNFREEZE = "fedvit privacy unfreeze --justification"


def play(run: StageRun) -> None:
    """Shut down, back up, delete the state, restore it, compare, and start."""
    system = run.system
    system.end_restarted_edges()
    run.inject("shutdown, and then the state is deleted")
    run.follow(SHUTDOWN, r"/api/system/shutdown")
    run.check("nothing runs", lambda: system.fedvit("status")["system"] == "down" and not accepts_connections(CONTROL))
    run.follow(SHUTDOWN, r"^docker-compose down")
    run.follow(SHUTDOWN, r"tar czf")
    before = _snapshot(system)
    # As the runbook says: a copy of the keys is kept where the state is not.
    keys_copy = shutil.copytree(system.home / KEYS, system.checkout.with_name("copy-of-keys"))
    _delete_state(system)
    run.detect()
    archive = max(path.name for path in system.checkout.glob("fedvit-backup-*.bak"))
    run.follow(RESTORE, r"^docker-compose down")
    run.say("(puts the copy of the keys back)")
    shutil.copytree(keys_copy, system.home / KEYS)
    run.follow(RESTORE, r"tar xzf", backup_file=archive)
    _compare(run, before)
    # The ledger of the deleted state is lost, so the operator has to unfreeze the restored one.
    _unfreeze(run)
    run.follow(RESTORE, r"^docker-compose up")
    run.follow(RESTORE, r"/api/system/health")
    run.follow(RESTORE, r"^fedvit privacy show")
    run.follow(RESTORE, r"^fedvit audit-log verify")
    done = before["rounds_done"]
    system.wait_for_rounds(done, "training continues where it was")
    run.clear()


def _snapshot(system: DrillSystem) -> dict[str, Any]:
    """All that must be restored: ledger, budgets, runs, rounds, models, clients, tokens, keys."""
    with Store.open(system.home) as store:
        run = store.runs.latest()
        return {
            "ledger": list(store.ledger.lines()),
            "budgets": store.budget.periods(),
            "runs": store.runs.all(),
            "rounds": [store.rounds.of_run(run.run_id) for run in store.runs.all()],
            "answers": [store.rounds.answers(run.run_id) for run in store.runs.all()],
            "versions": store.versions.all(),
            "releases": store.releases.all(),
            "clients": store.clients.all(),
            "tokens": store.tokens.all(),
            "blobs": {digest: store.blobs.size(digest) for digest in store.versions.blob_digests()},
            "keys": {path.name: sha256_of(path) for path in sorted((system.home / "keys").iterdir())},
            "rounds_done": run.rounds_done if run else 0,
        }


def _delete_state(system: DrillSystem) -> None:
    for path in system.home.glob(f"{DATABASE}*"):
        path.unlink()
    for name in KEPT_FOLDERS:
        shutil.rmtree(system.home / name)


def _compare(run: StageRun, before: dict[str, Any]) -> None:
    after = _snapshot(run.system)
    if different := [name for name in before if after[name] != before[name]]:
        raise DrillError(f"After the restore {', '.join(different)} are not what they were.")
    run.notes.append(f"{', '.join(before)} are after the restore what they were before")


def _unfreeze(run: StageRun) -> None:
    system = run.system
    if UNFREEZE not in (system.root / RUNBOOK).read_text():
        raise DrillError(f"The runbook does not name `{UNFREEZE}` any more.")
    run.say(f"$ {UNFREEZE} …")
    system.run(f'{UNFREEZE} "The system was stopped before the backup was made."').checked()


DRILL = Drill(
    "shutdown-restore",
    "full shutdown, loss of the state, restore from the backup",
    (Stage("", ExpectedAlert("ServiceDown"), play),),
)
