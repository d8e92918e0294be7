"""The aggregator without Ray: training loop, long operations and the registry's changes in one process.

The aggregator actor is a shell round it; tests use it as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from fedvit.cohort.connectivity import connectivity
from fedvit.config import Settings
from fedvit.errors import ConflictError
from fedvit.metrics.exposition import gauge
from fedvit.metrics.targets import ADDRESS, VEHICLES, Target, write_targets
from fedvit.operations.mailbox import Mailbox
from fedvit.operations.optimize import Optimizer
from fedvit.operations.periodic_tasks import PeriodicTasks
from fedvit.operations.runner import OperationCancelled, OperationKind, OperationRunner, Task
from fedvit.ports import AccountantPort, ExportedModel, FleetPort, ProxyReport, ServerModelPort
from fedvit.registry.weights import stored_weights
from fedvit.rounds.coordinator import Coordinator
from fedvit.rounds.steering import RunRequest, run_request
from fedvit.store.backup import write_backup
from fedvit.store.store import Store
from fedvit.types import ModelVersion, Operation, OperationStatus, Run, RunStatus, TrainingProgress, Variant, utc_now

LOOK_S = 0.1
SHUTDOWN = "shutdown"


class LocalAggregator:
    """Implements :class:`fedvit.ports.AggregatorPort`; the loop has a thread of its own, and so have operations.

    Args:
        on_progress: told after every event of the loop, from its thread.
        system_id: names the running system, over restarts of this process; a system that is started anew has another.
        on_connected: told every few seconds how many clients are connected.
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
    ) -> None:
        self._settings = settings
        self._store = store
        self._system_id = system_id
        self._fleet = fleet
        self._model = model
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
        self._loop: Future[Run] | None = None
        self._shutting_down = threading.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-loop")
        self._on_connected = on_connected
        self._mailbox = Mailbox(settings, store)
        looks = (self._mailbox.take, self._count_connected, self._count_messages, self._name_vehicles)
        self._watch = PeriodicTasks(settings.fleet.check_interval_s, *looks)
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
        """Take up what the last process was doing: the run under way, and long operations."""
        latest = self._store.runs.latest()
        if latest is not None and latest.status is RunStatus.RUNNING:
            self.start_training()
        self._operations.start()
        self._watch.start()

    def close(self) -> None:
        """End all threads after what they are doing; a start of another process takes it up."""
        self._watch.close()
        self._coordinator.request_stop()
        self._operations.close()
        self._thread.shutdown()

    def start_training(self) -> TrainingProgress:
        """Begin or continue the run that the settings describe; harmless when it is under way.

        Raises:
            ConflictError: the system is shutting down, or the fleet has outgrown what the settings promise it.
        """
        if self._shutting_down.is_set():
            raise ConflictError("The system is shutting down.", cure="Start it again: `fedvit up`.")
        with self._lock:
            if self._rests():
                # Said to whoever asks for it, and not by a loop that ends with it to everybody who looks later.
                self._coordinator.check_fleet()
            self._start()
        return self._coordinator.progress()

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""
        self._coordinator.request_stop()
        return self.progress()

    def progress(self) -> TrainingProgress:
        """Where the loop stands.

        Raises:
            Exception: the fault that ended the loop, where it was not one that fedvit foresees.
        """
        if self._loop is not None and self._loop.done():
            self._loop.result()
        return self._coordinator.progress()

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop rests, or after ``timeout_s``."""
        if self._loop is not None:
            wait([self._loop], timeout=timeout_s)
        return self.progress()

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now."""
        return self._fleet.proxies_alive()

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str | None = None) -> Operation:
        """Queue a long operation; see :class:`fedvit.ports.AggregatorPort`."""
        return self._operations.submit(kind, params, call_key)

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early; harmless when it has ended."""
        return self._operations.cancel(operation_id)

    def wait_operation(self, operation_id: str, timeout_s: float) -> Operation:
        """The operation once it has ended, or as it stands after ``timeout_s``."""
        return self._operations.wait(operation_id, timeout_s)

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until this system was told to go down; how, or None after ``timeout_s``."""
        return self._operations.wait_until(self._shutdown_mode, timeout_s)

    def rollback(self, version: str, *, force: bool = False, reason: str | None = None) -> str:
        """Make an older version's content current again, as a new version; return its name."""
        return self._publisher.rollback(version, force=force, reason=reason, export=self._export).version

    def switch_variant(self, variant: Variant) -> str:
        """Move the fleet to another variant of the current version; return the version's name."""
        return self._publisher.switch(variant).version

    def _count_connected(self) -> None:
        timeout_s = self._settings.fleet.heartbeat_timeout_s
        proxies = self.proxies_alive()
        fleet = connectivity(self._store.clients.last_contacts(hosted=False), proxies, utc_now(), timeout_s)
        # Of virtual clients there may be a million: they are counted, not looked at.
        hosted = self._store.clients.count_virtual() if any(proxies.alive.values()) else 0
        self._on_connected(fleet.connected + max(0, hosted - len(proxies.stranded)))

    def _count_messages(self) -> None:
        if self._mailbox.enabled():
            gauge("queue_depth").labels("mailbox").set(self._mailbox.state().pending)

    def _name_vehicles(self) -> None:
        """Keep the list of vehicles that Prometheus is to ask."""
        said = self._store.clients.metrics_addresses() if self._settings.fleet.scrape_vehicles else {}
        good = {client_id: address for client_id, address in said.items() if ADDRESS.fullmatch(address)}
        # The name is the series' instance, not the address: that may be anybody's.
        targets = [Target(good[name], {"instance": name, "device": name}) for name in sorted(good)]
        write_targets(self._store.home, VEHICLES, targets)

    def _export(self, version: ModelVersion) -> dict[Variant, ExportedModel]:
        weights = stored_weights(self._store, version.weights_digest)
        return {variant: self._model.export(weights, variant) for variant in self._publisher.variants()}

    # --- the loop ----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        # A run that an operation begins while the system shuts down is taken up by the next start.
        if self._rests() and not self._shutting_down.is_set():
            self._coordinator.announce()
            self._loop = self._thread.submit(self._coordinator.run)

    def _rests(self) -> bool:
        return self._loop is None or self._loop.done()

    # --- retrain and restart -----------------------------------------------------------------------------------------

    def _admit_run(self, params: Mapping[str, Any]) -> None:
        self._coordinator.check_new_run(self._order("", params))

    def _begin_run(self, task: Task) -> dict[str, Any]:
        """End the present run after its round, then begin the one that was ordered."""
        name = task.operation.operation_id
        before = run_request(self._store)
        if before is not None and before.operation_id == name:
            return self._result(before, self._restarted(before))
        order = self._order(name, task.params)
        task.report(0.1, "waiting for the round under way to end")
        run = self._replace_run(task, order)
        return self._result(order, run)

    def _replace_run(self, task: Task, order: RunRequest) -> Run:
        was_running = not self._rests()
        try:
            while True:
                self._rest(task)
                # Ordered before the lock is given back: nobody may start the old run in between.
                with self._lock:
                    if self._rests():
                        self._coordinator.check_new_run(order)
                        task.report(0.8, "beginning the new run")
                        run = self._coordinator.begin(order)
                        self._start()
                        return run
        except OperationCancelled:
            if was_running:
                with self._lock:
                    self._start()
            raise

    def _restarted(self, order: RunRequest) -> Run:
        with self._lock:
            run = self._coordinator.begin(order) if self._rests() else self._store.runs.latest()
            self._start()
        assert run is not None
        return run

    def _rest(self, task: Task) -> None:
        while not self._rests():
            task.check()
            # Asked again each time: a loop that was only just begun forgets what was asked before.
            self._coordinator.request_stop()
            assert self._loop is not None
            wait([self._loop], timeout=LOOK_S)

    def _order(self, operation_id: str, params: Mapping[str, Any]) -> RunRequest:
        base = None
        if params.get("strategy") == "fine_tune":
            current = self._store.releases.current()
            if current is None:
                raise ConflictError("There is no release to fine-tune.", cure='Ask for "full_retrain".')
            base = current.version
        told = ", ".join(f"{key}={value}" for key, value in params.items())
        selection = params.get("client_selection")
        return RunRequest(0, operation_id, f"Another run was ordered ({told}).", base, selection)

    def _result(self, order: RunRequest, run: Run) -> dict[str, Any]:
        return {
            "run_id": run.run_id,
            "base_version": order.base_version,
            "client_selection": run.config["order"]["client_selection"],
            "rounds_total": run.rounds_total,
        }

    # --- shutting down -----------------------------------------------------------------------------------------------

    def _admit_shutdown(self, params: Mapping[str, Any]) -> None:
        if params["mode"] == "graceful" and self._shutting_down.is_set():
            raise ConflictError("The system is shutting down already.", cure='To wait no longer, ask for "force".')

    def _shut_down(self, task: Task) -> dict[str, Any]:
        """Bring the state into safety. Once this has succeeded, whoever started the system ends it."""
        mode = task.params["mode"]
        told: dict[str, Any] = {"mode": mode, "system_id": self._system_id, "archive": None, "sha256": None}
        if mode == "graceful":
            told |= self._at_rest(task)
        progress = self._coordinator.progress()
        return told | {"run_id": progress.run_id, "rounds_done": progress.rounds_done}

    def _at_rest(self, task: Task) -> dict[str, Any]:
        was_running = not self._rests()
        self._shutting_down.set()
        try:
            task.report(0.1, "waiting for the round under way to end")
            self._rest(task)
            if not task.params["save_state"]:
                return {}
            task.report(0.6, "writing the backup archive")
            archive, sha256 = write_backup(self._store.home, self._store.home / "backups")
            return {"archive": str(archive), "sha256": sha256}
        except BaseException:
            self._shutting_down.clear()
            if was_running:
                self.start_training()
            raise

    def _shutdown_mode(self) -> str | None:
        # Read from the state: this process may have been restarted after the operation was given its end.
        for operation in self._store.operations.all(OperationStatus.SUCCEEDED):
            result = operation.result or {}
            if operation.kind == SHUTDOWN and result.get("system_id") == self._system_id:
                return str(result["mode"])
        return None
