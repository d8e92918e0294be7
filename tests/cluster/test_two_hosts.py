"""The main job on two hosts that ``ray up`` makes a cluster of; one is cut off in a round, and comes back.

The tests go on from one another, in their order, on one cluster: `make test-cluster`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from fedvit.store.store import Store
from tests.cluster.hosts import SHARED, Host, hosts, leftovers, missing
from tests.cluster.launch import Cluster

WHY_NOT = missing()
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no hosts as network namespaces here: {WHY_NOT}"),
]

ROUNDS = 12
CUT_S = 60.0
# Ray gives a head that is gone a minute before a worker's node ends itself.
ENDED_LIMIT_S = 150.0
JOB: dict[str, Any] = {
    "finetune.ranks": 2,
    "finetune.min_ranks": 1,
    "finetune.steps": 80,
    "finetune.checkpoint_every_steps": 4,
    # More than half of a host's.
    "finetune.cpus_per_rank": (os.cpu_count() or 1) / 2 + 0.5,
    "privacy.noise_multiplier": 2.0,
    "privacy.sampling_prob": 0.25,
    "privacy.target_epsilon": 50,
}
SETTINGS = f"--home {SHARED} --set training.rounds={ROUNDS} --set edge.ports=[]"


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Host]]:
    with hosts(tmp_path_factory.mktemp("hosts") / "files", ("operator", "head", "worker")) as result:
        yield result
    assert leftovers(result) == []


@pytest.fixture(scope="module")
def cluster(network: dict[str, Host]) -> Cluster:
    cluster = Cluster(network["operator"], [network["head"], network["worker"]])
    cluster.prepare()
    cluster.up()
    until(lambda: len(nodes(cluster)) == 2, 180.0)
    return cluster


def test_every_node_has_joined_with_the_token_and_none_is_let_in_without(cluster: Cluster) -> None:
    assert {node["node_ip"] for node in nodes(cluster)} == {cluster.head.address, cluster.workers[0].address}
    done = cluster.head.run("bash", "-c", ". ~/fedvit/env; RAY_AUTH_MODE=disabled timeout 30 ray list nodes")
    assert "10.213.7" not in done.stdout, done.stdout


def test_a_node_without_the_shared_folder_is_refused_by_name(cluster: Cluster) -> None:
    cluster.on_head("mkdir -p /srv/home/alone")
    done = cluster.head.run(
        "bash", "-c", f". ~/fedvit/env; fedvit up {SETTINGS.replace(str(SHARED), '/srv/home/alone')}"
    )
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert f"{cluster.workers[0].address} does not see the state folder" in said, said


def test_the_store_is_opened_on_the_labelled_node_and_nowhere_else(cluster: Cluster) -> None:
    line = f". ~/fedvit/env; RAY_ADDRESS={cluster.head.address}:6379 fedvit up {SETTINGS}"
    done = cluster.workers[0].run("bash", "-c", line)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert f"may be opened on {cluster.head.address} alone" in said, said


def test_the_main_job_has_proxies_on_both_hosts_and_whoever_opens_the_store_on_the_head(cluster: Cluster) -> None:
    cluster.on_head(f"fedvit up {SETTINGS}", 300.0)
    (head,) = [node["node_id"] for node in nodes(cluster) if node["is_head_node"]]
    where = {actor["name"]: actor["node_id"] for actor in actors(cluster)}
    print("\n" + "\n".join(f"{name} on node {node_id}" for name, node_id in sorted(where.items())))
    assert where["fedvit-proxy-0"] != where["fedvit-proxy-1"]
    assert where["fedvit-aggregator"] == where["fedvit-accountant"] == head
    assert {node for name, node in where.items() if name.startswith("SERVE_REPLICA")} == {head}


def test_a_worker_cut_off_in_the_middle_of_a_round_costs_no_round(cluster: Cluster) -> None:
    (worker,) = cluster.workers
    until(lambda: committed(cluster) >= 2, 120.0)
    worker.cut()
    began_s = time.monotonic()
    until(lambda: time.monotonic() - began_s >= CUT_S, CUT_S + 10.0)
    assert committed(cluster) < ROUNDS, "the run ended before the cut was over"
    worker.rejoin()
    until(lambda: status(cluster)["training"] == "completed", 240.0)
    until(lambda: len(nodes(cluster)) == 2, 180.0)
    cluster.on_head(f"fedvit down --home {SHARED}", 120.0)


def test_no_round_was_lost_no_client_missing_and_none_counted_twice(cluster: Cluster) -> None:
    with Store.open(cluster.shared) as store:
        tally = store.rounds.tally(datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC))
        run = store.runs.latest()
        assert run is not None
        cohorts = [len(record.cohort) for record in store.rounds.of_run(run.run_id)]
    print(f"\n{tally}")
    assert (tally.committed, tally.lost, tally.under_way, tally.refused) == (ROUNDS, 0, 0, 0)
    assert tally.answers == sum(cohorts)


def test_a_job_whose_host_is_lost_goes_on_with_the_rank_that_is_left_and_pays_once(cluster: Cluster) -> None:
    home, (worker,) = "job", cluster.workers
    options = " ".join(f"--set {name}={value}" for name, value in JOB.items())
    line = f". ~/fedvit/env; fedvit finetune --json --home {SHARED}/{home} {options}"
    job = cluster.head.start("bash", "-c", line)
    try:
        until(lambda: len(charged(cluster, home)) >= 3 or job.poll() is not None, 180.0)
        # One on each host: neither has room for two.
        assert ranks(cluster) == {cluster.head.address, worker.address}
        worker.cut()
        result, complained = job.communicate(timeout=300.0)
    finally:
        job.kill()
        job.wait()
        worker.rejoin()
    assert job.returncode == 0, complained[-3000:]
    report = json.loads(result)
    print(f"\n{report['steps']} steps, the last ones on {report['ranks']} rank, epsilon {report['epsilon_spent']:.4f}")
    steps, every = JOB["finetune.steps"], JOB["finetune.checkpoint_every_steps"]
    assert (report["steps"], report["ranks"], report["stopped"]) == (steps, 1, None)
    # Each range once, whoever took it: what the ledger says is what was released.
    assert charged(cluster, home) == [(first, every) for first in range(0, steps, every)]
    assert report["epsilon_spent"] == report["epsilon"]
    until(lambda: len(nodes(cluster)) == 2, 180.0)


def test_ray_down_leaves_nothing_behind(cluster: Cluster) -> None:
    cluster.down()
    ours = [cluster.head, *cluster.workers, cluster.operator]
    until(
        lambda: not any(host.processes() for host in ours), ENDED_LIMIT_S, lambda: [host.processes() for host in ours]
    )
    for host in ours:
        assert host.run("ls", "-A", "/dev/shm").stdout == ""
        assert host.run("ss", "-Hltn", "sport != 22").stdout == ""


def ranks(cluster: Cluster) -> set[str]:
    """The addresses of the hosts that have a rank."""
    where = {node["node_id"]: node["node_ip"] for node in nodes(cluster)}
    return {where[actor["node_id"]] for actor in actors(cluster) if actor["class_name"] == "RayTrainWorker"}


def charged(cluster: Cluster, home: str) -> list[tuple[int, int]]:
    """The first step and the number of steps of each charge of a job's ledger."""
    if not (cluster.shared / home / "state.db").exists():
        return []
    with Store.open(cluster.shared / home) as store:
        assert store.ledger.verify() == len(store.ledger.entries())
        return [(entry.charge.round_index, entry.charge.steps) for entry in store.ledger.entries()]


def until(holds: Callable[[], bool], limit_s: float, message: Callable[[], object] = lambda: "") -> None:
    """Wait until something holds; asking is what takes the time."""
    deadline_s = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline_s, message()
        time.sleep(1.0)


def nodes(cluster: Cluster) -> list[dict[str, Any]]:
    """The living nodes, as Ray lists them."""
    results: list[dict[str, Any]] = json.loads(cluster.on_head("ray list nodes --filter state=ALIVE --format json"))
    return results


def actors(cluster: Cluster) -> list[dict[str, Any]]:
    """The living actors, as Ray lists them."""
    results: list[dict[str, Any]] = json.loads(cluster.on_head("ray list actors --filter state=ALIVE --format json"))
    return results


def status(cluster: Cluster) -> dict[str, Any]:
    """What ``fedvit status`` tells."""
    results: dict[str, Any] = json.loads(cluster.on_head(f"fedvit status --json --home {SHARED}"))
    return results


def committed(cluster: Cluster) -> int:
    """How many rounds are."""
    return int(status(cluster)["rounds"].split()[0])
