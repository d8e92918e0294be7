"""What Ray Serve's HTTP proxies run in front of the applications: bounded connections, requests and unread responses.

A proxy hands a request on as soon as its headers are there, and keeps a response in memory until its peer has read it.
Serve takes middleware for its proxies by an environment variable alone, which must be set where they run.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from fedvit.access.limits import MAX_NAMES, FailureWindow
from fedvit.config import Settings
from fedvit.errors import OverloadedError, RateLimitedError
from serve_apps.problems import problem_of

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
REQUESTS_VARIABLE = "SERVE_APPS_PROXY_REQUESTS_OF_TOKEN"
REQUESTS_OF_TOKEN = 16
REFUSALS, REFUSALS_WINDOW_S = 50, 5.0
"""Refusals of one token within so many seconds, after which it is refused here; honest callers come nowhere near."""
MAX_UNREAD_OF_PEER = 256 * 2**20
"""Bytes of responses that wait for one peer, a token or an address; one response is admitted whatever its length."""
MAX_UNREAD = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
"""The same for all peers together: a quarter of the memory."""
PIECE_BYTES = 256 * 1024
_REFUSED = frozenset({401, 403, 408, 413, 429})
# With them a caller of Serve sets or lifts its own limits.
_SERVE_HEADERS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})


def environment(settings: Settings) -> dict[str, str]:
    """The variables with which the proxies run :func:`middlewares`."""
    # What all replicas of the control API, and one of the inference application, work on for one caller.
    requests = settings.access.max_requests_per_caller * (settings.serving.control_replicas + 1)
    return {CALLBACK_VARIABLE: "serve_apps.proxy:middlewares", REQUESTS_VARIABLE: str(requests)}


def middlewares() -> list[Middleware]:
    """Called by Serve in each HTTP proxy before its server starts."""
    # Serve lets uvicorn choose its protocol, and uvicorn looks it up here.
    HTTP_PROTOCOLS["auto"] = "edge_runtime.connections:BoundedProtocol"
    return [Middleware(PeerLimits, requests_of_token=int(os.environ.get(REQUESTS_VARIABLE, REQUESTS_OF_TOKEN)))]


class PeerLimits:
    """ASGI middleware that bounds what one peer has in this process, and what all of them have.

    Long responses are sent piece by piece, as they are read; a request whose response would make too many bytes wait is
    answered with 503. A token that has ``requests_of_token`` requests here, or whose requests were refused again and
    again, gets 429 at once: a refusal costs a replica ten times as much. What a peer sent to steer Serve is dropped.
    """

    def __init__(
        self,
        app: ASGIApp,
        requests_of_token: int,
        unread_of_peer: int = MAX_UNREAD_OF_PEER,
        unread_of_all: int = MAX_UNREAD,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._requests_of_token = app, requests_of_token
        self._unread_of_peer, self._unread_of_all = unread_of_peer, unread_of_all
        self._unread: Counter[bytes] = Counter()
        self._requests: Counter[bytes] = Counter()
        self._refusals = FailureWindow(REFUSALS, REFUSALS_WINDOW_S, clock)
        self._blocked_until_s: dict[bytes, float] = {}
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 429 or 503."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _SERVE_HEADERS]}
        token = _token_of(scope)
        if token is None:
            await self._app(scope, receive, self._sender(_digest(_address_of(scope)), scope, receive, send))
            return
        peer = _digest(token)
        if self._requests[peer] >= self._requests_of_token or self._clock() < self._blocked_until_s.get(peer, 0.0):
            message = "Too many requests of this token are under way, or were refused."
            error = RateLimitedError(message, cure="Wait, then send fewer at once.", retry_after_s=1)
            await problem_of(error)(scope, receive, send)
            return
        exchange = _Exchange(receive, self._sender(peer, scope, receive, send))
        with _counted(self._requests, peer, 1):
            await self._app(scope, exchange.receive, exchange.send)
        if exchange.refused:
            self._count_refusal(peer)

    def _count_refusal(self, peer: bytes) -> None:
        wait_s = self._refusals.fail(peer.hex())
        if wait_s:
            if len(self._blocked_until_s) >= MAX_NAMES:
                self._blocked_until_s.clear()
            self._blocked_until_s[peer] = self._clock() + wait_s

    def _sender(self, peer: bytes, scope: Scope, receive: Receive, send: Send) -> Send:
        start, refused = list[Message](), False

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
                with _counted(self._unread, peer, len(body)):
                    for piece in _pieces(message, body):
                        await send(piece)

        return send_in_pieces

    def _has_room(self, peer: bytes, size: int) -> bool:
        of_peer = self._unread[peer]
        return size <= PIECE_BYTES or (
            (not of_peer or of_peer + size <= self._unread_of_peer)
            and self._unread.total() + size <= self._unread_of_all
        )


class _Exchange:
    """A request and its response, as they pass.

    Attributes:
        refused: the response refused the caller, or came before the whole body with an error.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self._complete = self.refused = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._complete = self._complete or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            self.refused = status in _REFUSED or (status >= 400 and not self._complete)
        await self._send(message)


@contextmanager
def _counted(counter: Counter[bytes], peer: bytes, amount: int) -> Iterator[None]:
    counter[peer] += amount
    try:
        yield
    finally:
        counter[peer] -= amount
        if not counter[peer]:
            del counter[peer]


def _pieces(message: Message, body: bytes) -> Iterator[Message]:
    if len(body) <= PIECE_BYTES:
        yield message
        return
    for start in range(0, len(body), PIECE_BYTES):
        stop = start + PIECE_BYTES
        more = stop < len(body) or message.get("more_body", False)
        yield {**message, "body": body[start:stop], "more_body": more}


def _token_of(scope: Scope) -> str | None:
    """The bearer token that a request carries; it is not verified here."""
    return Headers(scope=scope).get("authorization", "").partition(" ")[2].strip() or None


def _address_of(scope: Scope) -> str:
    return str(scope["client"][0]) if scope.get("client") else ""


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
