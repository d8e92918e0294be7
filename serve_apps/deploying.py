"""What all Ray Serve deployments share: their options, and the address that their replicas listen on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

OPTIONS: dict[str, Any] = {
    # Seconds between two checks whether an ending replica has answered its requests; Ray's default is two.
    "graceful_shutdown_wait_loop_s": 0.2,
    # The applications have their own logs and counters; a second line for each request would cost time and disk.
    "logging_config": {"enable_access_log": False},
}
_EVERYWHERE = frozenset({"[::]", "0.0.0.0"})  # noqa: S104 - replaced, not listened on


def listen_on_node_address() -> None:
    """Let the gRPC servers of this replica's process listen on the address of its node, not on every interface.

    Serve starts one in each replica, for calls from other replicas, and has no option for its address. An application
    calls this while it is built, which is before Serve starts that server.
    """
    import ray
    from grpc.aio import _server

    for name in ("add_insecure_port", "add_secure_port"):
        add_port = getattr(_server.Server, name)
        if not hasattr(add_port, "__wrapped__"):
            setattr(_server.Server, name, _narrowed(add_port, ray.util.get_node_ip_address()))


def _narrowed(add_port: Callable[..., int], node_address: str) -> Callable[..., int]:
    node = f"[{node_address}]" if ":" in node_address else node_address

    @functools.wraps(add_port)
    def add_port_of_node(server: Any, address: str, *more: Any) -> int:
        host, _, port = address.rpartition(":")
        return add_port(server, f"{node}:{port}" if host in _EVERYWHERE else address, *more)

    return add_port_of_node
