"""More than half of the fleet is cut off, some in one direction and some in the other; the rest trains on."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedvit.config import DataConfig
from fedvit.data.sources import open_source
from fedvit.errors import DrillError
from fedvit.incidents.drills.alerts import Alert
from fedvit.incidents.drills.cables import Cable, laid, running
from fedvit.incidents.drills.course import Course
from fedvit.incidents.drills.drill import Drill, Stage
from fedvit.incidents.drills.site import Site

SECTION = "6. Network Partition"
SERVER = "http://127.0.0.1:8000"
TRAINS = "drill-truck"
SILENT = 7
"""Vehicles in each namespace that show that they are there, and train nothing."""
IMAGES = 24
INTERVAL_S = "1"


def play(course: Course) -> None:
    """Lay cables, let vehicles take part over them, cut them, follow the runbook, mend them."""
    site = course.site
    names = [[f"drill-van-{n}-{index}" for index in range(SILENT)] for n in (1, 2)]
    before = site.get("/api/training/config")
    try:
        with ExitStack() as stack, laid((1, 2), site.environment) as cables:
            _fleet(course, stack, cables, names)
            _cut_and_mended(course, cables)
            # Whoever leaves in the middle of a round is waited for.
            site.post("/api/training/stop")
            site.training(lambda now: now["phase"] in ("resting", "idle"), "training rests")
    finally:
        for name in (TRAINS, *names[0], *names[1]):
            site.ask(f"/api/clients/{name}", "DELETE")
        site.ask("/api/training/config", "POST", json={k: before[k] for k in ("min_clients", "wait_timeout")})


def _fleet(course: Course, stack: ExitStack, cables: list[Cable], names: list[list[str]]) -> None:
    site = course.site
    for cable, own in zip(cables, names, strict=True):
        for name in own:
            site.post("/api/clients/register", device_id=name)
        beacons = ["python", "-m", "fedvit.incidents.drills.beacons", SERVER, INTERVAL_S, *own]
        running(stack, cable.inside(beacons), site.environment, site.home / "logs" / "beacons.log")
    folder = site.checkout.with_name("truck")
    disk, log = own_images(folder / "disk"), folder / "log"
    trains = ["fedvit-edge", "train", "--source", SERVER, "--data", str(disk), "--device-id", TRAINS]
    trains += ["--home", str(folder / "home"), "--target-epsilon", "1000"]
    running(stack, cables[0].inside(trains), site.environment, log)
    course.check("a vehicle trains over its cable", lambda: _steps(log))
    course.check("everybody is connected", lambda: _lost(site) <= 1)


def _cut_and_mended(course: Course, cables: list[Cable]) -> None:
    site, (first, second) = course.site, cables
    course.inject("one namespace can send nothing, the other receives nothing")
    first.cut_from_there()
    second.cut_from_here()
    course.detect()
    _asymmetric(course, cables)
    found = course.follow(SECTION, r"/api/clients/connectivity").json()
    course.check("a partition is suspected", lambda: found["partition_suspected"])
    course.follow(SECTION, r'"mode": "asynchronous"')
    course.follow(SECTION, r'"min_clients": 10')
    course.follow(SECTION, r"communication/enable-backup")
    course.follow(SECTION, r"aggregation/mode\" \| jq")
    course.follow(SECTION, r"training/config\" \| jq")
    course.follow(SECTION, r"communication/backup\" \| jq")
    done = site.get("/api/training/status")["rounds_done"]
    site.training(lambda now: now["rounds_done"] > done + 1, "the rest trains on")
    first.mend_from_there()
    second.mend_from_here()
    course.check("everybody is connected again", lambda: _lost(site) <= 1)
    course.follow(SECTION, r'"mode": "synchronous"')
    course.follow(SECTION, r"communication/disable-backup")
    course.clear()
    done = site.get("/api/training/status")["rounds_done"]
    site.training(lambda now: now["rounds_done"] > done + 1, "rounds are synchronous again")


def _asymmetric(course: Course, cables: list[Cable]) -> None:
    """Send something each way, and see where it arrives."""
    first, second = cables
    arrived_there, arrived_here = first.received()[1], second.received()[0]
    _ping(["ping", "-c", "3", "-W", "1", first.there])
    _ping(second.inside(["ping", "-c", "3", "-W", "1", second.here]))
    if first.received()[1] <= arrived_there or second.received()[0] <= arrived_here:
        raise DrillError("The cut is not asymmetric: nothing arrives in the direction that is left.")
    course.notes.append("two network namespaces, each cut in one direction; in the other one packets arrive")


def _ping(command: list[str]) -> None:
    if subprocess.run(command, capture_output=True).returncode == 0:
        raise DrillError(f"{' '.join(command)} is answered, so the cable is not cut.")


def _lost(site: Site) -> int:
    found: dict[str, Any] = site.get("/api/clients/connectivity")
    return int(found["disconnected"])


def _steps(log: Path) -> list[dict[str, Any]]:
    """What the vehicle told of the rounds in which its update was taken."""
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line) for line in lines if line.startswith("{")]
    return [step for step in steps if step["status"] in ("received", "accepted")]


def own_images(folder: Path) -> Path:
    """Some real images, as they would lie on a vehicle's disk."""
    source = open_source(DataConfig())
    for index, record in enumerate(source.test[:: len(source.test) // IMAGES][:IMAGES]):
        path = folder / source.classes[record.label] / f"{index}{Path(record.key).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(record))
    return folder


DRILL = Drill(
    "partition",
    "most clients are cut off asymmetrically",
    (Stage("", Alert("NetworkPartition"), play, may_lose_updates=True),),
    needs=("ip", "ping"),
    needs_root=True,
)
