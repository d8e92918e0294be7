"""Long operations: a thread that runs them one after another, and their recovery after a restart; periodic tasks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from fedvit.errors import ConflictError, FedvitError, NotFoundError
from fedvit.store.store import Store
from fedvit.types import Operation, OperationStatus

_LOG = logging.getLogger(__name__)
_UNFINISHED = (OperationStatus.QUEUED, OperationStatus.RUNNING)
STOP_TIMEOUT_S, JOIN_S = 5.0, 10.0
_Result = TypeVar("_Result")


class OperationCancelled(Exception):
    """The operation was cancelled; its work must not catch this."""


class Task:
    """A running operation, as it was at the beginning: its parameters, progress reports and cancellation."""

    def __init__(self, operation: Operation, store: Store, cancelled: threading.Event) -> None:
        self.operation, self.params = operation, operation.params
        self.cancelled, self._store = cancelled, store

    def report(self, progress: float, stage: str) -> None:
        """Store the present stage and the share that is done, unless :meth:`check` raises."""
        self.check()
        self._store.operations.advance(self.operation.operation_id, progress, stage)

    def check(self) -> None:
        """Raise OperationCancelled if the operation was cancelled."""
        if self.cancelled.is_set():
            raise OperationCancelled


@dataclass(frozen=True, slots=True)
class OperationKind:
    """A kind of operation.

    Attributes:
        work: does the work and returns the result, JSON types only.
        admit: raises the error of a request that would have no effect.
        repeatable: the work may be run again from the beginning after the process died.
        urgent: does not wait for other operations, and is not continued by another process.
    """

    work: Callable[[Task], Mapping[str, Any]]
    admit: Callable[[Mapping[str, Any]], None] = lambda _: None
    repeatable: bool = False
    urgent: bool = False


class OperationRunner:
    """One thread that runs one operation at a time, in the order of submission; urgent ones run beside it."""

    def __init__(self, store: Store, kinds: Mapping[str, OperationKind]) -> None:
        self._store, self._kinds = store, dict(kinds)
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended = threading.Condition()
        self._closing = threading.Event()
        self._cancelled: dict[str, threading.Event] = {}
        self._thread = threading.Thread(target=self._run, name="operations", daemon=True)

    def start(self) -> None:
        """Queue or end the unfinished operations of the process before, then start the thread."""
        for operation in reversed(self._store.operations.all(*_UNFINISHED)):
            self._recover(operation)
        self._thread.start()

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        """Queue an operation, or return the one that was queued under the same key.

        Raises:
            NotFoundError: there is no such kind.
            ConflictError: the key was used for another request.
            FedvitError: ``admit`` raised it; nothing was queued.
        """
        if kind not in self._kinds:
            raise NotFoundError(f"There is no operation {kind!r}.", cure=f"There are: {', '.join(self._kinds)}.")
        if call_key is None or not self._store.operations.key_exists(call_key):
            self._kinds[kind].admit(params)
        operation, created = self._store.operations.create(kind, params, call_key=call_key)
        if created and self._kinds[kind].urgent:
            threading.Thread(target=self._run_one, args=(operation.operation_id,), daemon=True).start()
        elif created:
            self._queue.put(operation.operation_id)
        return operation

    def cancel(self, operation_id: str) -> Operation:
        """Cancel a queued operation at once and a running one at its next step; harmless after its end.

        Raises:
            NotFoundError: no such operation.
        """
        with self._lock:
            operation = self._store.operations.cancel(operation_id)
            if operation_id in self._cancelled:
                self._cancelled[operation_id].set()
        return operation

    def wait(self, operation_id: str, timeout_s: float) -> Operation:
        """The operation once it has ended, or its state after ``timeout_s``."""
        self.wait_until(lambda: self._store.operations.get(operation_id).status.ended, timeout_s)
        return self._store.operations.get(operation_id)

    def wait_until(self, condition: Callable[[], _Result], timeout_s: float) -> _Result:
        """The first true ``condition()``, evaluated whenever an operation ends, or its value after ``timeout_s``."""
        with self._ended:
            return self._ended.wait_for(condition, timeout_s)

    def close(self) -> None:
        """End the thread after the present operation; the next start continues or ends all others."""
        self._closing.set()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(STOP_TIMEOUT_S)

    def _recover(self, operation: Operation) -> None:
        kind = self._kinds.get(operation.kind)
        if operation.cancel_requested:
            self._store.operations.end(operation.operation_id, OperationStatus.CANCELLED)
        elif kind is not None and not kind.urgent and (kind.repeatable or operation.status is OperationStatus.QUEUED):
            self._queue.put(operation.operation_id)
        else:
            error = ConflictError("The process ended in the middle of the operation.", cure="Ask for it again.")
            self._store.operations.end(
                operation.operation_id, OperationStatus.FAILED, error=_described(error, "interrupted")
            )

    def _run(self) -> None:
        while (operation_id := self._queue.get()) is not None and not self._closing.is_set():
            self._run_one(operation_id)

    def _run_one(self, operation_id: str) -> None:
        try:
            self._perform(operation_id)
        except Exception:  # The store cannot be used: the next start ends the operation.
            _LOG.exception("operation %s", operation_id)
        with self._ended:
            self._ended.notify_all()

    def _perform(self, operation_id: str) -> None:
        with self._lock:
            operation = self._store.operations.begin(operation_id)
            cancelled = self._cancelled[operation_id] = threading.Event()
        try:
            if operation.status is OperationStatus.RUNNING and not operation.cancel_requested:
                self._work(Task(operation, self._store, cancelled))
            else:
                self._store.operations.end(operation_id, OperationStatus.CANCELLED)
        finally:
            with self._lock:
                del self._cancelled[operation_id]

    def _work(self, task: Task) -> None:
        name = task.operation.operation_id
        try:
            result = self._kinds[task.operation.kind].work(task)
        except OperationCancelled:
            self._store.operations.end(name, OperationStatus.CANCELLED)
        except FedvitError as error:
            self._store.operations.end(name, OperationStatus.FAILED, error=_described(error))
        except Exception as error:
            _LOG.exception("operation %s (%s)", name, task.operation.kind)
            unexpected = FedvitError(f"{type(error).__name__}: {error}", cure="See the aggregator's log.")
            self._store.operations.end(name, OperationStatus.FAILED, error=_described(unexpected))
        else:
            self._store.operations.end(name, OperationStatus.SUCCEEDED, result=result)


def _described(error: FedvitError, code: str | None = None) -> dict[str, Any]:
    return {"code": code or error.code, "message": error.message, "cure": error.cure}


class PeriodicTasks:
    """Calls ``tasks`` one after another, every ``interval_s`` seconds; a task that fails is called again next time."""

    def __init__(self, interval_s: float, *tasks: Callable[[], object]) -> None:
        self._interval_s, self._tasks = interval_s, tasks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="periodic-tasks", daemon=True)

    def start(self) -> None:
        """Start the thread; the first calls come after one interval."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the present calls; harmless when it was never started."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            for task in self._tasks:
                try:
                    task()
                except Exception:
                    _LOG.exception("the periodic task %s failed", getattr(task, "__name__", task))
