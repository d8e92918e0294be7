"""What a vehicle computes for a server that may be hostile: one output for each run, round and purpose, or nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hostile_server import CLASSES, CLIENT, SPEC, HostileServer, Offered, error_of, settings_with, write_images
from PIL import Image

from edge_runtime.training.policy import AllowedModel, Purpose, VehiclePolicy
from edge_runtime.training.vehicle import PollResult, Vehicle
from fedvit.errors import ControlApiError
from fedvit.settings import changed_settings
from fedvit.store.store import Store
from fedvit.testing.doubles import ManualClock

torch.set_num_threads(1)
HONEST = settings_with()


class Scene:
    """One vehicle with eight images, and a server that may be hostile."""

    def __init__(self, folder: Path, policy: VehiclePolicy | None = None) -> None:
        self.folder, self.policy, self.clock = folder, policy, ManualClock()
        self.data, self.home = write_images(folder / "images", 4), folder / "home"
        self.server = HostileServer()
        self.vehicle = self.another()

    def another(self) -> Vehicle:
        return Vehicle(self.server.client(), CLIENT, self.data, self.home, policy=self.policy, clock=self.clock)

    def restart(self) -> None:
        self.vehicle.close()
        self.vehicle = self.another()

    def send(self, task: Offered, histogram: Offered | None = None) -> bytes:
        """What the vehicle uploads for a task."""
        self.server.task, self.server.histogram = task, histogram
        self.vehicle.poll()
        return self.server.updates[-1][1]

    def ask(self, histogram: Offered) -> list[tuple[int, ...]]:
        """The histograms that the vehicle has sent so far."""
        self.server.task, self.server.histogram = None, histogram
        self.vehicle.poll()
        return [counts for _, counts in self.server.histograms]

    def charges(self) -> list[str]:
        """The outputs on the vehicle's ledger."""
        with Store.open(self.home) as store:
            return [entry.charge.output_id for entry in store.ledger.entries()]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Callable[..., Scene]]:
    scenes: list[Scene] = []

    def make(policy: VehiclePolicy | None = None) -> Scene:
        scenes.append(Scene(tmp_path, policy))
        return scenes[-1]

    yield make
    for each in scenes:
        each.vehicle.close()


# --- one output for each run, round and purpose ----------------------------------------------------------------------


def other_tasks(server: HostileServer) -> dict[str, Offered]:
    """Tasks of the same round, each consistent in itself, that differ from the honest one in a single thing."""

    def changed(**more: Any) -> Offered:
        return server.offer(settings_with(**more))

    return {
        "seed": changed(model={"seed": 1}),
        "depth": changed(model={"hybrid": {"depth": 2, "width": 16, "heads": 2}}),
        "image size": changed(data={"image_size": 40}),
        "rule": changed(training={"aggregation": "fedprox", "aggregation_options": {"proximal_mu": 1.0}}),
        "top k": changed(training={"compression": {"encodings": ["top_k"], "top_k_fraction": 0.5}}),
        "classes": server.offer(HONEST, classes=CLASSES[::-1]),
        "base weights": server.offer(HONEST, shift=0.5),
        "encoding": server.offer(HONEST, encoding="int8"),
        "noise": server.offer(HONEST, task={"noise_multiplier": 3.0}),
        "data digest": server.offer(HONEST, task={"data_digest": "e" * 64}),
    }


@pytest.mark.parametrize("change", list(other_tasks(HostileServer())))
def test_a_second_task_for_a_round_gets_no_output(scene: Callable[..., Scene], change: str) -> None:
    road = scene()
    first = road.send(road.server.offer(HONEST))
    assert error_of(first) is None
    other = other_tasks(road.server)[change]
    assert error_of(road.send(other)) is not None
    road.restart()
    assert error_of(road.send(other)) is not None
    assert len(road.charges()) == 1
    with Store.open(road.home) as store:
        record = store.metadata.get("vehicle_output/update/run-0001/1")
    assert record is not None
    assert record["refused"]["count"] == 2
    # The first task still has its output.
    assert road.send(road.server.offer(HONEST)) == first


def test_a_repetition_after_a_restart_has_the_same_bytes_and_costs_nothing(scene: Callable[..., Scene]) -> None:
    road = scene()
    contents = []
    for _ in range(2):
        contents.append(road.send(road.server.offer(HONEST), road.server.offer_histogram(HONEST)))
        road.restart()
    assert contents[0] == contents[1]
    assert road.server.histograms[0] == road.server.histograms[1]
    assert len(road.charges()) == 2


