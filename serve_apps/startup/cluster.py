"""Start of Ray, and of the actors with the watch for a shutdown."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from fedvit.config import Settings
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE
from fedvit.metrics.targets import RAY, link_targets, write_targets
from fedvit.ports import AggregatorPort
from fedvit.processes import record_ray_logs
from serve_apps import proxy
from serve_apps.startup.checks import await_free_ports

if TYPE_CHECKING:
    from actors.spawn import Actors

_LOG = logging.getLogger(__name__)
TRAINING_STOP_S = 30.0
CLUSTER_STOP_S = 15.0
AWAIT_SHUTDOWN_S = 30.0
SHUTDOWN_RETRY_S = 1.0


def start_ray(settings: Settings, stack: ExitStack) -> str | None:
    """Start Ray, or join the cluster of the settings; return the dashboard's URL if there is one."""
    import ray
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    from actors.connection import connect

    metrics_dir = settings.home / "run" / "metrics"
    shutil.rmtree(metrics_dir, ignore_errors=True)
    metrics_dir.mkdir(parents=True)
    if settings.ray.cluster_address() is None:
        # Ray's processes end a little after ray.shutdown returns; "stopped" means that the ports are free.
        stack.callback(await_free_ports, settings)
    environment = {MULTIPROCESS_VARIABLE: str(metrics_dir), "RAY_USAGE_STATS_ENABLED": "0"}
    connect(settings, environment | proxy.environment(settings))
    stack.callback(ray.shutdown)
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    record_ray_logs(settings.home, session / "logs", ray.get_runtime_context().get_job_id())
    if not settings.ray.dashboard:
        write_targets(settings.home, RAY, [])
        return None
    link_targets(settings.home, RAY, session / PROMETHEUS_SERVICE_DISCOVERY_FILE)
    stack.callback(write_targets, settings.home, RAY, [])
    url = ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else None


def start_actors(settings: Settings, stack: ExitStack, watch: ShutdownWatch) -> Actors:
    """Start the actors, and ``watch`` in a thread."""
    from actors.spawn import spawn_actors

    actors = spawn_actors(settings)
    thread = threading.Thread(target=watch.run, args=(actors.handle(),), daemon=True)
    # The kill ends the thread's call: nothing may call Ray once that is shut down.
    stack.callback(stop_within, CLUSTER_STOP_S, thread.join)
    stack.callback(stop_within, CLUSTER_STOP_S, actors.kill)

    def stop_training() -> None:
        if not watch.forced:
            actors.handle().stop_training()
            actors.handle().wait(TRAINING_STOP_S)

    stack.callback(stop_within, TRAINING_STOP_S + CLUSTER_STOP_S, stop_training)
    stack.callback(watch.stop)
    thread.start()
    return actors


class ShutdownWatch:
    """Waits until the control API is asked for a shutdown, and reports that once.

    Args:
        on_shutdown: called when a shutdown is asked for.
        retry_s: seconds between attempts to reach the aggregator, which may be restarting.

    Attributes:
        forced: whether the shutdown that was asked for is a forced one.
    """

    def __init__(self, on_shutdown: Callable[[], None], retry_s: float = SHUTDOWN_RETRY_S) -> None:
        self.forced = False
        self._on_shutdown, self._retry_s = on_shutdown, retry_s
        self._stopping = threading.Event()

    def stop(self) -> None:
        """Report nothing from now on: the system stops for another reason."""
        self._stopping.set()

    def run(self, aggregator: AggregatorPort) -> None:
        """Watch until a shutdown is asked for, or until :meth:`stop`."""
        while not self._stopping.is_set():
            try:
                mode = aggregator.await_shutdown(AWAIT_SHUTDOWN_S)
            except Exception as error:
                # At the end of the system its kill is what ends the call.
                if not self._stopping.is_set():
                    _LOG.warning("the aggregator does not answer: %s", type(error).__name__)
                self._stopping.wait(self._retry_s)
                continue
            if mode is not None and not self._stopping.is_set():
                self.forced = mode == "force"
                self._on_shutdown()
                return


def stop_within(limit_s: float, stop: Callable[..., object], *arguments: object) -> None:
    """Call ``stop`` and wait for at most ``limit_s``: a cluster that died must not keep this process from ending."""

    def attempt() -> None:
        try:
            stop(*arguments)
        except Exception as error:
            _LOG.warning("%s: %s", type(error).__name__, str(error).strip().splitlines()[0] if str(error) else "")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        _LOG.warning("gave up on %s after %g s", getattr(stop, "__name__", stop), limit_s)
