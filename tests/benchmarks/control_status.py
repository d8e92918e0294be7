"""``GET /api/clients/status?limit=50`` with 10,000 clients beside a bare FastAPI route that answers as many bytes.

Both on one Ray Serve instance, with as many replicas each; in turn, over and over. Run by ``make bench-control``;
writes docs/benchmarks/control_status.json and docs/benchmarks.md. BENCH_SECONDS shortens it.
"""

from __future__ import annotations

import json
import os
import statistics
from typing import Any

import httpx
from fastapi import FastAPI, Response
from ray import serve

from fedvit.config import Settings
from tests.benchmarks.control_fleet import CLIENTS, HOST, serving
from tests.benchmarks.http_load import Plan, run_load
from tests.benchmarks.results import write_result

PATHS = {
    "clients/status": "/api/clients/status?limit=50",
    "bare route, a dict": "/bare/dict",
    "bare route, ready bytes": "/bare/bytes",
}
OURS, BARE, BYTES = PATHS
CONNECTIONS = 8
ROUNDS = 5
SECONDS = float(os.environ.get("BENCH_SECONDS", "10"))


def main() -> None:
    """Measure and write."""
    with serving() as (settings, _):
        base = f"http://{HOST}:{settings.serving.port}"
        page = httpx.get(base + PATHS[OURS], timeout=60).content
        serve.run(_bare(settings, page), name="bare", route_prefix="/bare")
        for path in PATHS.values():
            length = len(httpx.get(base + path, timeout=60).content)
            if length != len(page):
                raise SystemExit(f"{path} answers {length} bytes, and {len(page)} are to be compared.")
        measured = _interleaved(settings.serving.port)
    figures = {name: _median(runs) for name, runs in measured.items()}
    ratios = {f"{OURS} / {name}": round(figures[OURS]["per_s"] / figures[name]["per_s"], 2) for name in (BARE, BYTES)}
    write_result(
        "control_status",
        title="One page of the list of clients",
        what=(
            f"One page has 50 of {CLIENTS:,} clients ({len(page):,} bytes of JSON). The bare FastAPI routes return as "
            f"many. One Ray Serve, {settings.serving.control_replicas} replica each, {CONNECTIONS} connections from "
            f"another process; median of {ROUNDS} turns of {SECONDS:g} s."
        ),
        command="make bench-control",
        figures=figures,
        ratios=ratios,
    )
    print(json.dumps({"figures": figures, "ratios": ratios}, indent=2))


def _bare(settings: Settings, page: bytes) -> serve.Application:
    content = json.loads(page)

    def build() -> FastAPI:
        api = FastAPI()

        @api.get("/dict")
        async def as_dict() -> dict[str, Any]:
            return content  # type: ignore[no-any-return]

        @api.get("/bytes")
        async def as_bytes() -> Response:
            return Response(page, media_type="application/json")

        return api

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="bare",
        num_replicas=settings.serving.control_replicas,
        ray_actor_options={"num_cpus": settings.ray.actor_cpus},
        max_ongoing_requests=64,
    )
    return deployment.bind()


def _interleaved(port: int) -> dict[str, list[dict[str, Any]]]:
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in PATHS}
    for turn in range(ROUNDS + 1):
        for name, path in PATHS.items():
            request = f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n"
            figures = run_load(HOST, port, Plan([request], CONNECTIONS, SECONDS))
            if figures["errors"]:
                raise SystemExit(f"{name}: {figures['errors']} errors: {figures['first_errors']}")
            # The first turn warms up.
            if turn:
                measured[name].append(figures)
    return measured


def _median(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in ("per_s", "p50_ms", "p99_ms")}


if __name__ == "__main__":
    main()
