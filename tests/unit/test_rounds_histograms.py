"""Histograms in the training loop: charged before they are asked for, only where the budget bears them, kept once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fedvit.config import Settings
from fedvit.errors import ConfigError
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.privacy.accountant import PrivacyAccountant
from fedvit.privacy.epsilon import epsilon_pld
from fedvit.privacy.events import Gaussian, event_from_json
from fedvit.privacy.round_cost import histogram_is_due, histogram_spend, round_noise_multiplier, run_spend
from fedvit.rounds import data_health
from fedvit.rounds.coordinator import Coordinator
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, PointModel, seeded_fleet
from fedvit.types import Evaluation, Run, RunStatus, Weights
from fedvit.updates import ClientUpdate
from fedvit.wire.histograms import ClientHistogram, HistogramRequest, HistogramSpec
from serve_apps.control.api import Services, create_api

TARGET = np.array([1.0, -2.0], dtype=np.float32)
SPEC = HistogramSpec({"brightness": (1.0, 2.0, 3.0)}, 2)
CLIENTS = 8
WAIT_S = 20.0


def settings(home: Path, *, rounds: int = 6, epsilon: float = 50.0, **more: Any) -> Settings:
    return load_settings(
        environ={},
        overrides={
            "home": home,
            "training": {"rounds": rounds},
            "privacy": {"noise_multiplier": 4.0, "sampling_prob": 0.5, "target_epsilon": epsilon},
            "release": {"every_rounds": 2},
            "histograms": {"every_rounds": 2, "noise_multiplier": 8.0},
        }
        | more,
    )


class Loop:
    """A coordinator whose clients histogram, over a real store and a real ledger."""

    def __init__(self, config: Settings, fleet: FakeFleet | None = None) -> None:
        self.store = Store.open(config.home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=["near", "far"])
        self.store.clients.register(replace(c, num_examples=400) for c in seeded_fleet(CLIENTS))
        self.fleet = fleet or FakeFleet(TARGET)
        self.model = PointModel(TARGET)
        self.model.spec = SPEC
        self.settings, self.health = config, list[tuple[float | None, float | None]]()
        self.accountant = PrivacyAccountant(self.store, config)

    def run(self) -> Run:
        loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=self.fleet,
            model=self.model,
            on_health=lambda quality, drift: self.health.append((quality, drift)),
        )
        return loop.run()

    def histogram_charges(self) -> list[tuple[int, str]]:
        charges = [entry.charge for entry in self.store.ledger.entries()]
        return [
            (charge.round_index, charge.unit_id)
            for charge in charges
            if charge.event is not None and event_from_json(charge.event) == Gaussian(8.0)
        ]


def counting(order: HistogramRequest, client_id: str, records: int = 400, bright: float = 0.25) -> tuple[int, ...]:
    """A histogram without noise: everybody's brightness is even, or ``bright`` of it in the last bin."""
    rest = round(records * (1 - bright) / 3)
    half = records // 2
    return (rest, rest, rest, records - 3 * rest, half, records - half, records, 0, 0, 0)


def test_every_histogram_is_charged_before_it_is_asked_for_and_kept(tmp_path: Path) -> None:
    loop = Loop(settings(tmp_path))
    loop.fleet.counts_of = counting
    asked: list[bool] = []
    ask = loop.fleet.request_histograms

    def watched(order: HistogramRequest, client_ids: Any) -> None:
        sizes = loop.store.clients.num_examples(client_ids)
        releases = [(order.run_id, order.round_index, c, order.output_id(c, sizes[c])) for c in client_ids]
        asked.append(all(loop.store.ledger.is_charged(*release) for release in releases))
        ask(order, client_ids)

    loop.fleet.request_histograms = watched  # type: ignore[method-assign]
    assert loop.run().status is RunStatus.COMPLETED
    assert asked == [True] * 3
    assert loop.histogram_charges() == [(r, f"vehicle-{i:04d}") for r in (1, 3, 5) for i in range(CLIENTS)]
    kept = loop.store.histograms.latest()
    assert {histogram.round_index for histogram in kept.values()} == {5}
    assert loop.store.histograms.spec(SPEC.digest) == SPEC
    assert kept["vehicle-0003"].deviation == 8.0 * SPEC.sensitivity("record")


