"""Start of actors, the one place that calls ``ray.remote``: names, restarts, resources and refusal for lack of room."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.aggregator import Aggregator
from actors.client_proxy import ClientProxy
from actors.handles import ACCOUNTANT, AGGREGATOR, PING, aggregator_handle, fetch, namespace_of, proxy_name
from actors.placement import Node, check_probes, probe_node, store_selector, write_marker
from actors.privacy_accountant import PrivacyAccountantActor
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.ports import AggregatorPort
from fedvit.privacy.randomness import load_or_create_root_secret
from fedvit.settings import settings_to_json
from fedvit.tools.sweep.space import check_room

NODE_PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Actors:
    """The actors of a system, by name; the aggregator is the last."""

    by_name: Mapping[str, Any]

    def handle(self) -> AggregatorPort:
        """The aggregator as a port."""
        return aggregator_handle(self.by_name[AGGREGATOR])

    def kill(self) -> None:
        """End all actors; their state is in the store."""
        for actor in reversed(list(self.by_name.values())):
            ray.kill(actor)

    def await_prepared(self, timeout_s: float) -> None:
        """Wait until each actor has opened its data and built its model.

        Raises:
            PlacementError: an actor did not start in time; it is named.
            FedvitError: an actor cannot use its settings.
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
    """Start accountant, proxies and aggregator; :meth:`Actors.await_prepared` waits until they are ready.

    Raises:
        PlacementError: Ray has no room for an actor; it is named.
    """
    _check_room(settings)
    selector = selector_of_store()
    # On the store's node: a proxy that created its own key would draw other noise than the other proxies.
    load_or_create_root_secret(settings.home)
    _check_nodes(settings)
    text = settings_to_json(settings)
    accountant = spawn(PrivacyAccountantActor, ACCOUNTANT, settings, text, label_selector=selector)
    proxies = {
        proxy_name(index): spawn(ClientProxy, proxy_name(index), settings, text, scheduling_strategy="SPREAD")
        for index in range(settings.ray.proxies)
    }
    # Last, because it finds the others by name. A restart gets the same arguments, and so the same system id.
    arguments = (text, namespace_of(settings.home), secrets.token_hex(8))
    aggregator = spawn(Aggregator, AGGREGATOR, settings, *arguments, label_selector=selector)
    return Actors({ACCOUNTANT: accountant, **proxies, AGGREGATOR: aggregator})


def spawn_accountant(settings: Settings) -> Any:
    """Start the accountant alone, for a job that is not part of a running system.

    Raises:
        FedvitError: the ledger cannot be used.
        PlacementError: it did not start in time.
    """
    # No CPU: it waits for the ranks, and when a node is lost, Ray Train counts on all CPUs of the remaining nodes.
    placed = settings.model_copy(update={"ray": settings.ray.model_copy(update={"actor_cpus": 0.0})})
    actor = spawn(
        PrivacyAccountantActor, ACCOUNTANT, placed, settings_to_json(settings), label_selector=selector_of_store()
    )
    Actors({ACCOUNTANT: actor}).await_prepared(settings.ray.start_timeout_s)
    return actor


def selector_of_store() -> dict[str, str]:
    """The labels of the node where the store may be opened; see :func:`actors.placement.store_selector`."""
    return store_selector(_nodes(), ray.get_runtime_context().get_node_id())


def _check_nodes(settings: Settings) -> None:
    """Make sure, on every node of a larger cluster, that a client proxy finds the files that it reads."""
    nodes = _nodes()
    if len(nodes) == 1:
        return
    marker = write_marker(settings.home)
    paths = [str(path) for path in (settings.data.path, settings.model.checkpoint) if path is not None]
    remote = ray.remote(num_cpus=0, max_retries=0)(probe_node)
    calls = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        probe = remote.options(name=f"fedvit-probe-{node.name}", scheduling_strategy=strategy)
        calls[node.name] = probe.remote(settings.home, paths)
    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=NODE_PROBE_TIMEOUT_S)
    probes = {name: fetch(reference) if reference in ready else None for name, reference in calls.items()}
    check_probes(probes, marker, settings.home, version("fedvit"))


def _nodes() -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(node["NodeID"], node["NodeManagerAddress"], node.get("Labels") or {}) for node in alive]


def spawn(kind: type, name: str, settings: Settings, *arguments: Any, **placement: Any) -> Any:
    """Start one actor of a class of this package, with restarts; ``placement``: Ray's options for where it may run."""
    options = ray.remote(
        num_cpus=settings.ray.actor_cpus,
        max_restarts=-1,
        max_task_retries=3,
        max_concurrency=_CONCURRENCY[kind],
        concurrency_groups={PING: 1} if kind is ClientProxy else None,
    )
    return options(kind).options(name=name, **placement).remote(*arguments)


# A proxy runs one training call at a time, and answers a ping meanwhile; the others answer calls while they work.
_CONCURRENCY: dict[type, int] = {ClientProxy: 1, PrivacyAccountantActor: 8, Aggregator: 16}


def spawn_trial_workers(settings: Settings, secret: bytes) -> list[Any]:
    """Actors that run a sweep's trials one after another and keep data and models in memory.

    The function that Ray Tune starts for a trial only waits, so that the worker gets nearly all of the trial's CPUs.

    Args:
        secret: the sweep's secret; see :meth:`fedvit.tools.sweep.journal.Journal.secret`.

    Raises:
        PlacementError: Ray has no room for so many.
    """
    # Imported here: it loads torch, which processes that only find actors do not need.
    from actors.sweep import SPARE, WAITING_CPUS, TrialWorker

    check_room(settings, ray.available_resources().get("CPU", 0))
    cpus = settings.sweep.cpus_per_trial * (1 - (1 + SPARE) * WAITING_CPUS)
    kind = ray.remote(num_cpus=cpus, max_restarts=-1, max_concurrency=4)(TrialWorker)
    return [
        kind.options(name=f"fedvit-trial-worker-{i}").remote(settings.ray.threads_per_proxy, secret)
        for i in range(settings.sweep.concurrent_trials)
    ]


def _check_room(settings: Settings) -> None:
    """Refuse at once actors that ask for more CPUs than the cluster has free."""
    names = [ACCOUNTANT, *(proxy_name(index) for index in range(settings.ray.proxies)), AGGREGATOR]
    free = ray.available_resources().get("CPU", 0)
    room = int(free / settings.ray.actor_cpus + 1e-9) if settings.ray.actor_cpus else len(names)
    if room < len(names):
        raise PlacementError(
            f"Ray has no room for {', '.join(names[room:])}: each asks for {settings.ray.actor_cpus:g} CPU, "
            f"and {free:g} are free.",
            cure="Lower ray.actor_cpus or ray.proxies, or add nodes.",
        )
