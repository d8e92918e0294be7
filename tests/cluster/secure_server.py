"""A control API and a training loop of twenty virtual clients, without Ray, for vehicles on other hosts.

Run as ``python -m tests.cluster.secure_server HOME DATA ADDRESS PORT ROUNDS``; ends when the run has ended.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import uvicorn

from fedvit.clients.host import vision_host
from fedvit.config import Settings
from fedvit.evaluation.server_model import ServerModel
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import GenerousAccountant
from fedvit.types import Client, ClientKind
from serve_apps.control.api import Services, create_api
from tests.secure_world import CLASSES, VEHICLES, VIRTUAL, HostFleet

PHASE_S = 30.0
READY = "ready"
"""File in the state folder, made when the control API listens."""


def settings_of(home: Path, data: Path, rounds: int) -> Settings:
    """The settings of the run."""
    partition = {"clients": VIRTUAL, "scheme": "iid", "min_examples": 2}
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "data": {"source": "folder", "path": data, "image_size": 32, "partition": partition},
            "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
            "training": {"rounds": rounds, "cohort": {"selection": "all"}, "round_timeout_s": PHASE_S},
            "privacy": {"noise_multiplier": 4.0, "noise_at": "distributed", "target_epsilon": 1000.0},
            "secure_aggregation": {"phase_timeout_s": PHASE_S},
            "histograms": {"every_rounds": None},
            "fleet": {"task_interval_s": 1.0, "admission": "automatic", "heartbeat_timeout_s": 3600.0},
            "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
        },
    )


def main(home: Path, data: Path, address: str, port: int, rounds: int) -> None:
    """Serve, wait until the vehicles have registered and asked for a task, and train."""
    settings = settings_of(home, data, rounds)

    def nobody() -> NoReturn:
        raise AssertionError("an actor was asked")

    with Store.open(home) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=CLASSES)
        host = vision_host(settings)
        names = [f"vehicle-{index:02d}" for index in range(VIRTUAL)]
        store.clients.register([Client(c, ClientKind.VIRTUAL, len(host.data.load(c).labels)) for c in names])
        api = create_api(Services(settings, store, nobody, nobody))
        server = uvicorn.Server(uvicorn.Config(api, host=address, port=port, log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.05)
        (home / READY).touch()
        while sum(client.last_seen_at is not None for client in store.clients.remote(VEHICLES)) < len(VEHICLES):
            time.sleep(0.2)
        loop = Coordinator(
            settings=settings,
            store=store,
            accountant=GenerousAccountant(store),
            fleet=MixedFleet(settings, store, HostFleet(host)),
            model=ServerModel(settings),
        )
        run = loop.run()
        print(run.status.value, run.reason, flush=True)
        server.should_exit = True


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
