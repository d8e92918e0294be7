"""The mode switched at random while a real fleet trains, with a vehicle among it that has a process of its own.

Updates accepted + refused + late are updates sent. CHAOS=full: 100 switches; else a few.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from certificate import self_signed
from command import SMALL, Fedvit, environment
from load import await_true

from fedvit.config import DataConfig
from fedvit.data.sources import open_source
from fedvit.store.store import Store
from fedvit.types import RunStatus

FULL = os.environ.get("CHAOS") == "full"
SWITCHES = 100 if FULL else 6
# After the last switch the run goes on; its last round waits for all who are at it still.
ROUNDS = SWITCHES + 4
TRUCK, IMAGES = "truck-7", 24

pytestmark = [pytest.mark.ray, pytest.mark.campaign, *([pytest.mark.timeout(3600)] if FULL else [])]


@pytest.fixture
def fedvit(tmp_path: Path) -> Iterator[Fedvit]:
    """Six virtual clients behind two proxies, and room for a vehicle; it speaks TLS."""
    certificate = self_signed(tmp_path)
    settings = {
        **SMALL,
        "training.rounds": str(ROUNDS),
        # Until the vehicle is there, the run cannot begin.
        "training.cohort.min_clients": "7",
        "training.compression.encodings": "[int8]",
        "privacy.target_epsilon": "1000",
        "release.every_rounds": str(ROUNDS),
        "ray.proxies": "2",
        "edge.ports": "[]",
        "fleet.task_interval_s": "0.1",
        "access.tls_cert": str(certificate),
        "access.tls_key": str(certificate.with_suffix(".key")),
    }
    system = Fedvit(tmp_path / "var", settings)
    yield system
    system.call("down", configured=False)


def own_images(folder: Path) -> Path:
    """Some real images, as they would lie on a vehicle's disk."""
    source = open_source(DataConfig())
    for index, record in enumerate(source.test[:: len(source.test) // IMAGES][:IMAGES]):
        path = folder / source.classes[record.label] / f"{index}{Path(record.key).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(record))
    return folder


@contextmanager
def truck(fedvit: Fedvit, control: str) -> Iterator[list[dict[str, Any]]]:
    """A vehicle's process while the block runs; afterwards, what it reported of each round."""
    folder = fedvit.home.parent
    result = fedvit.json("token", "create", TRUCK, "--scope", "device", "--client", TRUCK, configured=False)
    (folder / "token").write_text(result["token"])
    command = [
        *(sys.executable, "-m", "edge_runtime", "train", "--source", control, "--device-id", TRUCK),
        *("--data", str(own_images(folder / "disk")), "--home", str(folder / "truck"), "--target-epsilon", "1000"),
        *("--source-token-file", str(folder / "token"), "--source-ca", fedvit.settings["access.tls_cert"]),
    ]
    results: list[dict[str, Any]] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True)
    try:
        yield results
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    results += [json.loads(line) for line in output.splitlines()]


def switch_at_random(http: httpx.Client, draw: random.Random) -> None:
    def rounds_done() -> int:
        result = http.get("/api/training/status").json()
        assert result["status"] == "running", result
        return int(result["rounds_done"])

    # At first so that somebody is late for certain.
    body = {"mode": "asynchronous", "staleness_tolerance": 3, "buffer_size": 1}
    for index in range(SWITCHES):
        assert http.post("/api/aggregation/mode", json=body).status_code == 200
        body = {
            "mode": draw.choice(["synchronous", "asynchronous"]),
            "staleness_tolerance": draw.randrange(4),
            "buffer_size": draw.choice([None, 1, 2, 5]),
        }
        # Now and then two fall into one round.
        until = rounds_done() + (draw.randrange(2) if index else 2)
        await_true(lambda until=until: rounds_done() >= until, "the next round")


def test_whatever_the_mode_no_update_is_lost_or_counted_twice(fedvit: Fedvit) -> None:
    fedvit.json("up")
    control = fedvit.control.replace("http:", "https:")
    trust = ssl.create_default_context(cafile=fedvit.settings["access.tls_cert"])
    with httpx.Client(base_url=control, verify=trust, timeout=60) as http:
        with truck(fedvit, control) as result:
            await_true(lambda: http.get(f"/api/clients/{TRUCK}").status_code == 200, "the truck's registration")
            outcome = lambda: http.get(f"/api/clients/{TRUCK}").json()["last_seen_at"]  # noqa: E731
            await_true(lambda: outcome() is not None, "the truck's first question")
            assert http.post(f"/api/clients/{TRUCK}/validate", json={"validated": True}).status_code == 200
            assert http.post("/api/training/config", json={"min_clients": 1}).status_code == 200
            assert http.post("/api/training/start").status_code == 202
            switch_at_random(http, random.Random(7))
            await_true(lambda: http.get("/api/training/status").json()["status"] != "running", "the run's end")
        assert 'fed_vit_autorl_update_bytes_total{encoding="int8"}' in http.get("/metrics").text
    check_the_books(fedvit, result)


def check_the_books(fedvit: Fedvit, steps: list[dict[str, Any]]) -> None:
    """Every charge was for an update, and every update is in one round, with what became of it."""
    with Store.open(fedvit.home) as store, Store.open(fedvit.home.parent / "truck") as own:
        run = store.runs.latest()
        assert run is not None
        assert (run.ordinal, run.status, run.rounds_done) == (1, RunStatus.COMPLETED, ROUNDS)
        lineages = [dict(version.lineage) for version in store.versions.all()]
        assert store.ledger.verify() == len(store.ledger.entries())
        # Histograms are charged beside the updates, as events of their own.
        sent = Counter(entry.charge.unit_id for entry in store.ledger.entries() if entry.charge.event is None)
        charged = [entry.charge for entry in store.ledger.entries() if entry.charge.unit_id == TRUCK]
        assert [entry.charge for entry in own.ledger.entries()] == charged
    accepted, late, refused = Counter[str](), Counter[str](), Counter[str]()
    for lineage in lineages:
        aggregation = lineage.get("aggregation", {})
        staleness = aggregation.get("staleness", dict.fromkeys(lineage["clients"], 0))
        late.update(client for client, versions in staleness.items() if versions)
        accepted.update(client for client in lineage["clients"] if not staleness[client])
        refused.update(list(aggregation.get("refused", {})))
        assert "unexpected" not in aggregation
    assert accepted + late + refused == sent
    assert 0 < late.total() + refused.total() < sent.total()
    with sqlite3.connect(fedvit.home / "state.db") as database:
        outcomes = Counter(dict(database.execute("SELECT client_id, count(*) FROM client_rounds GROUP BY 1")))
    assert outcomes == sent
    # The vehicle's own account of it: each of its updates was taken when it came.
    assert [step["status"] for step in steps] == ["received"] * sent[TRUCK]
    assert accepted[TRUCK] + late[TRUCK] > 0
    forms = {lineage["sent"][TRUCK]["encoding"] for lineage in lineages if TRUCK in lineage.get("sent", {})}
    assert forms == {"int8"}
    print(
        f"{SWITCHES} switches: {sent.total()} sent, {accepted.total()} accepted, {late.total()} late, "
        f"{refused.total()} refused"
    )
