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
from conftest import Fedvit, environment

from fedvit.store.store import Store
from fedvit.types import RunStatus

pytestmark = pytest.mark.ray

START_TIMEOUT_S = 180.0


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
            try:
                progress = client.get("/api/training/status").json()
            except (httpx.HTTPError, ValueError):
                continue
            if progress.get("rounds_done", 0) >= rounds_done and progress["phase"] == "training":
                return
    raise AssertionError(f"training did not reach round {rounds_done + 1}; exit status {process.poll()}")


def check_everything_counted_once(fedvit: Fedvit) -> None:
    """One run, six rounds, one charge a client and round, no version twice."""
    with Store.open(fedvit.home) as store:
        run = store.latest_run()
        assert run is not None
        assert (run.ordinal, run.status, run.rounds_done) == (1, RunStatus.COMPLETED, 6)
        versions = [v.version for v in store.versions()]
        assert versions == [f"v1.1.{n}" for n in range(6, 0, -1)]
        store.verify_ledger()
        charges = collections.Counter((e.charge.round_index, e.charge.unit_id) for e in store.ledger())
        assert len(charges) == 6 * 6
        assert set(charges.values()) == {1}


def test_kill_9_of_the_driver_in_a_round_costs_nothing(fedvit: Fedvit) -> None:
    process = start_run(fedvit)
    await_round(fedvit, process, 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Store.open(fedvit.home) as store:
        before = store.latest_run()
        assert before is not None
        assert before.status is RunStatus.RUNNING
        assert 2 <= before.rounds_done < 6
    summary = fedvit.json("run")
    assert summary["rounds"] == 6
    check_everything_counted_once(fedvit)
    shown = fedvit.json("privacy", "show", configured=False)
    assert shown["epsilon_spent"] == pytest.approx(summary["epsilon"], abs=1e-9)
    assert shown["ledger_entries"] == 36


def test_ctrl_c_stops_gracefully_and_the_next_start_continues(fedvit: Fedvit) -> None:
    process = start_run(fedvit)
    await_round(fedvit, process, 1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    with Store.open(fedvit.home) as store:
        before = store.latest_run()
        assert before is not None
        assert before.status is RunStatus.STOPPED
        assert before.rounds_done >= 1
    trained = fedvit.json("train")
    assert (trained["status"], trained["rounds_done"]) == ("completed", 6)
    check_everything_counted_once(fedvit)
