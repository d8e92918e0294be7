"""Attacks by what clients upload: bytes that end the training, take its memory or its time, or count more than once."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from fastapi.testclient import TestClient
from remote_yard import TARGET, Yard

from fedvit.aggregation.registry import rule_for
from fedvit.aggregation.validation import UpdateValidator
from fedvit.errors import UpdateRejectedError
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import load_settings
from fedvit.testing.doubles import FakeFleet, GenerousAccountant, PointModel
from fedvit.types import ClientOutcome, Evaluation, RunStatus, Weights
from fedvit.updates import EncodedUpdate
from fedvit.wire.untrusted import JSON_FACTOR, MAX_REASON
from fedvit.wire.updates import MOST_COPIES, largest_update
from serve_apps.control.api import Services, create_api
from tests.attack.table import AttackTable

WAIT_S = 20.0
TRUCK = "truck-0"
SUBJECT = "uploads"
MAX_SECONDS = 0.05


class RunningYard(Yard):
    """The same with a running system's aggregator behind the API: its threads, operations, start and status."""

    def process(self) -> None:
        self.virtual = FakeFleet(TARGET)
        self.accountant = GenerousAccountant(self.store)
        self.local = LocalAggregator(
            settings=self.settings,
            store=self.store,
            accountant=self.accountant,
            fleet=MixedFleet(self.settings, self.store, self.virtual, clock=self.clock, pause=self._pause),
            model=self.model(),
        )
        self.local.resume()
        services = Services(self.settings, self.store, lambda: self.local, lambda: self.accountant)
        self.http = TestClient(create_api(services), raise_server_exceptions=False)

    def model(self) -> PointModel:
        return PointModel(TARGET)

    def close(self) -> None:
        self.local.close()
        self.store.close()

    def trained(self) -> dict[str, Any]:
        """Start the training; its status when it rests."""
        answer = self.http.post("/api/training/start")
        assert answer.status_code == 202, answer.text
        self.local.wait(WAIT_S)
        status = self.http.get("/api/training/status")
        assert status.status_code == 200, status.text
        return dict(status.json())

    def trained_anew(self, path: str, body: dict[str, Any]) -> str:
        """Begin another run and wait for its end; its status."""
        answer = self.http.post(path, json=body)
        assert answer.status_code == 202, answer.text
        self.local.wait_operation(answer.json()["operation_id"], WAIT_S)
        self.local.wait(WAIT_S)
        return str(self.http.get("/api/training/status").json()["status"])


def packed(facts: str, header: dict[str, Any] | None = None, body: bytes = b"") -> bytes:
    text = json.dumps({"__metadata__": {"update": facts}} | (header or {})).encode()
    return len(text).to_bytes(8, "little") + text + body


def facts_with(total_weight: str = "30.0", outcome: str = f'["{TRUCK}", 30, null]', round_index: str = "1") -> str:
    rest = f'"total_weight": {total_weight}, "within_clip": 0, "outcomes": [{outcome}]'
    return f'{{"round_index": {round_index}, {rest}}}'


BOMBS = {
    "weight of 401 digits": packed(facts_with("1" + "0" * 400)),
    "round of 401 digits": packed(facts_with(round_index="1" + "0" * 400)),
    "count of 401 digits": packed(facts_with(outcome=f'["{TRUCK}", 1{"0" * 400}, null]')),
    "number of 5,000 digits": packed(facts_with("9" * 5000)),
    "weight NaN": packed(facts_with("NaN")),
    "reason of half a character": packed(facts_with("0", f'["{TRUCK}", 0, "\\ud800"]')),
    "nested 10,000 times": packed("[" * 10_000),
}


def stored_bytes(yard: Yard) -> int:
    return sum(path.stat().st_size for path in (yard.store.home / "remote").rglob("*") if path.is_file())


