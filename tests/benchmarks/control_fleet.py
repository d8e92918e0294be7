"""A control application over a fleet of 10,000 registered clients on Ray Serve, without a training system behind it."""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve

from actors.connection import connect
from fedvit.config import Settings
from fedvit.settings import load_settings
from fedvit.store.store import Store
from fedvit.types import Client, ClientKind
from serve_apps import proxy
from serve_apps.control.app import build_control_app
from serve_apps.startup.serving import http_options

CLIENTS = 10_000
HOST = "127.0.0.1"


def client_names(count: int = CLIENTS) -> list[str]:
    """The registered clients."""
    return [f"truck-{number:05d}" for number in range(count)]


@contextmanager
def serving(access: dict[str, Any] | None = None, clients: int = CLIENTS) -> Iterator[tuple[Settings, Store]]:
    """A Ray Serve instance with the control application at ``/``; everything ends with the block."""
    with tempfile.TemporaryDirectory(prefix="fedvit-bench-") as folder, socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        overrides = {
            "home": Path(folder),
            "serving": {"host": HOST, "port": port},
            "access": access or {},
            "ray": {"dashboard": False},
        }
        settings = load_settings(environ={}, overrides=overrides)
        with Store.open(settings.home) as store:
            store.metadata.bind_fleet(
                data_digest="d" * 64, partition={"scheme": "iid"}, classes=["red", "yellow", "green"]
            )
            store.clients.register([Client(name, ClientKind.REMOTE, 40) for name in client_names(clients)])
            _start(settings)
            try:
                yield settings, store
            finally:
                serve.shutdown()
                ray.shutdown()


def _start(settings: Settings) -> None:
    metrics = settings.home / "run" / "metrics"
    metrics.mkdir(parents=True)
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(metrics), "RAY_USAGE_STATS_ENABLED": "0"}
    connect(settings, environment | proxy.environment(settings))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=http_options(settings))
    serve.run(build_control_app(settings), name="control", route_prefix="/")
