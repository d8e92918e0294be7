"""The training loop while an incident is in force: quarantine, the frozen ledger, and releases held back."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.errors import LedgerFrozenError
from fedvit.ports import ExportedModel
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import RunRequest
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import Evaluation, LedgerFreeze, RunStatus, Variant, Weights, utc_now

TARGET = np.array([1.0, -2.0], dtype=np.float32)
CAUGHT = "vehicle-0001"
OTHERS = ("vehicle-0000", "vehicle-0002", "vehicle-0003")


class Interrupted(PointModel):
    """Something happens between the judging of one round's updates and its commit, once."""

    def __init__(self, round_index: int, happens: Callable[[], object]) -> None:
        super().__init__(TARGET)
        self._rounds_left, self._happens = round_index, happens

    def evaluate(self, weights: Weights) -> Evaluation:
        self._rounds_left -= 1
        if self._rounds_left == 0:
            self._happens()
        return super().evaluate(weights)

    def export(self, weights: Weights, variant: Variant) -> ExportedModel:
        # By another model: an export evaluates, too, and only rounds are counted here.
        return PointModel(self._target).export(weights, variant)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        store.clients.register(seeded_fleet(4))
        yield store


def loop_over(store: Store, fleet: FakeFleet, model: PointModel | None = None, **cohort: Any) -> Coordinator:
    settings = load_settings(
        environ={},
        overrides={
            "home": store.home,
            "training": {"rounds": 4, "cohort": cohort},
            "privacy": {"noise_multiplier": 4.0, "sampling_prob": 0.5},
            "release": {"every_rounds": 2},
        },
    )
    accountant = PrivacyAccountant(store, settings)
    model = model or PointModel(TARGET)
    return Coordinator(settings=settings, store=store, accountant=accountant, fleet=fleet, model=model)


def quarantine(store: Store) -> None:
    store.clients.quarantine([CAUGHT], "incident PB-1", utc_now())


def freeze(store: Store) -> None:
    store.ledger.freeze(LedgerFreeze("PB-1", "images leaked", "Ana", utc_now()))


def contributors(store: Store) -> list[list[str]]:
    return [version.lineage["clients"] for version in reversed(store.versions.all())]


def test_an_interrupted_round_is_repeated_without_who_was_quarantined_since(store: Store) -> None:
    fleet = FakeFleet(TARGET, crash_in_round=2)
    with pytest.raises(KeyboardInterrupt):
        loop_over(store, fleet).run()
    quarantine(store)
    run = loop_over(store, fleet).run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)
    everybody = [c.client_id for c in seeded_fleet(4)]
    assert contributors(store) == [everybody, *[list(OTHERS)] * 3]
    assert [cohort.client_ids for _, cohort in fleet.tasks[2:]] == [OTHERS] * 3
    # What was recorded for the round stays on record, with what became of it.
    assert store.rounds.get(run.run_id, 2).cohort == tuple(everybody)
    assert outcome(store, run.run_id, 2) == "quarantined"


def outcome(store: Store, run_id: str, round_index: int) -> str | None:
    query = "SELECT error FROM client_rounds WHERE (run_id, round_index, client_id) = (?, ?, ?)"
    with closing(sqlite3.connect(store.home / "state.db")) as database:
        (error,) = database.execute(query, (run_id, round_index, CAUGHT)).fetchone()
    return error


def test_who_is_quarantined_while_a_round_trains_is_in_no_version_of_it(store: Store) -> None:
    loop = loop_over(store, FakeFleet(TARGET), model=Interrupted(3, lambda: quarantine(store)))
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.FAILED, 2)
    assert "Round 3 of run-0001 is discarded: vehicle-0001 came into quarantine" in (run.reason or "")
    run = loop.run()
    assert (run.status, run.rounds_done, run.ordinal) == (RunStatus.COMPLETED, 4, 1)
    assert [CAUGHT in clients for clients in contributors(store)] == [True, True, False, False]


def test_too_few_who_are_not_quarantined_make_no_round(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt):
        loop_over(store, FakeFleet(TARGET, crash_in_round=2), min_clients=4).run()
    quarantine(store)
    run = loop_over(store, FakeFleet(TARGET), min_clients=4).run()
    assert run.reason == "Round 2 has 3 eligible clients; at least 4 are needed."


def test_under_a_frozen_ledger_no_round_begins_not_even_one_that_was_charged(store: Store) -> None:
    fleet = FakeFleet(TARGET, crash_in_round=2)
    loop = loop_over(store, fleet)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    freeze(store)
    trained = len(fleet.tasks)
    run = loop.run()
    assert run.status is RunStatus.FAILED
    assert "incident PB-1: images leaked" in (run.reason or "")
    assert len(fleet.tasks) == trained
    with pytest.raises(LedgerFrozenError):
        loop.lifecycle.check_new_run(RunRequest(0, "op-1", "another"))
    store.ledger.unfreeze("PB-1")
    assert loop.run().status is RunStatus.COMPLETED


def test_a_version_that_an_incident_overtakes_is_not_released_until_it_is_over(store: Store) -> None:
    loop = loop_over(store, FakeFleet(TARGET), Interrupted(4, lambda: freeze(store)))
    run = loop.run()
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)
    assert [release.version for release in store.releases.all()] == ["v1.1.2"]
    assert store.versions.get("v1.1.4").refusal is None
    store.ledger.unfreeze("PB-1")
    loop.run()
    assert [release.version for release in store.releases.all()] == ["v1.1.2", "v1.1.4"]


def test_a_run_that_an_incident_stops_is_stopped_and_not_failed(store: Store) -> None:
    def breach() -> None:
        freeze(store)
        loop.request_stop()

    loop = loop_over(store, FakeFleet(TARGET), Interrupted(2, breach))
    run = loop.run()
    assert (run.status, run.reason) == (RunStatus.STOPPED, "Stopped on request after round 2.")
    assert store.releases.all() == []
