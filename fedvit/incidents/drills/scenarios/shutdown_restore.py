"""Everything is shut down, the state is lost, and a backup brings all of it back."""

from __future__ import annotations

import shutil
from typing import Any

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.runbook import RUNBOOK
from fedvit.incidents.drills.site import CONTROL, Site, answers
from fedvit.store.archive import DATABASE
from fedvit.store.backup import KEPT_FOLDERS, sha256_of
from fedvit.store.store import Store

SHUTDOWN, RESTORE = "Complete System Shutdown", "Restore from Backup"
UNFREEZE = "fedvit privacy unfreeze --justification"


def play(course: Course) -> None:
    """Shut down, back up, lose, restore, compare, start."""
    site = course.site
    site.end_strays()
    course.inject("shutdown, and then the state is deleted")
    course.follow(SHUTDOWN, r"/api/system/shutdown")
    course.check("nothing runs", lambda: site.fedvit("status")["system"] == "down" and not answers(CONTROL))
    course.follow(SHUTDOWN, r"^docker-compose down")
    course.follow(SHUTDOWN, r"tar czf")
    before = snapshot(site)
    _lose(site)
    course.detect()
    archive = max(path.name for path in site.checkout.glob("fedvit-backup-*.tar.gz"))
    course.follow(RESTORE, r"^docker-compose down")
    course.follow(RESTORE, r"tar xzf", backup_file=archive)
    _compare(course, before)
    # The present ledger is lost: the runbook's text says how somebody answers for it.
    _unfreeze(course)
    course.follow(RESTORE, r"^docker-compose up")
    course.follow(RESTORE, r"/api/system/health")
    course.follow(RESTORE, r"^fedvit privacy show")
    course.follow(RESTORE, r"^fedvit audit-log verify")
    done = before["rounds_done"]
    site.training(lambda now: now["rounds_done"] > done, "training continues where it was")
    course.clear()


def snapshot(site: Site) -> dict[str, Any]:
    """Everything that must come back: ledger, budgets, runs, rounds, models, clients, tokens, keys."""
    with Store.open(site.home) as store:
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
            "keys": {path.name: sha256_of(path) for path in sorted((site.home / "keys").iterdir())},
            "rounds_done": run.rounds_done if run else 0,
        }


def _lose(site: Site) -> None:
    for path in site.home.glob(f"{DATABASE}*"):
        path.unlink()
    for name in KEPT_FOLDERS:
        shutil.rmtree(site.home / name)


def _compare(course: Course, before: dict[str, Any]) -> None:
    after = snapshot(course.site)
    if different := [name for name in before if after[name] != before[name]]:
        raise DrillError(f"After the restore {', '.join(different)} are not what they were.")
    course.notes.append(f"{', '.join(before)} are after the restore what they were before")


def _unfreeze(course: Course) -> None:
    site = course.site
    if UNFREEZE not in (site.root / RUNBOOK).read_text():
        raise DrillError(f"The runbook does not name `{UNFREEZE}` any more.")
    course.say(f"$ {UNFREEZE} …")
    site.run(f'{UNFREEZE} "The system was stopped before the backup was made."').checked()


DRILL = Drill(
    "shutdown-restore",
    "full shutdown, loss of the state, restore from the backup",
    (Stage("", Alert("ServiceDown"), play),),
)
