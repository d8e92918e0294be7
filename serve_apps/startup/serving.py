"""Start of the Serve applications, and of the edge processes that follow their releases."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fedvit.access.identity import Scope
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.metrics.exposition import MULTIPROCESS_VARIABLE
from fedvit.processes import APPLICATIONS, end_child, end_with_parent, last_error, why_ended
from fedvit.wire.manifest import load_or_create_signing_key, public_key_text
from serve_apps.startup.cluster import CLUSTER_STOP_S, stop_within

FOLLOWER = "followers of this system"
SPARE_S = 30.0


def start_serve(settings: Settings, stack: ExitStack, token_file: Path | None) -> str:
    """Start the control and the inference application; return the URL of the control API.

    Raises:
        PlacementError: Ray Serve could not start them.
    """
    from ray import serve

    from actors.spawn import selector_of_store
    from serve_apps.control.app import build_control_app
    from serve_apps.inference.app import build_inference_app

    options = http_options(settings)
    scheme = "https" if "ssl_certfile" in options else "http"
    control_url = f"{scheme}://{settings.serving.host}:{settings.serving.port}"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=options)
    labels = selector_of_store()
    key = _trusted_key(settings)
    inference = build_inference_app(
        settings, control_url=control_url, trusted_key=key, token_file=token_file, node_labels=labels
    )
    applications = [
        serve.RunTarget(build_control_app(settings, node_labels=labels), name=APPLICATIONS[0], route_prefix="/"),
        serve.RunTarget(inference, name=APPLICATIONS[1], route_prefix="/inference"),
    ]
    stack.callback(stop_within, CLUSTER_STOP_S, _delete, [application.name for application in applications])
    try:
        serve.run_many(applications)
    except RuntimeError as error:
        # The first line says which application, the exception in the rest says why.
        first, reason = str(error).partition("\n")[0], last_error(str(error))
        message = f"Ray Serve could not start the applications: {first}" + (f" {reason}." if reason != first else "")
        raise PlacementError(message, cure="See their logs with `make logs`.") from None
    return control_url


def start_edge(settings: Settings, stack: ExitStack, control_url: str, index: int, token_file: Path | None) -> str:
    """Start one edge process; return its URL once it listens.

    Raises:
        PlacementError: it ended at its start.
    """
    edge = settings.edge
    name = f"edge-{index + 1}"
    command = [
        *(sys.executable, "-m", "edge_runtime", "serve"),
        *("--host", edge.host, "--port", str(edge.ports[index])),
        *("--source", control_url, "--trusted-key", _trusted_key(settings)),
        *("--cache", str(settings.home / "run" / name), "--device-id", name),
        *("--poll-interval", str(edge.poll_interval_s)),
    ]
    if token_file is not None:
        command += ["--source-token-file", str(token_file)]
    if settings.access.tls_cert is not None:
        command += ["--source-ca", str(settings.access.tls_cert.resolve())]
    log = settings.home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        before = output.tell()
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
        reason = why_ended(process.wait(), log.read_bytes()[before:].decode(errors="replace"))
        raise PlacementError(f"{name} ended at its start {reason}.", cure=f"See {log}.")
    return f"http://{edge.host}:{edge.ports[index]}"


def edge_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an edge process. It exports its own metrics, apart from the server's."""
    return {name: value for name, value in environment.items() if name != MULTIPROCESS_VARIABLE}


def http_options(settings: Settings) -> dict[str, Any]:
    """Serve's HTTP options: host, port, the certificate if there is one, and when Serve gives a request up.

    The applications have limits of their own, which are shorter; this one ends requests that no replica takes.
    """
    access = settings.access
    options: dict[str, Any] = {
        "host": settings.serving.host,
        "port": settings.serving.port,
        "request_timeout_s": access.body_timeout_s + access.request_timeout_s + SPARE_S,
    }
    if access.tls_cert is not None and access.tls_key is not None:
        options |= {"ssl_certfile": str(access.tls_cert.resolve()), "ssl_keyfile": str(access.tls_key.resolve())}
    return options


@contextmanager
def follower_token(settings: Settings) -> Iterator[Path | None]:
    """A file with the token that the replicas and edges of this system fetch releases with; None without tokens.

    The token is revoked at the end.
    """
    if settings.access.mode != "tokens":
        yield None
        return
    from fedvit.access.tokens import temporary_token
    from fedvit.store.store import Store

    path = settings.home / "run" / "follower.token"
    with Store.open(settings.home) as store, temporary_token(store, FOLLOWER, Scope.RELEASES, path):
        yield path


def _trusted_key(settings: Settings) -> str:
    return public_key_text(load_or_create_signing_key(settings.home / "keys").public_key())


def _delete(applications: Sequence[str]) -> None:
    """Delete these Serve applications, side by side; on a joined cluster others may use Serve too."""
    from ray import serve

    with ThreadPoolExecutor() as pool:
        list(pool.map(serve.delete, applications))
