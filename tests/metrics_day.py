"""A day of operation in fast-forward: what the exporters hold while clients, releases and processes come and go.

Run as a program it prints figures as JSON. The real store, heartbeats, routes, rounds and releases are driven by a
clock that is set forward, a scrape follows every step, and ``PROMETHEUS_MULTIPROC_DIR`` must name an empty folder.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

from fastapi.testclient import TestClient
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from fedvit.cohort.connectivity import connectivity
from fedvit.config import FleetConfig
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE, counter, render
from fedvit.metrics.releases import ReleaseMetrics
from fedvit.metrics.training import RoundMetrics, publish_connected, publish_training
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock
from fedvit.types import Client, ClientKind, ClientOutcome, Encoding, RunStatus, TrainingProgress
from serve_apps.control.api import Services, create_api
from serve_apps.control.fleet.heartbeats import Heartbeats

MORNING = datetime(2026, 3, 1, tzinfo=UTC)
DAY = timedelta(hours=24)
# How long a client stays, as a share of the day.
STAY = 0.2
RELEASE_EVERY = timedelta(minutes=10)
PROCESS_ENDS_EVERY = timedelta(hours=2)
# To look at the whole fleet, or at all of memory, takes a while.
READ_EVERY = timedelta(hours=2)
CLASSES = 43
# What another process of the node leaves when it ends.
SHORT_LIFE = """
from prometheus_client import CollectorRegistry
from fedvit.metrics.exposition import counter, gauge
from fedvit.metrics.releases import ReleaseMetrics
import sys
counter("heartbeats_total").labels("ok").inc()
gauge("training_loss").set(0.5)
gauge("queue_depth").labels("images").set(1)
release = ReleaseMetrics(CollectorRegistry(), count_answers=True)
release.serve(sys.argv[1], int(sys.argv[2]))
release.answered(int(sys.argv[2]), 0.01, 3)
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """What there is at one moment; every two hours also what Python holds for the exporters, by tracemalloc."""

    hour: float
    series: int
    exposition_bytes: int
    files: int
    files_bytes: int
    held_bytes: int | None


