"""Remote clients through the real API, store, ledger and loop; a truck acts whenever the round waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from httpx import Response
from prometheus_client import REGISTRY
from remote_yard import ALL, TARGET, Yard

from edge_runtime.mailbox import MailboxSender
from fedvit.access.tokens import create_token
from fedvit.metrics.catalogue import BY_NAME
from fedvit.operations.mailbox import Mailbox
from fedvit.rounds.fleets import UNCHARGED
from fedvit.rounds.protection import protection_for
from fedvit.rounds.remote import RemoteWork
from fedvit.rounds.steering import change_aggregation_settings
from fedvit.types import Run, RunStatus, utc_now
from fedvit.updates import ClientUpdate
from fedvit.wire.folders import open_folder
from fedvit.wire.updates import encode_update


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    result = Yard(tmp_path)
    yield result
    result.store.close()


def test_no_task_is_offered_whose_answer_was_just_taken(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """The aggregator leaves the next task, and deletes the old answer, while the API looks the old task up."""
    work, offered = RemoteWork(yard.settings, yard.store), []

    def act() -> None:
        offer = work.task("truck-0")
        assert offer is not None
        yard.act = lambda: None
        following = replace(offer.task, round_index=2)
        yard.accountant.charge(protection_for(yard.settings, yard.store).charges(following, ["truck-0"]))
        yard.do_duty("truck-0")
        latest = yard.store.runs.latest

        def leave_the_next_task() -> Run | None:
            monkeypatch.undo()
            work.leave(following, yard.store.clients.get("truck-0"))
            return latest()

        monkeypatch.setattr(yard.store.runs, "latest", leave_the_next_task)
        offered.append(work.task("truck-0"))

    yard.act = act
    yard.run()
    assert [offer.task.round_index for offer in offered if offer is not None] == [2]


def test_a_truck_and_virtual_clients_make_one_round(yard: Yard) -> None:
    seen: list[Any] = []

    def act() -> None:
        task = yard.task("truck-0")
        # Before anybody can release anything, it is paid for.
        key = (task["run_id"], task["round_index"], "truck-0", task["output_id"])
        seen.append((yard.store.ledger.is_charged(*key), yard.store.ledger.is_charged(*key[:3], "0" * 64)))
        answer = yard.put("truck-0", yard.update("truck-0", task, step=1.0))
        seen.append((answer.status_code, answer.json()["status"], yard.task("truck-0")))

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert seen == [(True, False), (202, "received", None)]
    # The virtual ones go half the way with ten examples each, the truck goes all of it with thirty.
    np.testing.assert_allclose(yard.point(), (20 * 0.5 + 30 * 1.0) / 50 * TARGET, rtol=1e-6)
    assert yard.lineage()["clients"] == ["truck-0", "vehicle-0000", "vehicle-0001"]
    assert yard.virtual.tasks[0][1].client_ids == ("vehicle-0000", "vehicle-0001")
    record = yard.receipt("truck-0")
    assert (record["status"], record["folded_in"], record["version"], record["reason"]) == (
        "accepted",
        1,
        "v1.1.1",
        None,
    )


@pytest.mark.parametrize(
    ("wanted", "known", "sent"),
    [
        ((), ALL, "float32"),
        (("int8", "float16"), ALL, "int8"),
        (("int8", "float16"), ["float16"], "float16"),
        (("top_k",), ["int8"], "float32"),
        (("bfloat16",), "bfloat16", "float32"),
    ],
)
def test_the_form_is_agreed_for_each_client_and_its_bytes_are_counted(
    tmp_path: Path, wanted: tuple[str, ...], known: Any, sent: str
) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value(BY_NAME["update_bytes_total"].full_name, {"encoding": sent}) or 0.0

    before = counted()
    yard = Yard(tmp_path, encodings=known, compression={"encodings": wanted})
    assert yard.run() is RunStatus.COMPLETED
    assert yard.lineage()["sent"]["truck-0"]["encoding"] == sent
    assert counted() - before == yard.lineage()["sent"]["truck-0"]["bytes"] > 100
    np.testing.assert_allclose(yard.point(), 0.5 * TARGET, rtol=0.01)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "nan": ({"weighted_sum": {"point": np.array([np.nan, 0.0])}}, "'point' holds a value that is not finite"),
    "huge": ({"step": 1e6}, "its norm is"),
    "misshapen": ({"weighted_sum": {"point": np.zeros((2, 1))}}, "'point' has the shape [2, 1]"),
    "nameless": ({"weighted_sum": {}}, "it lacks the parameter 'point'"),
    "strange": ({"weighted_sum": {"point": np.zeros(2), "x": np.zeros(1)}}, "it holds 'x'"),
    "heavy": ({"total_weight": 31.0}, "its weight is 31"),
    "another's": ({"client_id": "truck-1"}, "It speaks for [('truck-1', 30)] in round {0}"),
    "greedy": ({"num_examples": 31}, "It speaks for [('truck-0', 31)] in round {0}"),
    "of another version": (
        {"round_index": 7},
        "It speaks for [('truck-0', 30)] in round 7; truck-0 was asked in round {0}",
    ),
}


@pytest.mark.parametrize("fault", [*FAULTS, "no update"])
def test_an_invalid_update_is_rejected_at_once_recorded_and_counted(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    yard = Yard(tmp_path, trucks=2, rounds=2, validation={"max_update_norm": 100.0, "quarantine_after_rejections": 2})
    changes, reason = FAULTS.get(fault, ({}, "The update is not safetensors"))
    monkeypatch.setattr("remote_yard.encode_smaller", encode_as_it_is)
    answers: list[Response] = []

    def act() -> None:
        yard.do_duty("truck-1")
        if task := yard.task("truck-0"):
            content = b"pickle" if fault == "no update" else yard.update("truck-0", task, **changes)
            answers.append(yard.put("truck-0", content, task["round_index"]))

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert len(answers) == 2
    for index, answer in enumerate(answers, start=1):
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/update-rejected")
        assert reason.replace("{0}", str(index)) in answer.json()["detail"]
        recorded = yard.lineage(index)["aggregation"]["refused"]["truck-0"]
        assert recorded.startswith("its update is refused: ")
        assert reason.replace("{0}", str(index)) in recorded
        assert yard.receipt("truck-0", index)["reason"] == recorded
        assert "truck-1" in yard.lineage(index)["clients"]
    np.testing.assert_allclose(yard.point(2), 0.75 * TARGET, rtol=1e-6)
    assert yard.store.clients.quarantined() == ["truck-0"]
    assert yard.task("truck-0") is None


def encode_as_it_is(update: ClientUpdate, *_: Any) -> bytes:
    """With whatever is in it."""
    return encode_update(update)


def test_an_answer_may_be_repeated_and_not_changed(yard: Yard) -> None:
    results: list[tuple[int, str]] = []
    contents: list[bytes] = []

    def act() -> None:
        task = yard.task("truck-0")
        contents.extend(yard.update("truck-0", task, step=step) for step in (0.5, 0.25))
        for content in (contents[0], contents[0], contents[1]):
            answer = yard.put("truck-0", content)
            results.append(
                (answer.status_code, answer.json().get("status") if answer.is_success else answer.json()["detail"])
            )

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert results[:2] == [(202, "received")] * 2
    assert results[2][0] == 409
    assert "another answer to round 1 changes nothing" in str(results[2][1])
    np.testing.assert_allclose(yard.point(), 0.5 * TARGET, rtol=1e-6)
    again, other = yard.put("truck-0", contents[0]), yard.put("truck-0", contents[1])
    assert (again.status_code, again.json()["folded_in"], other.status_code) == (200, 1, 409)


def test_a_silent_truck_is_given_up_and_told_so_when_it_comes(yard: Yard) -> None:
    kept: list[bytes] = []

    def act() -> None:
        kept.append(yard.update("truck-0", yard.task("truck-0")))

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert yard.waits == 3
    assert yard.lineage()["clients"] == ["vehicle-0000", "vehicle-0001"]
    late = yard.put("truck-0", kept[0])
    assert late.status_code == 409
    assert "round 1 of run-0001 went on without it: no answer in 600 s" in late.json()["detail"]
    assert yard.receipt("truck-0")["status"] == "rejected"


def test_a_late_answer_goes_into_the_next_buffer_of_an_asynchronous_run(tmp_path: Path) -> None:
    yard = Yard(tmp_path, rounds=3)
    change_aggregation_settings(yard.store, lambda now: replace(now, mode="asynchronous", buffer_size=2))
    folded: list[Any] = []

    def look(progress: Any) -> None:
        if progress.rounds_done == 1 and not folded:
            folded.append(yard.do_duty("truck-0"))

    yard.on_progress = look
    assert yard.run() is RunStatus.COMPLETED
    assert folded[0].status_code == 202
    assert yard.lineage(2)["aggregation"]["staleness"]["truck-0"] == 1
    record = yard.receipt("truck-0", 1)
    assert (record["status"], record["folded_in"], record["version"]) == ("accepted", 2, "v1.1.2")


def test_an_answer_too_old_is_refused_in_the_round_that_meets_it(tmp_path: Path) -> None:
    yard = Yard(tmp_path, rounds=4)
    steering = {"mode": "asynchronous", "buffer_size": 2, "staleness_tolerance": 1}
    change_aggregation_settings(yard.store, lambda now: replace(now, **steering))

    def look(progress: Any) -> None:
        if progress.rounds_done == 2:
            yard.do_duty("truck-0")

    yard.on_progress = look
    assert yard.run() is RunStatus.COMPLETED
    record = yard.receipt("truck-0", 1)
    assert (record["status"], record["folded_in"]) == ("refused", 3)
    assert record["reason"] == "its update is 2 versions old; at most 1 are tolerated"


def test_an_answer_survives_the_death_of_the_aggregator(yard: Yard) -> None:
    committed = yard.store.rounds.commit

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    yard.store.rounds.commit = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        yard.run()
    yard.store.rounds.commit = committed  # type: ignore[method-assign]
    yard.process()
    yard.act = lambda: pytest.fail("the round waits for what it has")
    assert yard.run() is RunStatus.COMPLETED
    assert "truck-0" in yard.lineage()["clients"]
    assert len(yard.store.ledger.entries()) == 3


def test_a_truck_whose_data_changed_after_the_charge_is_not_asked(yard: Yard) -> None:
    charge = yard.accountant.charge

    def then_changed(charges: Any) -> Any:
        report = charge(charges)
        known = yard.store.clients.get("truck-0")
        yard.store.clients.register([replace(known, num_examples=31)])
        return report

    yard.accountant.charge = then_changed  # type: ignore[method-assign]
    assert yard.run() is RunStatus.COMPLETED
    assert yard.task("truck-0") is None
    assert yard.receipt("truck-0")["reason"] == UNCHARGED


def test_nobody_else_gets_a_task_or_brings_an_answer(yard: Yard) -> None:
    results: dict[str, Any] = {}

    def act() -> None:
        content = yard.update("truck-0", yard.task("truck-0"))
        results["virtual"] = yard.put("vehicle-0000", content).status_code
        results["unknown"] = yard.put("nobody", content).status_code
        results["other round"] = yard.put("truck-0", content, 7).json()["detail"]
        for name, client_id in (("own", "truck-0"), ("bound", "vehicle-0000")):
            token = create_token(yard.store, "x", ["device"], now=utc_now(), client_id=client_id).text
            headers = {"Authorization": f"Bearer {token}"}
            asked = [
                yard.http.get("/api/clients/truck-0/task", headers=headers).status_code,
                yard.http.get("/api/clients/truck-0/task/weights", headers=headers).status_code,
                yard.put("truck-0", content, headers=headers).status_code,
                yard.http.get("/api/clients/truck-0/updates/run-0001/1", headers=headers).status_code,
            ]
            results[name] = asked

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert (results["virtual"], results["unknown"]) == (409, 404)
    assert "round 7 of run-0001 did not ask it" in results["other round"]
    assert results["own"] == [200, 200, 202, 200]
    assert results["bound"] == [403] * 4
    assert yard.task("vehicle-0000") is None
    assert yard.http.get("/api/clients/truck-0/task/weights").status_code == 404
    assert yard.http.get("/api/clients/nobody/task").status_code == 404


def test_bytes_beyond_the_bound_are_not_read(tmp_path: Path) -> None:
    yard = Yard(tmp_path, validation={"max_update_bytes": 1000})
    assert yard.put("truck-0", bytes(1001)).status_code == 413
    assert yard.put("truck-0", bytes(1000)).status_code == 409


def test_an_update_left_in_the_mailbox_takes_the_same_way(yard: Yard) -> None:
    mailbox = Mailbox(yard.settings, yard.store)
    mailbox.enable()
    sender = MailboxSender(open_folder(mailbox.url), "truck-0", mailbox.key_of("truck-0"))

    def act() -> None:
        if task := yard.task("truck-0"):
            assert sender.update("run-0001", 9, b"of no round")
            assert sender.update("run-0001", 1, yard.update("truck-0", task))
            assert mailbox.take() == 1

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert "truck-0" in yard.lineage()["clients"]
    state = mailbox.state()
    assert (state.pending, state.not_yet_taken, state.delivered, state.rejected) == (0, 0, 1, 1)
    box = Path(mailbox.url)
    assert [path.name for path in box.rglob("*.safetensors")] == []
    (reason,) = box.rglob("*.reason")
    assert "rejected: round 9 of run-0001 did not ask it" in reason.read_text()


def test_a_task_that_was_answered_is_never_offered_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yard = Yard(tmp_path, rounds=2)
    asked: list[Any] = []
    unlink = Path.unlink

    def asking(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".safetensors":
            asked.append(yard.task("truck-0")["round_index"])
        unlink(path, missing_ok)
        if path.suffix == ".safetensors":
            asked.append(yard.task("truck-0")["round_index"])

    monkeypatch.setattr(Path, "unlink", asking)
    assert yard.run() is RunStatus.COMPLETED
    assert asked == [2, 2]


def test_what_a_removed_client_left_is_deleted_and_its_answer_is_not_awaited(yard: Yard) -> None:
    statuses: list[int] = []

    def act() -> None:
        if task := yard.task("truck-0"):
            content = yard.update("truck-0", task)
            statuses.append(yard.put("truck-0", b"invalid").status_code)
            assert yard.http.delete("/api/clients/truck-0").status_code == 200
            statuses.append(yard.put("truck-0", content).status_code)
        assert list((yard.store.home / "remote").rglob("*.*")) == []

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert statuses == [422, 409]
    assert yard.lineage()["clients"] == ["vehicle-0000", "vehicle-0001"]


@pytest.mark.parametrize(
    "stored", [{}, {"task": {"old": 1}, "encoding": "int8"}, {"task": {}, "encoding": "zip"}, 7, []]
)
def test_a_task_of_an_earlier_version_is_none_and_is_replaced(yard: Yard, stored: Any) -> None:
    for kind in ("remote_task", "remote_histogram"):
        yard.store.metadata.set(f"{kind}/truck-0", stored)
    assert yard.http.get("/api/clients/truck-0/task").json()["task"] is None
    assert yard.http.get("/api/clients/truck-0/task").json()["histogram"] is None
    assert yard.put("truck-0", b"").status_code == 409
    assert yard.run() is RunStatus.COMPLETED
    assert "truck-0" in yard.lineage()["clients"]


def test_a_stored_answer_that_cannot_be_read_is_a_failure_and_not_held_against_the_client(yard: Yard) -> None:
    def act() -> None:
        yard.task("truck-0")
        (yard.store.home / "remote" / "truck-0" / "run-0001.00000001.safetensors").mkdir(parents=True, exist_ok=True)

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert yard.receipt("truck-0")["reason"].startswith("its stored answer cannot be read")
    assert "aggregation" not in yard.lineage()


def test_a_damaged_record_of_an_invalid_answer_is_still_one(yard: Yard) -> None:
    def act() -> None:
        place = yard.store.home / "remote" / "truck-0" / "run-0001.00000001.safetensors"
        if yard.task("truck-0"):
            assert yard.put("truck-0", b"invalid").status_code == 422
            assert yard.put("truck-0", b"invalid").status_code == 422
            assert yard.put("truck-0", b"another").status_code == 409
            place.write_bytes(place.read_bytes()[:20])

    yard.act = act
    assert yard.run() is RunStatus.COMPLETED
    assert yard.receipt("truck-0")["status"] == "refused"
    assert list(yard.lineage()["aggregation"]["refused"]) == ["truck-0"]
