"""What the attacks on the control API are played against: an API behind a real HTTP server, or a running system."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from command import SMALL, Fedvit
from scoped_api import DEVICE, ScopedApi
from starlette.types import ASGIApp

from edge_runtime.connections import BoundedProtocol
from fedvit.access.identity import Scope
from fedvit.incidents.drills.processes import below, memory_mb, supervisor
from serve_apps.proxy import PeerLimits
from tests.attack.slow_peers import HOST

WAIT_S = 20.0
REQUESTS_OF_TOKEN = 16


class Target(ABC):
    """A control API that demands tokens; ``device`` and ``operator`` are the tokens of an attacker and of an operator.

    Attributes:
        form: for the table of attacks.
    """

    port: int
    device: str
    operator: str
    form: str

    def request(self, line: str, token: str | None = None, *headers: str, body: bytes = b"") -> bytes:
        """A request as bytes, to be answered once."""
        lines = [f"{line} HTTP/1.1", f"Host: {HOST}:{self.port}", "Connection: close", *headers]
        lines += [] if token is None else [f"Authorization: Bearer {token}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    @abstractmethod
    def memory_mb(self) -> float:
        """The memory of the processes that are attacked; 0 where it is also that of the attacker."""


class ServedApi(Target):
    """A control API over a real store, with the protocol and the middleware of Serve's proxies, in this process."""

    form = "one process"

    def __init__(self, home: Path, max_unread: int) -> None:
        self.site = ScopedApi(home, mode="tokens", requests_per_s=1e6, burst=10**6)
        self.device, self.operator = self.site.tokens[Scope.DEVICE], self.site.tokens[Scope.OPERATOR]
        self.releases = self.site.tokens[Scope.RELEASES]
        limits = PeerLimits(self.site.api, requests_of_token=REQUESTS_OF_TOKEN, unread_of_peer=max_unread)
        self._serving = served(limits)
        self.port = self._serving.__enter__()

    def memory_mb(self) -> float:
        return 0.0

    def close(self) -> None:
        self._serving.__exit__(None, None, None)
        self.site.store.close()


class RunningSystem(Target):
    """What ``fedvit up`` starts: Ray Serve with its proxy, the control and the inference application."""

    form = "`fedvit up`"

    def __init__(self, home: Path) -> None:
        self.fedvit = Fedvit(home, {**SMALL, "access.mode": "tokens"})
        self.operator = self._token("operator", "--scope", "admin")
        self.device = self._token(DEVICE, "--scope", "device", "--client", DEVICE)
        self.fedvit.variables["FEDVIT_TOKEN"] = self.operator
        self.fedvit.json("up")
        self.port = int(self.fedvit.settings["serving.port"])

    def _token(self, *arguments: str) -> str:
        result: str = self.fedvit.json("token", "create", *arguments, configured=False)["token"]
        return result

    def memory_mb(self) -> float:
        pid = supervisor(self.fedvit.home)
        attacked = [*below(pid, "ray::ServeReplica:control"), *below(pid, "ray::ProxyActor")]
        assert len(attacked) >= 2
        return sum(map(memory_mb, attacked))

    def close(self) -> None:
        self.fedvit.call("down", configured=False)


@contextmanager
def served(application: ASGIApp, **options: Any) -> Iterator[int]:
    """An HTTP server with the protocol of fedvit's; its port."""
    config = uvicorn.Config(application, http=BoundedProtocol, log_level="critical", lifespan="on", **options)
    server, listener = uvicorn.Server(config), socket.create_server((HOST, 0), backlog=512)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(WAIT_S)