class Day:
    """One node of a system whose fleet changes all day."""

    def __init__(self, home: Path, clients: int, step: timedelta) -> None:
        self._clock, self._start = ManualClock(MORNING), MORNING
        self._folder = Path(os.environ[MULTIPROCESS_VARIABLE])
        self._clients, self._step, self._random = clients, step, Random(0)
        settings = load_settings(environ={}, overrides={"home": home})
        self._store = Store.open(home)
        accountant = PrivacyAccountant(self._store, settings)
        self._budget = accountant.budget()
        self._heartbeats = Heartbeats(self._store, FleetConfig(), self._clock)
        services = Services(settings, self._store, self._nobody, lambda: accountant, self._folder)
        self._http = TestClient(create_api(services), raise_server_exceptions=False)
        self._rounds = RoundMetrics()
        self._release = ReleaseMetrics(CollectorRegistry(), count_answers=True)
        self._registered = 0
        self._there: list[str] = []
        self._sequence = 0

    def run(self) -> list[Reading]:
        """All of it; one reading a step."""
        tracemalloc.start()
        readings = []
        while (passed := self._clock.now() - self._start) < DAY:
            self._clock.advance(self._step.total_seconds())
            self._come_and_go((passed + self._step) / DAY)
            self._beat()
            self._serve(passed + self._step)
            self._train(passed + self._step)
            self._ask()
            readings.append(self._read(passed + self._step))
        return readings

    def _come_and_go(self, share: float) -> None:
        new = range(self._registered, int(self._clients * share))
        names = [f"truck-{number}" for number in new]
        self._store.clients.register(
            Client(name, ClientKind.REMOTE, 10, registered_at=self._clock.now()) for name in names
        )
        self._registered += len(names)
        self._there += names
        leaving = self._there[: max(0, len(self._there) - int(self._clients * STAY))]
        self._there = self._there[len(leaving) :]
        for name in leaving[:20]:
            self._store.clients.update(name, active=False)

    def _beat(self) -> None:
        beats = counter("heartbeats_total")
        for name in self._there:
            if not self._heartbeats.knows(name):
                self._heartbeats.learn(name)
            self._heartbeats.beat(name)
            beats.labels(self._random.choice(("ok", "degraded"))).inc()
        self._heartbeats.seen.flush()

    def _serve(self, passed: timedelta) -> None:
        sequence = passed // RELEASE_EVERY
        if sequence != self._sequence:
            self._sequence = sequence
            self._release.serve(f"v1.{sequence // 100}.{sequence}", sequence)
        for _ in range(50):
            self._release.answered(sequence, self._random.random(), self._random.randrange(CLASSES))
        if passed % PROCESS_ENDS_EVERY < self._step:
            words = [f"v1.{sequence // 100}.{sequence}", str(sequence)]
            subprocess.run([sys.executable, "-c", SHORT_LIFE, *words], check=True)

    def _train(self, passed: timedelta) -> None:
        asked = self._random.sample(self._there, min(30, len(self._there)))
        errors = (None, None, None, "no answer in 30 s", "a text of the client's own: {}")
        outcomes = [
            ClientOutcome(
                name,
                10,
                error=self._random.choice(errors),
                counted_against_client=False,
                staleness=self._random.randrange(9),
            )
            for name in asked
        ]
        self._rounds.committed(outcomes, quarantined=1, unexpected=1)
        for encoding in Encoding:
            counter("update_bytes_total").labels(str(encoding)).inc(1000)
        if passed % READ_EVERY < self._step:
            fleet = connectivity(
                self._store.clients.last_contacts(), None, self._clock.now(), FleetConfig().heartbeat_timeout_s
            )
            publish_connected(fleet.connected)
        progress = TrainingProgress("run-0001", RunStatus.RUNNING, "training", 9999, 1, 0.5, 0.9, 1.0, "v1.1.1")
        publish_training(progress, self._budget, active=len(self._there), total=self._registered)

    def _ask(self) -> None:
        """Requests whose every part is the caller's own text."""
        word = f"{self._random.getrandbits(64):x}"
        self._http.get(f"/api/clients/{self._there[-1]}")
        self._http.get(f"/{word}/{word}", headers={"Authorization": f"Bearer {word}"})
        self._http.request(f"X{word[:8].upper()}", "/api/clients/status")
        self._http.post(f"/api/clients/{word}/heartbeat", json={"status": word, "model_version": word})
        self._http.get("/api/privacy/budget", headers={"Authorization": f"Bearer fvt_{word}", "X-Request-ID": word})

    def _read(self, passed: timedelta) -> Reading:
        text = render(self._folder, REGISTRY)[0]
        series = sum(len(family.samples) for family in text_string_to_metric_families(text.decode()))
        files = list(self._folder.glob("*"))
        return Reading(
            hour=round(passed / timedelta(hours=1), 2),
            series=series,
            exposition_bytes=len(text),
            files=len(files),
            files_bytes=sum(path.stat().st_blocks * 512 for path in files),
            held_bytes=_held_bytes() if passed % READ_EVERY < self._step else None,
        )

    @staticmethod
    def _nobody() -> None:
        raise ConnectionError("there is no aggregator")


def _held_bytes() -> int:
    gc.collect()
    exporters = tracemalloc.Filter(True, "*/prometheus_client/*"), tracemalloc.Filter(True, "*/fedvit/monitoring/*")
    return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces(exporters).statistics("filename"))


def main() -> None:
    """Print the readings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--step-minutes", type=float, default=5.0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        day = Day(Path(home), chosen.clients, timedelta(minutes=chosen.step_minutes))
        print(json.dumps([asdict(reading) for reading in day.run()]))


if __name__ == "__main__":
    main()
