"""Masked rounds of three vehicles in network namespaces of their own and twenty virtual clients.

One vehicle's cable is pulled in each phase in turn, and one vehicle is killed after its masked upload:
`make test-secagg-vehicles`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edge_runtime.training.policy import sign_policy
from fedvit.access.tokens import create_token
from fedvit.errors import FedvitError
from fedvit.rounds.remote_sessions import PhaseRequest, RemoteSessions
from fedvit.secure_session import MASK, PHASES
from fedvit.store.store import Store
from fedvit.types import utc_now
from fedvit.wire.manifest import public_key_text
from tests.cluster.hosts import HOME, SHARED, Host, hosts, leftovers, missing
from tests.cluster.secure_server import READY
from tests.secure_world import POLICY, VEHICLES, VIRTUAL, images

WHY_NOT = missing()
pytestmark = [
    # As of the other test of hosts, so that `make test` leaves it out. It starts no Ray.
    pytest.mark.ray,
    pytest.mark.campaign,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no hosts as network namespaces here: {WHY_NOT}"),
]
ROOT = Path(__file__).parents[2]
PORT, LIMIT_S = 8123, 600.0
FIRST, SECOND, THIRD = VEHICLES
ROUNDS = len(PHASES) + 1


class Fleet:
    """A server and three vehicles, each on its own host."""

    def __init__(self, folder: Path, network: dict[str, Host]) -> None:
        self.network, self.home = network, folder / "shared" / "home"
        data = folder / "shared" / "server"
        images(data / "train", VIRTUAL, 0)
        images(data / "test", 1, 1)
        key = Ed25519PrivateKey.generate()
        self.owner, self.processes = public_key_text(key.public_key()), dict[str, subprocess.Popen[str]]()
        for seed, name in enumerate(VEHICLES, 2):
            images(network[name].files / "data", 2, seed)
            (network[name].files / "policy.json").write_text(sign_policy(POLICY, key))
        arguments = (str(SHARED / "home"), str(SHARED / "server"), self.server.address, str(PORT), str(ROUNDS))
        self.processes["server"] = self.python("server", "tests.cluster.secure_server", *arguments)
        until(lambda: (self.home / READY).exists() or self.processes["server"].poll() is not None, 300)
        if self.processes["server"].poll() is not None:
            raise AssertionError(f"the server ended: {self.processes['server'].communicate()[1][-2000:]}")
        with Store.open(self.home) as store:
            for name in VEHICLES:
                token = create_token(store, name, ["device"], now=utc_now(), client_id=name).text
                (network[name].files / "token").write_text(token)
                (network[name].files / "token").chmod(0o600)
        for name in VEHICLES:
            self.start(name)

    @property
    def server(self) -> Host:
        return self.network["server"]

    def python(self, host: str, module: str, *arguments: str) -> subprocess.Popen[str]:
        paths = f"PYTHONPATH={ROOT}:{ROOT / 'tests'}"
        return self.network[host].start("env", paths, sys.executable, "-m", module, *arguments)

    def start(self, name: str) -> None:
        """Begin the vehicle's process."""
        where = ("--source", f"http://{self.server.address}:{PORT}", "--device-id", name)
        files = ("--data", str(HOME / "data"), "--home", str(HOME / "vehicle"))
        policy = ("--policy", str(HOME / "policy.json"), "--owner-key", self.owner)
        token = ("--source-token-file", str(HOME / "token"))
        self.processes[name] = self.python(name, "edge_runtime", "train", *where, *token, *files, *policy)

    def kill(self, name: str) -> None:
        """SIGKILL to the vehicle's process."""
        inside = [pid for pid, line in self.network[name].processes().items() if "edge_runtime" in line]
        for pid in inside:
            subprocess.run(["kill", "-9", str(pid)], check=False)
        self.processes[name].wait(20)

    def home_of(self, name: str) -> Path:
        return self.network[name].files / "vehicle"


def until(done: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait; AssertionError after the limit."""
    ends_s = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < ends_s, "it did not happen in time"
        time.sleep(0.02)


def charged(home: Path) -> list[tuple[int, str, str]]:
    with Store.open(home) as store:
        return [(e.charge.round_index, e.charge.unit_id, e.charge.output_id) for e in store.ledger.entries()]


def test_a_vehicle_cut_off_in_each_phase_and_one_killed_after_its_upload(tmp_path: Path) -> None:
    with hosts(tmp_path / "files", ("server", *VEHICLES)) as network:
        fleet = Fleet(tmp_path / "files", network)
        try:
            follow(fleet)
            out, err = fleet.processes["server"].communicate(timeout=60)
            assert "completed None" in out, err[-2000:]
        finally:
            for process in fleet.processes.values():
                process.kill()
        check(fleet)
    assert leftovers(network) == []


def follow(fleet: Fleet) -> None:
    """Pull the third vehicle's cable in phase n of round n; kill the second one after its upload in the last round."""
    with Store.open(fleet.home) as store:
        sessions = RemoteSessions(store)

        def asked(name: str) -> PhaseRequest | None:
            try:
                return sessions.request(name)
            except FedvitError:
                return None

        def is_in(name: str, round_index: int, phase: str) -> bool:
            left = asked(name)
            return left is not None and (left.task.round_index, left.phase) == (round_index, phase)

        for round_index in range(1, len(PHASES) + 1):
            # Pulled before the phase begins: the vehicle has answered the one before, or the round begins.
            before = PHASES[round_index - 2] if round_index > 1 else None
            if before is None:
                until(lambda: len(store.clients.remote(VEHICLES)) == len(VEHICLES), 300)
            else:

                def answered(index: int = round_index, earlier: str = before) -> bool:
                    left = asked(THIRD)
                    return left is not None and is_in(THIRD, index, earlier) and sessions.has_answered(left)

                until(answered)
            fleet.network[THIRD].cut()
            until(lambda i=round_index: store.runs.latest() is not None and committed(store) >= i)
            fleet.network[THIRD].rejoin()

        def uploaded() -> bool:
            left = asked(SECOND)
            return left is not None and is_in(SECOND, ROUNDS, MASK) and sessions.has_answered(left)

        until(uploaded)
        fleet.kill(SECOND)
        fleet.start(SECOND)
        until(lambda: committed(store) >= ROUNDS)


def committed(store: Store) -> int:
    run = store.runs.latest()
    return 0 if run is None else run.rounds_done


def check(fleet: Fleet) -> None:
    """The sums, and both ledgers."""
    with Store.open(fleet.home) as store:
        clients = [client.client_id for client in store.clients.all()]
        counts = [len(store.versions.get(f"v1.1.{index}").lineage["clients"]) for index in range(1, ROUNDS + 1)]
    print("\nclients in the sums:", counts)
    everybody = VIRTUAL + len(VEHICLES)
    assert counts[:3] == [everybody - 1] * 3
    assert counts[3:] == [everybody] * 3
    server = charged(fleet.home)
    assert Counter((index, unit) for index, unit, _ in server) == Counter(
        {(index, client): 1 for index in range(1, ROUNDS + 1) for client in clients}
    )
    own = {name: charged(fleet.home_of(name)) for name in VEHICLES}
    for name in VEHICLES:
        assert set(own[name]) <= set(server)
        print(name, "charged itself for the rounds", [index for index, _, _ in own[name]])
    assert [index for index, _, _ in own[FIRST]] == list(range(1, ROUNDS + 1))
    assert [index for index, _, _ in own[SECOND]] == list(range(1, ROUNDS + 1))
    assert [index for index, _, _ in own[THIRD]] == [4, 5, 6]
