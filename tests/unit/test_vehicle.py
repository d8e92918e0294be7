"""The vehicle's own trainer against the real API, store and loop: what leaves it, and what keeps it from leaving."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from control_client import URL, Through
from fastapi.testclient import TestClient
from PIL import Image

from edge_runtime.mailbox import MailboxSender
from edge_runtime.training.policy import VehiclePolicy
from edge_runtime.training.records import OwnRecords, count_images
from edge_runtime.training.vehicle import PollResult, Vehicle
from fedvit.aggregation.validation import UpdateValidator
from fedvit.api.clients import HistogramRequestView
from fedvit.client import FedvitClient
from fedvit.clients.client_state import ClientState
from fedvit.clients.update_encoder import UpdateEncoder
from fedvit.errors import ControlUnreachableError, DataError
from fedvit.evaluation.server_model import ServerModel
from fedvit.operations.mailbox import Mailbox
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.fleets import MixedFleet
from fedvit.rounds.remote import FROZEN_DIGEST
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, ManualClock
from fedvit.types import ClientOutcome, Encoding, Run, RunStatus, TrainTask, utc_now
from fedvit.updates import ClientUpdate
from fedvit.wire.folders import open_folder
from serve_apps.control.api import Services, create_api

torch.set_num_threads(1)

CLASSES = ("green", "red")
TRUCK = "truck-7"


def images(folder: Path, count: int, names: tuple[str, ...] = CLASSES, *, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


class Road:
    """A server that trains, and one truck with eight images of its own."""

    def __init__(self, folder: Path, *, rounds: int = 1, training: dict[str, Any] | None = None, **truck: Any) -> None:
        images(folder / "server/train", 2)
        images(folder / "server/test", 1, seed=1)
        self.data = images(folder / "truck/train", 4, seed=2)
        self.settings = load_settings(
            environ={},
            overrides={
                "home": folder / "home",
                "data": {"source": "folder", "path": folder / "server", "image_size": 32},
                "model": {"pretrained": False, "trainable": "head", "hybrid": {"depth": 1, "width": 16, "heads": 2}},
                "training": {"rounds": rounds, **(training or {})},
                "privacy": {"noise_multiplier": 4.0},
                "release": {"every_rounds": 1000, "max_accuracy_drop": 1.0},
            },
        )
        self.store = Store.open(self.settings.home)
        self.store.metadata.bind_fleet(data_digest="d" * 64, partition={"scheme": "iid"}, classes=CLASSES)

        def unavailable() -> NoReturn:
            raise AssertionError("an actor was asked")

        self.way = Through(TestClient(create_api(Services(self.settings, self.store, unavailable, unavailable))))
        self.home = folder / "truck-home"
        self.client = FedvitClient(URL, transport=self.way, sleep=lambda _: None)
        self.vehicle = Vehicle(self.client, TRUCK, self.data, self.home, **truck)
        self.steps: list[PollResult] = []
        self.clock = ManualClock()
        self.act: Callable[[], object] = self.drive
        self.loop = Coordinator(
            settings=self.settings,
            store=self.store,
            accountant=GenerousAccountant(self.store),
            fleet=MixedFleet(
                self.settings,
                self.store,
                FakeFleet(np.zeros(2, np.float32)),
                clock=self.clock,
                pause=self._pause,
            ),
            model=ServerModel(self.settings),
        )

    def drive(self) -> None:
        self.steps.append(self.vehicle.poll())

    def _pause(self, _: float) -> None:
        self.clock.advance(250)
        self.act()

    def run(self) -> Run:
        self.vehicle.register()
        self.store.clients.set_last_seen({TRUCK: utc_now()})
        return self.loop.run()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Road]]:
    roads: list[Road] = []

    def build(**more: Any) -> Road:
        roads.append(Road(tmp_path, **more))
        return roads[-1]

    yield build
    for road in roads:
        road.vehicle.close()
        road.store.close()


def test_a_vehicle_trains_on_its_own_disk_and_both_ledgers_know(make: Callable[..., Road]) -> None:
    road = make(rounds=2, training={"compression": {"encodings": ["int8"]}})
    assert road.run().status is RunStatus.COMPLETED
    assert [(step.round_index, step.status) for step in road.steps] == [(1, "received"), (2, "received")]
    versions = [road.store.versions.get(f"v1.1.{n}") for n in (1, 2)]
    assert [v.lineage["clients"] for v in versions] == [[TRUCK]] * 2
    assert [v.lineage["sent"][TRUCK]["encoding"] for v in versions] == ["int8"] * 2
    assert len({v.weights_digest for v in versions}) == 2
    with Store.open(road.home) as own:
        charges = [[entry.charge for entry in store.ledger.entries()] for store in (own, road.store)]
    assert charges[0] == charges[1]
    kinds = [(charge.round_index, "gaussian" in str(charge.event)) for charge in charges[0]]
    assert kinds == [(1, False), (1, True), (2, False)]
    keys = [(home / "keys" / "root.key").read_bytes() for home in (road.home, road.settings.home)]
    assert keys[0] != keys[1]


def test_a_vehicle_sends_its_histogram_once_and_only_what_both_ledgers_hold(make: Callable[..., Road]) -> None:
    road = make(rounds=2)
    asked: list[HistogramRequestView | None] = []

    def act() -> None:
        asked.append(road.client.clients.task(TRUCK).histogram)
        road.drive()

    road.act = act
    assert road.run().status is RunStatus.COMPLETED
    assert [order is not None for order in asked] == [True, False]
    assert asked[0] is not None
    (histogram,) = road.store.histograms.latest().values()
    assert (histogram.client_id, histogram.round_index, histogram.num_examples) == (TRUCK, 1, 8)
    spec = road.store.histograms.spec(histogram.spec_digest)
    assert spec is not None
    assert len(histogram.counts) == spec.cells
    assert histogram.deviation == 5.25 * spec.sensitivity("record")
    with Store.open(road.home) as own:
        assert own.ledger.is_charged("run-0001", 1, TRUCK, asked[0].output_id)
    # Repeated, or brought for a round that asked for none, it changes nothing.
    for counts in (histogram.counts, (0,) * spec.cells):
        assert not road.client.clients.histogram(TRUCK, "run-0001", 1, counts).kept
    assert road.store.histograms.latest() == {TRUCK: histogram}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise_multiplier": 0.1}, "noise multiplier of 0.1"),
        ({"privacy_unit": "client"}, "histograms records"),
        ({"round_index": 2}, "not the one that was charged"),
    ],
)
def test_a_histogram_other_than_the_charged_one_is_not_sent(
    make: Callable[..., Road], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], words: str, caplog: Any
) -> None:
    road = make()
    honest = road.client.clients.task

    def task(client_id: str) -> Any:
        response = honest(client_id)
        if response.histogram is None:
            return response
        order = response.histogram.order.model_copy(update=change)
        return response.model_copy(update={"histogram": response.histogram.model_copy(update={"order": order})})

    monkeypatch.setattr(road.client.clients, "task", task)
    assert road.run().status is RunStatus.COMPLETED
    assert words in caplog.text
    assert road.store.histograms.latest() == {}
    with Store.open(road.home) as own:
        assert len(own.ledger.entries()) == 1


def test_a_vehicle_that_begins_again_makes_the_same_bytes_of_a_task(make: Callable[..., Road]) -> None:
    road = make()

    def act() -> None:
        task = road.client.clients.task(TRUCK).task
        assert task is not None
        again = Vehicle(road.client, TRUCK, road.data, road.home)
        first = again.answer(task)
        again.close()
        road.drive()
        assert (road.settings.home / "remote" / TRUCK / "run-0001.00000001.safetensors").read_bytes() == first

    road.act = act
    assert road.run().status is RunStatus.COMPLETED
    # The update, and the histogram that the first round of a run asks for.
    assert len(road.store.ledger.entries()) == 2
    with Store.open(road.home) as own:
        assert len(own.ledger.entries()) == 2


def refused(road: Road) -> str:
    """Why the round got nothing from the truck."""
    assert road.run().status is RunStatus.FAILED
    reason = str(road.store.runs.latest().reason)  # type: ignore[union-attr]
    assert "0 updates (1 clients failed, the first with: " in reason
    return reason


def test_the_owners_budget_ends_it_whatever_the_server_charges(make: Callable[..., Road]) -> None:
    road = make(policy=VehiclePolicy(max_epsilon=0.01))
    assert "budget" in refused(road)
    with Store.open(road.home) as own:
        assert own.ledger.entries() == []


def test_images_that_were_not_charged_are_not_trained_on(make: Callable[..., Road]) -> None:
    road = make()

    def act() -> None:
        images(road.data, 5, seed=3)
        road.drive()

    road.act = act
    assert "This vehicle holds 10 images, and was asked for 8." in refused(road)


def test_another_frozen_part_is_noticed(make: Callable[..., Road]) -> None:
    road = make()

    def act() -> None:
        road.store.metadata.set(FROZEN_DIGEST, "0" * 64)
        road.drive()

    road.act = act
    assert "frozen weights that came with the task were not charged" in refused(road)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        ({"noise_multiplier": 0.5}, "not the one that was charged"),
        ({"local_steps": 50}, "not of the run whose settings came with it"),
        ({"privacy_unit": "client"}, "nothing without noise of its own"),
    ],
)
def test_a_task_that_lies_gets_no_answer(
    make: Callable[..., Road], monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any], words: str
) -> None:
    road = make()
    true = road.client.clients.task

    def task(client_id: str) -> Any:
        response = true(client_id)
        return response.model_copy(update={"task": response.task and response.task.model_copy(update=lie)})

    monkeypatch.setattr(road.client.clients, "task", task)
    assert words in refused(road)


def test_where_the_server_does_not_answer_the_update_goes_to_the_mailbox(
    make: Callable[..., Road], tmp_path: Path
) -> None:
    road = make()
    mailbox = Mailbox(road.settings, road.store)
    mailbox.enable()
    sender = MailboxSender(open_folder(mailbox.url), TRUCK, mailbox.key_of(TRUCK))
    road.vehicle.close()
    road.vehicle = Vehicle(road.client, TRUCK, road.data, road.home, mailbox=sender)
    upload = road.client.clients.upload

    def nowhere(*_: Any) -> NoReturn:
        raise ControlUnreachableError("The line is down.")

    def act() -> None:
        road.client.clients.upload = nowhere  # type: ignore[method-assign]
        road.drive()
        road.client.clients.upload = upload  # type: ignore[method-assign]
        assert mailbox.take() == 1

    road.act = act
    assert road.run().status is RunStatus.COMPLETED
    assert road.steps[0].status == "mailbox"
    assert road.store.versions.get("v1.1.1").lineage["clients"] == [TRUCK]


def test_it_goes_on_when_the_server_comes_back_and_ends_after_its_rounds(make: Callable[..., Road]) -> None:
    road = make()
    steps: list[PollResult] = []
    stop = threading.Event()

    def act() -> None:
        # Lost five times, an answer is missing for good: the vehicle asks again.
        road.way.lose = 5
        monkey = pytest.MonkeyPatch()
        monkey.setattr("edge_runtime.training.vehicle.RETRY_S", 0.0)
        road.vehicle.run(stop, steps.append, rounds=1)
        monkey.undo()

    road.act = act
    assert road.run().status is RunStatus.COMPLETED
    assert [step.status for step in steps] == ["received"]


def test_a_disk_without_images_or_with_strange_ones_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty" / "red").mkdir(parents=True)
    assert count_images(tmp_path / "empty") == 0
    with pytest.raises(DataError):
        OwnRecords.open(tmp_path / "empty", CLASSES)
    strange = images(tmp_path / "strange", 1, ("blue", "red"))
    with pytest.raises(DataError):
        OwnRecords.open(strange, CLASSES)
    some = OwnRecords.open(images(tmp_path / "some", 2, ("red",)), CLASSES)
    assert [(r.key, r.label) for r in some.records(TRUCK)] == [("red/0.png", 1), ("red/1.png", 1)]
    with pytest.raises(DataError):
        count_images(tmp_path / "absent")


# --- error feedback --------------------------------------------------------------------------------------------------

TASK = TrainTask("run-0001", 1, "b" * 64, "d" * 64, 1.0, 0.5, 1.0, 1, 1.0)
SIZE = 200


def own(step: np.ndarray[Any, Any], round_index: int) -> ClientUpdate:
    return ClientUpdate(round_index, ClientOutcome(TRUCK, 3), {"w": 3.0 * step}, 3.0)


def test_values_dropped_by_top_k_are_sent_later_and_a_repetition_gives_the_same_bytes(tmp_path: Path) -> None:
    validator = UpdateValidator({"w": (SIZE,)}, by_examples=True, single=True)
    encoder = UpdateEncoder(tmp_path, bytes(32), 0.1)
    draw, sent, total = np.random.default_rng(0), np.zeros(SIZE), np.zeros(SIZE)
    for index in range(1, 40):
        step = draw.normal(size=SIZE)
        total += step
        task = replace(TASK, round_index=index)
        content = encoder.encode(task, own(step, index), Encoding.TOP_K, validator)
        # The process died and begins the round again.
        assert (
            UpdateEncoder(tmp_path, bytes(32), 0.1).encode(task, own(step, index), Encoding.TOP_K, validator) == content
        )
        sent += validator.decoded(content).weighted_sum["w"] / 3.0
        left = total - sent
    # Stich et al.: what is left is bounded, however long it goes on; without feedback it would grow as the root of 39.
    assert np.linalg.norm(left) < 0.5 * np.linalg.norm(total) * np.sqrt(39)
    dropped, _ = ClientState(tmp_path, "dropped").load("run-0001", 40, TRUCK)
    np.testing.assert_allclose(dropped["w"], left, atol=1e-5)


def test_an_update_that_would_be_rejected_in_a_smaller_encoding_is_sent_as_float32(tmp_path: Path) -> None:
    step = np.full(SIZE, 0.1)
    norm = float(np.linalg.norm(step))
    validator = UpdateValidator({"w": (SIZE,)}, by_examples=True, single=True, max_update_norm=norm)
    encoder = UpdateEncoder(tmp_path, bytes(32), 0.5)
    encoded = encoder.encode(TASK, own(step, 1), Encoding.INT8, validator)
    assert validator.fault_of(validator.decoded(encoded)) is None
    overflow = encoder.encode(TASK, own(step * 1e7, 1), Encoding.FLOAT16, replace(validator, max_update_norm=None))
    assert validator.decoded(overflow).outcomes[0].encoding == "float32"


def test_two_updates_for_one_task_do_not_share_their_rounding(tmp_path: Path) -> None:
    step = np.random.default_rng(0).normal(size=SIZE)
    validator = UpdateValidator({"w": (SIZE,)}, by_examples=True, single=True)
    encoder = UpdateEncoder(tmp_path, bytes(32), 0.5)
    one, again, double = (
        validator.decoded(encoder.encode(TASK, own(scale * step, 1), Encoding.INT8, validator)).weighted_sum["w"]
        for scale in (1.0, 1.0, 2.0)
    )
    np.testing.assert_array_equal(one, again)
    # The scale of the bytes doubles; with equal coins, so would every value.
    assert not np.array_equal(2 * one, double)
