"""Budget resets through the API: justifications, scopes, audit, idempotency, and a second approver."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx import Response

from fedvit.access.tokens import create_token
from fedvit.api.justification import checked_justification
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import PoissonGaussian, epsilon_pld
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import utc_now
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
    with pytest.raises(ValueError):
        checked_justification(text)


@pytest.mark.parametrize(
    "text",
    [WHY, "  Vorstandsbeschluss vom 3. März: Winterdaten\n", "隐私官 已经 批准 再进行一次完整的训练运行 谢谢大家"],
)
def test_a_text_of_substance_is_taken_without_the_space_around_it(text: str) -> None:
    assert checked_justification(text) == text.strip()


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
        created = {name: create_token(self.store, name, [scope], now=utc_now()) for name, scope in SCOPES.items()}
        self.tokens = {name: token.text for name, token in created.items()}
        self.actors = {name: f"token:{token.token.token_id}:{name}" for name, token in created.items()}

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


def test_a_second_token_of_the_same_person_approves_nothing(careful: System) -> None:
    second = create_token(careful.store, "Ana", ["admin"], now=utc_now()).text
    asked = careful.post(RESET, "Ana", body(1.5))
    approve = f"{RESET}/{asked.json()['request_id']}/approve"
    assert careful.http.post(approve, headers={"Authorization": f"Bearer {second}"}).status_code == 403
    assert careful.store.budget.periods() == []
    assert careful.post(approve, "Bo").status_code == 200
