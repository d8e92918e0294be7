"""The one place that says ``ray.remote``: names, restarts, resources, and what happens when there is no room."""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.aggregator import Aggregator
from actors.client_proxy import ClientProxy
from actors.handles import ACCOUNTANT, AGGREGATOR, PING, AggregatorHandle, fetch, proxy_name
from actors.placement import Node, check_sights, leave_sign, look, store_selector
from actors.privacy_accountant import PrivacyAccountantActor
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.privacy.secrets import load_or_create_root_secret
from fedvit.settings import settings_to_json
from fedvit.tools.sweep.space import check_room

NODE_LOOK_S = 60.0


def namespace_of(home: Path) -> str:
    """The Ray namespace of a state folder, so that two systems on one cluster do not meet."""
    return f"fedvit-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"


def connect(settings: Settings, environment: dict[str, str]) -> None:
    """Join the cluster that the settings name, or start one here that ends with this process.

    Args:
        environment: variables that every actor and replica must see.

    Raises:
        PlacementError: there is no such cluster.
    """
    address = settings.ray.cluster_address()
    os.environ.update(environment)
    options: dict[str, Any] = {"namespace": namespace_of(settings.home), "log_to_driver": False}
    if address is None:
        # Workers started here inherit the environment; a joined cluster's do not.
        options["include_dashboard"] = settings.ray.dashboard
    else:
        options["runtime_env"] = {"env_vars": environment}
    # Ray puts a handler of its own in the place of whatever unwinds this process gracefully.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "local", logging_level="ERROR", **options)
    except ConnectionError as error:
        raise PlacementError(
            f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}",
            cure="Start it, set RAY_AUTH_MODE=token where it demands one, or unset RAY_ADDRESS to start one here.",
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)


@dataclass(frozen=True, slots=True)
class Actors:
    """The actors of a system, by name; the aggregator is the last."""

    by_name: Mapping[str, Any]

    def handle(self) -> AggregatorHandle:
        """The aggregator, typed."""
        return AggregatorHandle(self.by_name[AGGREGATOR])

    def kill(self) -> None:
        """End them all; their state is in the store."""
        for actor in reversed(list(self.by_name.values())):
            ray.kill(actor)

    def await_prepared(self, timeout_s: float) -> None:
        """Wait until each has opened its data and built its model.

        Raises:
            PlacementError: one did not start in time; it is named.
            FedvitError: one of them cannot use its settings.
        """
        references = {actor.prepare.remote(): name for name, actor in self.by_name.items()}
        ready, waiting = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
        for reference in ready:
            fetch(reference)
        if waiting:
            names = ", ".join(references[reference] for reference in waiting)
            raise PlacementError(
                f"{names} did not start within {timeout_s:g} s.",
                cure="See `make logs`; on a slow machine raise ray.start_timeout_s.",
            )


def spawn_actors(settings: Settings) -> Actors:
    """Start accountant, proxies and aggregator; :meth:`Actors.await_prepared` waits until they can be used.

    Raises:
        PlacementError: Ray has no room for one of them; it is named.
    """
    _check_room(settings)
    selector = selector_of_store()
    # Here, where the store is: a proxy that made a key of its own would draw another noise than the next one.
    load_or_create_root_secret(settings.home)
    check_nodes(settings)
    text = settings_to_json(settings)
    accountant = _spawn(PrivacyAccountantActor, ACCOUNTANT, settings, text, label_selector=selector)
    proxies = {
        proxy_name(index): _spawn(ClientProxy, proxy_name(index), settings, text, scheduling_strategy="SPREAD")
        for index in range(settings.ray.proxies)
    }
    # It finds the others by name, so they have to be there. Restarted, it is given the same id again.
    system_id = secrets.token_hex(8)
    handed = (text, namespace_of(settings.home), system_id)
    aggregator = _spawn(Aggregator, AGGREGATOR, settings, *handed, label_selector=selector)
    return Actors({ACCOUNTANT: accountant, **proxies, AGGREGATOR: aggregator})


