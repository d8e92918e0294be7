"""More than half of the fleet is cut off, each part in one direction; the other clients continue to train."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedvit.config import DataConfig
from fedvit.data.sources import open_source
from fedvit.errors import DrillError
from fedvit.incidents.drills.drill import Drill, ExpectedAlert, Stage, StageRun
from fedvit.incidents.drills.network import CHILDREN, Link, linked_namespaces, start_child
from fedvit.incidents.drills.system import DrillSystem

SECTION = "6. Network Partition"
SERVER = "http://127.0.0.1:8000"
TRAINING_VEHICLE = "drill-truck"
SILENT = 7
"""Vehicles in each namespace that only send heartbeats."""
IMAGES = 24
INTERVAL_S = "1"


def play(run: StageRun) -> None:
    """Link namespaces, let vehicles take part over the links, cut these, follow the runbook, and restore them."""
    system = run.system
    names = [[f"drill-van-{n}-{index}" for index in range(SILENT)] for n in (1, 2)]
    before = system.get("/api/training/config")
    try:
        with ExitStack() as stack, linked_namespaces((1, 2), system.environment) as links:
            _start_fleet(run, stack, links, names)
            _cut_and_restore(run, links)
            # Rounds wait for vehicles that leave during the round.
            system.post("/api/training/stop")
            system.wait_for_rest()
    finally:
        for name in (TRAINING_VEHICLE, *names[0], *names[1]):
            system.request(f"/api/clients/{name}", "DELETE")
        system.request("/api/training/config", "POST", json={k: before[k] for k in ("min_clients", "wait_timeout")})


def _start_fleet(run: StageRun, stack: ExitStack, links: list[Link], names: list[list[str]]) -> None:
    system = run.system
    for link, own in zip(links, names, strict=True):
        for name in own:
            system.post("/api/clients/register", device_id=name)
        heartbeats = ["python", "-m", CHILDREN, "heartbeats", SERVER, INTERVAL_S, *own]
        start_child(stack, link.inside(heartbeats), system.environment, system.home / "logs" / "heartbeats.log")
    folder = system.checkout.with_name("truck")
    disk, log = _write_images(folder / "disk"), folder / "log"
    command = ["fedvit-edge", "train", "--source", SERVER, "--data", str(disk), "--device-id", TRAINING_VEHICLE]
    command += ["--home", str(folder / "home"), "--target-epsilon", "1000"]
    start_child(stack, links[0].inside(command), system.environment, log)
    run.check("a vehicle trains over its link", lambda: _accepted_steps(log))
    run.check("everybody is connected", lambda: _disconnected(system) <= 1)


def _cut_and_restore(run: StageRun, links: list[Link]) -> None:
    system, (first, second) = run.system, links
    run.inject("one namespace can send nothing, the other receives nothing")
    first.block_outgoing()
    second.block_incoming()
    run.detect()
    _check_asymmetry(run, links)
    connectivity = run.follow(SECTION, r"/api/clients/connectivity").json()
    run.check("a partition is suspected", lambda: connectivity["partition_suspected"])
    run.follow(SECTION, r'"mode": "asynchronous"')
    run.follow(SECTION, r'"min_clients": 10')
    run.follow(SECTION, r"communication/enable-backup")
    run.follow(SECTION, r"aggregation/mode\" \| jq")
    run.follow(SECTION, r"training/config\" \| jq")
    run.follow(SECTION, r"communication/backup\" \| jq")
    done = system.rounds_done()
    system.wait_for_rounds(done + 1, "the rest trains on")
    first.block_outgoing(undo=True)
    second.block_incoming(undo=True)
    run.check("everybody is connected again", lambda: _disconnected(system) <= 1)
    run.follow(SECTION, r'"mode": "synchronous"')
    run.follow(SECTION, r"communication/disable-backup")
    run.clear()
    done = system.rounds_done()
    system.wait_for_rounds(done + 1, "rounds are synchronous again")


def _check_asymmetry(run: StageRun, links: list[Link]) -> None:
    """Send packets in both directions, and check where they arrive."""
    first, second = links
    far_before, near_before = first.received()[1], second.received()[0]
    _ping(["ping", "-c", "3", "-W", "1", first.far])
    _ping(second.inside(["ping", "-c", "3", "-W", "1", second.near]))
    if first.received()[1] <= far_before or second.received()[0] <= near_before:
        raise DrillError("The cut is not asymmetric: nothing arrives in the direction that is left.")
    run.notes.append("two network namespaces, each cut in one direction; in the other one packets arrive")


def _ping(command: list[str]) -> None:
    if subprocess.run(command, capture_output=True).returncode == 0:
        raise DrillError(f"{' '.join(command)} is answered, so the link is not cut.")


def _disconnected(system: DrillSystem) -> int:
    return int(system.get("/api/clients/connectivity")["disconnected"])


def _accepted_steps(log: Path) -> list[dict[str, Any]]:
    """The vehicle's log lines of rounds that accepted its update."""
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line) for line in lines if line.startswith("{")]
    return [step for step in steps if step["status"] in ("received", "accepted")]


def _write_images(folder: Path) -> Path:
    """Write some images of the default data set as a vehicle stores them; return the folder."""
    source = open_source(DataConfig())
    for index, record in enumerate(source.test[:: len(source.test) // IMAGES][:IMAGES]):
        path = folder / source.classes[record.label] / f"{index}{Path(record.key).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(record))
    return folder


DRILL = Drill(
    "partition",
    "most clients are cut off asymmetrically",
    (Stage("", ExpectedAlert("NetworkPartition"), play, may_lose_updates=True),),
    needs=("ip", "ping"),
    needs_root=True,
)
