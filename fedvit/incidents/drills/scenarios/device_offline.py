"""An edge device is killed: the other one continues to serve, and the device returns under its own name."""

from __future__ import annotations

import os
import signal
import subprocess
from functools import partial
from pathlib import Path

from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.processes import supervisor, with_words
from fedvit.incidents.drills.system import EDGES, DrillSystem, accepts_connections, responds

DEVICE = "edge-2"
SECTION = "3. Edge Device Offline"


def play(run: StageRun) -> None:
    """Kill the device's process, and start it again."""
    system = run.system
    system.post("/api/clients/register", device_id=DEVICE)
    pid = _process(system)
    command = _nul_separated(pid, "cmdline")
    environment = dict(pair.split("=", 1) for pair in _nul_separated(pid, "environ") if "=" in pair)
    run.inject(f"kill -9 of {DEVICE}")
    os.kill(pid, signal.SIGKILL)
    run.detect()
    run.check(f"{DEVICE} is silent", lambda: not accepts_connections(EDGES[1]))
    run.check("the other edge serves on", partial(responds, f"{EDGES[0]}/health"))
    run.look(SECTION, r"^ping", edge_device_ip="-c 1 127.0.0.1")
    run.follow(SECTION, r"disconnected_clients")
    run.follow(SECTION, r"-X DELETE", device_id=DEVICE)
    run.check("it is not active", lambda: not system.client(DEVICE)["active"])
    _restart(system, command, environment)
    run.follow(SECTION, r'"camera": "front"', device_id=DEVICE)
    run.follow(SECTION, r"/heartbeat", device_id=DEVICE)
    run.check("it is active again", lambda: system.client(DEVICE)["active"])
    run.check("it serves again", partial(responds, f"{EDGES[1]}/health"))
    run.clear()


def _restart(system: DrillSystem, command: list[str], environment: dict[str, str]) -> None:
    """Start the process like the vehicle's service manager; the system ends it by its pid file."""
    with (system.home / "logs" / f"{DEVICE}.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    (system.home / "run" / f"{DEVICE}.pid").write_text(str(process.pid))


def _process(system: DrillSystem) -> int:
    pids = with_words(supervisor(system.home), "--device-id", DEVICE)
    if len(pids) != 1:
        raise DrillError(f"{len(pids)} processes are {DEVICE}.")
    return pids[0]


def _nul_separated(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/{name}").read_text().rstrip("\0").split("\0")


DRILL = Drill(
    "device-offline",
    "an edge process is killed",
    (Stage("", ExpectedAlert("EdgeDeviceOffline", {"device": DEVICE}), play),),
    needs=("ping",),
)
