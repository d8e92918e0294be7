"""The aggregator: the actor that trains and does long work in threads of its own, and answers meanwhile.

torch is loaded by the actor itself, not by whoever starts it or looks for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from actors.handles import AccountantHandle, RayFleet
from actors.ray_metrics import RayMirror
from fedvit.metrics.metrics import MULTIPROCESS_VARIABLE
from fedvit.metrics.throttled_publisher import ThrottledPublisher
from fedvit.metrics.training import DataMetrics, TrainingMetrics
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.operations.periodic_tasks import PeriodicTasks
from fedvit.ports import ProxyReport
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import settings_from_json
from fedvit.store.store import Store
from fedvit.types import Operation, TrainingProgress, Variant

METRICS_EVERY_S = 0.5
MIRROR_EVERY_S = 5.0


class Aggregator:
    """A shell round :class:`fedvit.operations.local_aggregator.LocalAggregator`.

    An aggregator that died in the middle of a run, or of a long operation, takes it up when Ray restarts it.
    """

    def __init__(self, settings_json: str, namespace: str, system_id: str) -> None:
        self._system_id = system_id
        self._settings = settings_from_json(settings_json)
        # By name, not by handle: an actor that is restarted finds them again.
        self._accountant = AccountantHandle.connect(namespace)
        self._fleet = RayFleet.connect(
            namespace, self._settings.ray.proxies, timeout_s=self._settings.training.round_timeout_s
        )
        self._metrics = TrainingMetrics()
        # Built in the background, so that a fault here reaches the caller of `prepare` as itself.
        self._local: Future[LocalAggregator] = ThreadPoolExecutor(max_workers=1).submit(self._build)

    def prepare(self) -> int:
        """Wait until the model is built and the state is read; return the process id.

        Raises:
            DataError, ModelError, StateError: the settings name something that cannot be used.
        """
        self._local.result()
        return os.getpid()

    def start_training(self) -> TrainingProgress:
        """See :class:`fedvit.ports.AggregatorPort`, as for all that follow."""
        return self._local.result().start_training()

    def stop_training(self) -> TrainingProgress:
        """Ask the loop to end after the round under way."""
        return self._local.result().stop_training()

    def progress(self) -> TrainingProgress:
        """Where the loop stands."""
        return self._local.result().progress()

    def wait(self, timeout_s: float) -> TrainingProgress:
        """Return when the loop rests, or after ``timeout_s``."""
        return self._local.result().wait(timeout_s)

    def proxies_alive(self) -> ProxyReport:
        """Which client proxies answer now; said also while the model is being built."""
        return self._fleet.proxies_alive()

    def submit(self, kind: str, params: Mapping[str, Any], call_key: str) -> Operation:
        """Queue a long operation; an equal ``call_key`` gives the same one."""
        return self._local.result().submit(kind, params, call_key)

    def cancel_operation(self, operation_id: str) -> Operation:
        """End a long operation early."""
        return self._local.result().cancel_operation(operation_id)

    def await_shutdown(self, timeout_s: float) -> str | None:
        """Block until this system was told to go down; how, or None after ``timeout_s``."""
        return self._local.result().await_shutdown(timeout_s)

    def rollback(self, version: str, force: bool, reason: str | None) -> str:
        """Make an older version's content current again."""
        return self._local.result().rollback(version, force=force, reason=reason)

    def switch_variant(self, variant: Variant) -> str:
        """Move the fleet to another variant."""
        return self._local.result().switch_variant(variant)

    def _build(self) -> LocalAggregator:
        from fedvit.clients.workload import server_model

        store = Store.open(self._settings.home)

        def publish(progress: TrainingProgress) -> None:
            self._metrics.publish(
                progress,
                self._accountant.budget(),
                active=store.count_clients(active=True, quarantined=False),
                total=store.count_clients(active=True),
            )

        # Rounds may take a tenth of a second; nobody looks at metrics that often.
        tell = ThrottledPublisher(publish, METRICS_EVERY_S)
        local = LocalAggregator(
            settings=self._settings,
            store=store,
            accountant=self._accountant,
            fleet=MixedFleet(self._settings, store, self._fleet),
            model=server_model(self._settings),
            on_progress=tell,
            system_id=self._system_id,
            on_connected=self._metrics.publish_connected,
            on_health=DataMetrics().publish,
        )
        publish(local.progress())
        local.resume()
        if self._settings.ray.dashboard and (folder := os.environ.get(MULTIPROCESS_VARIABLE)):
            PeriodicTasks(MIRROR_EVERY_S, RayMirror(Path(folder)).repeat).start()
        return local
