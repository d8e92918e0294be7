"""What a rule returns, and what a run starts from, is checked before it is committed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_rounds_coordinator import TARGET, settings

from fedvit.aggregation.fedavg import FedAvg
from fedvit.aggregation.registry import SHIPPED
from fedvit.aggregation.rule import NO_FACTS, Fold, RoundFacts, State, Updates, moved
from fedvit.errors import ModelError
from fedvit.rounds.coordinator import Coordinator
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel, seeded_fleet
from fedvit.types import Run, RunStatus, Weights

GOOD = np.array([1.0, 1.0], np.float32)


def run_with(
    home: Path, fold: Any, monkeypatch: pytest.MonkeyPatch, model: PointModel | None = None
) -> tuple[Run, Any]:
    """A run of a plug-in rule whose result is made by ``fold``; the run, and its latest version."""

    class Plugin(FedAvg):
        name = "plugin"

        def fold(self, base: Weights, updates: Updates, state: State, facts: RoundFacts = NO_FACTS) -> Fold:
            result: Fold = fold(base)
            return result

    monkeypatch.setitem(SHIPPED, "plugin", Plugin)
    config = settings(home, aggregation="plugin")
    with Store.open(home) as store:
        store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        store.clients.register(seeded_fleet(3))
        loop = Coordinator(
            settings=config,
            store=store,
            accountant=GenerousAccountant(store),
            fleet=FakeFleet(TARGET),
            model=model or PointModel(TARGET),
        )
        try:
            return loop.run(), store.versions.latest()
        except ValueError:  # of the rule itself
            run = store.runs.latest()
            assert run is not None
            return run, store.versions.latest()


@pytest.mark.parametrize(
    ("weights", "state"),
    [
        ({"point": np.array([1.0, np.nan], np.float32)}, {}),
        ({"point": np.array([np.inf, 1.0], np.float32)}, {}),
        ({"point": np.ones(3, np.float32)}, {}),
        ({"point": np.ones(2)}, {}),
        ({"point": [1.0, 1.0]}, {}),
        ({}, {}),
        ({"point": GOOD, "more": GOOD}, {}),
        ({"point": GOOD}, {"momentum": np.array([np.nan])}),
        ({"point": GOOD}, {"momentum": GOOD}),
    ],
)
def test_what_no_round_can_start_from_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Any, state: Any
) -> None:
    run, version = run_with(tmp_path, lambda base: Fold(weights, state), monkeypatch)
    assert (run.status, run.rounds_done, version) == (RunStatus.FAILED, 0, None)
    assert "plugin" in str(run.reason)


def test_a_rule_that_returns_something_else_than_a_fold_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, version = run_with(tmp_path, lambda base: {"point": GOOD}, monkeypatch)
    assert (run.status, version) == (RunStatus.FAILED, None)
    assert "plugin" in str(run.reason)


def test_a_rule_that_works_in_place_cannot_change_what_the_round_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place(base: Weights) -> Fold:
        base["point"][...] += 1
        return Fold(dict(base), {})

    run, version = run_with(tmp_path, in_place, monkeypatch)
    assert (run.status, version) == (RunStatus.FAILED, None)


def test_a_good_plug_in_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_with(tmp_path, lambda base: Fold(moved(base, {"point": np.ones(2)}), {}), monkeypatch)
    assert (run.status, run.rounds_done) == (RunStatus.COMPLETED, 4)


def test_initial_weights_that_are_not_finite_are_refused_before_anything_is_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(PointModel):
        def initial_weights(self) -> Weights:
            return {"point": np.array([0.0, np.nan], np.float32)}

    with pytest.raises(ModelError):
        run_with(tmp_path, lambda base: Fold(dict(base), {}), monkeypatch, Broken(TARGET))
    with Store.open(tmp_path) as store:
        assert store.ledger.entries() == []
