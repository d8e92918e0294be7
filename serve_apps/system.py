"""A whole fedvit on one Ray cluster: actors, Serve applications and edge processes, started and stopped together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedvit.access.identity import check_exposure
from fedvit.atomic_write import write_atomically
from fedvit.config import Settings
from fedvit.metrics.targets import EDGES, SERVER, Target, write_targets
from fedvit.ports import FinetuneReport, SystemUrls
from fedvit.store.backup_keys import KEYS, load_or_create_backup_key
from fedvit.store.locks import system_lock
from fedvit.tools.monitoring_stack import server_target
from fedvit.tools.simulation.rehearsal import check_rehearsal
from serve_apps.startup.checks import (
    await_free_ports,
    check_budget,
    check_ports,
    check_secure_aggregation,
    check_tls_key,
    check_training,
)
from serve_apps.startup.cluster import ShutdownWatch, start_actors, start_ray
from serve_apps.startup.serving import follower_token, start_edge, start_serve

if TYPE_CHECKING:
    from fedvit.tools.sweep.outcome import TrialOutcome

ANNOUNCEMENT = Path("run") / "system.json"
# The sweep keeps its own journal; Tune's files a trial and its tables on the terminal are not used.
QUIET_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Its present output prints a table for each trial that fails, also when it is silenced.
    "RAY_AIR_NEW_OUTPUT": "0",
}


class RaySystem:
    """Implements :class:`fedvit.ports.SystemPort`. Everything that it starts ends with the process that started it."""

    def __init__(self, settings: Settings) -> None:
        # Absolute: actors and replicas may work in other folders.
        self._home = settings.home.resolve()
        self._settings = settings.model_copy(update={"home": self._home})
        self._joins = settings.ray.cluster_address() is not None

    @contextmanager
    def running(
        self, on_step: Callable[[str], None], on_shutdown: Callable[[], None], *, train: bool = False
    ) -> Iterator[SystemUrls]:
        """Start everything, yield where it answers, stop gracefully in the reverse order.

        Raises:
            UsageError: the settings, the data, the model, the state or a port stand in the way; nothing was changed.
        """
        settings, watch = self._settings, ShutdownWatch(on_shutdown)
        with ExitStack() as stack:
            on_step("Checking the data, the model and the state")
            check_exposure(settings)
            check_tls_key(settings)
            check_rehearsal(settings)
            check_secure_aggregation(settings)
            check_budget(settings)
            if (self._home / ANNOUNCEMENT).exists():
                # The last one was killed: what Ray started for it ends by itself, a few seconds later.
                await_free_ports(settings)
            check_ports(settings, joins=self._joins)
            write_state = check_training(settings, on_step)
            stack.enter_context(system_lock(self._home))
            write_state()
            self._create_backup_key(on_step)
            token_file = stack.enter_context(follower_token(settings))
            on_step("Starting Ray")
            dashboard = start_ray(settings, stack)
            on_step("Starting the accountant, the client proxies and the aggregator")
            actors = start_actors(settings, stack, watch)
            on_step("Starting the control and inference applications")
            # Meanwhile the actors load what they need.
            control = start_serve(settings, stack, token_file)
            actors.await_prepared(settings.ray.start_timeout_s)
            on_step("Starting the edge devices")
            edges = tuple(
                start_edge(settings, stack, control, index, token_file) for index in range(len(settings.edge.ports))
            )
            self._write_scrape_targets(stack)
            certificate = settings.access.tls_cert
            ca_file = None if certificate is None else str(certificate.resolve())
            urls = SystemUrls(control, f"{control}/inference", edges, dashboard, ca_file)
            stack.enter_context(_announced(settings, urls))
            if train:
                actors.handle().start_training()
            # Before everything else: a shutdown asked for while we stop must not break that off.
            stack.callback(watch.stop)
            yield urls
            on_step("Stopping")

    def finetune(self, on_step: Callable[[str], None]) -> FinetuneReport:
        """See :class:`fedvit.ports.SystemPort`; nothing of the rest of a system is started."""
        from actors.finetuning import finetune

        return finetune(self._settings, on_step)

    def sweep(self, folder: Path, on_trial: Callable[[TrialOutcome], None]) -> None:
        import ray

        from actors.connection import connect
        from actors.spawn import spawn_trial_workers
        from actors.sweep import run_trials
        from fedvit.tools.sweep.journal import Journal
        from fedvit.tools.sweep.space import check_room

        journal = Journal(folder)
        if not self._joins:
            # Known before anything is started.
            check_room(self._settings, os.cpu_count() or 1)
        with ExitStack() as stack:
            connect(self._settings, {"RAY_USAGE_STATS_ENABLED": "0", **QUIET_TUNE})
            stack.callback(ray.shutdown)
            workers = spawn_trial_workers(self._settings, journal.secret())
            for worker in workers:
                stack.callback(ray.kill, worker)
            run_trials(self._settings, journal, workers, on_trial)

    def _create_backup_key(self, on_step: Callable[[str], None]) -> None:
        """Create the key of backups at the first start, with the other keys, so that one copy of them is complete."""
        backup = self._settings.backup
        if not backup.recipients and backup.passphrase_file is None and load_or_create_backup_key(self._home):
            folder = self._home / KEYS
            on_step(f"Created {folder}: keep a copy of it on another machine, without it backups cannot be opened")

    def _write_scrape_targets(self, stack: ExitStack) -> None:
        """Write Prometheus' targets. After a graceful end only the server counts as missing."""
        edge = self._settings.edge
        edges = [Target(f"{edge.host}:{port}", {"device": f"edge-{n}"}) for n, port in enumerate(edge.ports, start=1)]
        write_targets(self._home, SERVER, [server_target(self._settings)])
        write_targets(self._home, EDGES, edges)
        stack.callback(write_targets, self._home, EDGES, [])


@contextmanager
def _announced(settings: Settings, urls: SystemUrls) -> Iterator[None]:
    """``run/system.json`` tells the command line where the running system answers, and its settings."""
    path = settings.home / ANNOUNCEMENT
    facts = {"pid": os.getpid(), "settings": settings.model_dump(mode="json"), **asdict(urls)}
    write_atomically(path, json.dumps(facts))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
