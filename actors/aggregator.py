"""The aggregator actor: runs the training loop and long operations in threads of its own.

torch is loaded in the actor's own process, not in those that start or find the actor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from actors.fleet import RayFleet
from actors.handles import connect_accountant, forwards
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE, lasting_figures
from fedvit.metrics.training import ThrottledPublisher, publish_connected, publish_data_scores, publish_training
from fedvit.operations.local_aggregator import LocalAggregator
from fedvit.operations.runner import PeriodicTasks
from fedvit.ports import AggregatorPort, ProxyReport
from fedvit.rounds.fleets import MixedFleet
from fedvit.settings import settings_from_json
from fedvit.store.store import Store
from fedvit.types import TrainingProgress

METRICS_EVERY_S = 0.5
MIRROR_EVERY_S = 5.0


@forwards(AggregatorPort, "_ready")
class Aggregator:
    """Runs a :class:`fedvit.operations.local_aggregator.LocalAggregator`.

    When Ray restarts it, it continues the run and the long operations that its predecessor was doing.
    """

    def __init__(self, settings_json: str, namespace: str, system_id: str) -> None:
        self._system_id = system_id
        self._settings = settings_from_json(settings_json)
        # By name, not by handle: an actor that is restarted finds them again.
        self._accountant = connect_accountant(namespace)
        self._fleet = RayFleet.connect(
            namespace, self._settings.ray.proxies, timeout_s=self._settings.training.round_timeout_s
        )
        # In the background, so that an error reaches the caller of `prepare` as itself.
        self._local: Future[LocalAggregator] = ThreadPoolExecutor(max_workers=1).submit(self._build)

    def prepare(self) -> int:
        """Wait until the model is built and the state is read; return the process id.

        Raises:
            DataError, ModelError, StateError: the settings name something that cannot be used.
        """
        self._local.result()
        return os.getpid()

    def proxies_alive(self) -> ProxyReport:
        """See :class:`fedvit.ports.AggregatorPort`; answers also while the model is being built."""
        return self._fleet.proxies_alive()

    def _ready(self) -> LocalAggregator:
        return self._local.result()

    def _build(self) -> LocalAggregator:
        from fedvit.clients.workload import server_model

        store = Store.open(self._settings.home)

        def publish(progress: TrainingProgress) -> None:
            publish_training(
                progress,
                self._accountant.budget(),
                active=store.clients.count(active=True, quarantined=False),
                total=store.clients.count(active=True),
            )

        local = LocalAggregator(
            settings=self._settings,
            store=store,
            accountant=self._accountant,
            fleet=MixedFleet(self._settings, store, self._fleet),
            model=server_model(self._settings),
            # Rounds may take a tenth of a second, and metrics are read much less often.
            on_progress=ThrottledPublisher(publish, METRICS_EVERY_S),
            system_id=self._system_id,
            on_connected=publish_connected,
            on_health=publish_data_scores,
        )
        publish(local.progress())
        local.resume()
        if self._settings.ray.dashboard and (folder := os.environ.get(MULTIPROCESS_VARIABLE)):
            PeriodicTasks(MIRROR_EVERY_S, RayMirror(Path(folder)).copy).start()
        return local


class RayMirror:
    """Copies the counters and gauges in ``folder`` to Ray's own metrics, for users of the Ray dashboard.

    Ray's agent exports them with the prefix ``ray_``, and the dashboard draws them from Prometheus. They are read from
    the files that the node's processes write for Prometheus, so that both agree. Series that end with a release are
    left out: Ray's series do not end. ``make`` makes a gauge from its name, meaning and labels.
    """

    def __init__(self, folder: Path, make: Callable[[str, str, tuple[str, ...]], Any] = Gauge) -> None:
        self._folder, self._make = folder, make
        self._gauges: dict[str, Any] = {}

    def copy(self) -> None:
        """Set Ray's gauges to the present values; a counter becomes a gauge of its total."""
        for metric, labels, value in lasting_figures(self._folder):
            if metric.full_name not in self._gauges:
                names = tuple(label.name for label in metric.labels)
                self._gauges[metric.full_name] = self._make(metric.full_name, metric.meaning, names)
            self._gauges[metric.full_name].set(value, labels)