def test_changed_images_make_another_output(scene: Callable[..., Scene]) -> None:
    road = scene()
    task, histogram = road.server.offer(HONEST), road.server.offer_histogram(HONEST)
    assert error_of(road.send(task, histogram)) is None
    path = next(road.data.rglob("*.png"))
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(path)
    road.restart()
    assert error_of(road.send(task, histogram)) is not None
    assert len(road.server.histograms) == 1
    assert len(road.charges()) == 2


def test_lost_client_state_makes_another_output(scene: Callable[..., Scene]) -> None:
    scaffold = settings_with(training={"aggregation": "scaffold"})
    road = scene()
    tasks = [road.server.offer(scaffold, round_index=n) for n in (1, 2)]
    assert [error_of(road.send(task)) for task in tasks] == [None, None]
    for path in (road.home / "clients").rglob("00000001.safetensors"):
        path.unlink()
    road.restart()
    assert error_of(road.send(tasks[1])) is not None


def test_only_one_histogram_of_a_round_is_sent(scene: Callable[..., Scene]) -> None:
    road = scene()
    assert error_of(road.send(road.server.offer(HONEST))) is None
    assert len(road.ask(road.server.offer_histogram(HONEST))) == 1
    road.ask(road.server.offer_histogram(HONEST, noise_multiplier=5.0))
    other = type(SPEC)({"brightness": (100.0,)}, len(CLASSES))
    assert len(road.ask(road.server.offer_histogram(HONEST, spec=other))) == 1
    assert len(road.ask(road.server.offer_histogram(HONEST, round_index=2))) == 2
    assert len(road.charges()) == 3


def test_a_histogram_for_another_model_is_not_made(scene: Callable[..., Scene]) -> None:
    road = scene()
    road.send(road.server.offer(HONEST))
    for size in (40, 48):
        assert road.ask(road.server.offer_histogram(settings_with(data={"image_size": size}))) == []
    assert len(road.charges()) == 1


def test_two_processes_of_one_home_release_one_output(scene: Callable[..., Scene]) -> None:
    road = scene()
    second = road.another()
    tasks = [road.server.offer(HONEST), road.server.offer(settings_with(model={"seed": 1}))]
    views = []
    for task in tasks:
        road.server.task = task
        views.append(road.server.client().clients.task(CLIENT).task)
    # Both base weights are the same: the head starts at zero.
    first, other, again = road.vehicle.answer(views[0]), second.answer(views[1]), second.answer(views[0])
    second.close()
    assert error_of(first) is None
    assert error_of(other) is not None
    assert again == first
    assert len(road.charges()) == 1


# --- what is charged is what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"image_size": 40},
        {"classes": list(CLASSES[::-1])},
        {"frozen_digest": "0" * 64},
        {"context_digest": "0" * 64},
        {"base_digest": "0" * 64},
        {"settings": settings_with(model={"seed": 1}).training_identity()},
        {"settings": settings_with(training={"aggregation": "ditto"}).training_identity()},
        {"settings": {**HONEST.training_identity(), "workload": {"clients_class": "os:system"}}},
        {"settings": {**HONEST.training_identity(), "model": {"name": "hybrid_lite0", "depth": 1}}},
        {"output_id": "0" * 64},
        {"noise_multiplier": 1.0},
        {"num_examples": 9},
        {"l2_clip_norm": 100.0},
    ],
    ids=lambda lie: "/".join(lie),
)
def test_a_task_that_is_not_what_was_charged_costs_nothing(scene: Callable[..., Scene], lie: dict[str, Any]) -> None:
    road = scene()
    assert error_of(road.send(road.server.offer(HONEST, lies=lie))) is not None
    assert road.charges() == []


def test_weights_other_than_those_of_the_task_cost_nothing(scene: Callable[..., Scene]) -> None:
    road = scene()
    task, other = road.server.offer(HONEST), road.server.offer(HONEST, shift=1.0)
    task.weights = other.weights
    assert error_of(road.send(task)) is not None
    assert road.charges() == []


# --- the owner's policy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        VehiclePolicy(models=()),
        VehiclePolicy(models=(AllowedModel(name="vit_tiny_patch16_224"),)),
        VehiclePolicy(models=(AllowedModel(name="hybrid_lite0", frozen_digests=("0" * 64,)),)),
        VehiclePolicy(purposes=(Purpose.HISTOGRAM,)),
        VehiclePolicy(min_noise_multiplier=4.5),
        VehiclePolicy(max_local_steps=1),
        VehiclePolicy(max_sampling_prob=0.25),
    ],
)
def test_what_the_policy_forbids_is_refused_before_an_image_is_read(
    scene: Callable[..., Scene], policy: VehiclePolicy
) -> None:
    road = scene(policy)
    for path in road.data.rglob("*.png"):
        path.unlink()
    two_steps = settings_with(training={"local_steps": 2})
    error = error_of(road.send(road.server.offer(two_steps)))
    assert error is not None
    assert "policy" in error
    assert road.charges() == []


