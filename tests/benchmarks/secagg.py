"""Cost of secure aggregation beside that of plain uploads, and beside Flower's SecAgg+ on the same vector.

Run by ``make bench-secagg`` (6 minutes); writes docs/benchmarks/secagg.json and docs/benchmarks.md. All figures are CPU
seconds on one thread, and bytes. BENCH_PEERS is the folder of Flower's environment, BENCH_SECAGG a factor on all sizes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedvit.exact_sums import ExactSums
from fedvit.privacy.randomness import SecretStream
from fedvit.secagg.client import SecureClient
from fedvit.secagg.noise import Plan, decode, encode, plan_for
from fedvit.secagg.parameters import Parameters, parameters_for
from fedvit.secagg.server import Phase, SecureServer
from fedvit.types import ClientOutcome
from fedvit.updates import ClientUpdate
from fedvit.wire.ring import pack_ring, unpack_ring
from fedvit.wire.updates import decode_update, encode_update
from tests.benchmarks.results import write_result

FACTOR = float(os.environ.get("BENCH_SECAGG", "1"))
PEERS = Path(os.environ.get("BENCH_PEERS", ".bench-peers")).absolute()
ROOT = Path(__file__).parents[2]
CASES = (("50 clients x 5.5 M", 50, 5_500_000), ("1,000 clients x 50 k", 1_000, 50_000))
DROPOUT_RATE = 0.3
_T = TypeVar("_T")


@dataclass(slots=True)
class _Cost:
    """CPU seconds of each client and of the server, and the bytes of each client, both ways."""

    clients: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    server: float = 0.0

    def of(self, client_id: str, work: Callable[[], _T]) -> _T:
        started = time.process_time()
        result = work()
        self.clients[client_id] = self.clients.get(client_id, 0.0) + time.process_time() - started
        return result

    def of_server(self, work: Callable[[], _T]) -> _T:
        started = time.process_time()
        result = work()
        self.server += time.process_time() - started
        return result

    def sent(self, client_id: str, *contents: bytes) -> None:
        self.traffic[client_id] = self.traffic.get(client_id, 0) + sum(map(len, contents))

    def figures(self, remaining: list[str]) -> dict[str, float]:
        return {
            "client s": round(statistics.median(self.clients[c] for c in remaining), 3),
            "server s": round(self.server, 3),
            "MB a client": round(statistics.median(self.traffic[c] for c in remaining) / 1e6, 3),
        }


def main() -> None:
    """Measure and write."""
    figures: dict[str, dict[str, float]] = {}
    for name, clients, length in CASES:
        clients, length = max(4, round(clients * FACTOR)), max(100, round(length * FACTOR))
        figures[f"{name}: plain"] = plain(clients, length)
        plan = plan_of(clients, length)
        parameters = parameters_of(clients, plan)
        figures[f"{name}: secure"] = secure(parameters, plan, 0.0)
        figures[f"{name}: secure, 30% drop out"] = secure(parameters, plan, DROPOUT_RATE)
        for dropped, what in ((0, ""), (int(DROPOUT_RATE * clients), ", 30% drop out")):
            # With a thousand clients it had not ended after ten minutes beside other work.
            measured = flower(clients, length, parameters, dropped) if clients <= 50 else None
            if measured is not None:
                figures[f"{name}: Flower{what}"] = measured
        print(json.dumps({key: value for key, value in figures.items() if key.startswith(name)}, indent=2))
        print(f"ring of {plan.bits} bits, {parameters.neighbours} neighbours, threshold {parameters.threshold}")
    ratios = {
        f"traffic, secure / plain, {name}": round(
            figures[f"{name}: secure"]["MB a client"] / figures[f"{name}: plain"]["MB a client"], 3
        )
        for name, _, _ in CASES
    }
    write_result(
        "secagg",
        title="Secure aggregation beside plain uploads and Flower's SecAgg+",
        what=(
            "CPU seconds on one thread: of one client in all phases (the median; of Flower one client, measured "
            "once), of the server for the whole sum. A plain upload is a float32 update, encoded, decoded and "
            "added up. The secure one is rotated, rounded, noised and masked in a ring of at most 20 bits, with "
            "as many neighbours as the bounds demand where 30% may drop out. Flower's functions run on the same "
            "vector with as many neighbours; it adds no noise, and only its masked vector is counted as traffic. "
            "MB are those of all phases, both ways, without the weights that a round starts from."
        ),
        command="make bench-secagg",
        figures=figures,
        ratios=ratios,
    )


def plain(clients: int, length: int) -> dict[str, float]:
    """A float32 update of every client, encoded, decoded and added up."""
    cost, vector = _Cost(), _contribution(length).astype(np.float32)
    shapes = {"w": vector.shape}
    sums = ExactSums(shapes)
    for client_id in _names(clients):
        update = ClientUpdate(1, ClientOutcome(client_id, 1), {"w": vector}, 1.0)
        content = cost.of(client_id, lambda update=update: encode_update(update))
        cost.sent(client_id, content)
        received = cost.of_server(lambda c=content: decode_update(c, max_bytes=2**30, shapes=shapes))
        cost.of_server(lambda r=received: sums.add(r.weighted_sum))
    cost.of_server(sums.totals)
    return cost.figures(_names(clients))


def secure(parameters: Parameters, plan: Plan, dropout_rate: float) -> dict[str, float]:
    """All phases of one session; clients drop out before they send their vectors, the costliest moment."""
    cost, names = _Cost(), list(parameters.participants)
    identities = {c: Ed25519PrivateKey.generate() for c in names}
    peers = {c: key.public_key() for c, key in identities.items()}
    clients = {c: SecureClient(parameters, c, identities[c], peers) for c in names}
    server, contribution = SecureServer(parameters, peers), _contribution(plan.length)
    dropped = (
        set(names[:: max(1, round(1 / dropout_rate))][: int(dropout_rate * len(names))]) if dropout_rate else set()
    )
    remaining = [c for c in names if c not in dropped]
    while server.phase is not Phase.DONE:
        phase, requests = server.phase, cost.of_server(server.requests)
        for client_id, request in requests.items():
            if client_id in dropped and phase not in (Phase.ADVERTISE, Phase.SHARE):
                continue
            client = clients[client_id]
            if phase is Phase.MASK:
                secret = SecretStream(os.urandom(32), "benchmark", {})
                content = cost.of(client_id, lambda c=client, r=request, s=secret: _masked(c, r, plan, contribution, s))
                cost.of_server(lambda c=client_id, b=content: _take(server, plan, c, b))
            else:
                content = cost.of(client_id, lambda c=client, p=phase, r=request: _answer(c, p, r))
                cost.of_server(lambda c=client_id, b=content: server.receive(c, b))
            cost.sent(client_id, request, content)
        cost.of_server(server.advance)
    total = cost.of_server(lambda: decode(plan, server.total()))
    _check(total, contribution, plan, len(remaining))
    return cost.figures(remaining)


def flower(clients: int, length: int, parameters: Parameters, dropped: int) -> dict[str, float] | None:
    """Flower's functions on the same vector; None where its environment is missing."""
    python = PEERS / "flower" / "bin" / "python"
    if not python.exists():
        return None
    case: dict[str, Any] = {"clients": clients, "length": length, "dropped": dropped}
    case |= {"neighbours": parameters.neighbours, "threshold": parameters.threshold}
    command = [str(python), "-m", "tests.benchmarks.peers.flower_secagg", json.dumps(case)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=ROOT)
    measured = json.loads(done.stdout.splitlines()[-1])
    # A masked vector has 8 bytes a value.
    megabytes = round(8 * length / 1e6, 3)
    return {
        "client s": round(measured["client"], 3),
        "server s": round(measured["server"], 3),
        "MB a client": megabytes,
    }


