"""Long operations: order, progress, cancellation, and what becomes of them when the process dies."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from fedvit.errors import BudgetExhaustedError, ConflictError, ModelError, NotFoundError
from fedvit.operations.runner import OperationKind, OperationRunner, Task
from fedvit.store.store import Store
from fedvit.types import OperationStatus

WAIT_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path) as opened:
        yield opened


@pytest.fixture
def started(store: Store) -> Iterator[Callable[..., OperationRunner]]:
    runners = []

    def start(**kinds: OperationKind) -> OperationRunner:
        runner = OperationRunner(store, kinds)
        runner.start()
        runners.append(runner)
        return runner

    yield start
    for runner in runners:
        runner.close()


def double(task: Task) -> dict[str, Any]:
    task.report(0.5, "doubling")
    return {"doubled": 2 * task.params["number"]}


def test_an_operation_is_done_and_its_result_stays(started: Callable[..., OperationRunner], store: Store) -> None:
    runner = started(double=OperationKind(double))
    operation = runner.submit("double", {"number": 21})
    assert operation.status in (OperationStatus.QUEUED, OperationStatus.RUNNING)
    ended = runner.wait(operation.operation_id, WAIT_S)
    assert (ended.status, ended.progress, ended.result) == (OperationStatus.SUCCEEDED, 1.0, {"doubled": 42})
    assert ended.started_at is not None
    assert ended.ended_at is not None
    assert ended.created_at <= ended.started_at <= ended.ended_at
    assert store.operations.all(OperationStatus.SUCCEEDED) == [ended]
    assert store.operations.all(OperationStatus.QUEUED, OperationStatus.RUNNING) == []


def test_progress_is_seen_while_it_works(started: Callable[..., OperationRunner], store: Store) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def work(task: Task) -> dict[str, Any]:
        task.report(0.25, "a quarter")
        reached.set()
        assert go_on.wait(WAIT_S)
        return {}

    runner = started(slow=OperationKind(work))
    operation = runner.submit("slow", {})
    assert reached.wait(WAIT_S)
    row = store.operations.get(operation.operation_id)
    assert (row.status, row.progress, row.stage) == (OperationStatus.RUNNING, 0.25, "a quarter")
    go_on.set()
    assert runner.wait(operation.operation_id, WAIT_S).status is OperationStatus.SUCCEEDED


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ModelError("It is no model.", cure="Choose one."), ("invalid-model", "It is no model.", "Choose one.")),
        (KeyError("x"), ("internal-error", "KeyError: 'x'", "See the aggregator's log.")),
    ],
)
def test_a_failure_names_its_reason_and_the_next_one_goes_on(
    started: Callable[..., OperationRunner], error: Exception, expected: tuple[str, str, str]
) -> None:
    def fail(_: Task) -> dict[str, Any]:
        raise error

    runner = started(fail=OperationKind(fail), double=OperationKind(double))
    failed = runner.wait(runner.submit("fail", {}).operation_id, WAIT_S)
    assert failed.status is OperationStatus.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["message"], failed.error["cure"]) == expected
    after = runner.wait(runner.submit("double", {"number": 1}).operation_id, WAIT_S)
    assert after.status is OperationStatus.SUCCEEDED


def test_a_running_operation_is_cancelled_at_its_next_step_and_a_queued_one_never_begins(
    started: Callable[..., OperationRunner],
) -> None:
    begun, steps = threading.Event(), []

    def work(task: Task) -> dict[str, Any]:
        steps.append("begun")
        begun.set()
        assert task.cancelled.wait(WAIT_S)
        task.report(0.5, "never reached")
        steps.append("went on")
        return {}

    runner = started(slow=OperationKind(work))
    running, queued = runner.submit("slow", {}), runner.submit("slow", {})
    assert begun.wait(WAIT_S)
    assert runner.cancel(queued.operation_id).status is OperationStatus.CANCELLED
    assert runner.cancel(running.operation_id).cancel_requested
    ended = runner.wait(running.operation_id, WAIT_S)
    assert (ended.status, ended.result, ended.error) == (OperationStatus.CANCELLED, None, None)
    assert steps == ["begun"]
    assert runner.cancel(running.operation_id) == ended


def test_what_cannot_do_anything_is_refused_and_leaves_no_trace(
    started: Callable[..., OperationRunner], store: Store
) -> None:
    def refuse(_: Mapping[str, Any]) -> None:
        raise BudgetExhaustedError("There is nothing left.")

    runner = started(train=OperationKind(double, refuse))
    with pytest.raises(BudgetExhaustedError):
        runner.submit("train", {})
    with pytest.raises(NotFoundError):
        runner.submit("sing", {})
    with pytest.raises(NotFoundError):
        runner.cancel("op-unknown")
    assert store.operations.all() == []


def test_a_repeated_key_starts_nothing_new(started: Callable[..., OperationRunner], store: Store) -> None:
    admitted = []
    runner = started(double=OperationKind(double, admitted.append))
    first = runner.submit("double", {"number": 1}, "key-1")
    runner.wait(first.operation_id, WAIT_S)
    again = runner.submit("double", {"number": 1}, "key-1")
    assert again.operation_id == first.operation_id
    assert len(admitted) == 1
    with pytest.raises(ConflictError):
        runner.submit("double", {"number": 2}, "key-1")
    assert len(store.operations.all()) == 1


def test_after_a_restart_every_operation_has_a_definite_end(
    started: Callable[..., OperationRunner], store: Store
) -> None:
    def left_behind(kind: str, *, running: bool) -> str:
        name = store.operations.create(kind, {"number": 4})[0].operation_id
        if running:
            store.operations.begin(name)
        return name

    once, again = left_behind("once", running=True), left_behind("double", running=True)
    cancelled, queued = left_behind("double", running=True), left_behind("once", running=False)
    gone = left_behind("forgotten", running=False)
    store.operations.cancel(cancelled)
    done: list[str] = []

    def once_only(task: Task) -> dict[str, Any]:
        done.append(task.operation.operation_id)
        return {}

    runner = started(once=OperationKind(once_only), double=OperationKind(double, repeatable=True))
    interrupted = runner.wait(once, WAIT_S)
    assert interrupted.status is OperationStatus.FAILED
    assert interrupted.error is not None
    assert interrupted.error["code"] == "interrupted"
    assert runner.wait(again, WAIT_S).result == {"doubled": 8}
    assert runner.wait(cancelled, WAIT_S).status is OperationStatus.CANCELLED
    assert runner.wait(queued, WAIT_S).status is OperationStatus.SUCCEEDED
    assert runner.wait(gone, WAIT_S).status is OperationStatus.FAILED
    assert done == [queued]


def test_a_closed_runner_leaves_the_queue_to_the_next(store: Store) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def work(_: Task) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(WAIT_S)
        return {}

    runner = OperationRunner(store, {"slow": OperationKind(work)})
    runner.start()
    first, second = runner.submit("slow", {}), runner.submit("slow", {})
    assert begun.wait(WAIT_S)
    closer = threading.Thread(target=runner.close)
    closer.start()
    go_on.set()
    closer.join(WAIT_S)
    assert store.operations.get(first.operation_id).status is OperationStatus.SUCCEEDED
    assert store.operations.get(second.operation_id).status is OperationStatus.QUEUED
