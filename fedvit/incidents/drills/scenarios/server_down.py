"""kill -9 of the control replica, of the aggregator (both restarted by Ray), and of Ray itself (restarted by hand)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.processes import kill, named, supervisor
from fedvit.incidents.drills.system import CONTROL, EDGES, responds

SECTION = "1. Federated Server Down"
HEAD = ("gcs_server", "raylet")


def play_control(run: StageRun) -> None:
    """Kill the control replica repeatedly; the edges continue to serve, and Ray starts another replica."""
    run.inject("kill -9 of the control replica")
    run.detect(meanwhile=_RepeatedKill(run, "control", lambda: responds(f"{CONTROL}/healthz")))
    run.check("the edges serve on", partial(responds, f"{EDGES[0]}/health"))
    run.look(SECTION, r"^docker ps")
    run.look(SECTION, r"^docker stats")
    _check_recovery(run)


def play_aggregator(run: StageRun) -> None:
    """Kill the aggregator actor; it continues its round from the stored state."""
    done = run.system.rounds_done()
    run.inject("kill -9 of the aggregator")
    run.detect(meanwhile=_RepeatedKill(run, "aggregator", lambda: True))
    run.look(SECTION, r"^docker ps")
    run.look(SECTION, r"/api/system/health")
    _check_recovery(run)
    run.system.wait_for_rounds(done + 1, "training goes on")


def play_head(run: StageRun) -> None:
    """Kill Ray's head processes: Serve ends with its cluster, so the operator has to start the system again."""
    system = run.system
    system.end_restarted_edges()
    done = system.rounds_done()
    previous = supervisor(system.home)
    victims = [pid for name in HEAD for pid in named(previous, name)]
    if len(victims) != len(HEAD):
        raise DrillError(f"{len(victims)} processes are Ray's head; there should be {len(HEAD)}.")
    run.inject(f"kill -9 of {' and '.join(HEAD)}")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    run.detect()
    run.look(SECTION, r"^docker ps")
    run.look(SECTION, r"^docker logs")
    run.follow(SECTION, r"^free")
    run.follow(SECTION, r"^docker-compose restart")
    run.check("another system runs", lambda: supervisor(system.home) != previous)
    _check_recovery(run)
    system.wait_for_rounds(done + 1, "training continues where it was")


class _RepeatedKill:
    """Kills a part each time that it is back: Ray restarts it in seconds, too fast for the alert.

    Args:
        is_back: whether to look for the process.
    """

    def __init__(self, run: StageRun, part: str, is_back: Callable[[], bool]) -> None:
        self._home, self._part, self._is_back = run.system.home, part, is_back
        self._kills, self._notes = 0, run.notes
        self._notes.append("")

    def __call__(self) -> None:
        with suppress(LookupError, ProcessLookupError):
            if self._is_back():
                kill(self._home, self._part)
                self._kills += 1
                self._notes[-1] = f"killed {self._kills} times until the alert fired"


def _check_recovery(run: StageRun) -> None:
    run.clear()
    run.check("every part is healthy", lambda: run.system.fedvit("status")["system"] == "ok")
    run.follow(SECTION, r"^make health-check")
    run.follow(SECTION, r"config.yaml")
    run.follow(SECTION, r"test_connection")


DRILL = Drill(
    "server-down",
    "kill -9 of the control replica, the aggregator, and Ray's head",
    (
        Stage("control", ExpectedAlert("ServiceDown"), play_control),
        Stage("aggregator", ExpectedAlert("ComponentUnhealthy", {"component": "aggregator"}), play_aggregator),
        Stage("head", ExpectedAlert("ServiceDown"), play_head),
    ),
)