def test_a_histogram_out_of_bounds_is_left_out_and_a_fault_of_the_statistics_ends_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hostile(order: HistogramRequest, client_id: str) -> tuple[int, ...]:
        return (10**400,) * order.spec.cells if client_id == "vehicle-0000" else counting(order, client_id)

    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    loop = Loop(settings(tmp_path))
    loop.fleet.counts_of = hostile
    monkeypatch.setattr("fedvit.rounds.data_health.doubts", faulty)
    assert loop.run().status is RunStatus.COMPLETED
    assert "vehicle-0000" not in loop.store.histograms.latest()
    assert len(loop.store.histograms.latest()) == CLIENTS - 1
    assert any(record.exc_info for record in caplog.records)


def test_votes_stay_the_references_while_the_model_errs_in_the_same_classes(tmp_path: Path) -> None:
    loop = Loop(settings(tmp_path))
    loop.fleet.counts_of = counting
    evaluate = loop.model.evaluate
    # Right in near and wrong in far; much the same at the next histogram; and the other way round at the one after it.
    first, alike, other = ((8, 0), (8, 0)), ((6, 2), (7, 1)), ((1, 7), (1, 7))

    def shown(weights: Weights) -> Evaluation:
        asked = len(loop.fleet.histogram_requests)
        return replace(evaluate(weights), confusion=(first, alike, other, other)[asked])

    loop.model.evaluate = shown  # type: ignore[method-assign]
    loop.run()
    votes = {order.round_index: order.spec.risk_votes for order, _ in loop.fleet.histogram_requests}
    assert votes == {1: (-4, 4), 3: (-4, 4), 5: (3, -3)}
    assert data_health.histograms(loop.store).spec == SPEC.with_risks(other)
    assert loop.store.histograms.latest().keys() == {f"vehicle-{i:04d}" for i in range(CLIENTS)}


def test_a_round_that_is_tried_again_charges_and_keeps_a_histogram_once(tmp_path: Path) -> None:
    loop = Loop(settings(tmp_path), FakeFleet(TARGET, crash_in_round=3))
    loop.fleet.counts_of = counting
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert loop.run().status is RunStatus.COMPLETED
    assert [order.round_index for order, _ in loop.fleet.histogram_requests] == [1, 3, 3, 5]
    assert len(loop.histogram_charges()) == len(set(loop.histogram_charges())) == 3 * CLIENTS
    (order, _) = loop.fleet.histogram_requests[0]
    again = ClientHistogram("vehicle-0000", "run-0001", 5, 400, SPEC.digest, order.deviation, (7,) * SPEC.cells)
    assert loop.store.histograms.add([again], SPEC) == 0
    assert loop.store.histograms.latest()["vehicle-0000"].counts == counting(order, "vehicle-0000")


def test_a_client_whose_budget_the_rest_of_the_run_needs_is_not_asked(tmp_path: Path) -> None:
    config = settings(tmp_path)
    # What all six rounds cost, and not a histogram beside them.
    enough = epsilon_pld({event: n for event, n in run_spend(config).items() if event != Gaussian(8.0)}, 1e-5)
    loop = Loop(settings(tmp_path, epsilon=enough + 1e-3))
    assert loop.run().status is RunStatus.COMPLETED
    assert (loop.fleet.histogram_requests, loop.histogram_charges()) == ([], [])
    one = Loop(settings(tmp_path / "one", epsilon=epsilon_pld(run_spend(config), 1e-5) + 1e-3))
    assert one.run().status is RunStatus.COMPLETED
    assert len(one.histogram_charges()) == 3 * CLIENTS