def spawn_accountant(settings: Settings) -> Any:
    """Start the accountant alone, for a job that is not part of a running system.

    Raises:
        FedvitError: the ledger cannot be used.
        PlacementError: it did not start in time.
    """
    # It waits for the ranks. When a node is lost, Ray Train counts on all CPUs of those that are left.
    placed = settings.model_copy(update={"ray": settings.ray.model_copy(update={"actor_cpus": 0.0})})
    actor = _spawn(
        PrivacyAccountantActor, ACCOUNTANT, placed, settings_to_json(settings), label_selector=selector_of_store()
    )
    Actors({ACCOUNTANT: actor}).await_prepared(settings.ray.start_timeout_s)
    return actor


def selector_of_store() -> dict[str, str]:
    """The labels of the node where the store may be opened; see :func:`actors.placement.store_selector`.

    Raises:
        PlacementError: there is no such node, or this process runs on another one.
    """
    return store_selector(_nodes(), ray.get_runtime_context().get_node_id())


def check_nodes(settings: Settings) -> None:
    """Make sure, on every node of a larger cluster, that a client proxy finds there what it reads.

    Raises:
        PlacementError: a node lacks something; it is named.
    """
    nodes = _nodes()
    if len(nodes) == 1:
        return
    sign = leave_sign(settings.home)
    named = [path for path in (settings.data.path, settings.model.checkpoint) if path is not None]
    asked = {node.name: _on_node(node).remote(settings.home, [str(path) for path in named]) for node in nodes}
    ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=NODE_LOOK_S)
    sights = {name: fetch(reference) if reference in ready else None for name, reference in asked.items()}
    check_sights(sights, sign, settings.home, version("fedvit"))


def _nodes() -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeID"], node["NodeManagerAddress"], node.get("Labels") or {}) for node in alive]


def _on_node(node: Node) -> Any:
    place = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(look).options(
        name=f"fedvit-look-{node.name}", scheduling_strategy=place
    )


def _spawn(kind: type, name: str, settings: Settings, *arguments: Any, **placement: Any) -> Any:
    options = ray.remote(
        num_cpus=settings.ray.actor_cpus,
        max_restarts=-1,
        max_task_retries=3,
        max_concurrency=_CONCURRENCY[kind],
        concurrency_groups={PING: 1} if kind is ClientProxy else None,
    )
    return options(kind).options(name=name, **placement).remote(*arguments)


# A proxy trains one call at a time, and answers a ping meanwhile; the other two answer questions while they work.
_CONCURRENCY: dict[type, int] = {ClientProxy: 1, PrivacyAccountantActor: 8, Aggregator: 16}


def spawn_trial_workers(settings: Settings, secret: bytes) -> list[Any]:
    """Actors that run a sweep's trials one after another and stay warm in between.

    A trial's own function only waits: of the CPUs that a trial states, its worker has nearly all.

    Args:
        secret: of the sweep; see :meth:`fedvit.tools.sweep.journal.Journal.secret`.

    Raises:
        PlacementError: Ray has no room for so many.
    """
    # Imported here: it brings torch, which who only asks for an actor need not load.
    from actors.sweep import SPARE, WAITING_CPUS, TrialWorker

    check_room(settings, ray.available_resources().get("CPU", 0))
    cpus = settings.sweep.cpus_per_trial * (1 - (1 + SPARE) * WAITING_CPUS)
    kind = ray.remote(num_cpus=cpus, max_restarts=-1, max_concurrency=4)(TrialWorker)
    return [
        kind.options(name=f"fedvit-trial-worker-{i}").remote(settings.ray.threads_per_proxy, secret)
        for i in range(settings.sweep.concurrent_trials)
    ]


def _check_room(settings: Settings) -> None:
    """Say at once what will never be placed, instead of waiting for it.

    Raises:
        PlacementError: the actors ask for more CPUs than the cluster has free.
    """
    names = [ACCOUNTANT, *(proxy_name(index) for index in range(settings.ray.proxies)), AGGREGATOR]
    free = ray.available_resources().get("CPU", 0)
    room = int(free / settings.ray.actor_cpus + 1e-9) if settings.ray.actor_cpus else len(names)
    if room < len(names):
        raise PlacementError(
            f"Ray has no room for {', '.join(names[room:])}: each asks for {settings.ray.actor_cpus:g} CPU, "
            f"and {free:g} are free.",
            cure="Lower ray.actor_cpus or ray.proxies, or add nodes.",
        )
