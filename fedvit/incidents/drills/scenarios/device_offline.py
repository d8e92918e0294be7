"""An edge device dies: the other one serves on, and the device comes back under its own name."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.processes import supervisor, with_words
from fedvit.incidents.drills.site import EDGES, Site, answers, succeeds

DEVICE = "edge-2"
SECTION = "3. Edge Device Offline"


def play(course: Course) -> None:
    """Kill the device's process, and start it again."""
    site = course.site
    site.post("/api/clients/register", device_id=DEVICE)
    pid = _process(site)
    command, environment = _command(pid), _environment(pid)
    course.inject(f"kill -9 of {DEVICE}")
    os.kill(pid, signal.SIGKILL)
    course.detect()
    course.check(f"{DEVICE} is silent", lambda: not answers(EDGES[1]))
    course.check("the other edge serves on", partial(succeeds, f"{EDGES[0]}/health"))
    course.look(SECTION, r"^ping", edge_device_ip="-c 1 127.0.0.1")
    course.follow(SECTION, r"disconnected_clients")
    course.follow(SECTION, r"-X DELETE", device_id=DEVICE)
    course.check("it is not active", lambda: not site.client(DEVICE)["active"])
    start_again(site, command, environment)
    course.follow(SECTION, r'"camera": "front"', device_id=DEVICE)
    course.follow(SECTION, r"/heartbeat", device_id=DEVICE)
    course.check("it is active again", lambda: site.client(DEVICE)["active"])
    course.check("it serves again", partial(succeeds, f"{EDGES[1]}/health"))
    course.clear()


def start_again(site: Site, command: list[str], environment: dict[str, str]) -> None:
    """What the vehicle's service manager would do; its pid is kept where the site ends it."""
    with (site.home / "logs" / f"{DEVICE}.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    (site.home / "run" / f"{DEVICE}.pid").write_text(str(process.pid))


def _process(site: Site) -> int:
    found = with_words(supervisor(site.home), "--device-id", DEVICE)
    if len(found) != 1:
        raise DrillError(f"{len(found)} processes are {DEVICE}.")
    return found[0]


def _command(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def _environment(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().rstrip("\0").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


DRILL = Drill(
    "device-offline",
    "an edge process is killed",
    (Stage("", Alert("EdgeDeviceOffline", {"device": DEVICE}), play),),
    needs=("ping",),
)