def test_nobody_is_asked_where_there_is_nothing_to_count_or_the_setting_says_so(tmp_path: Path) -> None:
    blind = Loop(settings(tmp_path / "blind"))
    blind.model.spec = None
    off = Loop(settings(tmp_path / "off", histograms={"every_rounds": None}))
    for loop in (blind, off):
        assert loop.run().status is RunStatus.COMPLETED
        assert (loop.fleet.histogram_requests, loop.histogram_charges()) == ([], [])


def test_a_secret_sample_is_not_asked_for_histograms(tmp_path: Path) -> None:
    cohort = {"selection": "poisson", "sampling_prob": 0.5}
    privacy = {"privacy_unit": "client", "noise_multiplier": 4.0}
    secret = settings(tmp_path, privacy=privacy, training={"rounds": 6, "cohort": cohort})
    assert not any(histogram_is_due(secret, round_index) for round_index in range(1, 7))
    assert histogram_spend(secret) == {}
    assert [r for r in range(1, 7) if histogram_is_due(settings(tmp_path), r)] == [1, 3, 5]


def test_the_noise_of_the_rounds_leaves_the_histograms_room_in_the_budget() -> None:
    privacy = {"target_epsilon": 4.0, "sampling_prob": 0.5}
    base = {"training": {"rounds": 4}, "privacy": privacy}
    with_them = load_settings(
        environ={}, overrides={**base, "histograms": {"every_rounds": 2, "noise_multiplier": 8.0}}
    )
    without = load_settings(environ={}, overrides={**base, "histograms": {"every_rounds": None}})
    assert histogram_spend(with_them) == {Gaussian(8.0): 2}
    assert round_noise_multiplier(with_them) > round_noise_multiplier(without)
    assert epsilon_pld(run_spend(with_them), 1e-5) <= 4.0
    greedy = load_settings(environ={}, overrides={**base, "histograms": {"every_rounds": 1, "noise_multiplier": 1.0}})
    with pytest.raises(ConfigError):
        round_noise_multiplier(greedy)


def misbehaving(norm: float, alignment: float) -> Callable[[ClientUpdate], ClientUpdate]:
    def tamper(own: ClientUpdate) -> ClientUpdate:
        return replace(own, outcome=replace(own.outcome, update_norm=norm, alignment=alignment))

    return tamper


@pytest.fixture
def poisoned(tmp_path: Path) -> Loop:
    loop = Loop(settings(tmp_path, rounds=8, training={"rounds": 8}))
    for i in range(CLIENTS):
        loop.fleet.tamper[f"vehicle-{i:04d}"] = misbehaving(0.7, 0.4)
    loop.fleet.tamper["vehicle-0001"] = misbehaving(6.5, 0.0)
    loop.fleet.tamper["vehicle-0002"] = misbehaving(0.7, -2.5)
    loop.fleet.tamper["vehicle-0004"] = misbehaving(6.5, -2.5)
    return loop


def test_validated_follows_from_what_was_seen_and_a_restart_leaves_the_liars_out(poisoned: Loop) -> None:
    store = poisoned.store
    http_verdict = {"validated": True, "reason": "I drove it myself."}
    local = LocalAggregator(
        settings=poisoned.settings,
        store=store,
        accountant=poisoned.accountant,
        fleet=poisoned.fleet,
        model=poisoned.model,
        on_health=lambda quality, drift: poisoned.health.append((quality, drift)),
    )
    http = TestClient(create_api(Services(poisoned.settings, store, lambda: local, lambda: poisoned.accountant)))
    assert http.post("/api/clients/vehicle-0004/validate", json=http_verdict).status_code == 200
    local.resume()
    http.post("/api/training/start")
    local.wait(WAIT_S)
    result = http.get("/api/clients/data-quality").json()
    assert result["unvalidated"] == ["vehicle-0001", "vehicle-0002"]
    reasons = {c["client_id"]: " ".join(c["reasons"]) for c in result["clients"]}
    assert "6.5 times as long" in reasons["vehicle-0001"]
    assert "contradict" in reasons["vehicle-0002"]
    # An operator's word stands, whatever is seen; that it is seen is said all the same.
    assert "6.5 times as long" in reasons["vehicle-0004"]
    assert result["score"] < 0.7
    quality, _ = poisoned.health[-1]
    assert quality == pytest.approx(result["score"])
    client = http.get("/api/clients/vehicle-0001").json()
    validated = next(c for c in client["conditions"] if c["type"] == "Validated")
    assert (validated["status"], validated["reason"]) == ("False", "ByQuality")
    answer = http.post("/api/training/restart", json={"client_selection": "validated_only"})
    local.wait_operation(answer.json()["operation_id"], WAIT_S)
    local.wait(WAIT_S)
    cohorts = {r.cohort for r in store.rounds.of_run("run-0002")}
    assert [set(cohort) & {"vehicle-0001", "vehicle-0002"} for cohort in cohorts] == [set()]
    local.close()


