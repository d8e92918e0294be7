"""The control API as a Ray Serve application."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from actors.handles import connect_accountant, connect_aggregator, namespace_of
from fedvit.config import Settings
from fedvit.settings import settings_from_json, settings_to_json
from fedvit.store.store import Store
from serve_apps.control.api import Services, create_api
from serve_apps.control.http.request_log import LOG
from serve_apps.deploying import OPTIONS, listen_on_node_address
from serve_apps.logs import log_to_file

MAX_ONGOING_REQUESTS = 1_000
"""Far above what a replica admits (see :mod:`serve_apps.control.http.admission`), so that it answers everybody: Serve
counts a request from its headers on, and beyond this number no caller would be answered."""


def build_control_app(settings: Settings, *, node_labels: Mapping[str, str] | None = None) -> serve.Application:
    """The application; each replica opens the store, on a node with ``node_labels``, and finds the actors by name."""
    settings_json = settings_to_json(settings)

    def build() -> FastAPI:
        # Serve calls a function in the replica; a partial it would take for the ASGI application itself.
        listen_on_node_address()
        return _build_api(settings_json)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="control",
        num_replicas=settings.serving.control_replicas,
        ray_actor_options={"num_cpus": settings.ray.actor_cpus, "label_selector": dict(node_labels or {})},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **OPTIONS,
    )
    return deployment.bind()


def _build_api(settings_json: str) -> FastAPI:
    settings = settings_from_json(settings_json)
    log_to_file(LOG, settings.home / "logs" / "control.log")
    namespace = namespace_of(settings.home)
    metrics_dir = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return create_api(
        Services(
            settings=settings,
            store=Store.open(settings.home),
            aggregator=partial(connect_aggregator, namespace),
            accountant=partial(connect_accountant, namespace),
            metrics_dir=Path(metrics_dir) if metrics_dir else None,
        )
    )