@pytest.mark.parametrize("way", ["uploaded", "stored by an earlier version"])
def test_no_update_ends_the_training(tmp_path: Path, way: str, attack_table: AttackTable) -> None:
    """The first of these is the update that once ended training for good."""
    rounds, bombs = len(BOMBS), list(BOMBS.values())
    yard = RunningYard(tmp_path, rounds=rounds, validation={"quarantine_after_rejections": None})
    statuses: list[int] = []

    def act() -> None:
        if not (task := yard.task(TRUCK)):
            return
        run_id, index = task["run_id"], task["round_index"]
        if way == "uploaded":
            path = f"/api/clients/{TRUCK}/updates/{run_id}/{index}"
            statuses.append(yard.http.put(path, content=bombs[index - 1]).status_code)
            assert stored_bytes(yard) < 2 * MAX_REASON
        else:
            place = yard.store.home / "remote" / TRUCK / f"{run_id}.{index:08d}.safetensors"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(bombs[index - 1])

    yard.act = act
    assert yard.trained()["status"] == "completed"
    for index in range(1, rounds + 1):
        refused = yard.lineage(index)["aggregation"]["refused"][TRUCK]
        assert refused.startswith("its update is refused: ")
        assert len(refused) <= MAX_REASON
        assert yard.lineage(index)["clients"] == ["vehicle-0000", "vehicle-0001"]
    yard.local.close()
    yard.process()
    assert yard.trained()["status"] == "completed"
    assert yard.trained_anew("/api/training/restart", {}) == "completed"
    assert yard.trained_anew("/api/model/retrain", {"strategy": "full_retrain"}) == "completed"
    assert statuses == [422] * (3 * rounds if way == "uploaded" else 0)
    assert yard.http.delete(f"/api/clients/{TRUCK}").status_code == 200
    assert stored_bytes(yard) == 0
    yard.close()
    sizes = [len(bomb) for bomb in bombs]
    achieved = f"{rounds} updates of {min(sizes)} to {max(sizes)} bytes: every round completes without the client"
    bound = "start, restart, retrain and status answer, also after down and up; DELETE removes the rest"
    attack_table.add(SUBJECT, f"update that cannot be decoded, {way}", achieved=achieved, bound=bound)


def test_a_fault_of_the_program_rejects_one_update_and_ends_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, attack_table: AttackTable
) -> None:
    """Whatever a client may find in the code that reads its bytes."""

    def faulty(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("fedvit.aggregation.validation.decode_claim", faulty)
    yard = RunningYard(tmp_path)
    assert yard.trained()["status"] == "completed"
    assert "ZeroDivisionError" in yard.lineage()["aggregation"]["refused"][TRUCK]
    assert any(record.exc_info for record in caplog.records)
    yard.close()
    attack_table.add(
        SUBJECT, "update that finds a fault in decoding", achieved="1 rejection", bound="its own rejection"
    )


class FaultyModel(PointModel):
    """Cannot be evaluated, which is a fault of the program."""

    def evaluate(self, weights: Weights) -> Evaluation:
        raise RuntimeError("a fault")


def test_a_fault_of_the_loop_is_the_status_of_the_run_and_not_of_every_answer(tmp_path: Path) -> None:
    class FaultyYard(RunningYard):
        def model(self) -> PointModel:
            return FaultyModel(TARGET)

    yard = FaultyYard(tmp_path)
    for _ in range(2):
        status = yard.trained()
        assert (status["status"], status["message"]) == ("failed", "RuntimeError: a fault")
    yard.close()


# --- memory and time -------------------------------------------------------------------------------------------------

WIDE = {f"blocks.{i}.weight": (192, 192) for i in range(150)}
"""Parameters of a model with 150 arrays and 5.5 million values."""


def empty_tensors(count: int) -> bytes:
    entries = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}
    return packed(facts_with(), entries)


