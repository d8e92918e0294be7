"""kill -9 at random moments, of an accountant that charges and of a coordinator that charges, trains and commits.

The ledger is never below what was released, charges no round twice, and its chain verifies. ``CHAOS_KILLS`` says how
often (6); ``make chaos-ledger`` does it 200 times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.config import Settings
from fedvit.ports import POPULATION
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.events import Gaussian
from fedvit.privacy.round_cost import charge_of
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import Cohort, TrainTask, Weights
from fedvit.updates import UpdateMessage

KILLS = int(os.environ.get("CHAOS_KILLS", "6"))
LONGEST_WAIT_S = 0.03
TARGET = np.array([1.0, -2.0], dtype=np.float32)
CLIENTS, ROUNDS = 5, 5000
Release = tuple[str, int, str]


def settings(home: Path, privacy_unit: str) -> Settings:
    client = privacy_unit == "client"
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": ROUNDS, "cohort": {"selection": "poisson", "sampling_prob": 1.0} if client else {}},
            # Charges without sampling compose to one Gaussian: the accountant answers within a millisecond.
            "privacy": {
                "privacy_unit": privacy_unit,
                "noise_multiplier": 200.0,
                "sampling_prob": 1.0,
                "target_epsilon": 1000.0,
            },
            "release": {"every_rounds": 3},
        },
    )


class Released:
    """What left the clients: a line each, in a file that outlives whoever wrote it."""

    def __init__(self, path: Path, reports: Connection | None = None) -> None:
        self._path = path
        self._reports = reports

    def note(self, releases: list[Release]) -> None:
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(release) + "\n" for release in releases).encode())
        if self._reports is not None:
            self._reports.send(True)

    def read(self) -> list[Release]:
        if not self._path.exists():
            return []
        # A line without its end was under way: its client had not been asked.
        whole, _, _ = self._path.read_bytes().rpartition(b"\n")
        return [tuple(json.loads(line)) for line in whole.splitlines()]


class NotingFleet(FakeFleet):
    """Notes what it releases, before it does."""

    def __init__(self, released: Released) -> None:
        super().__init__(TARGET)
        self._released = released

    def train(
        self, task: TrainTask, weights: Weights, cohort: Cohort, *, timeout_s: float | None = None
    ) -> Iterator[UpdateMessage | None]:
        for answer in super().train(task, weights, cohort, timeout_s=timeout_s):
            if answer is not None:
                self._released.note([(task.run_id, task.round_index, o.client_id) for o in answer.outcomes])
            yield answer


def charge_for_ever(home: Path, unit: str, seed: int, reports: Connection) -> None:
    """An accountant that charges round after round, some of them again, and releases what was charged."""
    released, rng = Released(home / "released", reports), random.Random(seed)
    store = Store.open(home)
    accountant = PrivacyAccountant(store, settings(home, unit))
    first = 1 + max((entry.charge.round_index for entry in store.ledger.entries()), default=0)
    for round_index in range(first, first + ROUNDS):
        for wanted in {max(1, round_index - rng.randrange(3)), round_index}:
            units = [f"vehicle-{i}" for i in range(CLIENTS)]
            charges = [
                charge_of(
                    Gaussian(200.0), run_id="run-0001", round_index=wanted, unit_id=name, output_id="r", unit=unit
                )
                for name in units
            ]
            accountant.charge(charges)
            released.note([("run-0001", wanted, name) for name in units])


def train_for_ever(home: Path, unit: str, seed: int, reports: Connection) -> None:
    """The training loop without Ray."""
    store = Store.open(home)
    store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
    store.clients.register(seeded_fleet(CLIENTS, seed=0))
    config = settings(home, unit)
    loop = Coordinator(
        settings=config,
        store=store,
        accountant=PrivacyAccountant(store, config),
        fleet=NotingFleet(Released(home / "released", reports)),
        model=PointModel(TARGET),
    )
    loop.run()


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    """Processes that begin within milliseconds: a server that has imported all of this forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "fedvit.rounds.coordinator", "dp_accounting.pld", "dp_accounting.rdp"])
    return context


def kill_one(context: ForkServerContext, target: Any, home: Path, unit: str, rng: random.Random) -> None:
    here, there = context.Pipe()
    process = context.Process(target=target, args=(home, unit, rng.randrange(2**32), there))
    process.start()
    # Some die while they read the state, most of them some way into their work, all of them anywhere in a step.
    for _ in range(rng.choice((0, 1, 1, 2, 3, 5, 8))):
        assert here.poll(60), "nothing was released"
        here.recv()
    process.join(timeout=rng.uniform(0, LONGEST_WAIT_S))
    assert process.is_alive(), f"it ended by itself with {process.exitcode}"
    process.kill()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL


def check(home: Path) -> int:
    """The ledger against what was released; return how many lines it has."""
    with Store.open(home) as store:
        entries = store.ledger.entries()
        assert store.ledger.verify() == len(entries)
        times = Counter((e.charge.run_id, e.charge.round_index, e.charge.unit_id) for e in entries)
        committed = [r for run in store.runs.all() for r in store.rounds.of_run(run.run_id) if r.committed]
        versions = [version.version for version in store.versions.all()]
    assert set(times.values()) <= {1}, "a round was charged twice"
    for run_id, round_index, unit_id in Released(home / "released").read():
        paid = times[run_id, round_index, unit_id] or times[run_id, round_index, POPULATION]
        assert paid == 1, f"{unit_id} released round {round_index} of {run_id} without a charge"
    assert [record.round_index for record in committed] == list(range(1, len(committed) + 1))
    assert len(set(versions)) == len(versions) == len(committed)
    return len(entries)


@pytest.mark.parametrize(
    ("target", "unit", "kills"),
    [
        (charge_for_ever, "record", KILLS - 2 * (KILLS // 3)),
        (train_for_ever, "record", KILLS // 3),
        (train_for_ever, "client", KILLS // 3),
    ],
    ids=["accountant", "aggregator", "aggregator-client-level"],
)
def test_whatever_is_killed_the_ledger_covers_what_was_released(
    tmp_path: Path, context: ForkServerContext, target: Any, unit: str, kills: int
) -> None:
    rng, lines = random.Random(20240611), 0
    with Store.open(tmp_path):
        pass
    for _ in range(kills):
        kill_one(context, target, tmp_path, unit, rng)
        written = check(tmp_path)
        assert written >= lines, "lines were lost"
        lines = written
    released = len(set(Released(tmp_path / "released").read()))
    print(f"\n{target.__name__} ({unit}): {kills} kills, {lines} lines, {released} releases")
    # Resumed by another process, the accountant comes to the same epsilon.
    with Store.open(tmp_path) as store:
        config = settings(tmp_path, unit)
        results = [PrivacyAccountant(store, config).budget().epsilon_spent for _ in range(2)]
    assert results[0] == pytest.approx(results[1], abs=1e-9)
