"""Budget periods on the ledger: spending within them, tampering, freezing, and approval by a second person."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from fedvit.errors import (
    BudgetExhaustedError,
    ConflictError,
    ForbiddenError,
    IntegrityError,
    LedgerFrozenError,
    NotFoundError,
)
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant, epsilon_spent_at
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.settings import load_settings, settings_to_json
from fedvit.store.store import Store
from fedvit.types import LedgerFreeze, utc_now

WHY = "The privacy officer approved one more run."
WAIT_S = 20.0


def cost(rounds: int) -> float:
    """Epsilon of so many rounds."""
    return epsilon_pld({PoissonGaussian(4.0, 0.5): rounds}, 1e-5)


ADMITS_TWO = cost(2) + 1e-6


def charges(round_index: int, *units: str) -> list[Charge]:
    return [Charge("run-0001", round_index, u, f"{round_index:064x}", 4.0, 0.5, 1) for u in units or ("a", "b")]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as store:
        yield store


def accountant(store: Store, target_epsilon: float = ADMITS_TWO) -> PrivacyAccountant:
    return PrivacyAccountant(
        store, load_settings(environ={}, overrides={"privacy": {"target_epsilon": target_epsilon}})
    )


def tamper(store: Store, statement: str) -> None:
    with closing(sqlite3.connect(store.home / "state.db")) as connection:
        connection.execute(statement)
        connection.commit()


# --- periods ---------------------------------------------------------------------------------------------------------


def test_the_first_period_is_that_of_the_settings(store: Store) -> None:
    report = accountant(store).charge(charges(1))
    assert (report.period, report.period_started_at, report.target_epsilon) == (1, None, ADMITS_TWO)
    assert report.lifetime_epsilon == report.epsilon_spent == pytest.approx(cost(1))
    assert store.budget.periods() == []


def test_a_new_budget_begins_at_nothing_spent_and_forgets_nothing(store: Store) -> None:
    keeper = accountant(store)
    for round_index in (1, 2):
        keeper.charge(charges(round_index))
    with pytest.raises(BudgetExhaustedError):
        keeper.charge(charges(3))
    report = keeper.reset_budget(cost(1) + 1e-6, WHY, "token:a:Ana", "token:b:Bo")
    assert (report.period, report.epsilon_spent, report.rounds_charged, report.clients_charged) == (2, 0.0, 0, 0)
    assert report.target_epsilon == report.epsilon_remaining == cost(1) + 1e-6
    report = keeper.charge(charges(3))
    assert report.epsilon_spent == pytest.approx(cost(1))
    assert report.lifetime_epsilon == pytest.approx(cost(3))
    with pytest.raises(BudgetExhaustedError) as error:
        keeper.charge(charges(4))
    assert error.value.details["target_epsilon"] == cost(1) + 1e-6
    assert len(store.ledger.entries()) == 6
    (period,) = store.budget.periods()
    assert (period.ledger_sequence, period.requested_by, period.approved_by) == (4, "token:a:Ana", "token:b:Bo")
    assert (period.justification, period.at) == (WHY, report.period_started_at)


def test_what_was_spent_at_a_moment_is_that_of_the_period_then(store: Store) -> None:
    keeper, moments = accountant(store), [utc_now()]
    for round_index in (1, 2):
        keeper.charge(charges(round_index))
        moments.append(utc_now())
    keeper.reset_budget(cost(2) + 1e-6, WHY, "token:a:Ana")
    moments.append(utc_now())
    keeper.charge(charges(3))
    settings = load_settings(environ={}, overrides={})
    spent = [epsilon_spent_at(store, settings, at) for at in (*moments, utc_now())]
    assert spent == pytest.approx([0.0, cost(1), cost(2), 0.0, cost(1)])


def test_the_lifetime_is_that_of_the_most_exposed_unit(store: Store) -> None:
    keeper = accountant(store)
    keeper.charge(charges(1, "a", "b"))
    keeper.reset_budget(ADMITS_TWO, WHY, "Ana")
    keeper.charge(charges(2, "b"))
    report = keeper.charge(charges(3, "c"))
    assert report.epsilon_spent == pytest.approx(cost(1))
    assert report.lifetime_epsilon == pytest.approx(cost(2))
    assert accountant(store).budget() == report


def test_a_smaller_budget_takes_effect_as_well(store: Store) -> None:
    keeper = accountant(store)
    keeper.reset_budget(cost(1) / 2, WHY, "Ana")
    with pytest.raises(BudgetExhaustedError):
        keeper.check(charges(1))


def test_a_period_granted_by_another_process_is_seen_inside_the_transaction(store: Store) -> None:
    keeper = accountant(store)
    for round_index in (1, 2):
        keeper.charge(charges(round_index))
    with Store.open(store.home) as other:
        other.budget.grant(cost(1) + 1e-6, WHY, "Ana")
    keeper.charge(charges(3))
    with Store.open(store.home) as other:
        other.budget.grant(1e-3, WHY, "Ana")
    with pytest.raises(BudgetExhaustedError):
        keeper.charge(charges(4))
    assert (keeper.budget().period, keeper.budget().target_epsilon) == (3, 1e-3)


def test_a_call_that_is_repeated_grants_once(store: Store) -> None:
    keeper = accountant(store)
    first = keeper.reset_budget(1.0, WHY, "Ana", call_key="k")
    keeper.charge(charges(1))
    assert keeper.reset_budget(1.0, WHY, "Ana", call_key="k").period_started_at == first.period_started_at
    assert keeper.budget().epsilon_spent > 0
    assert keeper.reset_budget(1.0, WHY, "Ana", call_key="l").period == 3
    assert [keeper.reset_budget(1.0, WHY, "Ana").period for _ in range(2)] == [4, 5]


def test_a_call_that_ray_repeats_on_a_new_actor_grants_once(store: Store) -> None:
    from actors.privacy_accountant import PrivacyAccountantActor

    text = settings_to_json(load_settings(environ={}, overrides={"home": store.home}))
    reports = [PrivacyAccountantActor(text).reset_budget(1.0, WHY, "Ana", "Bo", call_key="k") for _ in range(2)]
    assert reports[0] == reports[1]
    assert [period.approved_by for period in store.budget.periods()] == ["Bo"]


def test_many_threads_count_each_charge_once(store: Store) -> None:
    keeper, start = accountant(store, 100.0), threading.Barrier(6)

    def charge(unit: str) -> None:
        start.wait(WAIT_S)
        keeper.budget()
        keeper.charge(charges(1, unit))

    threads = [threading.Thread(target=charge, args=(f"u{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert keeper.budget() == accountant(store, 100.0).budget()
    assert keeper.budget().clients_charged == 6


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE budget_periods SET target_epsilon = 99",
        "UPDATE budget_periods SET ledger_sequence = 1",
        "UPDATE budget_periods SET justification = 'none'",
        "DELETE FROM budget_periods",
        "DELETE FROM meta WHERE key = 'budget_head'",
    ],
)
def test_a_period_that_was_changed_is_found(store: Store, statement: str) -> None:
    keeper = accountant(store)
    keeper.charge(charges(1))
    keeper.reset_budget(1.0, WHY, "Ana")
    assert store.ledger.verify() == 2
    tamper(store, statement)
    with pytest.raises(IntegrityError) as error:
        store.ledger.verify()
    assert "budget periods is broken at sequence 1" in str(error.value)


def test_no_budget_is_granted_over_a_ledger_with_its_end_cut_off(store: Store) -> None:
    keeper = accountant(store)
    keeper.charge(charges(1))
    tamper(store, "DELETE FROM privacy_ledger WHERE sequence = 2")
    with pytest.raises(IntegrityError):
        keeper.reset_budget(1.0, WHY, "Ana")
    assert store.budget.periods() == []


def test_the_stores_own_keys_stay_its_own(store: Store) -> None:
    for key in ("budget_requests", "budget_last_call", "budget_head", "ledger_copy"):
        with pytest.raises(ConflictError):
            store.metadata.set(key, None)


# --- a frozen ledger -------------------------------------------------------------------------------------------------


def test_while_the_ledger_is_frozen_nothing_remains_and_a_new_budget_does_not_lift_an_incident(store: Store) -> None:
    keeper, freeze = accountant(store), LedgerFreeze("PB-1", "images leaked", "token:a:Ana", utc_now())
    store.ledger.freeze(freeze)
    assert (keeper.budget().frozen, keeper.budget().epsilon_remaining) == (freeze, 0.0)
    with pytest.raises(LedgerFrozenError):
        keeper.check(charges(1))
    keeper.reset_budget(5.0, WHY, "Ana")
    with pytest.raises(LedgerFrozenError):
        keeper.charge(charges(1))
    store.ledger.unfreeze("PB-1")
    assert keeper.budget().epsilon_remaining == 5.0


# --- requests for a second person ------------------------------------------------------------------------------------


def test_a_request_waits_for_24_hours_and_is_taken_once(store: Store) -> None:
    now = utc_now()
    wish = store.budget.request(1.0, WHY, "Ana", now)
    assert wish.expires_at == now + timedelta(hours=24)
    assert len(wish.request_id) == 32
    assert store.budget.request(2.0, WHY, "Ana", now).request_id != wish.request_id
    with pytest.raises(NotFoundError):
        store.budget.approve("0" * 32, "Bo", now)
    assert store.budget.approve(wish.request_id, "Bo", now) == wish
    with pytest.raises(NotFoundError):
        store.budget.approve(wish.request_id, "Bo", now)
    late = store.budget.request(3.0, WHY, "Ana", now)
    with pytest.raises(NotFoundError):
        store.budget.approve(late.request_id, "Bo", late.expires_at)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("token:0a:Ana", "token:0b:Ana", True),
        ("token:0a:Ana Lund", "token:0b:ana  lund ", True),
        ("token:0a:Ana", "token:0a:Bo", False),
        ("token:0a:Ana", "oidc:Ana", False),
        ("oidc:ana@fleet", "oidc:ANA@fleet", True),
    ],
)
def test_who_approves_is_another_person_whatever_the_token(store: Store, one: str, other: str, same: bool) -> None:
    wish = store.budget.request(1.0, WHY, one, utc_now())
    if same:
        with pytest.raises(ForbiddenError):
            store.budget.approve(wish.request_id, other, utc_now())
    else:
        assert store.budget.approve(wish.request_id, other, utc_now()) == wish