def longest_header(filling: str) -> bytes:
    """The longest header that is parsed for this model, full of the smallest values."""
    size = largest_update(WIDE) - 8 - 8 * sum(map(math.prod, WIDE.values()))
    text = f'{{"x":[{filling * (size // len(filling))}'[: size - 3].rstrip(",[{") + "]}"
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("attack", "content"),
    [
        ("header of 300,000 empty tensors", empty_tensors(300_000)),
        ("header of 1,000 empty tensors", empty_tensors(1_000)),
        ("longest header, of integers", longest_header("1,")),
        ("longest header, of lists", longest_header("[],")),
        ("longest header, of objects", longest_header("{},")),
        ("header of 2^63 bytes", (2**63).to_bytes(8, "little") + bytes(4096)),
        (
            "tensor of 2^62 values",
            packed(facts_with(), {"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 8]}}),
        ),
        (
            "empty tensor of 2^40 rows",
            packed(facts_with(), {"w": {"dtype": "F64", "shape": [2**40, 0], "data_offsets": [0, 0]}}),
        ),
    ],
)
def test_no_header_takes_time_or_memory(attack: str, content: bytes, attack_table: AttackTable) -> None:
    settings = load_settings(environ={})
    weights = {name: np.zeros(shape, np.float32) for name, shape in WIDE.items()}
    validator = UpdateValidator.of(settings, rule_for(settings), weights, {TRUCK: 30})
    update = EncodedUpdate(1, ClientOutcome(TRUCK, 30), content)

    def refused() -> None:
        with pytest.raises(UpdateRejectedError):
            raise UpdateRejectedError(str(validator.fault_of(validator.decoded(update))))  # type: ignore[arg-type]

    seconds = []
    for _ in range(3):
        began = time.thread_time()
        refused()
        seconds.append(time.thread_time() - began)
    tracemalloc.start()
    refused()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    allowed = MOST_COPIES * 8 * sum(map(math.prod, WIDE.values()))
    assert min(seconds) < MAX_SECONDS
    assert peak < min(allowed, JSON_FACTOR * len(content) + 2**16)
    achieved = f"{min(seconds) * 1000:.2f} ms, {peak / 2**20:.2f} MiB for {len(content):,} bytes"
    bound = f"{MAX_SECONDS * 1000:g} ms, {MOST_COPIES} float64 copies of the model"
    attack_table.add(SUBJECT, attack, achieved=achieved, bound=bound)


# --- what counts -----------------------------------------------------------------------------------------------------


def honest_points(home: Path, rounds: int) -> list[Any]:
    yard = Yard(home, rounds=rounds)
    assert yard.run() is RunStatus.COMPLETED
    points = [yard.point(index) for index in range(1, rounds + 1)]
    yard.store.close()
    return points


def test_replayed_and_reordered_uploads_count_once(tmp_path: Path, attack_table: AttackTable) -> None:
    rounds = 4
    yard = Yard(tmp_path / "attacked", rounds=rounds)
    kept: list[bytes] = []
    statuses: Counter[str] = Counter()

    def put(kind: str, content: bytes, index: int) -> None:
        statuses[f"{kind} {yard.put(TRUCK, content, index).status_code}"] += 1

    def act() -> None:
        if not (task := yard.task(TRUCK)):
            return
        now, own, another = task["round_index"], yard.update(TRUCK, task), yard.update(TRUCK, task, step=50.0)
        for before, content in enumerate(kept, start=1):
            put("again", content, before)
            put("changed", own, before)
        for ahead in (now + 1, now + 5, 2**31, 2**53 - 1):
            put("early", own, ahead)
        put("first", own, now)
        put("repeated", own, now)
        put("second", another, now)
        kept.append(own)

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    for index in range(1, rounds + 1):
        put("again", kept[index - 1], index)
    for index, point in enumerate(honest_points(tmp_path / "honest", rounds), start=1):
        np.testing.assert_array_equal(yard.point(index), point)
        assert yard.lineage(index)["clients"] == [TRUCK, "vehicle-0000", "vehicle-0001"]
        assert "aggregation" not in yard.lineage(index)
    assert statuses.keys() == {"again 200", "changed 200", "early 409", "first 202", "repeated 202", "second 409"}
    yard.store.close()
    achieved = (
        f"{sum(statuses.values())} uploads in {rounds} rounds: the models are those without the attack, bit by bit"
    )
    attack_table.add(
        SUBJECT, "replayed, reordered, early and second uploads", achieved=achieved, bound="the same models"
    )


def test_the_update_of_another_round_is_a_rejection_of_its_client(tmp_path: Path, attack_table: AttackTable) -> None:
    yard = Yard(tmp_path, rounds=5)
    kept: list[bytes] = []
    statuses: list[int] = []

    def act() -> None:
        if task := yard.task(TRUCK):
            kept.append(yard.update(TRUCK, task))
            statuses.append(yard.put(TRUCK, kept[0], task["round_index"]).status_code)

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert statuses == [202, 422, 422, 422]
    assert yard.store.clients.quarantined() == [TRUCK]
    yard.store.close()
    attack_table.add(
        SUBJECT,
        "old update under a new round",
        achieved="refused; quarantine after 3",
        bound="counts in no other round",
    )


def test_uploads_for_rounds_that_are_not_offered_touch_nothing(tmp_path: Path, attack_table: AttackTable) -> None:
    yard = RunningYard(tmp_path)
    run_ids = ["run-0002", "..", "%2e%2e%2fx", "run-0001%00", "%00", "r" * 5000, "run%0a0001", "%ed%a0%80"]
    statuses: Counter[int] = Counter()

    def act() -> None:
        if task := yard.task(TRUCK):
            content = yard.update(TRUCK, task)
            for run_id in run_ids:
                path = f"/api/clients/{TRUCK}/updates/{run_id}/1"
                statuses[yard.http.put(path, content=content).status_code] += 1
                statuses[yard.http.get(path).status_code] += 1
            assert stored_bytes(yard) == 0
            yard.do_duty(TRUCK)

    yard.act = act
    assert yard.trained()["status"] == "completed"
    assert statuses.total() == 2 * len(run_ids)
    assert max(statuses) < 500
    assert yard.lineage()["clients"] == [TRUCK, "vehicle-0000", "vehicle-0001"]
    yard.close()
    achieved = f"{statuses.total()} requests answered {', '.join(map(str, sorted(statuses)))}; nothing stored"
    attack_table.add(SUBJECT, "updates and receipts of rounds not offered", achieved=achieved, bound="no 5xx, no file")


async def put_slowly(yard: Yard, path: str, headers: dict[bytes, bytes]) -> tuple[int, int]:
    """The status of an upload whose body comes when it is asked for, and how many bytes of it were asked for."""
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 7)},
        **{"server": ("testserver", 80), "headers": list({b"host": b"testserver", **headers}.items())},
    }
    statuses, read = [], 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 4096
        return {"type": "http.request", "body": bytes(4096), "more_body": read < 2**26}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await yard.http.app(scope, receive, send)
    return statuses[0], read


