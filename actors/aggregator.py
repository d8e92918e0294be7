"""The aggregator: the actor that runs the training loop in a thread of its own and answers meanwhile."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from actors.handles import AccountantHandle, RayFleet
from fedvit.config import settings_from_json
from fedvit.monitoring.training import TrainingMetrics
from fedvit.rounds.coordinator import Coordinator
from fedvit.store.store import Store
from fedvit.training.server import ServerModel
from fedvit.types import Run, RunStatus, TrainingProgress


class Aggregator:
    """A shell round :class:`fedvit.rounds.coordinator.Coordinator`.

    An aggregator that died in the middle of a run continues it by itself when Ray restarts it.
    """

    def __init__(self, settings_json: str, namespace: str) -> None:
        self._settings = settings_from_json(settings_json)
        # By name, not by handle: an actor that is restarted finds them again.
        self._accountant = AccountantHandle.connect(namespace)
        self._fleet = RayFleet.connect(
            namespace, self._settings.ray.proxies, timeout_s=self._settings.training.round_timeout_s
        )
        self._metrics = TrainingMetrics()
        self._lock = threading.Lock()
        self._loop: Future[Run] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="training-loop")
        # Built in the background, so that a fault here reaches the caller of `prepare` as itself.
        self._coordinator: Future[Coordinator] = self._thread.submit(self._build)

    def prepare(self) -> int:
        """Wait until the model is built and the state is read; return the process id.

        Raises:
            DataError, ModelError, StateError: the settings name something that cannot be used.
        """
        self._coordinator.result()
        return os.getpid()

    def start_training(self) -> TrainingProgress:
        """Begin or continue the run that the settings describe; harmless when it is under way."""
        coordinator = self._coordinator.result()
        with self._lock:
            if self._loop is None or self._loop.done():
                coordinator.announce()
                self._loop = self._thread.submit(coordinator.run)
        return coordinator.progress()

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""
        self._coordinator.result().request_stop()
        return self.progress()

    def progress(self) -> TrainingProgress:
        """Where the loop stands.

        Raises:
            Exception: the fault that ended the loop, where it was not one that fedvit foresees.
        """
        if self._loop is not None and self._loop.done():
            self._loop.result()
        return self._coordinator.result().progress()

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop rests, or after ``timeout_s``."""
        if self._loop is not None:
            wait([self._loop], timeout=timeout_s)
        return self.progress()

    def _build(self) -> Coordinator:
        # More threads than free cores make torch wait for itself.
        torch.set_num_threads(self._settings.ray.threads_per_proxy)
        store = Store.open(self._settings.home)

        def publish(progress: TrainingProgress) -> None:
            self._metrics.publish(
                progress,
                self._accountant.budget(),
                active=store.count_clients(active=True),
                total=store.count_clients(),
            )

        coordinator = Coordinator(
            settings=self._settings,
            store=store,
            accountant=self._accountant,
            fleet=self._fleet,
            model=ServerModel(self._settings),
            on_progress=publish,
        )
        publish(coordinator.progress())
        latest = store.latest_run()
        if latest is not None and latest.status is RunStatus.RUNNING:
            self._loop = self._thread.submit(coordinator.run)
        return coordinator
