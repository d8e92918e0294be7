"""kill -9: of the control replica and the aggregator, which Ray starts again, and of Ray itself, which nobody does."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.processes import kill, named, supervisor
from fedvit.incidents.drills.site import CONTROL, EDGES, succeeds

SECTION = "1. Federated Server Down"
HEAD = ("gcs_server", "raylet")


def play_control(course: Course) -> None:
    """Kill the replica that answers; edges serve on meanwhile, and another one takes its place."""
    course.inject("kill -9 of the control replica")
    keep_killing = _Killer(course, "control", lambda: succeeds(f"{CONTROL}/healthz"))
    course.detect(meanwhile=keep_killing)
    course.check("the edges serve on", partial(succeeds, f"{EDGES[0]}/health"))
    course.look(SECTION, r"^docker ps")
    course.look(SECTION, r"^docker stats")
    _recovered(course)


def play_aggregator(course: Course) -> None:
    """Kill the actor that trains; it continues its round from the state."""
    done = course.site.get("/api/training/status")["rounds_done"]
    course.inject("kill -9 of the aggregator")
    course.detect(meanwhile=_Killer(course, "aggregator", lambda: True))
    course.look(SECTION, r"^docker ps")
    course.look(SECTION, r"/api/system/health")
    _recovered(course)
    course.site.training(lambda now: now["rounds_done"] > done + 1, "training goes on")


def play_head(course: Course) -> None:
    """Kill Ray's own processes: Serve does not outlive its cluster, so somebody must start the system again."""
    site = course.site
    # Whatever a former drill left running in the place of an edge ends with its machine.
    site.end_strays()
    done = site.get("/api/training/status")["rounds_done"]
    above = supervisor(site.home)
    victims = [pid for name in HEAD for pid in named(above, name)]
    if len(victims) != len(HEAD):
        raise DrillError(f"{len(victims)} processes are Ray's head; there should be {len(HEAD)}.")
    course.inject(f"kill -9 of {' and '.join(HEAD)}")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    course.detect()
    course.look(SECTION, r"^docker ps")
    course.look(SECTION, r"^docker logs")
    course.follow(SECTION, r"^free")
    course.follow(SECTION, r"^docker-compose restart")
    course.check("another system runs", lambda: supervisor(site.home) != above)
    _recovered(course)
    site.training(lambda now: now["rounds_done"] > done + 1, "training continues where it was")


class _Killer:
    """Kills a part whenever it is there again: Ray mends it in seconds, and what mends itself should alarm nobody.

    Args:
        is_back: whether it is worth looking for its process.
    """

    def __init__(self, course: Course, part: str, is_back: Callable[[], bool]) -> None:
        self._home, self._part, self._is_back = course.site.home, part, is_back
        self._kills, self._notes = 0, course.notes
        self._notes.append("")

    def __call__(self) -> None:
        with suppress(LookupError, ProcessLookupError):
            if self._is_back():
                kill(self._home, self._part)
                self._kills += 1
                self._notes[-1] = f"killed {self._kills} times until the alert fired"


def _recovered(course: Course) -> None:
    course.clear()
    course.check("every part is well", lambda: course.site.fedvit("status")["system"] == "ok")
    course.follow(SECTION, r"^make health-check")
    course.follow(SECTION, r"config.yaml")
    course.follow(SECTION, r"test_connection")


DRILL = Drill(
    "server-down",
    "kill -9 of the control replica, the aggregator, and Ray's head",
    (
        Stage("control", Alert("ServiceDown"), play_control),
        Stage("aggregator", Alert("ComponentUnhealthy", {"component": "aggregator"}), play_aggregator),
        Stage("head", Alert("ServiceDown"), play_head),
    ),
)
