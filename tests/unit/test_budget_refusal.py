"""A budget for exactly R rounds: the run ends after exactly R, and API, metric and ledger tell the same of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from fedvit.config import Settings
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.ports import Charge
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Event, Gaussian, PoissonGaussian
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
WAIT_S = 20.0
ROUNDS, ADMITTED = 7, 3
REMAINING, SPENT = "fed_vit_autorl_privacy_epsilon_remaining", "fed_vit_autorl_privacy_epsilon_spent"

RECORD: dict[str, Any] = {"privacy": {"noise_multiplier": 4.0, "sampling_prob": 0.5}, "training": {"rounds": ROUNDS}}
POISSON: dict[str, Any] = {
    "privacy": {"privacy_unit": "client", "noise_multiplier": 4.0},
    "training": {"rounds": ROUNDS, "cohort": {"selection": "poisson", "sampling_prob": 0.5}},
}
CAPPED: dict[str, Any] = {
    "privacy": {"privacy_unit": "client", "noise_multiplier": 4.0},
    "training": {"rounds": ROUNDS, "cohort": {"selection": "all", "max_participations": ROUNDS}},
}
KINDS: list[tuple[dict[str, Any], Event]] = [
    (RECORD, PoissonGaussian(4.0, 0.5)),
    (POISSON, PoissonGaussian(4.0, 0.5)),
    (CAPPED, Gaussian(4.0)),
]


class Served:
    """The control API over a real loop, ledger and accountant."""

    def __init__(self, home: Path, overrides: dict[str, Any], target_epsilon: float) -> None:
        privacy = {**overrides["privacy"], "target_epsilon": target_epsilon}
        self.settings: Settings = load_settings(environ={}, overrides={**overrides, "privacy": privacy, "home": home})
        self.store = Store.open(home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near"])
        self.store.clients.register(seeded_fleet(5))
        self.accountant = PrivacyAccountant(self.store, self.settings)
        self.local = LocalAggregator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=FakeFleet(TARGET),
            model=PointModel(TARGET),
        )
        services = Services(
            self.settings, self.store, aggregator=lambda: self.local, accountant=lambda: self.accountant
        )
        self.http = TestClient(create_api(services))

    def close(self) -> None:
        self.local.close()
        self.store.close()

    def train(self) -> dict[str, Any]:
        self.http.post("/api/training/start")
        self.local.wait(WAIT_S)
        response: dict[str, Any] = self.http.get("/api/training/status").json()
        return response

    def budget(self) -> dict[str, Any]:
        response: dict[str, Any] = self.http.get("/api/privacy/budget").json()
        return response

    def metric(self, name: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        unit = self.settings.privacy.privacy_unit
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        (value,) = [sample.value for sample in samples if sample.labels["privacy_unit"] == unit]
        return value


@pytest.mark.parametrize(("overrides", "a_round"), KINDS, ids=["record", "client-poisson", "client-capped"])
def test_a_budget_for_r_rounds_ends_the_run_after_exactly_r(
    tmp_path: Path, overrides: dict[str, Any], a_round: Event
) -> None:
    budget = epsilon_pld({a_round: ADMITTED}, 1e-5) + 1e-6
    served = Served(tmp_path, overrides, budget)
    try:
        before = served.budget()
        assert before["rounds_left"] == ADMITTED
        assert before["next_round_epsilon"] == epsilon_pld({a_round: 1}, 1e-5)
        ended = served.train()
        assert (ended["status"], ended["rounds_done"], ended["phase"]) == ("budget_exhausted", ADMITTED, "resting")
        assert "above the budget" in ended["message"]
        spent = epsilon_pld({a_round: ADMITTED}, 1e-5)
        response = served.budget()
        assert response["epsilon_spent"] == served.metric(SPENT) == spent
        assert response["epsilon_remaining"] == served.metric(REMAINING) == budget - spent
        assert response["rounds_left"] == 0
        assert response["next_round_epsilon"] == epsilon_pld({a_round: ADMITTED + 1}, 1e-5) > budget
        # The ledger, read by somebody who knows nothing of all this.
        with Store.open(tmp_path) as store:
            assert len({e.charge.round_index for e in store.ledger.entries()}) == ADMITTED
            assert PrivacyAccountant(store, served.settings).budget().epsilon_spent == pytest.approx(spent, abs=1e-9)
        # Asked again, it stays where it is, and charges nothing.
        assert served.train()["rounds_done"] == ADMITTED
        assert served.budget() == response
    finally:
        served.close()


def test_a_client_without_budget_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    a_round = PoissonGaussian(4.0, 0.5)
    served = Served(tmp_path, RECORD, epsilon_pld({a_round: ADMITTED}, 1e-5) + 1e-6)
    try:
        earlier = Charge("an-earlier-run", 1, "vehicle-0002", "e" * 64, 4.0, 0.5, ADMITTED)
        served.accountant.charge([earlier])
        ended = served.train()
        assert (ended["status"], ended["rounds_done"]) == ("budget_exhausted", ADMITTED)
        charged = Counter(e.charge.unit_id for e in served.store.ledger.entries() if e.charge.run_id != earlier.run_id)
        assert charged == {f"vehicle-000{i}": ADMITTED for i in (0, 1, 3, 4)}
    finally:
        served.close()


def test_the_metric_follows_a_reset_though_nothing_trains(tmp_path: Path) -> None:
    a_round = PoissonGaussian(4.0, 0.5)
    served = Served(tmp_path, RECORD, epsilon_pld({a_round: ADMITTED}, 1e-5) + 1e-6)
    try:
        served.train()
        assert served.metric(REMAINING) < 1e-5
        served.accountant.reset_budget(2.5, "The officer approved it today.", "token:a:Ana")
        assert served.metric(REMAINING) == served.budget()["epsilon_remaining"] == 2.5
        assert served.metric(SPENT) == 0.0
        assert served.budget()["rounds_left"] > 0
    finally:
        served.close()


def test_the_outlook_is_not_made_up_where_no_round_has_a_price(tmp_path: Path) -> None:
    served = Served(tmp_path, {"privacy": {}, "training": {"rounds": 4}}, 8.0)
    try:
        response = served.budget()
        assert (response["next_round_epsilon"], response["rounds_left"]) == (None, None)
    finally:
        served.close()


def test_asynchronous_rounds_are_refused_where_cohorts_are_poisson_samples(tmp_path: Path) -> None:
    served = Served(tmp_path, POISSON, 8.0)
    try:
        answer = served.http.post("/api/aggregation/mode", json={"mode": "asynchronous"})
        assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
        assert served.http.post("/api/aggregation/mode", json={"mode": "synchronous"}).status_code == 200
    finally:
        served.close()


def test_history_tells_of_everybody_and_of_what_was_done(tmp_path: Path) -> None:
    one_round = {**POISSON, "training": {**POISSON["training"], "rounds": 1}}
    served = Served(tmp_path, one_round, 8.0)
    try:
        served.train()
        line = served.http.get("/api/privacy/history").json()[0]
        assert (line["client_id"], line["privacy_unit"], line["sampling_prob"]) == ("*", "client", 0.5)
        assert line["event"] == {"kind": "poisson_gaussian", "noise_multiplier": 4.0, "sampling_prob": 0.5}
    finally:
        served.close()
