"""One seed, one model: how many proxies trained it, and who was slow, changes no bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.client_proxy import ClientProxy
from actors.connection import connect
from actors.fleet import RayFleet
from actors.handles import proxy_name
from actors.spawn import spawn
from fedvit.clients.workload import load_workload, server_model
from fedvit.config import Settings
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings, settings_to_json
from fedvit.store.store import Store
from fedvit.testing.doubles import GenerousAccountant
from fedvit.types import RunStatus

pytestmark = pytest.mark.ray

SEED = bytes(range(32))
CLIENTS, ROUNDS = 9, 4
# Each is slow enough for the others to be ahead of it, wherever it is trained.
STRAGGLERS = {1: ["vehicle-03"], 2: ["vehicle-00", "vehicle-05"], 4: ["vehicle-08"]}
PRIVACY: dict[str, dict[str, Any]] = {
    "record": {"privacy": {"privacy_unit": "record"}, "cohort": {"selection": "uniform", "size": 6}},
    "client": {"privacy": {"privacy_unit": "client"}, "cohort": {"selection": "poisson", "sampling_prob": 0.7}},
    # Masks cancel to the last bit, whichever clients are in one proxy's sum.
    "masked": {
        "privacy": {"privacy_unit": "client", "noise_at": "distributed"},
        "cohort": {"selection": "uniform", "size": 6, "max_participations": ROUNDS},
    },
}


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray whose workers find the modules beside the tests."""
    settings = load_settings(
        environ={}, overrides={"home": tmp_path_factory.mktemp("ray"), "ray": {"dashboard": False}}
    )
    folder = str(Path(__file__).parents[1])
    connect(settings, {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])})
    yield
    ray.shutdown()


def trained(home: Path, unit: str, proxies: int) -> list[str]:
    """The hash of every round's weights."""
    settings = _settings(home, unit)
    (home / "keys").mkdir(parents=True)
    (home / "keys" / "root.key").write_bytes(SEED)
    # What is slow where is not the same in any two runs.
    (home / "stragglers").write_text("\n".join(STRAGGLERS[proxies]))
    actors = [
        spawn(ClientProxy, f"{proxy_name(index)}-of-{proxies}-{unit}", settings, settings_to_json(settings))
        for index in range(proxies)
    ]
    try:
        with Store.open(home) as store:
            store.clients.register(load_workload(settings).registered())
            loop = Coordinator(
                settings=settings,
                store=store,
                accountant=GenerousAccountant(store),
                fleet=RayFleet(actors, timeout_s=60.0),
                model=server_model(settings),
            )
            run = loop.run()
            assert (run.status, run.reason) == (RunStatus.COMPLETED, None)
            return [version.weights_digest for version in reversed(store.versions.all())]
    finally:
        for actor in actors:
            ray.kill(actor)


def _settings(home: Path, unit: str) -> Settings:
    overrides = {
        "home": home,
        "workload": {
            "clients_class": "workload_clients:ProtectingClients",
            "options": {"clients": CLIENTS},
        },
        "training": {"rounds": ROUNDS, "cohort": PRIVACY[unit]["cohort"]},
        "privacy": {"noise_multiplier": 1.0, **PRIVACY[unit]["privacy"]},
    }
    return load_settings(environ={}, overrides=overrides)


@pytest.mark.parametrize("unit", list(PRIVACY))
def test_one_two_and_four_proxies_train_the_same_model(tmp_path: Path, unit: str) -> None:
    results = [trained(tmp_path / str(proxies), unit, proxies) for proxies in (1, 2, 4)]
    assert results[0] == results[1] == results[2]
    assert len(set(results[0])) == ROUNDS
