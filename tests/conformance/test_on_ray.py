"""The ports of the actors, all on one Ray and one system of three actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import ray
from contracts.accountant import AccountantContract
from contracts.aggregator import AggregatorContract
from contracts.client_host import ClientHostContract
from contracts.fleet import FleetContract, task_for

from actors.connection import connect
from actors.fleet import RayFleet
from actors.handles import ACCOUNTANT, ActorHandle, accountant_handle, proxy_name
from actors.spawn import Actors, spawn_actors
from fedvit.clients.workload import load_workload, server_model
from fedvit.config import Settings
from fedvit.ports import AccountantPort, AggregatorPort, ClientHostPort, FleetPort
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import Cohort, TrainTask, Weights

pytestmark = pytest.mark.ray

CLIENTS = tuple(f"vehicle-{index:02d}" for index in range(6))


@dataclass(frozen=True, slots=True)
class System:
    """A system that has started, and its store."""

    settings: Settings
    store: Store
    actors: Actors


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    overrides: dict[str, Any] = {
        "home": tmp_path_factory.mktemp("home"),
        "workload": {"clients_class": "workload_clients:PullingClients", "options": {"clients": len(CLIENTS)}},
        "training": {"rounds": 2, "cohort": {"selection": "poisson", "sampling_prob": 0.9}},
        "privacy": {"privacy_unit": "client", "noise_multiplier": 8.0},
        "ray": {"dashboard": False, "proxies": 2, "actor_cpus": 0.1},
    }
    settings = load_settings(environ={}, overrides=overrides)
    # The actors have to find the workload beside the tests.
    folder = str(Path(__file__).parents[1])
    connect(settings, {"PYTHONPATH": os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])})
    with Store.open(settings.home) as store:
        store.clients.register(load_workload(settings).registered())
        actors = spawn_actors(settings)
        actors.await_prepared(120.0)
        yield System(settings, store, actors)
        actors.kill()
    ray.shutdown()


@pytest.fixture(scope="module")
def weights(system: System) -> Weights:
    return server_model(system.settings).initial_weights()


class TestRayFleet(FleetContract):
    clients = CLIENTS

    @pytest.fixture(autouse=True)
    def _root_secret(self, system: System) -> None:
        self.root_secret = load_or_create_root_secret(system.settings.home)

    @pytest.fixture
    def fleet(self, system: System) -> FleetPort:
        proxies = [system.actors.by_name[proxy_name(index)] for index in range(2)]
        return RayFleet(proxies, timeout_s=60.0)

    def test_a_client_that_ends_its_process_fails_alone(
        self, system: System, fleet: FleetPort, weights: Weights
    ) -> None:
        killers = system.settings.home / "killers"
        killers.write_text(CLIENTS[1])
        try:
            cohort = Cohort(1, CLIENTS, None, dict.fromkeys(CLIENTS, 100))
            answers = [a for a in fleet.train(task_for(weights, 1), weights, cohort) if a is not None]
        finally:
            killers.unlink()
        outcomes = {o.client_id: o for answer in answers for o in answer.outcomes}
        assert outcomes.keys() == set(CLIENTS)
        assert [c for c, o in outcomes.items() if o.error] == [CLIENTS[1]]
        assert outcomes[CLIENTS[1]].counted_against_client
        assert fleet.in_flight() == frozenset()


class TestClientProxy(ClientHostContract):
    clients = CLIENTS[:3]

    @pytest.fixture
    def host(self, system: System) -> ClientHostPort:
        return cast(ClientHostPort, ActorHandle(system.actors.by_name[proxy_name(0)], ClientHostPort))

    @pytest.fixture
    def task(self, weights: Weights) -> TrainTask:
        return task_for(weights, 1)


class TestAccountantActor(AccountantContract):
    privacy_unit = "client"

    @pytest.fixture
    def accountant(self, system: System) -> AccountantPort:
        return accountant_handle(system.actors.by_name[ACCOUNTANT])

    @pytest.fixture
    def store(self, system: System) -> Store:
        return system.store


# Last, because it shuts the system down.
class TestAggregatorActor(AggregatorContract):
    @pytest.fixture
    def aggregator(self, system: System) -> AggregatorPort:
        return system.actors.handle()
