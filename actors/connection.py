"""Connection to Ray. A cluster that is started here listens on loopback only; every cluster has to demand its token."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import ray_constants

from actors.handles import namespace_of
from fedvit.api.transport import is_loopback
from fedvit.atomic_write import create_atomically
from fedvit.config import Settings
from fedvit.errors import PlacementError
from fedvit.private_files import FILE_MODE, ensure_private, open_own_folder, open_private_folder
from fedvit.processes import ray_folder

LOOPBACK = "127.0.0.1"
AUTH_MODE = "RAY_AUTH_MODE"
PROBE_TIMEOUT_S = 10.0
# A call that reads; any other would do, since Ray checks the token before it looks at a call.
_PROBE = "/ray.rpc.JobInfoGcsService/GetAllJobInfo"


def connect(settings: Settings, environment: dict[str, str]) -> None:
    """Join the cluster that the settings name, or start one here that ends with this process.

    Args:
        environment: variables of every actor and replica.

    Raises:
        PlacementError: there is no such cluster, it answers without a token, or it listens on more than loopback.
        StateError: other users can read the file of Ray's token, or use the folder of its sockets and logs.
    """
    address = settings.ray.cluster_address()
    os.environ.update(environment)
    options: dict[str, Any] = {"namespace": namespace_of(settings.home), "log_to_driver": False}
    ensure_private([token_file()])
    # Ray replaces the handler that ends this process gracefully.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address is None:
            # Workers of a cluster that starts here inherit the environment; those of a joined cluster do not.
            _start(include_dashboard=settings.ray.dashboard, **options)
        else:
            runtime_env = {"env_vars": environment}
            ray.init(address=address, logging_level="ERROR", runtime_env=runtime_env, **options)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise PlacementError(
            f"No Ray cluster answers at {address}: {str(error).splitlines()[0]}",
            cure="Start it, set RAY_AUTH_MODE=token where it demands one, or unset RAY_ADDRESS to start one here.",
        ) from None
    signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if settings.ray.require_token:
            check_token_is_demanded(ray.get_runtime_context().gcs_address)
    except PlacementError:
        ray.shutdown()
        raise


def token_file() -> Path:
    """The file that Ray reads its token from, where RAY_AUTH_TOKEN does not hold it."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def _start(**options: Any) -> None:
    """Start a cluster of this machine alone; Ray itself demands the token of every new one."""
    _create_token()
    open_own_folder(ray_folder().parent)
    with _loopback_node():
        ray.init(
            address="local",
            logging_level="ERROR",
            dashboard_host=LOOPBACK,
            _node_ip_address=LOOPBACK,
            _temp_dir=str(ray_folder()),
            **options,
        )
    address = ray.util.get_node_ip_address()
    if not is_loopback(address):
        ray.shutdown()
        raise PlacementError(
            f"Ray {ray.__version__} listens on {address}, which other machines may reach.",
            cure="Install the version of Ray that constraints.txt names.",
        )


@contextmanager
def _loopback_node() -> Iterator[None]:
    """Let Ray accept the loopback address as that of its node: only then all of its servers bind to loopback.

    Ray replaces 127.0.0.1 by the address of another interface, unless this constant is False, as it is on macOS.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _create_token() -> None:
    """Create Ray's token where there is none; Ray would create a file that others can read."""
    if os.environ.get("RAY_AUTH_TOKEN") or token_file().exists():
        return
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    open_private_folder(token_file().parent)
    create_atomically(token_file(), generate_new_authentication_token().encode(), mode=FILE_MODE)


def check_token_is_demanded(gcs_address: str) -> None:
    """Check that the cluster refuses a call without a token. Ray runs the code of every caller on its nodes.

    With ``RAY_USE_TLS`` the cluster demands a client certificate instead, which this does not check.

    Args:
        gcs_address: HOST:PORT of the cluster's control store.

    Raises:
        PlacementError: the cluster answers, or does not answer at all.
    """
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(gcs_address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_PROBE)(b"", timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
            raise PlacementError(f"The Ray cluster at {gcs_address} does not answer: {error.code().name}.") from None
    raise PlacementError(
        f"The Ray cluster at {gcs_address} answers without a token, so that everybody who reaches it can run code.",
        cure=f"Start it with {AUTH_MODE}=token and set that here too, or set ray.require_token to false.",
    )
