"""kill -9 and Ctrl-C in the middle of a run: the next start continues it."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
from command import Fedvit, environment

from fedvit.errors import InterruptedRunError
from fedvit.store.store import Store
from fedvit.types import Run, RunStatus

pytestmark = pytest.mark.ray

START_TIMEOUT_S = 180.0
CLIENTS = 6
ROUNDS = 6


def start_run(fedvit: Fedvit) -> subprocess.Popen[str]:
    """``fedvit run`` in the background."""
    return subprocess.Popen(
        fedvit.command("run"),
        stdout=sys.stderr,
        stderr=sys.stderr,
        env=environment(),
        start_new_session=True,
        text=True,
    )


def await_round(fedvit: Fedvit, process: subprocess.Popen[str], rounds_done: int) -> None:
    """Return in the middle of the round that follows ``rounds_done`` committed ones."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(base_url=fedvit.control, timeout=10) as client:
        while time.monotonic() < deadline_s and process.poll() is None:
            # Asked without a pause, the answers would take a whole core from what is waited for.
            time.sleep(0.1)
            try:
                progress = client.get("/api/training/status").json()
            except (httpx.HTTPError, ValueError):
                continue
            if progress.get("rounds_done", 0) >= rounds_done and progress["phase"] == "training":
                return
    raise AssertionError(f"training did not reach round {rounds_done + 1}; exit status {process.poll()}")


def stored_run(fedvit: Fedvit) -> Run:
    """The run as the state folder remembers it."""
    with Store.open(fedvit.home) as store:
        run = store.runs.latest()
    assert run is not None
    return run


def check_everything_counted_once(fedvit: Fedvit) -> None:
    """One run, one charge a client and round, no version twice."""
    with Store.open(fedvit.home) as store:
        run = store.runs.latest()
        assert run is not None
        assert (run.ordinal, run.status, run.rounds_done) == (1, RunStatus.COMPLETED, ROUNDS)
        versions = [v.version for v in store.versions.all()]
        assert versions == [f"v1.1.{n}" for n in range(ROUNDS, 0, -1)]
        store.ledger.verify()
        updates = [e.charge for e in store.ledger.entries() if e.charge.event is None]
        charges = collections.Counter((charge.round_index, charge.unit_id) for charge in updates)
        # And one histogram of each client, of the first round.
        assert len(store.ledger.entries()) == len(updates) + CLIENTS
        assert len(charges) == ROUNDS * CLIENTS
        assert set(charges.values()) == {1}


def interrupt(fedvit: Fedvit) -> int:
    """Ctrl-C in the second round of a new run; how many rounds are done."""
    process = start_run(fedvit)
    await_round(fedvit, process, 1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == InterruptedRunError.exit_status
    stopped = stored_run(fedvit)
    assert stopped.status is RunStatus.STOPPED
    assert 1 <= stopped.rounds_done < ROUNDS
    return stopped.rounds_done


def kill_and_finish(fedvit: Fedvit, rounds_done: int) -> None:
    """kill -9 after a further round, in the middle of the next; the same command ends what was begun."""
    process = start_run(fedvit)
    await_round(fedvit, process, rounds_done + 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    killed = stored_run(fedvit)
    assert killed.status is RunStatus.RUNNING
    assert rounds_done < killed.rounds_done < ROUNDS

    summary = fedvit.json("run")
    assert summary["rounds"] == ROUNDS
    check_everything_counted_once(fedvit)
    shown = fedvit.json("privacy", "show", configured=False)
    assert shown["epsilon_spent"] == pytest.approx(summary["epsilon"], abs=1e-9)
    assert shown["ledger_entries"] == ROUNDS * CLIENTS + CLIENTS


@pytest.fixture
def fedvit(fedvit: Fedvit) -> Fedvit:
    """The small system, for so many rounds."""
    fedvit.settings |= {"training.rounds": str(ROUNDS), "release.every_rounds": str(ROUNDS)}
    return fedvit


def test_kill_9_in_a_round_costs_nothing(fedvit: Fedvit) -> None:
    kill_and_finish(fedvit, 0)


@pytest.mark.campaign
def test_ctrl_c_in_a_round_and_kill_9_after_it_cost_nothing(fedvit: Fedvit) -> None:
    kill_and_finish(fedvit, interrupt(fedvit))
