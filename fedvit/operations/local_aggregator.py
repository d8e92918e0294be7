"""The aggregator of one process: training loop, long operations and changes of the served model.

The aggregator actor runs it on Ray; tests use it directly.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from fedvit.clock import SYSTEM_CLOCK
from fedvit.cohort.connectivity import connectivity
from fedvit.config import Settings
from fedvit.errors import ConflictError, FedvitError
from fedvit.metrics.exposition import gauge
from fedvit.metrics.targets import ADDRESS, VEHICLES, Target, write_targets
from fedvit.operations.mailbox import Mailbox
from fedvit.operations.optimize import Optimizer
from fedvit.operations.runner import OperationCancelled, OperationKind, OperationRunner, PeriodicTasks, Task
from fedvit.ports import AccountantPort, ClockPort, ExportedModel, FleetPort, ProxyReport, ServerModelPort
from fedvit.registry.publisher import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import RunRequest, run_request
from fedvit.store.backup import write_backup
from fedvit.store.store import Store
from fedvit.types import ModelVersion, Operation, OperationStatus, Run, RunStatus, TrainingProgress, Variant

_LOG = logging.getLogger(__name__)
STOP_POLL_S = 0.1
SHUTDOWN = "shutdown"


class LocalAggregator:
    """Implements :class:`fedvit.ports.AggregatorPort`, with one thread for the training loop and one for operations.

    Args:
        on_progress: called after every event of the loop, from its thread.
        system_id: identifies the running system; it stays the same when this process is restarted, and a new start of
            the system has another one.
        on_connected: called every few seconds with the number of connected clients.
        on_health: see :class:`fedvit.rounds.coordinator.Coordinator`.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        store: Store,
        accountant: AccountantPort,
        fleet: FleetPort,
        model: ServerModelPort,
        on_progress: Callable[[TrainingProgress], None] = lambda _: None,
        system_id: str = "local",
        on_connected: Callable[[int], None] = lambda _: None,
        on_health: Callable[[float | None, float | None], None] = lambda quality, drift: None,
        clock: ClockPort = SYSTEM_CLOCK,
    ) -> None:
        self._settings, self._store, self._system_id = settings, store, system_id
        self._fleet, self._model, self._on_connected, self._clock = fleet, model, on_connected, clock
        self._coordinator = Coordinator(
            settings=settings,
            store=store,
            accountant=accountant,
            fleet=fleet,
            model=model,
            on_progress=on_progress,
            on_health=on_health,
        )
        self._publisher = self._coordinator.publisher
        self._lock = threading.Lock()
        self._loop: Future[None] | None = None
        self._shutting_down = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-loop")
        self._mailbox = Mailbox(settings, store, clock)
        tasks = (self._mailbox.take, self._count_connected, self._count_messages, self._list_vehicles)
        self._periodic_tasks = PeriodicTasks(settings.fleet.check_interval_s, *tasks)
        optimizer = Optimizer(settings, store, self._publisher, model)
        new_run = OperationKind(self._begin_run, self._admit_run, repeatable=True)
        self._operations = OperationRunner(
            store,
            {
                "optimize": OperationKind(optimizer.work, optimizer.admit, repeatable=True),
                "retrain": new_run,
                "restart": new_run,
                SHUTDOWN: OperationKind(self._shut_down, self._admit_shutdown, urgent=True),
            },
        )

    def resume(self) -> None:
        """Continue the run and the long operations of the process before."""
        latest = self._store.runs.latest()
        if latest is not None and latest.status is RunStatus.RUNNING:
            self.start_training()
        self._operations.start()
        self._periodic_tasks.start()

    def close(self) -> None:
        """End all threads; the next process continues their work."""
        self._periodic_tasks.close()
        self._coordinator.request_stop()
        self._operations.close()
        self._thread.shutdown()

    def start_training(self) -> TrainingProgress:
        if self._shutting_down.is_set():
            raise ConflictError("The system is shutting down.", cure="Start it again: `fedvit up`.")
        with self._lock:
            if self._is_idle():
                # Here, so that the caller gets the error, instead of in the loop, where it would end the run.
                self._coordinator.lifecycle.check_fleet()
            self._start()
        return self._coordinator.progress()

    def stop_training(self) -> TrainingProgress:
        self._coordinator.request_stop()
        return self.progress()

    def progress(self) -> TrainingProgress:
        if self._loop is not None and self._loop.done():
            self._loop.result()
        return self._coordinator.progress()

    def wait(self, timeout_s: float) -> TrainingProgress:
        if self._loop is not None:
            wait([self._loop], timeout=timeout_s)
        return self.progress()

    def proxies_alive(self) -> ProxyReport:
        return self._fleet.proxies_alive()

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        return self._operations.submit(kind, params, call_key)

    def cancel_operation(self, operation_id: str) -> Operation:
        return self._operations.cancel(operation_id)

    def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """The operation once it has ended, or its state after ``timeout_s``."""
        return self._operations.wait(operation_id, timeout_s)

    def await_shutdown(self, timeout_s: float) -> str | None:
        return self._operations.wait_until(self._shutdown_mode, timeout_s)

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        return self._publisher.rollback(version, force=force, reason=reason, export=self._export).version

    def switch_variant(self, variant: Variant) -> str:
        return self._publisher.switch(variant).version

    def _count_connected(self) -> None:
        timeout_s = self._settings.fleet.heartbeat_timeout_s
        proxies = self.proxies_alive()
        fleet = connectivity(
            self._store.clients.last_contacts(include_virtual=False), proxies, self._clock.now(), timeout_s
        )
        # Counted in the database: there may be a million virtual clients.
        hosted = self._store.clients.count_virtual() if any(proxies.alive.values()) else 0
        self._on_connected(fleet.connected + max(0, hosted - len(proxies.stranded)))

    def _count_messages(self) -> None:
        if self._mailbox.enabled():
            gauge("queue_depth").labels("mailbox").set(self._mailbox.state().pending)

    def _list_vehicles(self) -> None:
        """Write the list of vehicles that Prometheus scrapes."""
        addresses = self._store.clients.metrics_addresses() if self._settings.fleet.scrape_vehicles else {}
        good = {client_id: address for client_id, address in addresses.items() if ADDRESS.fullmatch(address)}
        # The label `instance` is the client's name: several vehicles may report the same address.
        targets = [Target(good[name], {"instance": name, "device": name}) for name in sorted(good)]
        write_targets(self._store.home, VEHICLES, targets)

    def _export(self, version: ModelVersion) -> dict[Variant, ExportedModel]:
        weights = stored_weights(self._store, version.weights_digest)
        return {variant: self._model.export(weights, variant) for variant in self._publisher.variants()}

    def _start(self) -> None:
        # A run that an operation begins while the system shuts down is continued by the next start.
        if self._is_idle() and not self._shutting_down.is_set():
            self._coordinator.announce()
            self._loop = self._thread.submit(self._run)

    def _run(self) -> None:
        """Run the loop. A fault of the program ends the run with status FAILED, and does not keep the progress back."""
        try:
            self._coordinator.run()
        except FedvitError:
            raise
        except Exception:
            _LOG.exception("the training loop ended with a fault of the program")
            self._coordinator.show_stored()

    def _is_idle(self) -> bool:
        return self._loop is None or self._loop.done()

    def _admit_run(self, params: Mapping[str, Any]) -> None:
        self._coordinator.lifecycle.check_new_run(self._run_request("", params))

    def _begin_run(self, task: Task) -> dict[str, Any]:
        """End the present run after its round, then begin the requested one."""
        name = task.operation.operation_id
        before = run_request(self._store)
        if before is not None and before.operation_id == name:
            return self._result(before, self._restarted(before))
        request = self._run_request(name, task.params)
        task.report(0.1, "waiting for the round under way to end")
        return self._result(request, self._replace_run(task, request))

    def _replace_run(self, task: Task, request: RunRequest) -> Run:
        was_running = not self._is_idle()
        try:
            while True:
                self._stop_loop(task)
                # Begun under the lock, so that no other thread can start the old run in between.
                with self._lock:
                    if self._is_idle():
                        self._coordinator.lifecycle.check_new_run(request)
                        task.report(0.8, "beginning the new run")
                        run = self._coordinator.begin(request)
                        self._start()
                        return run
        except OperationCancelled:
            if was_running:
                with self._lock:
                    self._start()
            raise

    def _restarted(self, request: RunRequest) -> Run:
        with self._lock:
            run = self._coordinator.begin(request) if self._is_idle() else self._store.runs.latest()
            self._start()
        assert run is not None
        return run

    def _stop_loop(self, task: Task) -> None:
        while not self._is_idle():
            task.check()
            # Requested again each time: a loop that has just begun ignores earlier requests.
            self._coordinator.request_stop()
            assert self._loop is not None
            wait([self._loop], timeout=STOP_POLL_S)

    def _run_request(self, operation_id: str, params: Mapping[str, Any]) -> RunRequest:
        base = None
        if params.get("strategy") == "fine_tune":
            # A model without an export has no releases.
            current = self._store.releases.current() if self._model.exports else self._store.versions.latest()
            if current is None:
                raise ConflictError("There is no version to fine-tune.", cure='Ask for "full_retrain".')
            base = current.version
        given = ", ".join(f"{key}={value}" for key, value in params.items())
        selection = params.get("client_selection")
        return RunRequest(0, operation_id, f"Another run was ordered ({given}).", base, selection)

    def _result(self, request: RunRequest, run: Run) -> dict[str, Any]:
        return {
            "run_id": run.run_id,
            "base_version": request.base_version,
            "client_selection": run.config["order"]["client_selection"],
            "rounds_total": run.rounds_total,
        }

    def _admit_shutdown(self, params: Mapping[str, Any]) -> None:
        if params["mode"] == "graceful" and self._shutting_down.is_set():
            raise ConflictError("The system is shutting down already.", cure='To wait no longer, ask for "force".')

    def _shut_down(self, task: Task) -> dict[str, Any]:
        """Save the state; after that the process that started the system ends it."""
        mode = task.params["mode"]
        result: dict[str, Any] = {"mode": mode, "system_id": self._system_id, "archive": None, "sha256": None}
        if mode == "graceful":
            result |= self._save_state(task)
        progress = self._coordinator.progress()
        return result | {"run_id": progress.run_id, "rounds_done": progress.rounds_done}

    def _save_state(self, task: Task) -> dict[str, Any]:
        was_running = not self._is_idle()
        self._shutting_down.set()
        try:
            task.report(0.1, "waiting for the round under way to end")
            self._stop_loop(task)
            if not task.params["save_state"]:
                return {}
            task.report(0.6, "writing the backup archive")
            backup = write_backup(self._store.home, self._store.home / "backups", self._settings.backup)
            return {"archive": str(backup.archive), "sha256": backup.sha256}
        except BaseException:
            self._shutting_down.clear()
            if was_running:
                self.start_training()
            raise

    def _shutdown_mode(self) -> str | None:
        # From the store: this process may have been restarted since the operation ended.
        for operation in self._store.operations.all(OperationStatus.SUCCEEDED):
            result = operation.result or {}
            if operation.kind == SHUTDOWN and result.get("system_id") == self._system_id:
                return str(result["mode"])
        return None
