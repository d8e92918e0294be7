"""A whole fedvit on one Ray cluster: actors, Serve applications and edge processes, started and stopped together."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvit.access.exposure import check_exposure
from fedvit.access.identity import Scope
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE
from fedvit.metrics.targets import EDGES, RAY, SERVER, Target, link_targets, write_targets
from fedvit.ports import AggregatorPort, FinetuneReport, SystemUrls
from fedvit.processes import check_port_free, end_child, end_with_parent, why_taken
from fedvit.store.locks import system_lock
from fedvit.tools.monitoring_stack import server_target
from fedvit.tools.simulation.rehearsal import check_rehearsal
from fedvit.wire.manifest import load_or_create_signing_key, public_key_text

if TYPE_CHECKING:
    from actors.spawn import Actors
    from fedvit.tools.sweep.outcome import TrialOutcome

log = logging.getLogger(__name__)

FOLLOWER = "followers of this system"
TRAINING_STOP_S = 30.0
CLUSTER_STOP_S = 15.0
PORT_FREE_S = 20.0
SHUTDOWN_LOOK_S = 30.0
SHUTDOWN_RETRY_S = 1.0
ANNOUNCEMENT = Path("run") / "system.json"
# The sweep keeps its own journal; Tune's files a trial and its tables on the terminal are nobody's.
QUIET_TUNE = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}


class RaySystem:
    """Implements :class:`fedvit.ports.SystemPort`. Everything that it starts ends with the process that started it."""

    def __init__(self, settings: Settings) -> None:
        # Absolute: actors and replicas may work in other folders.
        self._home = settings.home.resolve()
        self._settings = settings.model_copy(update={"home": self._home})
        self._joins = settings.ray.cluster_address() is not None
        self._token_file: Path | None = None
        self._stopping = threading.Event()
        self._forced = False

    @contextmanager
    def running(
        self, on_step: Callable[[str], None], on_shutdown: Callable[[], None], *, train: bool = False
    ) -> Iterator[SystemUrls]:
        """Start everything, yield where it answers, stop gracefully in the reverse order.

        Raises:
            UsageError: the settings, the data, the model, the state or a port stand in the way; nothing was changed.
        """
        with ExitStack() as stack:
            on_step("Checking the data, the model and the state")
            check_exposure(self._settings)
            check_rehearsal(self._settings)
            if (self._home / ANNOUNCEMENT).exists():
                # The last one was killed: what Ray started for it ends by itself, a few seconds later.
                _await_free_ports(self._settings)
            check_ports(self._settings, joins=self._joins)
            prepare = self._checked()
            stack.enter_context(system_lock(self._home))
            prepare()
            self._token_file = stack.enter_context(follower_token(self._settings))
            on_step("Starting Ray")
            dashboard = self._start_ray(stack)
            on_step("Starting the accountant, the client proxies and the aggregator")
            actors = self._start_actors(stack, on_shutdown)
            on_step("Starting the control and inference applications")
            # Meanwhile the actors load what they need.
            control = self._start_serve(stack)
            actors.await_prepared(self._settings.ray.start_timeout_s)
            on_step("Starting the edge devices")
            edges = tuple(self._start_edge(stack, control, index) for index in range(len(self._settings.edge.ports)))
            self._tell_prometheus(stack)
            urls = SystemUrls(control, f"{control}/inference", edges, dashboard, self._ca_file())
            stack.enter_context(_announced(self._home, urls))
            if train:
                actors.handle().start_training()
            # First of all: an end asked for while we stop must not break that off.
            stack.callback(self._stopping.set)
            yield urls
            on_step("Stopping")

    def finetune(self, on_step: Callable[[str], None]) -> FinetuneReport:
        """See :class:`fedvit.ports.SystemPort`; nothing of the rest of a system is started."""
        from actors.finetuning import finetune

        return finetune(self._settings, on_step)

    def sweep(self, folder: Path, on_trial: Callable[[TrialOutcome], None]) -> None:
        """See :meth:`fedvit.ports.SystemPort.sweep`."""
        import ray

        from actors.spawn import connect, spawn_trial_workers
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

    def _checked(self) -> Callable[[], None]:
        """Read and check everything that can be wrong; the answer writes what the checks found into the state."""
        from fedvit.data.fleet import VirtualFleet
        from fedvit.data.manifest import build_manifest
        from fedvit.data.records import load_images
        from fedvit.rounds.steering import begin_in_initial_mode
        from fedvit.store.store import Store

        settings = self._settings
        if settings.workload.clients_class is not None:
            return _checked_workload(settings)
        fleet = VirtualFleet.open(settings.data)
        manifest = build_manifest(fleet.source)
        known = trained = None
        if (self._home / "state.db").exists():
            with Store.open(self._home) as store:
                known, trained = store.metadata.fleet(), store.runs.latest()
        if known is None:
            # Every image once, so that a broken one is named now and not in the middle of a round.
            load_images(fleet.source, (*fleet.source.train, *fleet.source.test), settings.data.image_size)
            fleet.check_disjoint()
        if trained is None or trained.config.get("model") != settings.training_identity()["model"]:
            _check_model(settings, len(manifest.classes))

        def write() -> None:
            with Store.open(self._home) as store:
                store.metadata.bind_fleet(
                    data_digest=manifest.digest,
                    partition={**settings.data.partition.model_dump(mode="json"), "digest": fleet.parts_digest()},
                    classes=manifest.classes,
                )
                store.clients.register(fleet.clients())
                begin_in_initial_mode(store, settings)

        return write

    def _start_ray(self, stack: ExitStack) -> str | None:
        import ray
        from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

        from actors.spawn import connect

        metrics_dir = self._home / "run" / "metrics"
        shutil.rmtree(metrics_dir, ignore_errors=True)
        metrics_dir.mkdir(parents=True)
        environment = {MULTIPROCESS_VARIABLE: str(metrics_dir), "RAY_USAGE_STATS_ENABLED": "0"}
        if not self._joins:
            # Ray's processes end a little after ray.shutdown returns; "stopped" means that the ports are free.
            stack.callback(_await_free_ports, self._settings)
        connect(self._settings, environment)
        stack.callback(ray.shutdown)
        if not self._settings.ray.dashboard:
            write_targets(self._home, RAY, [])
            return None
        session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
        link_targets(self._home, RAY, session / PROMETHEUS_SERVICE_DISCOVERY_FILE)
        stack.callback(write_targets, self._home, RAY, [])
        url = ray._private.worker.get_dashboard_url()
        return f"http://{url}" if url else None

    def _tell_prometheus(self, stack: ExitStack) -> None:
        """Name what is to be scraped; of a graceful end only the server is told to be missing."""
        edge = self._settings.edge
        edges = [Target(f"{edge.host}:{port}", {"device": f"edge-{n}"}) for n, port in enumerate(edge.ports, start=1)]
        write_targets(self._home, SERVER, [server_target(self._settings)])
        write_targets(self._home, EDGES, edges)
        stack.callback(write_targets, self._home, EDGES, [])

    def _start_actors(self, stack: ExitStack, on_shutdown: Callable[[], None]) -> Actors:
        from actors.spawn import spawn_actors

        actors = spawn_actors(self._settings)
        watch = threading.Thread(target=self._watch, args=(actors.handle(), on_shutdown), daemon=True)
        # The kill ends its call: nobody may ask Ray once that is shut down.
        stack.callback(_within, CLUSTER_STOP_S, watch.join)
        stack.callback(_within, CLUSTER_STOP_S, actors.kill)

        def rest() -> None:
            if not self._forced:
                actors.handle().stop_training()
                actors.handle().wait(TRAINING_STOP_S)

        stack.callback(_within, TRAINING_STOP_S + CLUSTER_STOP_S, rest)
        stack.callback(self._stopping.set)
        watch.start()
        return actors

    def _watch(self, aggregator: AggregatorPort, on_shutdown: Callable[[], None]) -> None:
        """Tell when the control API was asked for the end. The aggregator may be restarted meanwhile."""
        while not self._stopping.is_set():
            try:
                mode = aggregator.await_shutdown(SHUTDOWN_LOOK_S)
            except Exception as error:
                # At the end of the system its kill is what ends the call.
                if not self._stopping.is_set():
                    log.warning("the aggregator does not answer: %s", type(error).__name__)
                self._stopping.wait(SHUTDOWN_RETRY_S)
                continue
            if mode is not None and not self._stopping.is_set():
                self._forced = mode == "force"
                on_shutdown()
                return

    def _start_serve(self, stack: ExitStack) -> str:
        from ray import serve

        from actors.spawn import selector_of_store
        from serve_apps.control.app import build_control_app
        from serve_apps.inference.app import build_inference_app

        serving = self._settings.serving
        options = http_options(self._settings)
        control_url = f"{'https' if 'ssl_certfile' in options else 'http'}://{serving.host}:{serving.port}"
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options=options)
        labels = selector_of_store()
        inference = build_inference_app(
            self._settings,
            control_url=control_url,
            trusted_key=self._trusted_key(),
            token_file=self._token_file,
            node_labels=labels,
        )
        applications = [
            serve.RunTarget(build_control_app(self._settings, node_labels=labels), name="control", route_prefix="/"),
            serve.RunTarget(inference, name="inference", route_prefix="/inference"),
        ]
        stack.callback(_within, CLUSTER_STOP_S, _delete, [application.name for application in applications])
        try:
            serve.run_many(applications)
        except RuntimeError as error:
            raise PlacementError(
                f"Ray Serve could not start the applications: {str(error).splitlines()[0]}",
                cure="See their logs with `make logs`.",
            ) from None
        return control_url

    def _ca_file(self) -> str | None:
        certificate = self._settings.access.tls_cert
        return None if certificate is None else str(certificate.resolve())

    def _trusted_key(self) -> str:
        return public_key_text(load_or_create_signing_key(self._home / "keys").public_key())

    def _start_edge(self, stack: ExitStack, control_url: str, index: int) -> str:
        edge = self._settings.edge
        name = f"edge-{index + 1}"
        command = [
            *(sys.executable, "-m", "edge_runtime", "serve"),
            *("--host", edge.host, "--port", str(edge.ports[index])),
            *("--source", control_url, "--trusted-key", self._trusted_key()),
            *("--cache", str(self._home / "run" / name), "--device-id", name),
            *("--poll-interval", str(edge.poll_interval_s)),
        ]
        if self._token_file is not None:
            command += ["--source-token-file", str(self._token_file)]
        if (ca_file := self._ca_file()) is not None:
            command += ["--source-ca", ca_file]
        log = self._home / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            # Its own process group, so that Ctrl-C reaches it through us and in order.
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env=edge_environment(os.environ),
            )
        stack.callback(end_child, process)
        assert process.stdout is not None
        if not process.stdout.readline():
            raise PlacementError(f"{name} ended at its start with status {process.wait()}.", cure=f"See {log}.")
        return f"http://{edge.host}:{edge.ports[index]}"


def edge_environment(ours: Mapping[str, str]) -> dict[str, str]:
    """An edge's: it exports its own metrics, and what it counts is nothing of the server's."""
    return {name: value for name, value in ours.items() if name != MULTIPROCESS_VARIABLE}


def _delete(applications: Sequence[str]) -> None:
    """Delete these Serve applications, side by side; on a joined cluster others may use Serve too."""
    from ray import serve

    with ThreadPoolExecutor() as pool:
        list(pool.map(serve.delete, applications))


def http_options(settings: Settings) -> dict[str, Any]:
    """How Serve listens."""
    access = settings.access
    options: dict[str, Any] = {"host": settings.serving.host, "port": settings.serving.port}
    if access.tls_cert is not None and access.tls_key is not None:
        options |= {"ssl_certfile": str(access.tls_cert.resolve()), "ssl_keyfile": str(access.tls_key.resolve())}
    return options


@contextmanager
def follower_token(settings: Settings) -> Iterator[Path | None]:
    """A file with the token that replicas and edges started here fetch releases with; it is good while they live.

    None where no token is demanded.
    """
    if settings.access.mode != "tokens":
        yield None
        return
    from fedvit.access.tokens import lent_token
    from fedvit.store.store import Store

    path = settings.home / "run" / "follower.token"
    with Store.open(settings.home) as store, lent_token(store, FOLLOWER, Scope.DEVICE, path):
        yield path


def _checked_workload(settings: Settings) -> Callable[[], None]:
    """Make the workload once, so that a fault of it is named now; the answer registers its clients."""
    from fedvit.clients.workload import client_host, load_workload
    from fedvit.rounds.steering import begin_in_initial_mode
    from fedvit.store.store import Store

    client_host(settings)
    named = json.dumps(settings.workload.model_dump(mode="json"), sort_keys=True)

    def write() -> None:
        with Store.open(settings.home) as store:
            store.metadata.bind_fleet(data_digest=hashlib.sha256(named.encode()).hexdigest(), partition={}, classes=())
            store.clients.register(load_workload(settings).registered())
            begin_in_initial_mode(store, settings)

    return write


def _check_model(settings: Settings, num_classes: int) -> None:
    """Build the model and write it as ONNX: what cannot be released is refused before it is trained.

    Raises:
        ModelError: the model cannot be built or exported.
    """
    # torch and timm are imported here, after everything that can be said without them.
    from fedvit.models.export import export_onnx
    from fedvit.models.models import build_model

    image_size = settings.data.image_size
    export_onnx(build_model(settings.model, num_classes, image_size), image_size)


def _within(limit_s: float, stop: Callable[..., object], *arguments: object) -> None:
    """Stop something gracefully, for at most ``limit_s``: a cluster that died under us must not keep us from ending."""

    def attempt() -> None:
        try:
            stop(*arguments)
        except Exception as error:
            log.warning("%s: %s", type(error).__name__, str(error).strip().splitlines()[0] if str(error) else "")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        log.warning("gave up on %s after %g s", getattr(stop, "__name__", stop), limit_s)


def check_ports(settings: Settings, *, joins: bool = False) -> None:
    """Make sure that every port can be listened on.

    Args:
        joins: a running cluster is joined, whose Serve may hold ``serving.port`` already.

    Raises:
        PortInUseError: one is taken; it and its setting are named.
    """
    wanted = [("edge.ports", settings.edge.host, port) for port in settings.edge.ports]
    if not joins:
        wanted.insert(0, ("serving.port", settings.serving.host, settings.serving.port))
    for key, host, port in wanted:
        check_port_free(host, port, key)


def _await_free_ports(settings: Settings) -> None:
    serving, edge = settings.serving, settings.edge
    places = [(serving.host, serving.port), *((edge.host, port) for port in edge.ports)]
    deadline_s = time.monotonic() + PORT_FREE_S
    while any(why_taken(*place) for place in places) and time.monotonic() < deadline_s:
        time.sleep(0.05)


@contextmanager
def _announced(home: Path, urls: SystemUrls) -> Iterator[None]:
    """``run/system.json`` tells the command line where the running system answers."""
    path = home / ANNOUNCEMENT
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"pid": os.getpid(), **asdict(urls)}))
    draft.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
