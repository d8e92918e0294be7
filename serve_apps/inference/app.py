"""Inference on Ray Serve: replicas that run the same serving code as a vehicle."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from ray import serve
from starlette.applications import Starlette
from starlette.middleware import Middleware

from edge_runtime.server import ServingOptions, ServingProcess
from fedvit.config import Settings
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE
from fedvit.registry.client import ReleaseClient
from fedvit.registry.feed import HttpFeed
from fedvit.settings import settings_from_json, settings_to_json
from fedvit.store.store import Store
from fedvit.wire.manifest import parse_public_key
from serve_apps.control.http.access import Guard
from serve_apps.control.http.admission import Admission
from serve_apps.deploying import OPTIONS, listen_on_node_address
from serve_apps.inference.access import InferenceGuard

TARGET_ONGOING_REQUESTS = 2
# Far above what a replica admits, so that slow callers do not take the places of others; see serve_apps.control.app.
MAX_ONGOING_REQUESTS = 500
MAX_QUEUED_REQUESTS = 64
_LOCK_FILE = ".lock"


def build_inference_app(
    settings: Settings,
    *,
    control_url: str,
    trusted_key: str,
    token_file: Path | None = None,
    node_labels: Mapping[str, str] | None = None,
) -> serve.Application:
    """The application; each replica follows the releases of ``control_url`` that ``trusted_key`` signed.

    ``token_file`` holds the token to fetch them with, where one is demanded. A replica looks tokens up in the store, so
    it runs on a node with ``node_labels``.

    ``settings.home`` must be absolute, and ``PROMETHEUS_MULTIPROC_DIR`` in the environment of the replicas if their
    metrics are to be merged.

    Raises:
        UsageError: ``trusted_key`` is not a key.
    """
    parse_public_key(trusted_key)
    settings_json = settings_to_json(settings)

    def build() -> Starlette:
        # Serve calls a function in the replica; a partial it would take for the ASGI application itself.
        listen_on_node_address()
        return _build_replica(settings_from_json(settings_json), control_url, trusted_key, token_file)

    serving = settings.serving
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="inference",
        ray_actor_options={"num_cpus": settings.ray.actor_cpus, "label_selector": dict(node_labels or {})},
        autoscaling_config={
            "min_replicas": serving.inference_min_replicas,
            "initial_replicas": serving.inference_min_replicas,
            "max_replicas": max(serving.inference_min_replicas, serving.inference_max_replicas),
            "target_ongoing_requests": TARGET_ONGOING_REQUESTS,
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        # Beyond this the proxy answers 503 at once instead of letting callers wait without end.
        max_queued_requests=MAX_QUEUED_REQUESTS,
        health_check_period_s=5,
        health_check_timeout_s=15,
        graceful_shutdown_timeout_s=5,
        **OPTIONS,
    )
    return deployment.bind()


def _build_replica(settings: Settings, control_url: str, trusted_key: str, token_file: Path | None) -> Starlette:
    replica_id = serve.get_replica_context().replica_id.unique_id
    cache = claim_cache(settings.home / "run" / "inference", replica_id)
    feed = HttpFeed(control_url, token_file=token_file, ca_file=settings.access.tls_cert)
    client = ReleaseClient(feed, cache, [parse_public_key(trusted_key)])
    metrics_dir = os.environ.get(MULTIPROCESS_VARIABLE)
    options = ServingOptions(
        device_id=f"replica-{replica_id}",
        source=control_url,
        poll_interval_s=settings.serving.poll_interval_s,
        metrics_dir=Path(metrics_dir) if metrics_dir else None,
        count_answers=True,
    )
    guard = Guard(settings, Store.open(settings.home))
    admission = Admission(settings.access)
    return ServingProcess(client, options).app(Middleware(InferenceGuard, guard=guard, admission=admission))


_held_locks: list[IO[bytes]] = []


def claim_cache(root: Path, name: str) -> Path:
    """``root/name``, locked for as long as this process lives; folders of replicas that died are removed."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / _LOCK_FILE).open("wb") as root_lock:
        fcntl.flock(root_lock, fcntl.LOCK_EX)
        for folder in root.iterdir():
            if folder.is_dir() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
        folder = root / name
        folder.mkdir(exist_ok=True)
        lock = (folder / _LOCK_FILE).open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        _held_locks.append(lock)
    return folder


def _is_abandoned(folder: Path) -> bool:
    with (folder / _LOCK_FILE).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
