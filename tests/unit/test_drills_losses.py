"""What an incident cost, counted from the state: by hand, over a real loop, and over a state that lost something."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from control_system import System, TinyModel

from fedvit.incidents.drills.drill import ExpectedAlert, Stage, StageRun, fault_in
from fedvit.incidents.drills.losses import LossBaseline, Losses, count_losses, match
from fedvit.privacy.accountant import epsilon_of
from fedvit.testing.doubles import FakeFleet
from fedvit.types import RoundRecord

TARGET = np.array([1.0, -2.0], dtype=np.float32)
NOTHING = Losses(
    rounds_committed=4,
    rounds_lost=0,
    updates=20,
    updates_lost=0,
    updates_doubled=0,
    uncharged=0,
    epsilon_difference=0.0,
)


def _play(_: StageRun) -> None:
    """Nothing: only what a stage allows is asked."""


STRICT = Stage("", ExpectedAlert("ServiceDown"), _play)
LENIENT = Stage("", ExpectedAlert("ServiceDown"), _play, may_lose_updates=True)


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    result = System(tmp_path / "var", TinyModel(TARGET), FakeFleet(TARGET), {"min_export_agreement": 0.5}, epsilon=50.0)
    yield result
    result.close()


def alter(system: System, statement: str) -> None:
    with sqlite3.connect(system.settings.home / "state.db") as database:
        assert database.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("drawn", "answered", "found"),
    [
        ([1, 2, 3], [(1, True), (2, True), (3, True)], {1: 1, 2: 1, 3: 1}),
        # Late: round 3 took the answer to round 1.
        ([1, 5], [(3, True), (5, True)], {1: 1, 5: 1}),
        ([1, 2], [(1, False), (2, True)], {2: 1}),
        ([1, 4], [(2, True), (3, True)], {1: 2}),
        ([], [(1, True)], {}),
        ([2], [(1, True)], {}),
    ],
)
def test_answers_belong_to_the_draw_before_them(
    drawn: list[int], answered: list[tuple[int, bool]], found: dict[int, int]
) -> None:
    assert match(drawn, answered) == found


def test_a_run_that_went_well_costs_what_it_released(system: System) -> None:
    before = LossBaseline.of(system.store)
    assert before == LossBaseline(0, frozenset())
    system.trained()
    assert count_losses(system.store, system.settings, before) == NOTHING
    after = LossBaseline.of(system.store)
    assert after.ledger_sequence == 20
    assert count_losses(system.store, system.settings, after) == replace(NOTHING, rounds_committed=0, updates=0)


def test_an_update_that_is_gone_is_lost_and_was_paid_for(system: System) -> None:
    before = LossBaseline.of(system.store)
    system.trained()
    client_id = system.store.clients.all()[0].client_id
    alter(system, f"DELETE FROM client_rounds WHERE round_index = 2 AND client_id = '{client_id}'")
    result = count_losses(system.store, system.settings, before)
    assert (result.updates, result.updates_lost) == (19, 1)
    # Everybody else has released as much, so the most exposed client has lost nothing.
    assert result.epsilon_difference == 0.0
    alter(system, "DELETE FROM client_rounds WHERE round_index = 2")
    result = count_losses(system.store, system.settings, before)
    charges = [entry.charge for entry in system.store.ledger.entries()]
    released = [charge for charge in charges if charge.round_index != 2]
    assert result.updates_lost == 5
    assert result.epsilon_difference == epsilon_of(charges, system.settings) - epsilon_of(released, system.settings) > 0


def test_a_round_that_is_gone_is_lost(system: System) -> None:
    system.trained()
    before = LossBaseline.of(system.store)
    alter(system, "UPDATE rounds SET committed_at = NULL WHERE round_index = 3")
    assert count_losses(system.store, system.settings, before).rounds_lost == 1


def test_a_round_that_was_charged_and_will_never_be_is_lost_and_one_under_way_is_not(system: System) -> None:
    before = LossBaseline.of(system.store)
    system.trained()
    alter(system, "UPDATE rounds SET committed_at = NULL WHERE round_index = 4")
    alter(system, "DELETE FROM client_rounds WHERE round_index = 4")
    result = count_losses(system.store, system.settings, before)
    assert (result.rounds_committed, result.rounds_lost, result.updates_lost) == (3, 1, 5)
    alter(system, "UPDATE runs SET status = 'running'")
    result = count_losses(system.store, system.settings, before)
    assert result == replace(NOTHING, rounds_committed=3, updates=15)


def test_a_round_that_is_committed_while_it_is_counted_is_not_lost(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = LossBaseline.of(system.store)
    system.trained()
    alter(system, "UPDATE rounds SET committed_at = NULL WHERE round_index = 4")
    alter(system, "UPDATE runs SET status = 'running'")
    read = system.store.rounds.of_run

    def committed_meanwhile(run_id: str) -> list[RoundRecord]:
        result = read(run_id)
        alter(system, "UPDATE rounds SET committed_at = '2026-01-01 00:00:00' WHERE round_index = 4")
        return result

    monkeypatch.setattr(system.store.rounds, "of_run", committed_meanwhile)
    assert count_losses(system.store, system.settings, before).rounds_lost == 0


@pytest.mark.parametrize(
    ("stage", "found", "reason"),
    [
        (STRICT, NOTHING, None),
        (STRICT, replace(NOTHING, rounds_lost=2), "2 rounds are lost"),
        (LENIENT, replace(NOTHING, rounds_lost=2), "2 rounds are lost"),
        (LENIENT, replace(NOTHING, updates_doubled=1), "1 updates count twice"),
        (LENIENT, replace(NOTHING, uncharged=3), "3 are not on the ledger"),
        (STRICT, replace(NOTHING, updates_lost=4, epsilon_difference=0.1), "4 updates are lost"),
        (LENIENT, replace(NOTHING, updates_lost=4, epsilon_difference=0.1), None),
        (LENIENT, replace(NOTHING, epsilon_difference=0.1), "+0.100000 epsilon more"),
        (LENIENT, replace(NOTHING, updates_lost=4, epsilon_difference=-0.1), "-0.100000 epsilon more"),
    ],
)
def test_what_an_incident_may_cost(stage: Stage, found: Losses, reason: str | None) -> None:
    fault = fault_in(found, stage)
    assert fault is None if reason is None else reason in (fault or "")