def _masked(client: SecureClient, request: bytes, plan: Plan, contribution: Any, secret: SecretStream) -> bytes:
    return pack_ring(client.mask(request, encode(plan, contribution, secret)), plan.bits)


def _take(server: SecureServer, plan: Plan, client_id: str, content: bytes) -> None:
    server.receive_masked([client_id], unpack_ring(content, plan.padded, plan.bits))


def _answer(client: SecureClient, phase: Phase, request: bytes) -> bytes:
    if phase is Phase.ADVERTISE:
        return client.advertise()
    answers = {Phase.SHARE: client.share, Phase.CONFIRM: client.confirm, Phase.UNMASK: client.unmask}
    return answers[phase](request)


def plan_of(clients: int, length: int) -> Plan:
    """The plan of a sum of clipped updates of norm 1, in a ring of at most 20 bits."""
    return plan_for(
        length=length,
        sensitivity=1.0,
        largest_norm=1.0,
        total_norm=float(clients),
        participants=clients,
        honest=_survivors(clients),
        noise_multiplier=1.0,
        max_bits=20,
        rotation=b"benchmark",
    )


def parameters_of(clients: int, plan: Plan) -> Parameters:
    """The parameters of a session in which 30% may drop out."""
    return parameters_for(
        os.urandom(32).hex(),
        _names(clients),
        min_survivors=_survivors(clients),
        max_colluding=0,
        dropout_rate=DROPOUT_RATE,
        bits=plan.bits,
        length=plan.padded,
    )


def _survivors(clients: int) -> int:
    return clients - int(DROPOUT_RATE * clients)


def _names(clients: int) -> list[str]:
    return [f"vehicle-{index:04d}" for index in range(clients)]


def _contribution(length: int) -> Any:
    vector = np.random.default_rng(0).normal(size=length)
    return vector / np.linalg.norm(vector)


def _check(total: Any, contribution: Any, plan: Plan, survivors: int) -> None:
    """The sum is that of the contributions, with noise of the planned size."""
    error = float(np.mean((total - survivors * contribution) ** 2))
    expected = plan.variance(survivors)
    if not 0.5 * expected < error < 2 * expected:
        raise SystemExit(f"the sum has a mean squared error of {error:g} instead of {expected:g}")


if __name__ == "__main__":
    main()
