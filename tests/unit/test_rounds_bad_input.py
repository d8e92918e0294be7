"""A fleet that is not what the settings hope for: a clear outcome each, and the run goes on where it can.

Bad updates are in test_rounds_rules.py and test_remote_clients.py, silence in test_rounds_async.py, a rule's parameters
in test_aggregation_registry.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedvit.aggregation.registry import rule_for
from fedvit.errors import ConfigError, ConflictError
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import change_aggregation_settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel
from fedvit.types import Client, ClientKind, Run, RunStatus

TARGET = np.array([1.0, -2.0], dtype=np.float32)


class Training:
    """A run of clients with so many examples each."""

    def __init__(self, home: Path, sizes: list[int], *, failing: set[str] | None = None, **training: Any) -> None:
        self.settings = load_settings(
            environ={},
            overrides={
                "home": home,
                "training": {"rounds": 2, **training},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register([Client(f"v{i}", ClientKind.VIRTUAL, size) for i, size in enumerate(sizes)])
        self.fleet = FakeFleet(TARGET, failing=failing or ())
        self.loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=GenerousAccountant(self.store),
            fleet=self.fleet,
            model=PointModel(TARGET),
        )

    def run(self) -> Run:
        return self.loop.run()

    def drawn(self) -> list[tuple[str, ...]]:
        return [cohort.client_ids for _, cohort in self.fleet.tasks]


def test_clients_with_no_data_are_neither_drawn_nor_charged(tmp_path: Path) -> None:
    training = Training(tmp_path, [10, 0, 10])
    assert training.run().status is RunStatus.COMPLETED
    assert training.drawn() == [("v0", "v2")] * 2
    assert {entry.charge.unit_id for entry in training.store.ledger.entries()} == {"v0", "v2"}


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_a_fleet_without_any_data_is_said_and_costs_nothing(tmp_path: Path, sizes: list[int]) -> None:
    training = Training(tmp_path, sizes)
    with pytest.raises(ConflictError):
        training.run()
    assert (training.store.runs.all(), training.store.ledger.entries()) == ([], [])
    training.store.clients.register([Client("late", ClientKind.VIRTUAL, 10)])
    assert training.run().status is RunStatus.COMPLETED


@pytest.mark.parametrize("mode", ["synchronous", "asynchronous"])
@pytest.mark.parametrize("aggregation", ["fedavg", "median", "trimmed_mean", "geometric_median"])
def test_one_client_only_is_its_own_mean(tmp_path: Path, mode: Any, aggregation: str) -> None:
    training = Training(tmp_path, [10], aggregation=aggregation)
    training.fleet.rule = rule_for(training.settings)
    if aggregation == "fedavg":
        change_aggregation_settings(training.store, lambda now: replace(now, mode=mode))
    assert training.run().status is RunStatus.COMPLETED
    point = stored_weights(training.store, training.store.versions.get("v1.1.2").weights_digest)["point"]
    np.testing.assert_allclose(point, 0.75 * TARGET, rtol=1e-6)


@pytest.mark.parametrize(("aggregation", "needed"), [("krum", 5), ("bulyan", 7)])
def test_one_client_is_too_few_where_a_rule_compares_them(tmp_path: Path, aggregation: str, needed: int) -> None:
    training = Training(tmp_path, [10], aggregation=aggregation)
    with pytest.raises(ConfigError):
        training.run()
    assert training.store.runs.all() == []


def test_a_cohort_larger_than_the_population_is_everybody(tmp_path: Path) -> None:
    training = Training(tmp_path, [10, 10, 10], cohort={"selection": "uniform", "size": 50})
    assert training.run().status is RunStatus.COMPLETED
    assert training.drawn() == [("v0", "v1", "v2")] * 2


def test_more_clients_demanded_than_there_are_is_said_before_anybody_is_charged(tmp_path: Path) -> None:
    training = Training(tmp_path, [10, 10], cohort={"min_clients": 3})
    run = training.run()
    assert (run.status, run.reason) == (RunStatus.FAILED, "Round 1 has 2 eligible clients; at least 3 are needed.")
    assert training.store.ledger.entries() == []


def test_when_every_client_fails_the_first_reason_is_told_and_the_round_is_tried_again(tmp_path: Path) -> None:
    training = Training(tmp_path, [10, 10], failing={"v0", "v1"})
    run = training.run()
    assert run.status is RunStatus.FAILED
    assert run.reason == "Round 1 has 0 updates (2 clients failed, the first with: it failed); at least 1 are needed."
    training.fleet.failing = frozenset()
    assert training.run().status is RunStatus.COMPLETED
    assert len(training.store.ledger.entries()) == 4


def test_some_failing_clients_are_recorded_and_the_round_goes_on(tmp_path: Path) -> None:
    training = Training(tmp_path, [10, 10, 10], failing={"v1"})
    assert training.run().status is RunStatus.COMPLETED
    assert training.store.versions.get("v1.1.2").lineage["clients"] == ["v0", "v2"]
    result = training.store.rounds.participation()["v1"]
    assert (result.rounds, result.failures) == (2, 2)