def test_who_behaves_again_is_validated_again_but_not_against_an_operator(poisoned: Loop) -> None:
    poisoned.run()
    store = poisoned.store
    assert [c.client_id for c in store.clients.all() if not c.validated] == [
        "vehicle-0001",
        "vehicle-0002",
        "vehicle-0004",
    ]
    http = TestClient(create_api(Services(poisoned.settings, store, _nobody, _nobody)))
    http.post("/api/clients/vehicle-0004/validate", json={"validated": False, "reason": "Scrapped."})
    for client_id in ("vehicle-0001", "vehicle-0004"):
        poisoned.fleet.tamper[client_id] = misbehaving(0.7, 0.4)
    # Another run: only the rounds of one run are judged together.
    poisoned.settings = settings(poisoned.settings.home, training={"rounds": 12}, model={"seed": 1})
    poisoned.run()
    assert [c.client_id for c in store.clients.all() if not c.validated] == ["vehicle-0002", "vehicle-0004"]


def _nobody() -> Any:
    raise AssertionError("an actor was asked")


def test_drift_since_the_release_is_told_with_where_it_is(tmp_path: Path) -> None:
    histograms = {"every_rounds": 2, "noise_multiplier": 3.0}
    loop = Loop(settings(tmp_path, training={"rounds": 2}, histograms=histograms), FakeFleet(TARGET, crash_in_round=4))
    dark = {"vehicle-0005", "vehicle-0006"}

    def counts(order: HistogramRequest, client_id: str) -> tuple[int, ...]:
        moved = client_id in dark and (order.run_id, order.round_index) == ("run-0002", 3)
        return counting(order, client_id, bright=0.95 if moved else 0.25)

    loop.fleet.counts_of = counts
    http = TestClient(create_api(Services(loop.settings, loop.store, _nobody, lambda: loop.accountant)))
    loop.run()
    before = http.get("/api/monitoring/data-drift").json()
    assert (before["compared"], before["drifting_clients"], before["reference_version"]) == (0, {}, "v1.1.2")
    assert "8 have sent one" in next(s["reason"] for s in before["signals"] if s["name"] == "histograms")
    # Another run, whose first window is the reference's and whose second is not; nothing is released meanwhile.
    loop.settings = settings(tmp_path, model={"seed": 1}, release={"every_rounds": 1000}, histograms=histograms)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    result = http.get("/api/monitoring/data-drift").json()
    assert (result["compared"], result["reference_version"], result["drifting"]) == (CLIENTS, "v1.1.2", True)
    assert result["drifting_clients"] == {client_id: ["brightness"] for client_id in sorted(dark)}
    signals = {signal["name"]: signal for signal in result["signals"]}
    assert "2 of 8 clients: vehicle-0005, vehicle-0006" in signals["histogram_brightness"]["reason"]
    assert (signals["histogram_label"]["score"] < 0.5, signals["histogram_brightness"]["score"]) == (True, 1.0)
    assert [f["feature"] for f in result["features"]] == ["brightness", "label", "records"]
    quality = {c["client_id"]: c for c in http.get("/api/clients/data-quality").json()["clients"]}
    assert "moved since the release: brightness" in " ".join(quality["vehicle-0005"]["reasons"])
    assert quality["vehicle-0004"]["score"] > quality["vehicle-0005"]["score"]
    assert loop.health[-1][1] == 1.0
