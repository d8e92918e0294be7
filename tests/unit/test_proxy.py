"""The middleware of Serve's proxies: bounds of a token's requests, and of what waits to be read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from edge_runtime.connections import BoundedProtocol
from fedvit.settings import load_settings
from fedvit.testing.doubles import ManualClock
from serve_apps.proxy import (
    CALLBACK_VARIABLE,
    PIECE_BYTES,
    REFUSALS,
    REFUSALS_WINDOW_S,
    PeerLimits,
    environment,
    middlewares,
)

SIZE = 3 * PIECE_BYTES + 7


def application(content: bytes, seen: list[Scope] | None = None) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if seen is not None:
            seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content, "more_body": False})

    return app


class Peer:
    """A peer that reads only when it is let."""

    def __init__(self, reads: bool = True) -> None:
        self.messages: list[Message] = []
        self.stopped, self.let = asyncio.Event(), asyncio.Event()
        if reads:
            self.let.set()

    async def send(self, message: Message) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.stopped.set()
            await self.let.wait()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def content(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def scope_of(token: str = "a", headers: Mapping[bytes, bytes] | None = None) -> Scope:
    pairs = [(b"authorization", f"Bearer {token}".encode()), *(headers or {}).items()]
    return {"type": "http", "method": "GET", "path": "/", "headers": pairs, "client": ("127.0.0.1", 1)}


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_a_long_response_arrives_whole_in_pieces() -> None:
    async def work() -> None:
        content, peer = bytes(range(256)) * (SIZE // 256), Peer()
        await PeerLimits(application(content), 1)(scope_of(), receive, peer.send)
        assert peer.content == content
        assert [len(message["body"]) for message in peer.messages[1:]][:-1] == [PIECE_BYTES] * (len(peer.messages) - 2)
        assert [message["more_body"] for message in peer.messages[1:]] == [True] * (len(peer.messages) - 2) + [False]

    run(work())


def test_what_a_peer_does_not_read_is_bounded_for_it_and_for_all() -> None:
    async def work() -> None:
        middleware = PeerLimits(application(bytes(SIZE)), 9, unread_of_peer=2 * SIZE, unread_of_all=3 * SIZE)
        slow = [Peer(reads=False) for _ in range(2)]
        tasks = [asyncio.create_task(middleware(scope_of(), receive, peer.send)) for peer in slow]
        for peer in slow:
            await peer.stopped.wait()
        third, other, late = Peer(), Peer(reads=False), Peer()
        await middleware(scope_of(" a "), receive, third.send)
        assert (third.status, json.loads(third.content)["type"]) == (503, "/problems/overloaded")
        tasks.append(asyncio.create_task(middleware(scope_of("b"), receive, other.send)))
        await other.stopped.wait()
        await middleware(scope_of("c"), receive, late.send)
        assert late.status == 503
        for peer in (*slow, other):
            peer.let.set()
        await asyncio.gather(*tasks)
        again = Peer()
        await middleware(scope_of(), receive, again.send)
        assert again.content == bytes(SIZE)

    run(work())


def test_a_peer_that_went_away_leaves_nothing_behind() -> None:
    async def work() -> None:
        middleware = PeerLimits(application(bytes(SIZE)), 9, unread_of_peer=SIZE)
        gone, back = Peer(reads=False), Peer()
        task = asyncio.create_task(middleware(scope_of(), receive, gone.send))
        await gone.stopped.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await middleware(scope_of(), receive, back.send)
        assert back.status == 200

    run(work())


def test_headers_that_would_steer_serve_are_dropped() -> None:
    async def work() -> None:
        seen: list[Scope] = []
        sent = {b"x-request-timeout-seconds": b"0", b"x-request-disconnect-disabled": b"?1", b"x-request-id": b"7"}
        await PeerLimits(application(b"", seen), 1)(scope_of(headers=sent), receive, Peer().send)
        assert [name for name, _ in seen[0]["headers"]] == [b"authorization", b"x-request-id"]

    run(work())


def test_a_token_has_so_many_requests_at_once_and_others_are_not_hindered() -> None:
    async def work() -> None:
        middleware = PeerLimits(application(b"x"), 2)
        slow = [Peer(reads=False) for _ in range(2)]
        tasks = [asyncio.create_task(middleware(scope_of(), receive, peer.send)) for peer in slow]
        for peer in slow:
            await peer.stopped.wait()
        third, other, nobody = Peer(), Peer(), Peer()
        await middleware(scope_of(" a"), receive, third.send)
        assert (third.status, json.loads(third.content)["type"]) == (429, "/problems/rate-limited")
        await middleware(scope_of("b"), receive, other.send)
        await middleware(scope_of(""), receive, nobody.send)
        assert (other.status, nobody.status) == (200, 200)
        for peer in slow:
            peer.let.set()
        await asyncio.gather(*tasks)
        await middleware(scope_of(), receive, third.send)
        assert third.messages[-1]["body"] == b"x"

    run(work())


@pytest.mark.parametrize(("status", "complete"), [(403, True), (429, True), (404, False), (409, False)])
def test_a_token_that_is_refused_again_and_again_is_refused_here_for_a_while(status: int, complete: bool) -> None:
    async def work() -> None:
        clock, asked = ManualClock(), 0

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal asked
            asked += 1
            await receive()
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": not complete}

        middleware = PeerLimits(app, 9, clock=clock.monotonic)
        for _ in range(3 * REFUSALS):
            peer = Peer()
            await middleware(scope_of(), receive, peer.send)
        assert (peer.status, asked) == (429, REFUSALS + 1)
        await middleware(scope_of("b"), receive, Peer().send)
        assert asked == REFUSALS + 2
        clock.advance(REFUSALS_WINDOW_S)
        await middleware(scope_of(), receive, Peer().send)
        assert asked == REFUSALS + 3

    run(work())


def test_errors_that_are_no_refusals_do_not_count() -> None:
    async def work() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        middleware = PeerLimits(app, 9, clock=ManualClock().monotonic)
        for _ in range(3 * REFUSALS):
            peer = Peer()
            await middleware(scope_of(), receive, peer.send)
            assert peer.status == 404

    run(work())


def test_serve_finds_the_callback_and_uvicorn_the_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(HTTP_PROTOCOLS)
    variables = environment(load_settings(environ={}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        module, _, name = variables[CALLBACK_VARIABLE].partition(":")
        assert (module, name) == (middlewares.__module__, middlewares.__name__)
        assert [(each.cls, each.kwargs) for each in middlewares()] == [(PeerLimits, {"requests_of_token": 16})]
        module, _, name = HTTP_PROTOCOLS["auto"].partition(":")
        assert (module, name) == (BoundedProtocol.__module__, BoundedProtocol.__name__)
    finally:
        HTTP_PROTOCOLS.update(before)
