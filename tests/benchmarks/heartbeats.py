"""Heartbeats of 10,000 devices, a request and a token of its own each: 60 s at their rate, then without a pause.

Run by ``make bench-control``; writes docs/benchmarks/heartbeats.json and docs/benchmarks.md. Any error fails it.
BENCH_SECONDS and BENCH_DEVICES shorten it.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from fedvit.access.identity import Scope
from fedvit.access.tokens import create_token
from fedvit.incidents.drills.processes import TITLES, below, memory_mb
from fedvit.store.store import Store
from fedvit.types import utc_now
from tests.benchmarks.control_fleet import CLIENTS, HOST, client_names, serving
from tests.benchmarks.http_load import Plan, run_load
from tests.benchmarks.results import write_result

DEVICES = int(os.environ.get("BENCH_DEVICES", CLIENTS))
SECONDS = float(os.environ.get("BENCH_SECONDS", "60"))
CONNECTIONS = 32


def main() -> None:
    """Measure and write."""
    with serving({"mode": "tokens"}, DEVICES) as (settings, store):
        requests = _requests(store)
        interval_s = settings.fleet.heartbeat_interval_s
        needed_per_s = DEVICES / interval_s
        plans = {
            f"every {interval_s:g} s each": Plan(requests, CONNECTIONS, SECONDS, needed_per_s),
            "without a pause": Plan(requests, CONNECTIONS, SECONDS / 2),
        }
        figures = {name: _measured(settings.serving.port, plan) for name, plan in plans.items()}
        _check_all_were_heard(store, min(DEVICES, max(f["requests"] for f in figures.values())))
    write_result(
        "heartbeats",
        title="Heartbeats",
        what=(
            f"{DEVICES:,} devices, each with its own token and requests, without batching. For {SECONDS:g} s each "
            f"device sends one heartbeat every {interval_s:g} s ({needed_per_s:.0f} a second in all), then for "
            f"{SECONDS / 2:g} s they send without a pause. One control replica, {CONNECTIONS} connections; memory of "
            "the replica in MB."
        ),
        command="make bench-control",
        figures=figures,
        ratios={"without a pause / needed": round(figures["without a pause"]["per_s"] / needed_per_s, 2)},
    )
    print(json.dumps(figures, indent=2))


def _requests(store: Store) -> list[str]:
    """One request a device, ready to be sent."""
    now = utc_now()
    return [
        f"POST /api/clients/{name}/heartbeat HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 2\r\n"
        f"Authorization: Bearer {create_token(store, name, [Scope.DEVICE], now=now, client_id=name).text}\r\n\r\n{{}}"
        for name in client_names(DEVICES)
    ]


def _check_all_were_heard(store: Store, devices: int) -> None:
    """A replica tells the store about once a second."""
    heard = 0
    for _ in range(100):
        heard = sum(client.last_seen_at is not None for client in store.clients.all())
        if heard >= devices:
            return
        time.sleep(0.1)
    raise SystemExit(f"{heard} of {devices} devices were heard according to the store.")


def _measured(port: int, plan: Plan) -> dict[str, Any]:
    before_mb = _memory_mb()
    figures = run_load(HOST, port, plan)
    if figures["errors"]:
        raise SystemExit(f"{figures['errors']} errors: {figures['first_errors']}")
    del figures["first_errors"]
    return {**figures, "mb_before": before_mb, "mb_after": _memory_mb()}


def _memory_mb() -> float:
    replicas = below(os.getpid(), TITLES["control"])
    return round(sum(map(memory_mb, replicas)), 1)


if __name__ == "__main__":
    main()