def test_a_histogram_that_the_policy_forbids_is_not_made(scene: Callable[..., Scene]) -> None:
    road = scene(VehiclePolicy(purposes=(Purpose.UPDATE,)))
    assert error_of(road.send(road.server.offer(HONEST), road.server.offer_histogram(HONEST))) is None
    assert road.server.histograms == []
    assert len(road.charges()) == 1


def test_the_budgets_for_a_day_and_in_all_end_it(scene: Callable[..., Scene]) -> None:
    # A round with noise multiplier 4 and sampling 0.5 costs about 0.5.
    road = scene(VehiclePolicy(max_epsilon_per_day=1.0, max_epsilon=1.5))

    def released(first: int) -> int:
        errors = [error_of(road.send(road.server.offer(HONEST, round_index=first + n))) for n in range(20)]
        return sum(error is None for error in errors)

    a_day = released(1)
    assert 0 < a_day < 20
    road.restart()
    assert released(101) == 0
    road.clock.advance(24 * 3600 + 1)
    assert 0 < released(201) <= a_day
    road.clock.advance(24 * 3600 + 1)
    in_all = len(road.charges()) + released(301)
    road.clock.advance(24 * 3600 + 1)
    assert len(road.charges()) == in_all
    assert released(401) == 0


# --- values that are no values ---------------------------------------------------------------------------------------

INVALID: dict[str, Any] = {
    "run_id": ["../../../tmp/x", "a/b", "", "run 1", "x" * 65, "run\n", None],
    "round_index": [0, -1, 10**9, 10**400, "one", 1.5],
    "base_digest": ["", "b" * 63, "../" + "b" * 61, "B" * 64],
    "noise_multiplier": [float("nan"), float("inf"), 0.0, -1.0, 1e300, "much"],
    "sampling_prob": [float("nan"), 0.0, 1.1],
    "learning_rate": [float("nan"), float("-inf"), 0.0],
    "local_steps": [0, 10**12],
    "privacy_unit": ["", "nobody"],
    "encoding": ["float64", "", "../int8"],
    "image_size": [0, 8, 10**6],
    "classes": [[], ["red", "red"], ["re\nd", "green"], ["x" * 201, "y"], "red"],
    "settings": [[], "model", {"model": 1}],
    "output_id": ["", "nan"],
}


