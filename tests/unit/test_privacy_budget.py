"""A new privacy budget: what it lets be spent, what it does not forget, who may grant it, and how it is asked for."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx import Response

from fedvit.access.tokens import create_token
from fedvit.api.justification import checked_justification
from fedvit.errors import (
    BudgetExhaustedError,
    ConflictError,
    ForbiddenError,
    IntegrityError,
    LedgerFrozenError,
    NotFoundError,
)
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant, epsilon_spent_at
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.settings import load_settings, settings_to_json
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import LedgerFreeze, utc_now
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
WHY = "The privacy officer approved one more run."
RESET = "/api/privacy/reset-budget"
WAIT_S = 20.0
JsonObject = dict[str, Any]


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
    with pytest.raises(BudgetExhaustedError, match=str(cost(1) + 1e-6)):
        keeper.charge(charges(4))
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
    reports = [PrivacyAccountantActor(text).reset_budget(1.0, WHY, "Ana", "Bo", "k") for _ in range(2)]
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
    with pytest.raises(IntegrityError, match="budget periods is broken at sequence 1"):
        store.ledger.verify()


def test_no_budget_is_granted_over_a_ledger_with_its_end_cut_off(store: Store) -> None:
    keeper = accountant(store)
    keeper.charge(charges(1))
    tamper(store, "DELETE FROM privacy_ledger WHERE sequence = 2")
    with pytest.raises(IntegrityError, match="sequence 2"):
        keeper.reset_budget(1.0, WHY, "Ana")
    assert store.budget.periods() == []


def test_the_stores_own_keys_stay_its_own(store: Store) -> None:
    for key in ("budget_requests", "budget_last_call", "budget_head", "ledger_copy"):
        with pytest.raises(ConflictError, match=key):
            store.metadata.set(key, None)


# --- a frozen ledger -------------------------------------------------------------------------------------------------


def test_while_the_ledger_is_frozen_nothing_remains_and_a_new_budget_does_not_lift_an_incident(store: Store) -> None:
    keeper, freeze = accountant(store), LedgerFreeze("PB-1", "images leaked", "token:a:Ana", utc_now())
    store.ledger.freeze(freeze)
    assert (keeper.budget().frozen, keeper.budget().epsilon_remaining) == (freeze, 0.0)
    with pytest.raises(LedgerFrozenError, match="PB-1"):
        keeper.check(charges(1))
    keeper.reset_budget(5.0, WHY, "Ana")
    with pytest.raises(LedgerFrozenError, match="stand-down"):
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
    with pytest.raises(NotFoundError, match="24 hours"):
        store.budget.approve(late.request_id, "Bo", late.expires_at)


# --- justifications --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "...",
        "." * 50,
        ". . . . . . . . . . . . . .",
        "-- -- -- -- -- -- -- -- --",
        "because I said so",
        "becauseIsaidsoandthatisenough",
        "two words--------------",
        "   short words here     ",
        "<your justification goes here, please>",
        "{put your own words in here}",
        "word " * 1000,
        "The officer\x00 approved it today.",
    ],
)
def test_a_text_that_says_nothing_is_no_justification(text: str) -> None:
    with pytest.raises(ValueError, match="say why"):
        checked_justification(text)


@pytest.mark.parametrize(
    "text",
    [WHY, "  Vorstandsbeschluss vom 3. März: Winterdaten\n", "隐私官 已经 批准 再进行一次完整的训练运行 谢谢大家"],
)
def test_a_text_of_substance_is_taken_without_the_space_around_it(text: str) -> None:
    assert checked_justification(text) == text.strip()


# --- the routes ------------------------------------------------------------------------------------------------------


class System:
    """A control API over a real store, ledger and training loop, and two admins; the budget admits two rounds."""

    def __init__(self, home: Path, **privacy: Any) -> None:
        overrides = {
            "home": home,
            "training": {"rounds": 4},
            "release": {"every_rounds": 2},
            "privacy": {"noise_multiplier": 4.0, "target_epsilon": ADMITS_TWO, **privacy},
        }
        settings = load_settings(environ={}, overrides=overrides)
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(3))
        self.accountant = PrivacyAccountant(self.store, settings)
        self.local = LocalAggregator(
            settings=settings,
            store=self.store,
            accountant=self.accountant,
            fleet=FakeFleet(TARGET),
            model=PointModel(TARGET),
        )
        services = Services(settings, self.store, lambda: self.local, lambda: self.accountant)
        self.http = TestClient(create_api(services), raise_server_exceptions=False)
        made = {name: create_token(self.store, name, [scope], now=utc_now()) for name, scope in SCOPES.items()}
        self.tokens = {name: token.text for name, token in made.items()}
        self.actors = {name: f"token:{token.token.token_id}:{name}" for name, token in made.items()}

    def close(self) -> None:
        self.local.close()
        self.store.close()

    def post(self, path: str, who: str | None, body: JsonObject | bytes | None = None) -> Response:
        headers = {} if who is None else {"Authorization": f"Bearer {self.tokens[who]}"}
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        return self.http.post(path, headers=headers, **content)  # type: ignore[arg-type]

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def train(self) -> JsonObject:
        self.http.post("/api/training/start")
        self.local.wait(WAIT_S)
        status: JsonObject = self.get("/api/training/status")
        return status


SCOPES = {"Ana": "admin", "Bo": "admin", "Olga": "operator", "Emil": "emergency"}


@pytest.fixture
def system(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path)
    yield system
    system.close()


@pytest.fixture
def careful(tmp_path: Path) -> Iterator[System]:
    system = System(tmp_path, require_second_approver=True)
    yield system
    system.close()


def body(new_epsilon: Any = 1.0, justification: str = WHY) -> JsonObject:
    return {"new_epsilon": new_epsilon, "justification": justification}


def test_a_run_that_the_budget_ended_goes_on_after_a_reset(system: System) -> None:
    exhausted = system.train()
    assert (exhausted["status"], exhausted["rounds_done"]) == ("budget_exhausted", 2)
    assert system.train()["rounds_done"] == 2
    answer = system.post(RESET, "Ana", body(ADMITS_TWO))
    assert answer.status_code == 200, answer.text
    view = answer.json()
    assert (view["period"], view["epsilon_spent"], view["epsilon_remaining"]) == (2, 0.0, ADMITS_TWO)
    assert (view["frozen"], view["lifetime_epsilon"]) == (None, pytest.approx(cost(2)))
    assert system.get("/api/privacy/budget") == view
    done = system.train()
    assert (done["run_id"], done["status"], done["rounds_done"]) == ("run-0001", "completed", 4)
    assert done["epsilon"] == pytest.approx(cost(2))
    # A version tells what its weights cost the data, whatever the budget's period.
    assert system.get("/api/model/current")["epsilon"] == pytest.approx(cost(4))
    assert len(system.store.ledger.entries()) == 4 * 3


def test_periods_are_listed_for_any_viewer(system: System) -> None:
    assert system.get("/api/privacy/periods") == []
    system.post(RESET, "Ana", body(1.5))
    system.post(RESET, "Bo", body(2.5))
    first, second = system.get("/api/privacy/periods")
    assert {**first, "at": None} == {
        "sequence": 1,
        "period": 2,
        "at": None,
        "target_epsilon": 1.5,
        "justification": WHY,
        "requested_by": system.actors["Ana"],
        "approved_by": None,
    }
    assert (second["sequence"], second["requested_by"]) == (2, system.actors["Bo"])
    assert second["at"] == system.get("/api/privacy/budget")["period_started_at"]


def test_a_reset_is_on_the_audit_trail_with_before_and_after(system: System) -> None:
    system.post(RESET, "Ana", body(1.5))
    (entry,) = system.store.audit.entries()
    assert (entry.facts.actor, entry.facts.status) == (system.actors["Ana"], 200)
    assert (entry.facts.before["target_epsilon"], entry.facts.after["target_epsilon"]) == (ADMITS_TWO, 1.5)
    assert entry.facts.params["body"]["justification"] == WHY


@pytest.mark.parametrize(("who", "status"), [(None, 401), ("Olga", 403), ("Emil", 403)])
def test_nobody_but_an_admin_with_a_token_grants_a_budget(system: System, who: str | None, status: int) -> None:
    assert system.post(RESET, who, body()).status_code == status
    assert system.post(f"{RESET}/{'0' * 32}/approve", who).status_code == status
    assert system.store.budget.periods() == []


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        (b'{"new_epsilon": 1.0, "justification": "..."}', "20 characters and 3 words"),
        (b'{"new_epsilon": 1.0}', "justification"),
        (b'{"justification": "The officer approved it today."}', "new_epsilon"),
        (b'{"new_epsilon": 0, "justification": "The officer approved it today."}', "greater than 0"),
        (b'{"new_epsilon": -1, "justification": "The officer approved it today."}', "greater than 0"),
        (b'{"new_epsilon": true, "justification": "The officer approved it today."}', "new_epsilon"),
        (b'{"new_epsilon": "1.0", "justification": "The officer approved it today."}', "new_epsilon"),
        (b'{"new_epsilon": 1, "justification": "The officer approved it today.", "force": true}', "force"),
    ],
)
def test_what_is_no_reset_is_refused_and_says_what_would_be(system: System, sent: bytes, named: str) -> None:
    answer = system.post(RESET, "Ana", sent)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert named in answer.json()["detail"]
    assert system.store.budget.periods() == []


@pytest.mark.parametrize(
    "sent",
    [
        b'{"new_epsilon": 1e999, "justification": "The officer approved it today."}',
        b'{"new_epsilon": NaN, "justification": "The officer approved it today."}',
        b'{"new_epsilon": 1, "justification": "The officer approved \\ud800 it today."}',
        b'{"new_epsilon": 1.0, "justification": ...}',
    ],
)
def test_what_is_no_json_grants_nothing(system: System, sent: bytes) -> None:
    assert system.post(RESET, "Ana", sent).status_code == 400
    assert system.store.budget.periods() == []


def test_an_idempotency_key_makes_a_repeated_reset_harmless(system: System) -> None:
    headers = {"Authorization": f"Bearer {system.tokens['Ana']}", "Idempotency-Key": "k"}
    answers = [system.http.post(RESET, headers=headers, json=body()) for _ in range(2)]
    assert answers[0].content == answers[1].content
    assert len(system.store.budget.periods()) == 1


def test_with_a_second_approver_a_reset_waits_for_another_admin(careful: System) -> None:
    asked = careful.post(RESET, "Ana", body(1.5))
    assert (asked.status_code, asked.json()["status"]) == (202, "awaiting_approval")
    assert careful.get("/api/privacy/budget")["period"] == 1
    approve = f"{RESET}/{asked.json()['request_id']}/approve"
    refused = careful.post(approve, "Ana")
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
    approved = careful.post(approve, "Bo")
    assert (approved.status_code, approved.json()["target_epsilon"], approved.json()["period"]) == (200, 1.5, 2)
    (period,) = careful.get("/api/privacy/periods")
    assert (period["requested_by"], period["approved_by"]) == (careful.actors["Ana"], careful.actors["Bo"])
    assert careful.post(approve, "Bo").status_code == 404
    assert careful.get("/api/privacy/budget")["period"] == 2


def test_a_second_approver_does_not_make_another_run_of_the_same_training() -> None:
    alone, together = (
        load_settings(environ={}, overrides={"privacy": {"require_second_approver": wanted}})
        for wanted in (False, True)
    )
    assert alone.training_digest() == together.training_digest()
    # Not even the name of the setting: runs from before there was one must go on.
    assert set(alone.training_identity()["privacy"]) == {
        "privacy_unit",
        "target_epsilon",
        "target_delta",
        "noise_multiplier",
        "sampling_prob",
        "l2_clip_norm",
    }
    assert set(alone.training_identity()["training"]["cohort"]) == {
        "selection",
        "size",
        "min_clients",
        "client_selection",
    }


def test_what_protects_clients_makes_another_run() -> None:
    cohort = {"selection": "poisson", "sampling_prob": 0.5}
    digests = {
        load_settings(
            environ={}, overrides={"training": {"cohort": cohort}, "privacy": {"privacy_unit": "client", **privacy}}
        ).training_digest()
        for privacy in ({}, {"adaptive_clip": {}}, {"adaptive_clip": {"target_quantile": 0.4}}, {"l2_clip_norm": 2.0})
    }
    assert len(digests) == 4


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
        with pytest.raises(ForbiddenError, match="Who asked"):
            store.budget.approve(wish.request_id, other, utc_now())
    else:
        assert store.budget.approve(wish.request_id, other, utc_now()) == wish


def test_a_second_token_of_the_same_person_approves_nothing(careful: System) -> None:
    second = create_token(careful.store, "Ana", ["admin"], now=utc_now()).text
    asked = careful.post(RESET, "Ana", body(1.5))
    approve = f"{RESET}/{asked.json()['request_id']}/approve"
    assert careful.http.post(approve, headers={"Authorization": f"Bearer {second}"}).status_code == 403
    assert careful.store.budget.periods() == []
    assert careful.post(approve, "Bo").status_code == 200