def test_what_is_not_awaited_or_too_large_is_not_read(tmp_path: Path, attack_table: AttackTable) -> None:
    yard = Yard(tmp_path)
    read: dict[str, tuple[int, int]] = {}
    cases = {
        "another round": (2, {}),
        "an announced length": (1, {b"content-length": b"60000000"}),
        "no announced length": (1, {b"transfer-encoding": b"chunked"}),
    }

    def act() -> None:
        if yard.task(TRUCK):
            for name, (index, headers) in cases.items():
                path = f"/api/clients/{TRUCK}/updates/run-0001/{index}"
                read[name] = anyio.run(put_slowly, yard, path, headers)
            yard.do_duty(TRUCK)

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    limit = largest_update({"point": (2,)})
    assert (read["another round"], read["an announced length"]) == ((409, 0), (413, 0))
    assert read["no announced length"][0] == 413
    assert read["no announced length"][1] <= limit + 2 * 4096
    assert yard.lineage()["clients"] == [TRUCK, "vehicle-0000", "vehicle-0001"]
    yard.store.close()
    achieved = "; ".join(f"{name}: {status}, {count:,} bytes read" for name, (status, count) in read.items())
    attack_table.add(SUBJECT, "64 MiB uploads", achieved=achieved, bound=f"0 bytes, or {limit:,} for this model")


def test_what_is_invalid_is_not_stored_and_its_reason_is_one_short_line(
    tmp_path: Path, attack_table: AttackTable
) -> None:
    yard = Yard(tmp_path, trucks=20, validation={"quarantine_after_rejections": None})
    sent: list[int] = []
    hostile = json.dumps("\x1b[31m\n\0" + "x" * 8000)
    cases: list[Callable[[str], bytes]] = [
        lambda truck: b"\xff" * 8 + b'{"sha256": "0", "fault": ""}' + bytes(8000),
        lambda truck: bytes(30_000),
        lambda truck: packed(facts_with("0", f'["{truck}", 0, {hostile}]')),
        lambda truck: packed(facts_with(outcome=f'["{"y" * 60}", 30, {hostile}]')),
    ]

    def act() -> None:
        for number, truck in enumerate(yard.trucks):
            if yard.task(truck):
                content = cases[number % len(cases)](truck)
                sent.append(len(content))
                assert yard.put(truck, content).status_code in (202, 422)

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    reasons = [yard.receipt(truck)["reason"] for truck in yard.trucks]
    assert all(reason.isprintable() and len(reason) <= MAX_REASON for reason in reasons)
    invalid = [
        path for path in (yard.store.home / "remote").rglob("*.safetensors") if path.stat().st_size > 2 * MAX_REASON
    ]
    # A client's own failure is valid, and is kept with all its words until the next task.
    assert {path.parent.name for path in invalid} == set(yard.trucks[2::4])
    assert sum(path.stat().st_size for path in invalid) < 5 * 20_000
    for truck in yard.trucks:
        assert yard.http.delete(f"/api/clients/{truck}").status_code == 200
    assert stored_bytes(yard) == 0
    yard.store.close()
    achieved = f"{sum(sent):,} bytes sent, reasons of at most {max(map(len, reasons))} printable characters"
    attack_table.add(
        SUBJECT, "invalid bytes to fill the disk", achieved=achieved, bound=f"{MAX_REASON} characters each"
    )
