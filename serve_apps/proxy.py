"""What Ray Serve's HTTP proxies run in front of the applications: bounded connections, and bounded unread responses.

A proxy hands a request on at once, and keeps a response in memory until its peer has read it. Serve takes middleware
for its proxies by the variable of :data:`ENVIRONMENT` alone, which must be set in the environment of the proxies.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from fedvit.errors import OverloadedError
from serve_apps.problems import problem_of

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_apps.proxy:middlewares"}
MAX_UNREAD_OF_PEER = 256 * 2**20
"""Bytes of responses that wait for one peer, a token or an address; one response is admitted whatever its length."""
MAX_UNREAD = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
"""The same for all peers together: a quarter of the memory."""
PIECE_BYTES = 256 * 1024
# With them a caller of Serve sets or lifts its own limits.
_SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})


def middlewares() -> list[Middleware]:
    """Called by Serve in each HTTP proxy before its server starts."""
    # Serve lets uvicorn choose its protocol, and uvicorn looks it up here.
    HTTP_PROTOCOLS["auto"] = "edge_runtime.connections:BoundedProtocol"
    return [Middleware(UnreadResponses)]


class UnreadResponses:
    """ASGI middleware that sends long responses piece by piece, as they are read, and bounds how many bytes wait.

    Beyond that a request is answered with 503. What a peer sent to steer Serve itself is dropped.
    """

    def __init__(self, app: ASGIApp, max_of_peer: int = MAX_UNREAD_OF_PEER, max_of_all: int = MAX_UNREAD) -> None:
        self._app, self._max_of_peer, self._max_of_all = app, max_of_peer, max_of_all
        self._unread: Counter[bytes] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _SERVE_HEADERS]}
        peer, start, refused = _peer_of(scope), list[Message](), False

        async def send_in_pieces(message: Message) -> None:
            nonlocal refused
            body = message.get("body", b"")
            if message["type"] == "http.response.start":
                # Held back until the length of the body is known: the response may have to be another one.
                start.append(message)
            elif start and not self._has_room(peer, len(body)):
                start.clear()
                refused = True
                error = OverloadedError("Too many responses wait to be read.", cure="Read them.", retry_after_s=5)
                await problem_of(error)(scope, receive, send)
            elif not refused:
                if start:
                    await send(start.pop())
                with self._counted(peer, len(body)):
                    for piece in _pieces(message, body):
                        await send(piece)

        await self._app(scope, receive, send_in_pieces)

    def _has_room(self, peer: bytes, size: int) -> bool:
        of_peer = self._unread[peer]
        return size <= PIECE_BYTES or (
            (not of_peer or of_peer + size <= self._max_of_peer) and self._unread.total() + size <= self._max_of_all
        )

    @contextmanager
    def _counted(self, peer: bytes, size: int) -> Iterator[None]:
        self._unread[peer] += size
        try:
            yield
        finally:
            self._unread[peer] -= size
            if not self._unread[peer]:
                del self._unread[peer]


def _pieces(message: Message, body: bytes) -> Iterator[Message]:
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        stop = start + PIECE_BYTES
        more = stop < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:stop], "more_body": more}


def _peer_of(scope: Scope) -> bytes:
    """The token that a request carries, which is not verified here; else its address."""
    token = Headers(scope=scope).get("authorization", "").partition(" ")[2].strip()
    address = scope["client"][0] if scope.get("client") else ""
    return hashlib.sha256((token or address).encode("utf-8", "surrogateescape")).digest()
