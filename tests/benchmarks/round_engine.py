"""Our own round engine, measured: actors, coordinator, store and accountant as in production, clients of any kind."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray

from actors.connection import connect
from actors.spawn import Actors, spawn_actors
from fedvit.clients.workload import load_workload
from fedvit.config import Settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import RunStatus
from tests.benchmarks.process_tree import TreeWatch

CLIENTS = "tests.benchmarks.round_clients"


def settings_for(
    home: Path, kind: str, options: Mapping[str, Any], *, rounds: int, cohort: int | None = None, **more: Any
) -> Settings:
    """A run of a workload of :mod:`tests.benchmarks.round_clients` that no budget ends."""
    overrides: dict[str, Any] = {
        "home": home,
        "workload": {"clients_class": f"{CLIENTS}:{kind}", "options": dict(options)},
        "training": {"rounds": rounds, "local_steps": 1},
        # Enough noise for many rounds: what a round costs in time does not depend on it.
        "privacy": {"noise_multiplier": 100.0, "sampling_prob": 0.5, "target_epsilon": 50.0, "target_delta": 1e-9},
        "release": {"every_rounds": 100_000},
        "ray": {"dashboard": False, "proxies": 2},
    }
    if cohort is not None:
        overrides["training"]["cohort"] = {"selection": "uniform", "size": cohort}
    for section, values in more.items():
        overrides[section] = {**overrides[section], **values}
    return load_settings(environ={}, overrides=overrides)


@contextmanager
def running(settings: Settings) -> Iterator[Actors]:
    """The system's actors on a Ray of their own, over a registered fleet; everything ends with the block."""
    with Store.open(settings.home) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["none"])
        store.clients.register(load_workload(settings).registered())
    metrics = settings.home / "run" / "metrics"
    metrics.mkdir(parents=True, exist_ok=True)
    logging.getLogger("ray").setLevel(logging.ERROR)
    connect(settings, {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "RAY_USAGE_STATS_ENABLED": "0"})
    try:
        actors = spawn_actors(settings)
        actors.await_prepared(settings.ray.start_timeout_s)
        yield actors
        actors.kill()
    finally:
        ray.shutdown()


def run_rounds(actors: Actors, settings: Settings) -> list[float]:
    """Train to the end; the seconds from each commit to the next."""
    handle = actors.handle()
    handle.start_training()
    while (progress := handle.wait(60.0)).status is RunStatus.RUNNING:
        pass
    if progress.status is not RunStatus.COMPLETED:
        raise SystemExit(f"The run ended {progress.status}: {progress.message}")
    return _between_commits(settings.home)


def _between_commits(home: Path) -> list[float]:
    with sqlite3.connect(home / "state.db") as connection:
        rows = connection.execute("SELECT committed_at FROM rounds ORDER BY run_id, round_index").fetchall()
    moments = [datetime.fromisoformat(at) for (at,) in rows]
    return [(after - before).total_seconds() for before, after in pairwise(moments)]


def measure(kind: str, options: Mapping[str, Any], *, rounds: int, warm: int = 5, **more: Any) -> dict[str, float]:
    """Median and slowest seconds of a round after ``warm`` ones, and the peak memory of all processes in MB."""
    with tempfile.TemporaryDirectory(prefix="fedvit-bench-") as folder:
        settings = settings_for(Path(folder), kind, options, rounds=rounds + warm + 1, **more)
        started_s = time.perf_counter()
        with TreeWatch(os.getpid()) as watch, running(settings) as actors:
            ready_s = time.perf_counter() - started_s
            seconds = run_rounds(actors, settings)[warm:]
    return {
        "round_s": round(statistics.median(seconds), 4),
        "slowest_s": round(max(seconds), 4),
        "start_s": round(ready_s, 1),
        "peak_mb": watch.peak_mb(),
    }


if __name__ == "__main__":
    # Called by bench-peers and by hand: kind, options, keywords, as JSON; prints the figures.
    print(json.dumps(measure(sys.argv[1], json.loads(sys.argv[2]), **json.loads(sys.argv[3]))))