@pytest.mark.parametrize("name", [*INVALID, "poll_after_s", "client_id", "the body"])
def test_values_that_no_server_sends_do_not_end_the_loop(
    scene: Callable[..., Scene], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.training.vehicle.RETRY_S", 0.0)
    road, server = scene(), HostileServer()
    if name in INVALID:
        for value in INVALID[name]:
            server.task = road.server.offer(HONEST, lies={name: value})
            road.server.raw.append(server.answer())
    elif name == "the body":
        road.server.raw += [b"", b"[]", b"nonsense", b"[" * 100_000, b'{"task": {}}', server.answer(task={})]
    else:
        values = {"poll_after_s": [float("nan"), -1.0, 0.0, 1e300], "client_id": ["../truck", ""]}[name]
        road.server.raw += [server.answer(**{name: value}) for value in values]
    for raw in list(road.server.raw):
        road.server.raw = [raw]
        with pytest.raises(ControlApiError):
            road.vehicle.poll()
        road.server.raw = [raw]
        road.server.task = road.server.offer(HONEST)
        done: list[PollResult] = []
        road.vehicle.run(threading.Event(), done.append, rounds=1)
        assert [result.status for result in done] == ["received"]
    assert len(road.charges()) == 1
    assert {path.name for path in road.folder.iterdir()} == {"images", "home"}


PROBLEMS: list[bytes] = [
    b"",
    b"nonsense",
    b"[" * 100_000,
    b'{"type": 3, "title": [], "detail": {}, "status": "x"}',
    b'{"type": "/problems/integrity", "detail": null, "retry_after_s": NaN}',
    b'{"type": "/problems/rate-limited", "detail": "slow", "retry_after_s": "never"}',
]


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 409, 418, 422, 429, 500, 503])
def test_refusals_of_any_form_do_not_end_the_loop(
    scene: Callable[..., Scene], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.training.vehicle.RETRY_S", 0.0)
    road = scene(VehiclePolicy(purposes=()))
    headers = {"Retry-After": "nan", "Location": "file:///etc/passwd"}
    road.server.raw = [httpx.Response(status, content=body, headers=headers) for body in PROBLEMS for _ in range(4)]
    road.server.task = road.server.offer(HONEST)
    done: list[PollResult] = []
    road.vehicle.run(threading.Event(), done.append, rounds=1)
    assert [result.status for result in done] == ["received"]
    assert road.charges() == []


UNFIT: dict[str, dict[str, Any]] = {
    "no settings": {"settings": {}},
    "an empty section": {"settings": {**HONEST.training_identity(), "model": {}}},
    "no number": {"settings": {**HONEST.training_identity(), "privacy": {"l2_clip_norm": float("nan")}}},
    "no rule": {"settings": {**HONEST.training_identity(), "training": {"aggregation": "../../evil"}}},
    "no options": {
        "settings": {**HONEST.training_identity(), "training": {"aggregation_options": {"x": float("nan")}}}
    },
    "no size": {"settings": {**HONEST.training_identity(), "model": {"hybrid": {"depth": 10**9}}}},
    "no seed": {"settings": {**HONEST.training_identity(), "model": {"seed": 10**30}}},
    "too small an image": {"image_size": 16},
    "another image size": {"image_size": 33},
}


@pytest.mark.parametrize("name", list(UNFIT))
def test_settings_that_cannot_be_used_are_refused_with_a_reason(scene: Callable[..., Scene], name: str) -> None:
    road = scene()
    assert error_of(road.send(road.server.offer(HONEST, lies=UNFIT[name]))) is not None
    assert error_of(road.send(road.server.offer(HONEST, round_index=2))) is None
    assert len(road.charges()) == 1


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("order", {}),
        ("noise_multiplier", float("nan")),
        ("run_id", "../x"),
        ("privacy_unit", 3),
        ("spec", {"edges": {"../x": [1.0]}, "classes": 2, "risk_votes": []}),
        ("spec", {"edges": {"brightness": [float("nan")]}, "classes": 2, "risk_votes": []}),
        ("spec", {"edges": {"brightness": [1.0]}, "classes": 10**400, "risk_votes": []}),
        ("spec", {"edges": {"brightness": [2.0, 1.0]}, "classes": 2, "risk_votes": []}),
        ("spec", {"edges": {"unheard": [1.0]}, "classes": 2, "risk_votes": []}),
        ("spec", {"edges": {"brightness": [1.0]}, "classes": 1, "risk_votes": []}),
        ("spec", {"edges": {"brightness": [float(i) for i in range(2000)]}, "classes": 2, "risk_votes": []}),
    ],
)
def test_a_histogram_request_that_is_none_does_not_end_the_loop(
    scene: Callable[..., Scene], where: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_runtime.training.vehicle.RETRY_S", 0.0)
    road = scene()
    road.send(road.server.offer(HONEST))
    honest = road.server.offer_histogram(HONEST, round_index=2)
    body = honest.body | ({"order": value} if where == "order" else {"order": honest.body["order"] | {where: value}})
    server = HostileServer(task=road.server.offer(HONEST, round_index=2), histogram=Offered(body, honest.request))
    road.server.raw = [server.answer()]
    road.server.task = server.task
    done: list[PollResult] = []
    road.vehicle.run(threading.Event(), done.append, rounds=1)
    assert [result.status for result in done] == ["received"]
    assert road.server.histograms == []


def test_the_context_covers_what_it_must_and_leaves_out_what_differs_between_sides() -> None:
    digest = HONEST.context_digest(CLASSES, "f" * 64)
    others = [
        HONEST.context_digest(CLASSES[::-1], "f" * 64),
        HONEST.context_digest(CLASSES, "e" * 64),
        *(settings_with(**change).context_digest(CLASSES, "f" * 64) for change in CHANGES),
    ]
    assert len({digest, *others}) == len(others) + 1
    same = {"privacy.target_epsilon": 3.0, "privacy.target_delta": 1e-6, "model.checkpoint": "x.pth", "home": "y"}
    assert changed_settings(HONEST, same).context_digest(CLASSES, "f" * 64) == digest


CHANGES: list[dict[str, Any]] = [
    {"model": {"seed": 1}},
    {"model": {"trainable": "all"}},
    {"model": {"hybrid": {"depth": 3, "width": 16, "heads": 2}}},
    {"data": {"image_size": 40}},
    {"training": {"aggregation": "ditto"}},
    {"training": {"aggregation": "ditto", "aggregation_options": {"personal_lambda": 0.5}}},
    {"training": {"local_steps": 2}},
    {"training": {"compression": {"encodings": ["int8"]}}},
    {"privacy": {"l2_clip_norm": 2.0}},
]
